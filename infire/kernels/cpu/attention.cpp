// Attention of a step's tokens over KV that lies in blocks, for decoding and prefill alike.
//
// A query goes through its keys in chunks that begin at multiples of CHUNK, whatever else is in
// the step. A chunk is computed relative to its own largest score and then added to what came
// before it, always by the same formula, and what a token does not see has a weight of exactly 0.
// So a result is the same bits for one token at a time, for any cutting of a prompt, on any thread
// and, chunk by chunk, on several. Weights are rounded to bf16 for the product with the values; sums
// are fp32.
//
// The running softmax is that of Milakov and Gimelshein, "Online normalizer calculation for
// softmax", https://arxiv.org/abs/1805.02867.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <utility>

#include "attention_items.h"

namespace infire {
namespace {

constexpr int64_t MAX_ELEMENTS = MAX_HEAD_DIM / 2 * PAIR_ELEMENTS;
constexpr int64_t CHUNK_ELEMENTS = CHUNK / 2 * PAIR_ELEMENTS;
constexpr int64_t PARTS_A_THREAD = 4;  // so that threads end together
constexpr double LOG2_E = 1.4426950408889634;

struct Scratch {
  alignas(64) Element keys[MAX_ELEMENTS * CHUNK];
  Element values[CHUNK_ELEMENTS * MAX_HEAD_DIM];
  Element queries[ITEM_ROWS * MAX_ELEMENTS];
  float mixed[ITEM_ROWS * MAX_HEAD_DIM];  // running sums of values, by weight
  float totals[ITEM_ROWS][LANES];         // running sums of weights, lane by lane
  float tops[ITEM_ROWS + LANES];          // the score that both are relative to
  int64_t oldest[ITEM_ROWS], newest[ITEM_ROWS];  // positions that a row sees
  Chunk chunks[2];
  const bf16* fetched[CHUNK];  // values of the chunk after this one
  // Of the rows at hand, in one chunk:
  float scores[TILE_ROWS * CHUNK];
  Input weights[TILE_ROWS * CHUNK];
  float chunk_mixed[TILE_ROWS * MAX_HEAD_DIM];
  float chunk_totals[TILE_ROWS][LANES];
  float chunk_tops[LANES];
};
static_assert(sizeof(Scratch) <= SCRATCH_BYTES);

// What the chunks of one item of one tile were found to be, each by whichever thread.
class Results {
 public:
  static int64_t chunk_floats(int64_t num_rows, int64_t columns) {
    return 1 + num_rows * (1 + LANES + columns);
  }

  Results(float* at, int64_t num_rows, int64_t columns)
      : at_(at), rows_(num_rows), columns_(columns) {}

  void put(int64_t chunk, const Scratch& from, bool seen) {
    float* at = of(chunk);
    *at++ = seen;
    if (!seen) return;
    std::memcpy(at, from.chunk_tops, rows_ * sizeof(float));
    std::memcpy(at + rows_, from.chunk_totals, rows_ * LANES * sizeof(float));
    std::memcpy(at + rows_ * (1 + LANES), from.chunk_mixed, rows_ * columns_ * sizeof(float));
  }

  bool take(int64_t chunk, Scratch& to) const {
    const float* at = of(chunk);
    if (!*at++) return false;
    std::memcpy(to.chunk_tops, at, rows_ * sizeof(float));
    std::memcpy(to.chunk_totals, at + rows_, rows_ * LANES * sizeof(float));
    std::memcpy(to.chunk_mixed, at + rows_ * (1 + LANES), rows_ * columns_ * sizeof(float));
    return true;
  }

 private:
  float* of(int64_t chunk) const { return at_ + chunk * chunk_floats(rows_, columns_); }

  float* at_;
  int64_t rows_;
  int64_t columns_;
};

void prefetch_row(const bf16* row, int64_t size) {
  for (int64_t i = 0; i < size; i += 64 / sizeof(bf16)) prefetch(row + i);
}

class Attention {
 public:
  Attention(const AttentionArgs& args, const Item& item, Scratch& scratch)
      : args_(args),
        item_(item),
        s_(scratch),
        group_(args.num_heads / args.num_kv_heads),
        size_(args.head_dim),
        elements_(args.head_dim / 2 * PAIR_ELEMENTS),
        columns_(up_to(LANES, args.head_dim)),
        direct_(!INFIRE_AVX512 && item.num_rows <= TILE_ROWS && args.head_dim % LANES == 0) {}

