// Rotary embedding of queries and keys, and the KV of a step's tokens put where it belongs.
//
// Halves of a head are rotated against each other, as Llama's weights want it. Norm and rotation
// are worked out in fp32 and rounded once. A token's result depends on that token alone.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "paged.h"

namespace infire {
namespace {

constexpr int64_t TOKENS = 8;  // an item: some microseconds

// One head in fp32, 0 past its size.
struct HeadValues {
  alignas(64) float x[MAX_HEAD_DIM];

  HeadValues(const bf16* at, int64_t size) {
    for (int64_t i = 0; i < size; i++) x[i] = to_float(at[i]);
    for (int64_t i = size; i % LANES; i++) x[i] = 0.0f;
  }

  // Scales to a root mean square of 1, then by the weights.
  void normalise(const bf16* weight, float eps, int64_t size) {
    F squares{};
    for (int64_t i = 0; i < size; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps);
    for (int64_t i = 0; i < size; i++) x[i] = x[i] * scale * to_float(weight[i]);
  }

  void rotate(const float* cos, const float* sin, int64_t half, bf16* out) const {
    for (int64_t i = 0; i < half; i++) {
      const float low = x[i], high = x[i + half];
      out[i] = to_bf16(low * cos[i] - high * sin[i]);
      out[i + half] = to_bf16(high * cos[i] + low * sin[i]);
    }
  }
};

// Which head's values go where is the caller's: `from` and `to` may be the same.
void rotate_heads(const RopeArgs& args, int64_t position, int64_t num_heads, const bf16* weight,
                  const bf16* from, bf16* to) {
  const int64_t size = args.head_dim, half = size / 2;
  for (int64_t head = 0; head < num_heads; head++) {
    HeadValues values(from + head * size, size);
    if (weight) values.normalise(weight, static_cast<float>(args.eps), size);
    values.rotate(args.cos + position * half, args.sin + position * half, half, to + head * size);
  }
}

void rope_token(const RopeArgs& args, int64_t slot, int64_t token) {
  const int64_t position = args.step->positions[token];
  const int64_t size = args.num_kv_heads * args.head_dim;
  bf16* q = args.qkv + token * args.ld_qkv;
  const bf16* k = q + args.num_heads * args.head_dim;
  const int64_t cell = cell_of(*args.tables, slot, position) * size;
  rotate_heads(args, position, args.num_heads, args.q_norm, q, q);
  rotate_heads(args, position, args.num_kv_heads, args.k_norm, k, args.k + cell);
  std::memcpy(args.v + cell, k + size, size * sizeof(bf16));
}

}  // namespace

void rope(const RopeArgs& args, Worker& worker) {
  const Step& step = *args.step;
  const Span* spans_end = step.spans + step.num_spans;
  for (Share share(worker, (step.num_tokens + TOKENS - 1) / TOKENS); share.next();) {
    int64_t token = share.item * TOKENS;
    const int64_t end = std::min(token + TOKENS, step.num_tokens);
    const Span* span = std::upper_bound(step.spans, spans_end, token, [](int64_t at, const Span& s) {
                         return at < s.first;
                       }) - 1;
    for (; token < end; token++) {
      if (token == span->first + span->length) span++;
      rope_token(args, span->slot, token);
    }
  }
}

}  // namespace infire
