// Keys and values of a chunk, laid out as the right-hand sides of its two products: words are
// pairs of bf16, lanes are keys, or dimensions. Knows no positions.
#pragma once

#include <cstring>

#include "simd.h"

namespace infire {

constexpr int CHUNK = 128;  // keys

inline int64_t up_to(int64_t multiple, int64_t size) {
  return (size + multiple - 1) / multiple * multiple;
}

// The first `count` words of a row, then zeros.
inline U load_some(const bf16* row, int64_t count) {
  if (count >= LANES) return load_words(row);
  uint32_t words[LANES] = {};
  std::memcpy(words, row, count * sizeof(uint32_t));
  return load_words(words);
}

#if INFIRE_AVX512
// Rows become columns: rows[i][j] is what rows[j][i] was.
inline void transpose(U (&rows)[LANES]) {
  U fours[LANES];  // fours[4 i + c]: words c, c + 4, c + 8 and c + 12 of rows 4 i .. 4 i + 3
  for (int i = 0; i < LANES; i += 4) {
    U twos[4];
    for (int j = 0; j < 4; j += 2) {
      const U a = rows[i + j], b = rows[i + j + 1];
      twos[j] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21,  //
                                        8, 24, 9, 25, 12, 28, 13, 29);
      twos[j + 1] = __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23,  //
                                            10, 26, 11, 27, 14, 30, 15, 31);
    }
    for (int c = 0; c < 4; c += 2) {
      const U a = twos[c / 2], b = twos[c / 2 + 2];
      fours[i + c] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21,  //
                                             8, 9, 24, 25, 12, 13, 28, 29);
      fours[i + c + 1] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23,  //
                                                 10, 11, 26, 27, 14, 15, 30, 31);
    }
  }
  const auto even = [](U a, U b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  };
  const auto odd = [](U a, U b) {
    return __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  };
  for (int c = 0; c < 4; c++) {
    const U a = even(fours[c], fours[c + 4]), b = even(fours[c + 8], fours[c + 12]);
    const U d = odd(fours[c], fours[c + 4]), e = odd(fours[c + 8], fours[c + 12]);
    rows[c] = even(a, b);
    rows[c + 4] = even(d, e);
    rows[c + 8] = odd(a, b);
    rows[c + 12] = odd(d, e);
  }
}
#else
inline void transpose(U (&rows)[LANES]) {
  uint32_t words[LANES][LANES], turned[LANES][LANES];
  std::memcpy(words, rows, sizeof(words));
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < LANES; j++) turned[i][j] = words[j][i];
  std::memcpy(rows, turned, sizeof(turned));
}
#endif

// Sixteen keys of `pairs` words each -> packed[p * CHUNK + i], rounded up to 16 pairs.
inline void pack_keys(const bf16* const* keys, int64_t pairs, uint32_t* packed) {
  for (int64_t first = 0; first < pairs; first += LANES) {
    U rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = load_some(keys[i] + 2 * first, pairs - first);
    transpose(rows);
    for (int p = 0; p < LANES; p++) store_words(packed + (first + p) * CHUNK, rows[p]);
  }
}

// The values of two keys, `size` each -> packed[d] = (low[d], high[d]), rounded up to 16 words.
inline void pack_values(const bf16* low, const bf16* high, int64_t size, uint32_t* packed) {
  int64_t d = 0;
#if INFIRE_AVX512
  for (; d + 2 * LANES <= size; d += 2 * LANES) {
    const Half a = bits<Half>(load_words(low + d)), b = bits<Half>(load_words(high + d));
    store_words(packed + d, bits<U>(__builtin_shufflevector(
        a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47)));
    store_words(packed + d + LANES, bits<U>(__builtin_shufflevector(
        a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
        24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63)));
  }
#endif
  for (; d < size; d++) packed[d] = low[d] | uint32_t{high[d]} << 16;
  for (; d % LANES; d++) packed[d] = 0;
}

}  // namespace infire