  // `next`: what is likely computed after it, whose first keys are fetched ahead; or null.
  void run(const Item* next) {
    begin();
    each_chunk(0, num_chunks(item_), next, [&](const Chunk& chunk, const Chunk& ahead, int64_t) {
      for (int64_t row = 0; row < item_.num_rows; row += TILE_ROWS) {
        const int64_t count = std::min<int64_t>(TILE_ROWS, item_.num_rows - row);
        if (compute(chunk, ahead, row, count)) merge(row, count);
      }
    });
    finish();
  }

  // As much of an item of one tile: its chunks from `first` to before `end`, each by itself.
  void run_part(int64_t first, int64_t end, Results& results) {
    begin();
    each_chunk(first, end, nullptr, [&](const Chunk& chunk, const Chunk& ahead, int64_t n) {
      results.put(n, s_, compute(chunk, ahead, 0, item_.num_rows));
    });
  }

  // What `run` would have found, of all parts.
  void run_merge(Results& results) {
    begin();
    for (int64_t n = 0; n < num_chunks(item_); n++)
      if (results.take(n, s_)) merge(0, item_.num_rows);
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
      pack_query(query + query_head(row) * size_, size_, s_.queries + row * elements_);
      const int64_t position = item_.span->start + token(row);
      s_.oldest[row] = first_visible(*args_.tables, position);
      s_.newest[row] = position;
      s_.tops[row] = LOWEST;
      store(s_.totals[row], F{});
    }
    std::fill_n(s_.mixed, item_.num_rows * columns_, 0.0f);
  }

  // Calls act(chunk, the one after it, number) for some chunks of the item, in order.
  template <class Act>
  void each_chunk(int64_t first, int64_t end, const Item* next, const Act& act) {
    Chunk *chunk = &s_.chunks[0], *ahead = &s_.chunks[1];
    const int64_t begin = first_chunk(item_);
    if (first < end) locate(args_, item_, begin + first * CHUNK, *chunk);
    for (int64_t n = first; n < end; n++, std::swap(chunk, ahead)) {
      if (n + 1 < end)
        locate(args_, item_, begin + (n + 1) * CHUNK, *ahead);
      else if (next)
        locate(args_, *next, first_chunk(*next), *ahead);
      else
        ahead->range = {};
      if (!direct_) pack(*chunk, *ahead);
      act(*chunk, *ahead, n);
    }
  }

  // Lays out the keys and values of a chunk, and fetches those of another.
  void pack(const Chunk& chunk, const Chunk& ahead) {
    for (int64_t n = 0; n < CHUNK; n += LANES) {
      if (inside(chunk, n)) pack_keys(chunk.keys + n, size_ / 2, s_.keys + n, CHUNK);
      if (inside(ahead, n))
        for (int64_t i = n; i < n + LANES; i++) prefetch_row(ahead.keys[i], size_);
    }
    for (int64_t n = 0; n < CHUNK; n += 2) {
      if (inside(chunk, n))
        pack_values(chunk.values[n], chunk.values[n + 1], size_, columns_,
                    s_.values + n / 2 * PAIR_ELEMENTS * columns_);
      if (inside(ahead, n))
        for (int64_t i = n; i < n + 2; i++) prefetch_row(ahead.values[i], size_);
    }
  }

  static bool inside(const Chunk& chunk, int64_t n) {
    return chunk.range.begin <= n && n < chunk.range.end;
  }

