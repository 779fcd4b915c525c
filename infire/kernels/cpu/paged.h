// Where the KV of a sequence lies, and how much of it a token sees. Knows no arithmetic of either.
#pragma once

#include <algorithm>

#include "ops.h"

namespace infire {

// Index of a position's cell in planes of (blocks * P) cells.
inline int64_t cell_of(const Tables& tables, int64_t slot, int64_t position) {
  const int64_t block = tables.blocks[slot * tables.width + position / tables.block_tokens];
  return block * tables.block_tokens + position % tables.block_tokens;
}

// The oldest position that the token at `position` may look at: KVGroup.first_visible.
inline int64_t first_visible(const Tables& tables, int64_t position) {
  if (tables.window == 0) return 0;
  if (tables.chunked) return position / tables.window * tables.window;
  return std::max<int64_t>(0, position - tables.window + 1);
}

}  // namespace infire
