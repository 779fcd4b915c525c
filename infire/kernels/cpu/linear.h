// The product that `linear` and the head share; they differ in what becomes of a result.
//
// A panel of weights (a few strips of 16 outputs) is brought into the cache, decoded if it is in
// 12 bits, and multiplied with all rows. Each output is one chain of dot2 over its input pairs, in
// order: so a row's result is bit by bit the same whatever other rows there are, however the
// panels are cut, and in both formats.
#pragma once

#include <algorithm>

#include "strips.h"

namespace infire {

#if INFIRE_AVX512
constexpr int MOST_TILE = 24;  // sums that a tile keeps in registers, of 32
#elif defined(__aarch64__)
constexpr int MOST_TILE = 4;  // a sum takes four registers of 32
#else
constexpr int MOST_TILE = 4;  // a sum takes two registers of 16
#endif
constexpr int WIDE = 4, NARROW = 2;            // strips a panel has, for few rows and for many
constexpr int64_t FEW_ROWS = MOST_TILE / WIDE / 2;  // up to which a wide panel's streams pay
constexpr int64_t PACKED_ROWS = 4;
// Input pairs of a panel that is decoded for many rows (128 KiB, of the L2 cache), and for so few
// that writing it costs as much as reading it (12 KiB, of the L1 cache).
constexpr int64_t MANY_PAIRS = 1024, SOME_PAIRS = 96;
constexpr int64_t SOME_ROWS = 48;
constexpr int64_t BLOCK_ROWS = 1024;  // whose sums are kept while a long chain is continued
constexpr int64_t PREFETCH_BYTES = 1536;

// ROWS rows of x times STRIPS strips, for `pairs` input pairs; continues `sums`, which is
// (ROWS, 16 * STRIPS), or begins them.
template <int ROWS, int STRIPS>
void multiply_tile(const uint8_t* weights, int64_t strip_stride, int64_t pairs, const bf16* x,
                   int64_t ld_x, float* sums, bool begin, int64_t ahead) {
  F acc[ROWS][STRIPS];
  for (int row = 0; row < ROWS; row++)
    for (int strip = 0; strip < STRIPS; strip++)
      acc[row][strip] = begin ? F{} : load(sums + (row * STRIPS + strip) * LANES);
  for (int64_t pair = 0; pair < pairs; pair++) {
    U some[STRIPS];
    for (int strip = 0; strip < STRIPS; strip++) {
      const uint8_t* at = weights + strip * strip_stride + PAIR_BYTES * pair;
      some[strip] = load_words(at);
      prefetch(at + ahead);
    }
    for (int row = 0; row < ROWS; row++) {
      const U inputs = splat_word(static_cast<const void*>(x + row * ld_x + 2 * pair));
      for (int strip = 0; strip < STRIPS; strip++)
        acc[row][strip] = dot2(acc[row][strip], some[strip], inputs);
    }
  }
  for (int row = 0; row < ROWS; row++)
    for (int strip = 0; strip < STRIPS; strip++)
      store(sums + (row * STRIPS + strip) * LANES, acc[row][strip]);
}

using Tile = void (*)(const uint8_t*, int64_t, int64_t, const bf16*, int64_t, float*, bool, int64_t);

// The tiles of 1 .. MOST_TILE / STRIPS rows.
template <int STRIPS, int... ROWS>
inline Tile tile_of(int64_t rows, std::integer_sequence<int, ROWS...>) {
  static constexpr Tile tiles[] = {multiply_tile<ROWS + 1, STRIPS>...};
  return tiles[rows - 1];
}

// `pairs` input pairs of some strips, from 12 bits.
inline void decode_panel(const Matrix& matrix, int64_t first_strip, int64_t num_strips,
                         int64_t first_pair, int64_t pairs, uint8_t* out) {
  const int64_t next = first_pair + 2 * pairs <= matrix.num_pairs ? 1 : 0;
  const int64_t ahead = next ? pairs / GROUP_PAIRS * GROUP_BYTES
                             : num_strips * strip_bytes(matrix) - first_pair / GROUP_PAIRS * GROUP_BYTES;
  for (int64_t n = 0; n < num_strips; n++) {
    const int64_t strip = first_strip + n;
    const uint8_t* at = matrix.data + strip * strip_bytes(matrix) +
                        first_pair / GROUP_PAIRS * GROUP_BYTES;
    const Half bases = bases_of(matrix.base + LANES * strip);
    for (int64_t pair = 0; pair < pairs; pair += GROUP_PAIRS, at += GROUP_BYTES) {
      for (int line = 0; line < 3; line++) prefetch(at + ahead + 64 * line);
      decode_group(at, bases, reinterpret_cast<U*>(out + (n * pairs + pair) * PAIR_BYTES));
    }
  }
  for (int64_t n = 0; n < num_strips; n++) {
    const Exception* some = matrix.exceptions + matrix.ptr[first_strip + n];
    const Exception* end = matrix.exceptions + matrix.ptr[first_strip + n + 1];
    if (first_pair) some = std::lower_bound(some, end, 2 * first_pair, [](const Exception& one, int64_t input) { return one.input < input; });
    bf16* panel = reinterpret_cast<bf16*>(out + n * pairs * PAIR_BYTES);
    for (; some < end && some->input < 2 * (first_pair + pairs); some++) {
      const int64_t input = some->input - 2 * first_pair;
      panel[input / 2 * 32 + some->row * 2 + input % 2] = some->value;
    }
  }
}

// As multiply_tile, from 12 bits: for few rows, where decoded weights need not leave registers.
template <int ROWS, int STRIPS>
void multiply_packed(const Matrix& matrix, int64_t first_strip, const bf16* x, int64_t ld_x,
                     float* sums) {
  const int64_t stride = strip_bytes(matrix);
  const uint8_t* at = matrix.data + first_strip * stride;
  const Exception* exceptions = matrix.exceptions;
  int32_t next[STRIPS], end[STRIPS];
  Half bases[STRIPS];
  for (int strip = 0; strip < STRIPS; strip++) {
    next[strip] = matrix.ptr[first_strip + strip];
    end[strip] = matrix.ptr[first_strip + strip + 1];
    bases[strip] = bases_of(matrix.base + (first_strip + strip) * LANES);
  }
  F acc[ROWS][STRIPS] = {};
  const auto add = [&](int strip, const U* weights, const bf16* inputs) {
    for (int pair = 0; pair < GROUP_PAIRS; pair++)
      for (int row = 0; row < ROWS; row++)
        acc[row][strip] = dot2(acc[row][strip], weights[pair], splat_word(static_cast<const void*>(inputs + row * ld_x + 2 * pair)));
  };
  const int64_t groups = matrix.num_pairs / GROUP_PAIRS;
  for (int64_t group = 0; group < groups; group++) {
    // Groups up to the next that has an exception.
    int64_t plain = groups;
    for (int strip = 0; strip < STRIPS; strip++)
      if (next[strip] < end[strip])
        plain = std::min(plain, int64_t{exceptions[next[strip]].input} / (2 * GROUP_PAIRS));
    for (; group < plain; group++, at += GROUP_BYTES) {
      for (int strip = 0; strip < STRIPS; strip++) {
        U weights[GROUP_PAIRS];
        decode_group(at + strip * stride, bases[strip], weights);
        for (int line = 0; line < 3; line++)
          prefetch(at + strip * stride + PREFETCH_BYTES + 64 * line);
        add(strip, weights, x + group * 2 * GROUP_PAIRS);
      }
    }
    if (group == groups) break;
    for (int strip = 0; strip < STRIPS; strip++) {
      U weights[GROUP_PAIRS];
      decode_group(at + strip * stride, bases[strip], weights);
      bf16* values = reinterpret_cast<bf16*>(weights);
      for (; next[strip] < end[strip]; next[strip]++) {
        const Exception& one = exceptions[next[strip]];
        const int64_t input = one.input - group * 2 * GROUP_PAIRS;
        if (input >= 2 * GROUP_PAIRS) break;
        values[input / 2 * 2 * LANES + one.row * 2 + input % 2] = one.value;
      }
      add(strip, weights, x + group * 2 * GROUP_PAIRS);
    }
    at += GROUP_BYTES;
  }
  for (int row = 0; row < ROWS; row++)
    for (int strip = 0; strip < STRIPS; strip++)
      store(sums + (row * STRIPS + strip) * LANES, acc[row][strip]);
}

template <int STRIPS, class Done>
void multiply_panel(const Matrix& matrix, int64_t first_strip, const bf16* x, int64_t ld_x,
                    int64_t first_row, int64_t num_rows, const Done& done, char* scratch) {
  constexpr int most_rows = MOST_TILE / STRIPS;
  if (matrix.format == U12 && num_rows <= PACKED_ROWS) {
    float* sums = reinterpret_cast<float*>(scratch);
    const bf16* inputs = x + first_row * ld_x;
    switch (num_rows) {
      case 1: multiply_packed<1, STRIPS>(matrix, first_strip, inputs, ld_x, sums); break;
      case 2: multiply_packed<2, STRIPS>(matrix, first_strip, inputs, ld_x, sums); break;
      case 3: multiply_packed<3, STRIPS>(matrix, first_strip, inputs, ld_x, sums); break;
      default: multiply_packed<4, STRIPS>(matrix, first_strip, inputs, ld_x, sums); break;
    }
    for (int64_t row = 0; row < num_rows; row++)
      done(first_row + row, first_strip * LANES, sums + row * STRIPS * LANES, STRIPS * LANES);
    return;
  }
  const int64_t most_pairs = num_rows <= SOME_ROWS ? SOME_PAIRS : MANY_PAIRS;
  uint8_t* panel = reinterpret_cast<uint8_t*>(scratch);
  float* sums = reinterpret_cast<float*>(scratch + NARROW * MANY_PAIRS * PAIR_BYTES);
  const int64_t tiles = (num_rows + most_rows - 1) / most_rows;
  const bool decoded = matrix.format == U12;
  const int64_t step = decoded ? std::min(most_pairs, matrix.num_pairs) : matrix.num_pairs;
  for (int64_t pair = 0; pair < matrix.num_pairs; pair += step) {
    const int64_t pairs = std::min(step, matrix.num_pairs - pair);
    if (decoded) decode_panel(matrix, first_strip, STRIPS, pair, pairs, panel);
    const uint8_t* weights = decoded ? panel : matrix.data + first_strip * strip_bytes(matrix) + pair * PAIR_BYTES;
    const int64_t stride = (decoded ? pairs : matrix.num_pairs) * PAIR_BYTES;
    const bool last = pair + pairs == matrix.num_pairs;
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t begin = num_rows * tile / tiles, rows = num_rows * (tile + 1) / tiles - begin;
      const bf16* inputs = x + (first_row + begin) * ld_x + 2 * pair;
      float* results = sums + (step < matrix.num_pairs ? begin * STRIPS * LANES : 0);
      tile_of<STRIPS>(rows, std::make_integer_sequence<int, most_rows>())(
          weights, stride, pairs, inputs, ld_x, results, pair == 0, decoded ? 0 : PREFETCH_BYTES);
      if (!last) continue;
      for (int64_t row = 0; row < rows; row++)
        done(first_row + begin + row, first_strip * LANES, results + row * STRIPS * LANES,
             STRIPS * LANES);
    }
  }
}

// Calls done(row, first output, results, how many) for all of x W^T.
template <class Done>
void multiply(const Matrix& matrix, const bf16* x, int64_t ld_x, int64_t num_rows,
              const Done& done, Worker& worker) {
  const int64_t width = num_rows <= FEW_ROWS ? WIDE : NARROW;
  const int64_t items = (matrix.num_strips + width - 1) / width;
  for (Share share(worker, items); share.next();) {
    int64_t strip = share.item * width;
    const int64_t end = std::min(strip + width, matrix.num_strips);
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
