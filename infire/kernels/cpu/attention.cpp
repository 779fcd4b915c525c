// Attention of a step's tokens over KV that lies in blocks, for decoding and prefill alike.
//
// A query goes through its keys in chunks that begin at multiples of CHUNK, whatever else is in
// the step. A chunk is computed relative to its own largest score and then added to what came
// before it, always by the same formula, and what a token does not see has a weight of exactly 0.
// So a result is the same bits for one token at a time, for any cutting of a prompt and on any
// thread. Weights are rounded to bf16 for the product with the values; sums are fp32.
//
// The running softmax is that of Milakov and Gimelshein, "Online normalizer calculation for
// softmax", https://arxiv.org/abs/1805.02867.

#include <algorithm>
#include <cstring>
#include <limits>

#include "attention_pack.h"
#include "attention_tile.h"
#include "paged.h"

namespace infire {
namespace {

// Rows of an item: query heads that share a KV head, of successive tokens. Packing a chunk costs
// as much as its products for 8 rows.
constexpr int64_t ITEM_ROWS = 192;
constexpr int64_t MAX_WORDS = MAX_HEAD_DIM / 2;
constexpr int64_t PAIRS = CHUNK / 2;
constexpr float LOWEST = -1e30f;  // below any score; finite, so that it may be subtracted

alignas(64) constexpr bf16 NO_VALUES[MAX_HEAD_DIM] = {};

struct Scratch {
  alignas(64) uint32_t keys[MAX_WORDS * CHUNK];
  uint32_t values[PAIRS * MAX_HEAD_DIM];
  uint32_t queries[ITEM_ROWS * MAX_WORDS];
  float mixed[ITEM_ROWS * MAX_HEAD_DIM];  // running sums of values, by weight
  float totals[ITEM_ROWS][LANES];         // running sums of weights, by lane
  float tops[ITEM_ROWS + LANES];          // the score that both are relative to
  int64_t oldest[ITEM_ROWS], newest[ITEM_ROWS];  // positions that a row sees
  const bf16* key_rows[CHUNK];
  const bf16* value_rows[CHUNK];
  // Of the rows at hand, in one chunk:
  float scores[TILE_ROWS * CHUNK];
  bf16 weights[TILE_ROWS * CHUNK];
  float chunk_mixed[TILE_ROWS * MAX_HEAD_DIM];
  float chunk_totals[TILE_ROWS][LANES];
  float chunk_tops[LANES];
};
static_assert(sizeof(Scratch) <= SCRATCH_BYTES);

struct Item {
  const Span* span;
  int64_t head;       // KV head
  int64_t first_row;  // of the span's length * G rows of that head: token by token
  int64_t num_rows;
};

class Items {
 public:
  explicit Items(const AttentionArgs& args)
      : step_(*args.step), num_kv_heads_(args.num_kv_heads), group_(args.num_heads / num_kv_heads_) {
    for (int64_t n = 0; n < step_.num_spans; n++) size_ += of(step_.spans[n]);
  }

  int64_t size() const { return size_; }

  // Item 0 is the end of the last span: chunks of prompts come last in a step, and their last
  // tokens see most. Long items are begun first, so that threads end together.
  Item at(int64_t index) const {
    const Span* span = step_.spans + step_.num_spans - 1;
    for (; index >= of(*span); span--) index -= of(*span);
    const int64_t rows = span->length * group_;
    const int64_t first = (blocks(*span) - 1 - index / num_kv_heads_) * ITEM_ROWS;
    return {span, index % num_kv_heads_, first, std::min(ITEM_ROWS, rows - first)};
  }

 private:
  int64_t blocks(const Span& span) const {
    return (span.length * group_ + ITEM_ROWS - 1) / ITEM_ROWS;
  }
  int64_t of(const Span& span) const { return blocks(span) * num_kv_heads_; }

  const Step& step_;
  int64_t num_kv_heads_;
  int64_t group_;
  int64_t size_ = 0;
};

// Positions of a chunk, relative to its beginning.
struct Range {
  int64_t begin;
  int64_t end;