  // What `count` <= TILE_ROWS rows find in a chunk, if they see any of it; fetches `ahead`, where
  // it is not packed by now.
  bool compute(const Chunk& chunk, const Chunk& ahead, int64_t row, int64_t count) {
    const Range seen{std::max(s_.oldest[row] - chunk.at, int64_t{0}),
                     std::min<int64_t>(s_.newest[row + count - 1] + 1 - chunk.at, CHUNK)};
    if (seen.begin >= seen.end) return false;
    const int64_t first = seen.first_vector(), vectors = seen.end_vector() - first;
    if (direct_)
      score_directly(chunk, ahead, count, first, vectors);
    else
      multiply({.a = s_.queries + row * elements_,
                .lda = elements_,
                .b = s_.keys + first * LANES,
                .ldb = CHUNK,
                .num_elements = elements_,
                .c = s_.scores + first * LANES,
                .ldc = CHUNK},
               count, vectors);
    const float scale = static_cast<float>(args_.scale * LOG2_E);
    for (int64_t n = 0; n < count; n++) {
      const Range own{s_.oldest[row + n] - chunk.at, s_.newest[row + n] + 1 - chunk.at};
      float* scores = s_.scores + n * CHUNK;
      s_.chunk_tops[n] = hide_and_find_top(scores, seen, own) * scale;
      Input* weights = s_.weights + n * CHUNK;
      store(s_.chunk_totals[n], weigh(scores, seen, scale, s_.chunk_tops[n], weights));
    }
    if (direct_)
      mix_directly(chunk, ahead, count, first, vectors);
    else
      mix(count, first, vectors);
    return true;
  }

  // The values by the weights, of `vectors` vectors of keys from `first` on.
  void mix(int64_t count, int64_t first, int64_t vectors) {
    const int64_t before = first * LANES / 2 * PAIR_ELEMENTS;
    multiply({.a = reinterpret_cast<const Element*>(s_.weights) + before,
              .lda = CHUNK_ELEMENTS,
              .b = s_.values + before * columns_,
              .ldb = columns_,
              .num_elements = vectors * LANES / 2 * PAIR_ELEMENTS,
              .c = s_.chunk_mixed,
              .ldc = columns_},
             count, columns_ / LANES);
  }

#if INFIRE_AVX512
  void score_directly(const Chunk&, const Chunk&, int64_t, int64_t, int64_t) {}
  void mix_directly(const Chunk&, const Chunk&, int64_t, int64_t, int64_t) {}
#else
  // As the product with packed keys, of a few keys at a time, which stay in the L1 cache.
  void score_directly(const Chunk& chunk, const Chunk& ahead, int64_t count, int64_t first,
                      int64_t vectors) {
    constexpr int64_t together = 2, ld = together * LANES;
    fetch(ahead, ahead.keys, 0, first * LANES);
    fetch(ahead, ahead.keys, (first + vectors) * LANES, CHUNK);
    for (int64_t v = first; v < first + vectors; v += together) {
      const int64_t width = std::min(together, first + vectors - v);
      fetch(ahead, ahead.keys, v * LANES, (v + width) * LANES);
      for (int64_t n = 0; n < width; n++)
        pack_keys(chunk.keys + (v + n) * LANES, size_ / 2, s_.keys + n * LANES, ld);
      multiply({.a = s_.queries,
                .lda = elements_,
                .b = s_.keys,
                .ldb = ld,
                .num_elements = elements_,
                .c = s_.scores + v * LANES,
                .ldc = CHUNK},
               count, width);
    }
  }

  // As `mix`, of values where they lie.
  void mix_directly(const Chunk& chunk, const Chunk& ahead, int64_t count, int64_t first,
                    int64_t vectors) {
    const int64_t end = (first + vectors) * LANES;
    fetch(ahead, ahead.values, 0, first * LANES);
    fetch(ahead, ahead.values, end, CHUNK);
    const RowsAt product = {.a = s_.weights + first * LANES,
                            .lda = CHUNK,
                            .b = chunk.values + first * LANES,
                            .ahead = s_.fetched + first * LANES,
                            .num_rows = vectors * LANES,
                            .c = s_.chunk_mixed,
                            .ldc = columns_};
    for (int64_t n = first * LANES; n < end; n++)
      s_.fetched[n] = ahead.range.begin <= n && n < ahead.range.end ? ahead.values[n] : NOTHING;
    multiply_rows_at(product, count, columns_ / LANES);
  }
#endif

  // Fetches keys or values of a chunk, as far as it has those from `begin` to before `end`.
  void fetch(const Chunk& ahead, const bf16* const* rows, int64_t begin, int64_t end) {
    end = std::min(end, ahead.range.end);
    for (int64_t n = std::max(begin, ahead.range.begin); n < end; n++) prefetch_row(rows[n], size_);
  }

