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
#include <utility>

#include "attention_pack.h"
#include "attention_softmax.h"
#include "attention_tile.h"
#include "paged.h"

namespace infire {
namespace {

// Rows of an item: query heads that share a KV head, of successive tokens. Packing a chunk costs
// as much as its products for 8 rows.
constexpr int64_t ITEM_ROWS = 192;
constexpr int64_t MAX_ELEMENTS = MAX_HEAD_DIM / 2 * PAIR_ELEMENTS;
constexpr int64_t CHUNK_ELEMENTS = CHUNK / 2 * PAIR_ELEMENTS;
constexpr double LOG2_E = 1.4426950408889634;

alignas(64) constexpr bf16 NOTHING[MAX_HEAD_DIM] = {};

// Where the keys and values of a chunk are, of one KV head.
struct Chunk {
  int64_t at;   // position of the first key
  Range range;  // of keys that a row of the item sees, rounded out to whole vectors
  const bf16* keys[CHUNK];
  const bf16* values[CHUNK];
};

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

struct Item {
  const Span* span;
  int64_t head;       // KV head
  int64_t first_row;  // of the span's length * G rows of that head: token by token
  int64_t num_rows;
  int64_t first_key;  // positions that its rows see: from here
  int64_t end_key;    // to before here
};

class Items {
 public:
  explicit Items(const AttentionArgs& args)
      : args_(args), step_(*args.step), group_(args.num_heads / args.num_kv_heads) {
    for (int64_t n = 0; n < step_.num_spans; n++) size_ += of(step_.spans[n]);
  }

  int64_t size() const { return size_; }

  // Item 0 is the end of the last span: chunks of prompts come last in a step, and their last
  // tokens see most. Long items are begun first, so that threads end together.
  Item at(int64_t index) const {
    const Span* span = step_.spans + step_.num_spans - 1;
    for (; index >= of(*span); span--) index -= of(*span);
    const int64_t heads = args_.num_kv_heads, rows = span->length * group_;
    const int64_t first = (blocks(*span) - 1 - index / heads) * ITEM_ROWS;
    const int64_t end = std::min(first + ITEM_ROWS, rows);
    return {.span = span,
            .head = index % heads,
            .first_row = first,
            .num_rows = end - first,
            .first_key = first_visible(*args_.tables, span->start + first / group_),
            .end_key = span->start + (end - 1) / group_ + 1};
  }

 private:
  int64_t blocks(const Span& span) const {
    return (span.length * group_ + ITEM_ROWS - 1) / ITEM_ROWS;
  }
  int64_t of(const Span& span) const { return blocks(span) * args_.num_kv_heads; }

  const AttentionArgs& args_;
  const Step& step_;
  int64_t group_;
  int64_t size_ = 0;
};

// The chunk of the item that position `at` begins. What a row does not see is zeros: its cell
// holds what an earlier owner left, or belongs to nobody.
void locate(const AttentionArgs& args, const Item& item, int64_t at, Chunk& chunk) {
  const Range seen{std::max(item.first_key - at, int64_t{0}),
                   std::min<int64_t>(item.end_key - at, CHUNK)};
  chunk.at = at;
  chunk.range = {seen.first_vector() * LANES, seen.end_vector() * LANES};
  for (int64_t n = chunk.range.begin; n < seen.begin; n++)
    chunk.keys[n] = chunk.values[n] = NOTHING;
  for (int64_t n = seen.end; n < chunk.range.end; n++) chunk.keys[n] = chunk.values[n] = NOTHING;
  const int64_t stride = args.num_kv_heads * args.head_dim;
  const int64_t block_tokens = args.tables->block_tokens;
  for (int64_t n = seen.begin; n < seen.end;) {
    int64_t offset = cell_of(*args.tables, item.span->slot, at + n) * stride +
                     item.head * args.head_dim;
    const int64_t left = block_tokens - (at + n) % block_tokens;
    for (const int64_t end = std::min(seen.end, n + left); n < end; n++, offset += stride) {
      chunk.keys[n] = args.k + offset;
      chunk.values[n] = args.v + offset;
    }
  }
}

int64_t first_chunk(const Item& item) { return item.first_key / CHUNK * CHUNK; }

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
    Chunk *chunk = &s_.chunks[0], *ahead = &s_.chunks[1];
    locate(args_, item_, first_chunk(item_), *chunk);
    for (int64_t at = chunk->at; at < item_.end_key; at += CHUNK, std::swap(chunk, ahead)) {
      if (at + CHUNK < item_.end_key)
        locate(args_, item_, at + CHUNK, *ahead);
      else if (next)
        locate(args_, *next, first_chunk(*next), *ahead);
      else
        ahead->range = {};
      if (!direct_) pack(*chunk, *ahead);
      for (int64_t row = 0; row < item_.num_rows; row += TILE_ROWS)
        add_chunk(*chunk, *ahead, row, std::min<int64_t>(TILE_ROWS, item_.num_rows - row));
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
      pack_query(query + query_head(row) * size_, size_, s_.queries + row * elements_);
      const int64_t position = item_.span->start + token(row);
      s_.oldest[row] = first_visible(*args_.tables, position);
      s_.newest[row] = position;
      s_.tops[row] = LOWEST;
      store(s_.totals[row], F{});
    }
    std::fill_n(s_.mixed, item_.num_rows * columns_, 0.0f);
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

  // Adds a chunk to `count` <= TILE_ROWS rows; fetches `ahead`, where it is not packed by now.
  void add_chunk(const Chunk& chunk, const Chunk& ahead, int64_t row, int64_t count) {
    const Range seen{std::max(s_.oldest[row] - chunk.at, int64_t{0}),
                     std::min<int64_t>(s_.newest[row + count - 1] + 1 - chunk.at, CHUNK)};
    if (seen.begin >= seen.end) return;
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
    merge(row, count);
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

  // Adds what add_chunk found to the running sums.
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
  int64_t group_;    // query heads that share a KV head
  int64_t size_;     // D
  int64_t elements_;  // of a query
  int64_t columns_;  // D, rounded up to whole vectors
  bool direct_;      // few rows: what is packed would be read once
};

}  // namespace

void attention(const AttentionArgs& args, Worker& worker) {
  Scratch& scratch = *reinterpret_cast<Scratch*>(worker.scratch);
  const Items items(args);
  for (Share share(worker, items.size()); share.next();) {
    const Item item = items.at(share.item);
    const bool last = share.item + 1 == items.size();
    const Item next = last ? item : items.at(share.item + 1);
    Attention(args, item, scratch).run(last ? nullptr : &next);
  }
}

}  // namespace infire