  int64_t first_vector() const { return begin / LANES; }
  int64_t end_vector() const { return (end + LANES - 1) / LANES; }
};

class Attention {
 public:
  Attention(const AttentionArgs& args, const Item& item, Scratch& scratch)
      : args_(args),
        item_(item),
        s_(scratch),
        group_(args.num_heads / args.num_kv_heads),
        size_(args.head_dim),
        columns_(up_to(LANES, args.head_dim)) {}

  void run() {
    begin();
    const int64_t first = s_.oldest[0], end = s_.newest[item_.num_rows - 1] + 1;
    for (int64_t at = first / CHUNK * CHUNK; at < end; at += CHUNK) {
      pack(at, {std::max(first - at, int64_t{0}), std::min<int64_t>(end - at, CHUNK)});
      for (int64_t row = 0; row < item_.num_rows; row += TILE_ROWS)
        add_chunk(at, row, std::min<int64_t>(TILE_ROWS, item_.num_rows - row));
    }
    finish();
  }

 private:
  int64_t token(int64_t row) const { return (item_.first_row + row) / group_; }
  int64_t query_head(int64_t row) const {
    return item_.head * group_ + (item_.first_row + row) % group_;
  }

  void begin() {
    for (int64_t row = 0; row < item_.num_rows; row++) {
      const bf16* query = args_.qkv + (item_.span->first + token(row)) * args_.ld_qkv;
      std::memcpy(s_.queries + row * size_ / 2, query + query_head(row) * size_,
                  size_ * sizeof(bf16));
      const int64_t position = item_.span->start + token(row);
      s_.oldest[row] = first_visible(*args_.tables, position);
      s_.newest[row] = position;
      s_.tops[row] = LOWEST;
      store(s_.totals[row], F{});
    }
    std::fill_n(s_.mixed, item_.num_rows * columns_, 0.0f);
  }

  // Lays out the keys and values of the range, by 16 keys. What is past its ends is zeros: the
  // cells hold what an earlier owner left, or belong to nobody.
  void pack(int64_t at, Range range) {
    const Range whole{range.first_vector() * LANES, range.end_vector() * LANES};
    std::fill(s_.key_rows + whole.begin, s_.key_rows + whole.end, NO_VALUES);
    std::fill(s_.value_rows + whole.begin, s_.value_rows + whole.end, NO_VALUES);
    const Tables& tables = *args_.tables;
    for (int64_t n = range.begin; n < range.end;) {
      const int64_t stride = args_.num_kv_heads * size_;
      int64_t cell = cell_of(tables, item_.span->slot, at + n) * stride + item_.head * size_;
      const int64_t left = tables.block_tokens - (at + n) % tables.block_tokens;
      for (const int64_t stop = std::min(range.end, n + left); n < stop; n++, cell += stride) {
        s_.key_rows[n] = args_.k + cell;
        s_.value_rows[n] = args_.v + cell;
      }
    }
    for (int64_t n = whole.begin; n < whole.end; n += LANES)
      pack_keys(s_.key_rows + n, size_ / 2, s_.keys + n);
    for (int64_t n = whole.begin; n < whole.end; n += 2)
      pack_values(s_.value_rows[n], s_.value_rows[n + 1], size_, s_.values + n / 2 * columns_);
  }

  // Adds the chunk at `at` to `count` <= TILE_ROWS rows.
  void add_chunk(int64_t at, int64_t row, int64_t count) {
    const Range seen{std::max(s_.oldest[row] - at, int64_t{0}),
                     std::min<int64_t>(s_.newest[row + count - 1] + 1 - at, CHUNK)};
    if (seen.begin >= seen.end) return;
    const int64_t first = seen.first_vector(), vectors = seen.end_vector() - first;
    multiply({.a = s_.queries + row * size_ / 2,
              .lda = size_ / 2,
              .b = s_.keys + first * LANES,
              .ldb = CHUNK,
              .num_pairs = size_ / 2,
              .c = s_.scores + first * LANES,
              .ldc = CHUNK},
             count, vectors);
    for (int64_t n = 0; n < count; n++) weigh(at, row + n, n, seen);
    multiply({.a = reinterpret_cast<const uint32_t*>(s_.weights) + first * LANES / 2,
              .lda = PAIRS,
              .b = s_.values + first * LANES / 2 * columns_,
              .ldb = columns_,
              .num_pairs = vectors * LANES / 2,
              .c = s_.chunk_mixed,
              .ldc = columns_},
             count, columns_ / LANES);
    merge(row, count);
  }