  // Adds what `compute` found to the running sums.
  void merge(int64_t row, int64_t count) {
    float factors[LANES];
    store(factors, factor_of(load(s_.tops + row), load(s_.chunk_tops)));
    for (int64_t n = 0; n < count; n++) {
      const bool rises = s_.chunk_tops[n] > s_.tops[row + n];
      if (rises) s_.tops[row + n] = s_.chunk_tops[n];
      const F factor = splat(factors[n]);
      add_scaled(s_.totals[row + n], s_.chunk_totals[n], LANES, factor, rises);
      add_scaled(s_.mixed + (row + n) * columns_, s_.chunk_mixed + n * columns_, columns_, factor,
                 rises);
    }
  }

  void finish() {
    for (int64_t row = 0; row < item_.num_rows; row++) {
      Input* out = args_.out + (item_.span->first + token(row)) * args_.ld_out +
                   query_head(row) * size_;
      const F share = splat(1.0f / sum(load(s_.totals[row])));
      const float* mixed = s_.mixed + row * columns_;
      Input rounded[MAX_HEAD_DIM];
      // + 0: a sum of nothing but zeros is +0 however many of them were added.
      for (int64_t i = 0; i < size_; i += LANES)
        store_input(rounded + i, fma(load(mixed + i), share, F{}));
      std::memcpy(out, rounded, size_ * sizeof(Input));
    }
  }

  const AttentionArgs& args_;
  const Item& item_;
  Scratch& s_;
  int64_t group_;     // query heads that share a KV head
  int64_t size_;      // D
  int64_t elements_;  // of a query
  int64_t columns_;   // D, rounded up to whole vectors
  bool direct_;       // few rows: what is packed would be read once
};

// Where threads meet that compute parts of items; all counts are 0 between operations.
struct Shared {
  std::atomic<int64_t> finished[MAX_THREADS * PARTS_A_THREAD];  // parts, of each item
  alignas(64) float results[(SCRATCH_BYTES - 8 * MAX_THREADS * PARTS_A_THREAD) / sizeof(float)];
};
static_assert(sizeof(Shared) <= SCRATCH_BYTES);

// Items of one tile over their keys, where there are too few of them to keep all threads busy.
class Split {
 public:
  Split(const AttentionArgs& args, const Items& items, Worker& worker)
      : args_(args), items_(items), worker_(worker), rows_(items.most_rows()) {
    const int64_t wanted = PARTS_A_THREAD * worker.count, size = items.size();
    if (worker.count == 1 || size >= wanted || rows_ > TILE_ROWS) return;
    for (int64_t n = 0; n < size; n++) chunks_ = std::max(chunks_, num_chunks(items.at(n)));
    if (size * item_floats() <= std::ssize(shared().results))
      parts_ = std::min(chunks_, (wanted + size - 1) / size);
  }

  bool pays() const { return parts_ > 1; }

  void run(Scratch& scratch) {
    for (Share share(worker_, items_.size() * parts_); share.next();) {
      const int64_t n = share.item / parts_, part = share.item % parts_;
      const Item item = items_.at(n);
      const int64_t chunks = num_chunks(item);
      Results results(shared().results + n * item_floats(), item.num_rows, columns());
      Attention(args_, item, scratch)
          .run_part(chunks * part / parts_, chunks * (part + 1) / parts_, results);
      if (shared().finished[n].fetch_add(1, std::memory_order_acq_rel) + 1 < parts_) continue;
      shared().finished[n].store(0, std::memory_order_relaxed);
      Attention(args_, item, scratch).run_merge(results);
    }
  }

 private:
  Shared& shared() const { return *reinterpret_cast<Shared*>(worker_.shared); }
  int64_t columns() const { return up_to(LANES, args_.head_dim); }
  int64_t item_floats() const { return chunks_ * Results::chunk_floats(rows_, columns()); }

  const AttentionArgs& args_;
  const Items& items_;
  Worker& worker_;
  int64_t rows_;
  int64_t chunks_ = 0;  // the most that an item has
  int64_t parts_ = 1;   // of an item
};

}  // namespace

void attention(const AttentionArgs& args, Worker& worker) {
  Scratch& scratch = *reinterpret_cast<Scratch*>(worker.scratch);
  const Items items(args);
  if (Split split(args, items, worker); split.pays()) return split.run(scratch);
  for (Share share(worker, items.size()); share.next();) {
    const Item item = items.at(share.item);
    const bool last = share.item + 1 == items.size();
    const Item next = last ? item : items.at(share.item + 1);
    Attention(args, item, scratch).run(last ? nullptr : &next);
  }
}

}  // namespace infire
