// What attention's threads share out: rows of a span and a KV head, and the keys that they see.
// Knows no arithmetic.
#pragma once

#include <algorithm>

#include "attention_pack.h"
#include "attention_softmax.h"
#include "paged.h"

namespace infire {

// Rows of an item: query heads that share a KV head, of successive tokens. Packing a chunk costs
// as much as its products for 8 rows.
constexpr int64_t ITEM_ROWS = 192;

alignas(64) constexpr bf16 NOTHING[MAX_HEAD_DIM] = {};

// Where the keys and values of a chunk are, of one KV head.
struct Chunk {
  int64_t at;   // position of the first key
  Range range;  // of keys that a row of the item sees, rounded out to whole vectors
  const bf16* keys[CHUNK];
  const bf16* values[CHUNK];
};

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

  // The most rows that an item has.
  int64_t most_rows() const {
    int64_t most = 0;
    for (int64_t n = 0; n < step_.num_spans; n++)
      most = std::max(most, step_.spans[n].length * group_);
    return std::min(most, ITEM_ROWS);
  }

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
inline void locate(const AttentionArgs& args, const Item& item, int64_t at, Chunk& chunk) {
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

inline int64_t first_chunk(const Item& item) { return item.first_key / CHUNK * CHUNK; }

inline int64_t num_chunks(const Item& item) {
  return (item.end_key - first_chunk(item) + CHUNK - 1) / CHUNK;
}

}  // namespace infire