  // From the scores of a row to its weights, over the vectors of `seen`.
  void weigh(int64_t at, int64_t row, int64_t n, Range seen) {
    const Range own{s_.oldest[row] - at, s_.newest[row] + 1 - at};
    float* scores = s_.scores + n * CHUNK;
    F top = splat(LOWEST);
    for (int64_t v = seen.first_vector(); v < seen.end_vector(); v++) {
      F score = load(scores + v * LANES);
      if (own.begin > v * LANES || own.end < (v + 1) * LANES) {
        score = hide(score, own.begin - v * LANES, own.end - v * LANES);
        store(scores + v * LANES, score);
      }
      top = maximum(top, score);
    }
    const float scale = static_cast<float>(args_.scale);
    const float chunk_top = largest(top) * scale;
    F total{};
    for (int64_t v = seen.first_vector(); v < seen.end_vector(); v++) {
      const F weight = exponential(fma(load(scores + v * LANES), splat(scale), splat(-chunk_top)));
      total += weight;
      store_bf16(s_.weights + n * CHUNK + v * LANES, weight);
    }
    s_.chunk_tops[n] = chunk_top;
    store(s_.chunk_totals[n], total);
  }

  static F hide(F score, int64_t begin, int64_t end) {
    const I lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const I first = I{} + static_cast<int32_t>(std::clamp<int64_t>(begin, 0, LANES));
    const I stop = I{} + static_cast<int32_t>(std::clamp<int64_t>(end, 0, LANES));
    const F hidden = splat(-std::numeric_limits<float>::infinity());
    return select((lane >= first) & (lane < stop), score, hidden);
  }

  // Adds what add_chunk found to the running sums; those with the lower top are scaled down.
  void merge(int64_t row, int64_t count) {
    const F before = load(s_.tops + row), found = load(s_.chunk_tops);
    float factors[LANES];
    store(factors, exponential(before > found ? found - before : before - found));
    for (int64_t n = 0; n < count; n++) {
      const bool rises = s_.chunk_tops[n] > s_.tops[row + n];
      if (rises) s_.tops[row + n] = s_.chunk_tops[n];
      add(s_.totals[row + n], s_.chunk_totals[n], LANES, splat(factors[n]), rises);
      add(s_.mixed + (row + n) * columns_, s_.chunk_mixed + n * columns_, columns_,
          splat(factors[n]), rises);
    }
  }

  static void add(float* running, const float* found, int64_t size, F factor, bool rises) {
    for (int64_t i = 0; i < size; i += LANES) {
      const F a = load(running + i), b = load(found + i);
      store(running + i, rises ? fma(a, factor, b) : fma(b, factor, a));
    }
  }

  void finish() {
    for (int64_t row = 0; row < item_.num_rows; row++) {
      bf16* out = args_.out + (item_.span->first + token(row)) * args_.ld_out +
                  query_head(row) * size_;
      const F share = splat(1.0f / sum(load(s_.totals[row])));
      const float* mixed = s_.mixed + row * columns_;
      bf16 rounded[MAX_HEAD_DIM];
      // + 0: a sum of nothing but zeros is +0 however many of them were added.
      for (int64_t i = 0; i < size_; i += LANES)
        store_bf16(rounded + i, fma(load(mixed + i), share, F{}));
      std::memcpy(out, rounded, size_ * sizeof(bf16));
    }
  }

  const AttentionArgs& args_;
  const Item& item_;
  Scratch& s_;
  int64_t group_;    // query heads that share a KV head
  int64_t size_;     // D
  int64_t columns_;  // D, rounded up to whole vectors
};

}  // namespace

void attention(const AttentionArgs& args, Worker& worker) {
  Scratch& scratch = *reinterpret_cast<Scratch*>(worker.scratch);
  const Items items(args);
  for (Share share(worker, items.size()); share.next();)
    Attention(args, items.at(share.item), scratch).run();
}

}  // namespace infire
