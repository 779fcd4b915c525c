// What the operations of a forward pass are given. Every field is 8 bytes wide, so that the
// mirror of these in library.py cannot differ by padding. Knows no computation.
//
// Letters: T tokens in the step, R sampled positions, S spans (rows of the plan), H query heads,
// K KV heads, D head size, N blocks, P tokens a block, V vocabulary. Activations are bf16, or
// Inputs where a product reads them; row by row, `ld*` elements from one row to the next; columns
// past the width are 0.
#pragma once

#include "pool.h"
#include "simd.h"

namespace infire {

// Tokens of one sequence, one after the other.
struct Span {
  int64_t first;   // index in the step of the first token
  int64_t start;   // its position in the sequence
  int64_t length;  // tokens
  int64_t slot;    // row of the block tables
};

// What changes from step to step, at one address for the life of the engine.
struct Step {
  int64_t num_tokens;          // T
  int64_t num_sampled;         // R
  int64_t num_spans;           // S
  int64_t num_requests;        // rows that sample
  const int32_t* token_ids;    // (T,)
  const int32_t* positions;    // (T,)
  const Span* spans;           // (S,)
  const int32_t* sampled;      // (R,): indices of the tokens whose successors are wanted
};

// The block tables of one KV group.
struct Tables {
  const int32_t* blocks;  // (slots, width)
  int64_t width;
  int64_t block_tokens;  // P
  int64_t window;        // tokens a layer sees; 0: all
  int64_t chunked;       // 1: the window begins at its multiples, and does not slide
};

// (N, K) weights in strips of 16 outputs; see unweight/README.md.
struct Matrix {
  const uint8_t* data;
  int64_t format;             // a Format
  int64_t num_strips;         // of 16 outputs
  int64_t num_pairs;          // of inputs, a multiple of 4
  const uint8_t* base;        // U12: (16 * num_strips,)
  const int32_t* ptr;         // U12: (num_strips + 1,)
  const struct Exception* exceptions;  // U12
};

enum Format : int64_t { BF16 = 0, U12 = 1 };

struct Exception {  // a weight that the 12 bits cannot say
  int32_t input;
  uint16_t row;  // of the strip
  bf16 value;
};

struct EmbedArgs {
  const Step* step;
  const Matrix* table;  // (V, hidden)
  bf16* out;            // (T, hidden)
  int64_t ld_out;
};

// x += delta, out = x / rms(x) * weight.
struct NormArgs {
  const int64_t* num_rows;
  const int32_t* index;  // (rows,): which rows of x and delta; null: all
  bf16* x;
  const bf16* delta;  // null: nothing is added
  int64_t ld_x;
  const bf16* weight;
  double eps;
  int64_t size;
  Input* out;
  int64_t ld_out;
  int64_t keep;  // 1: the sum is written back to x
};

// y = x W^T + bias
struct LinearArgs {
  const int64_t* num_rows;
  const Matrix* weight;
  const bf16* bias;  // (16 * num_strips,); null: none
  const Input* x;
  int64_t ld_x;
  bf16* y;
  int64_t ld_y;
};

// out = silu(gate) * up, of rows gate | up.
struct SiluArgs {
  const int64_t* num_rows;
  const bf16* x;
  int64_t ld_x;
  int64_t size;  // of gate
  Input* out;
  int64_t ld_out;
};

// A head has at most so many values: what attention's scratch is made for.
constexpr int64_t MAX_HEAD_DIM = 256;

// Of rows q (H, D) | k (K, D) | v (K, D): q is rotated in place; k, rotated, and v go to the cache.
struct RopeArgs {
  const Step* step;
  const Tables* tables;
  bf16* qkv;
  int64_t ld_qkv;
  int64_t num_heads;     // H
  int64_t num_kv_heads;  // K
  int64_t head_dim;      // D: even, at most MAX_HEAD_DIM
  const bf16* q_norm;    // (D,): weights of a norm of each head before it is rotated; null: none
  const bf16* k_norm;
  double eps;
  const float* cos;  // (positions, D / 2)
  const float* sin;
  bf16* k;  // (N, P, K, D)
  bf16* v;
};

// out = softmax(q k^T * scale) v, each token over the positions that it sees.
struct AttentionArgs {
  const Step* step;
  const Tables* tables;
  const bf16* qkv;  // as rope leaves it; k and v are read from the cache
  int64_t ld_qkv;
  int64_t num_heads;
  int64_t num_kv_heads;
  int64_t head_dim;
  const bf16* k;  // (N, P, K, D)
  const bf16* v;
  double scale;  // above 0
  Input* out;    // (T, H * D)
  int64_t ld_out;
};

struct Candidates;

// The logits of R positions: written where `limits` is 0, else so many candidates collected.
struct HeadArgs {
  const int64_t* num_rows;  // R
  const Matrix* weight;
  const Input* x;  // (R, hidden)
  int64_t ld_x;
  int64_t vocabulary;      // V
  const int64_t* limits;   // (R,)
  float* logits;           // (R, V)
  Candidates* candidates;  // (threads that take part, R)
};

// How one request samples in this step.
struct SampleRow {
  int64_t first;          // its first sampled position in the step
  int64_t num_drafts;     // it has one sampled position more than that
  const int32_t* drafts;  // (num_drafts,)
  int64_t index;          // of the first id in the sequence: with the seed, what draws it
  uint64_t seed;
  double temperature;  // 0: the likeliest id, whatever the filters say
  int64_t top_k;       // 0: all
  double top_p;        // 1: all
  double min_p;        // 0: all
  double repetition;   // 1: no penalty
  double frequency;
  double presence;
  int64_t num_biases;
  const int32_t* bias_ids;
  const float* bias_values;
  uint8_t* seen;    // (V,): 1: the id is in the sequence; null: the request has no penalties
  int32_t* said;    // (V,): how often it is in the output
  int64_t num_top;  // likeliest ids that are told with each id; -1: not even its own logprob
  int64_t limit;    // candidates that the head collected; 0: it wrote the logits
  const uint32_t* allowed;  // bit i of word n: the id 32 n + i may be chosen; null: any may
};

// One item a request. Drafts are verified in order, up to the first that is not what is drawn.
struct SampleArgs {
  const int64_t* num_rows;
  const SampleRow* rows;
  const int64_t* num_sampled;    // R
  int64_t vocabulary;            // V
  float* logits;                 // (R, V); overwritten
  const Candidates* candidates;  // (threads that take part, R)
  int32_t* ids;                  // (R,): of a request's positions, as many as were drawn
  int64_t* num_ids;              // (rows,): 1 + the drafts that were right
  float* logprobs;               // (R,)
  int64_t most_top;              // M
  int32_t* top_ids;              // (R, M)
  float* top_logprobs;           // (R, M)
};

enum Kind : int64_t { EMBED, NORM, LINEAR, SILU, ROPE, ATTENTION, HEAD, SAMPLE, NUM_KINDS };

void embed(const EmbedArgs& args, Worker& worker);
void norm(const NormArgs& args, Worker& worker);
void linear(const LinearArgs& args, Worker& worker);
void silu(const SiluArgs& args, Worker& worker);
void rope(const RopeArgs& args, Worker& worker);
void attention(const AttentionArgs& args, Worker& worker);
void head(const HeadArgs& args, Worker& worker);
void sample(const SampleArgs& args, Worker& worker);

extern const Operation OPERATIONS[NUM_KINDS];

}  // namespace infire
