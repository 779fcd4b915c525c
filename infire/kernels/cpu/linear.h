// The product that `linear` and the head share; they differ in what becomes of a result.
//
// A panel of weights (a few strips of 16 outputs) is brought into the cache, decoded if need be,
// and multiplied with all rows. Each output is one chain over its inputs, in order: so a row's
// result is bit by bit the same whatever other rows there are, however the panels are cut, and in
// both formats.
#pragma once

#include "tile.h"

namespace infire {

constexpr int64_t PACKED_ROWS = 4;  // up to which decoding in registers pays
// Input pairs of a panel that is decoded for many rows, and for so few that writing it costs as
// much as reading it (12 KiB, of the L1 cache). Many: 128 KiB, of the L2 cache; as floats 24 KiB.
constexpr int64_t MANY_PAIRS = INFIRE_AVX512 ? 1024 : 192, SOME_PAIRS = 96;
constexpr int64_t SOME_ROWS = 48;
constexpr int64_t BLOCK_ROWS = 1024;  // whose sums are kept while a long chain is continued
constexpr int64_t PANEL_BYTES = WIDE * MANY_PAIRS * PANEL_PAIR_BYTES;
static_assert(PANEL_BYTES + BLOCK_ROWS * WIDE * VECTOR_BYTES <= SCRATCH_BYTES);

// Rows that take their weights from the matrix, decoded on the way.
template <int STRIPS>
void multiply_few(const Matrix& matrix, int64_t strip, const Input* x, int64_t ld_x,
                  int64_t num_rows, float* sums) {
  switch (num_rows) {
    case 1: return FewRows<1, STRIPS>(matrix, strip, x, ld_x).multiply(sums);
    case 2: return FewRows<2, STRIPS>(matrix, strip, x, ld_x).multiply(sums);
    case 3: return FewRows<3, STRIPS>(matrix, strip, x, ld_x).multiply(sums);
    default: return FewRows<4, STRIPS>(matrix, strip, x, ld_x).multiply(sums);
  }
}

// What is decoded after some strips' pairs before `pair`: more of them, or of those that follow,
// which are likely this thread's next.
inline Ahead ahead_of(const Matrix& matrix, int64_t strip, int64_t num_strips, int64_t pair) {
  if (pair == matrix.num_pairs) {
    strip += num_strips;
    pair = 0;
  }
  const int64_t stride = strip_bytes(matrix);
  const int64_t pair_bytes = matrix.format == BF16 ? PAIR_BYTES : GROUP_BYTES / GROUP_PAIRS;
  return {matrix.data + strip * stride + pair * pair_bytes, stride, pair_bytes};
}

template <int STRIPS, class Done>
void multiply_panel(const Matrix& matrix, int64_t first_strip, const Input* x, int64_t ld_x,
                    int64_t first_row, int64_t num_rows, const Done& done, char* scratch) {
  constexpr int most_rows = MOST_TILE / STRIPS;
  const bool decoded = !is_panel(matrix);
  uint8_t* panel = reinterpret_cast<uint8_t*>(scratch);
  float* sums = reinterpret_cast<float*>(scratch + PANEL_BYTES);
  const auto give = [&](int64_t row, int64_t rows, const float* results) {
    for (int64_t n = 0; n < rows; n++)
      done(row + n, first_strip * LANES, results + n * STRIPS * LANES, STRIPS * LANES);
  };
  if (decoded && num_rows <= PACKED_ROWS) {
    multiply_few<STRIPS>(matrix, first_strip, x + first_row * ld_x, ld_x, num_rows, sums);
    return give(first_row, num_rows, sums);
  }
  const int64_t most_pairs = num_rows <= SOME_ROWS ? SOME_PAIRS : MANY_PAIRS;
  const int64_t tiles = (num_rows + most_rows - 1) / most_rows;
  const int64_t step = decoded ? std::min(most_pairs, matrix.num_pairs) : matrix.num_pairs;
  for (int64_t pair = 0; pair < matrix.num_pairs; pair += step) {
    const int64_t pairs = std::min(step, matrix.num_pairs - pair);
    if (decoded) decode_panel(matrix, first_strip, STRIPS, pair, pairs, panel);
    const uint8_t* weights = decoded ? panel : matrix.data + first_strip * strip_bytes(matrix);
    const int64_t stride = (decoded ? pairs : matrix.num_pairs) * PANEL_PAIR_BYTES;
    const Ahead ahead = decoded ? ahead_of(matrix, first_strip, STRIPS, pair + pairs)
                                : Ahead{weights + PREFETCH_BYTES, stride, PAIR_BYTES};
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t begin = num_rows * tile / tiles, rows = num_rows * (tile + 1) / tiles - begin;
      const Input* inputs = x + (first_row + begin) * ld_x + 2 * pair;
      float* results = sums + (step < matrix.num_pairs ? begin * STRIPS * LANES : 0);
      tile_of<STRIPS>(rows, std::make_integer_sequence<int, most_rows>())(
          weights, stride, pairs, inputs, ld_x, results, pair == 0,
          decoded && tile ? Ahead{panel, 0, 0} : ahead);
      if (pair + pairs == matrix.num_pairs) give(first_row + begin, rows, results);
    }
  }
}

// Calls done(row, first output, results, how many) for all of x W^T.
template <class Done>
void multiply(const Matrix& matrix, const Input* x, int64_t ld_x, int64_t num_rows,
              const Done& done, Worker& worker) {
  const int64_t width = num_rows <= few_rows(matrix) ? WIDE : NARROW;
  // Every thread has as many strips as the others, in panels of which the last is narrower: a whole
  // panel more for one of two threads would be a tenth of a small matrix.
  const int64_t most = (matrix.num_strips + worker.count - 1) / worker.count;
  const int64_t panels = (most + width - 1) / width;
  for (Share share(worker, panels * worker.count); share.next();) {
    const int64_t part = share.item / panels;
    const int64_t strip = matrix.num_strips * part / worker.count + share.item % panels * width;
    const int64_t end =
        std::min(strip + width, matrix.num_strips * (part + 1) / worker.count);
    for (int64_t row = 0; row < num_rows; row += BLOCK_ROWS) {
      const int64_t rows = std::min(BLOCK_ROWS, num_rows - row);
      int64_t at = strip;
      if (width == WIDE && at + WIDE <= end) {
        multiply_panel<WIDE>(matrix, at, x, ld_x, row, rows, done, worker.scratch);
        at += WIDE;
      }
      for (; at + NARROW <= end; at += NARROW)
        multiply_panel<NARROW>(matrix, at, x, ld_x, row, rows, done, worker.scratch);
      for (; at < end; at++)
        multiply_panel<1>(matrix, at, x, ld_x, row, rows, done, worker.scratch);
    }
  }
}

}  // namespace infire
