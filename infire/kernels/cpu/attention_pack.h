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

#if INFIRE_AVX512
// Sixteen rows of sixteen words -> columns[j * CHUNK + i] = rows[i][j]. Four rows are put side by
// side as they are loaded, which leaves half of the shuffles of a transposition in registers.
inline void transpose(const bf16* const* rows, uint32_t* columns) {
  const auto part = [](const bf16* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  };
  for (int j = 0; j < LANES; j += 4) {
    U fours[4];  // fours[i]: words j .. j + 3 of rows i, i + 4, i + 8 and i + 12
    for (int i = 0; i < 4; i++) {
      __m512i four = _mm512_castsi128_si512(part(rows[i] + 2 * j));
      four = _mm512_inserti32x4(four, part(rows[i + 4] + 2 * j), 1);
      four = _mm512_inserti32x4(four, part(rows[i + 8] + 2 * j), 2);
      fours[i] = bits<U>(_mm512_inserti32x4(four, part(rows[i + 12] + 2 * j), 3));
    }
    const auto low = [](U a, U b) {
      return bits<__m512i>(_mm512_unpacklo_epi32(bits<__m512i>(a), bits<__m512i>(b)));
    };
    const auto high = [](U a, U b) {
      return bits<__m512i>(_mm512_unpackhi_epi32(bits<__m512i>(a), bits<__m512i>(b)));
    };
    const __m512i a = low(fours[0], fours[1]), b = low(fours[2], fours[3]);
    const __m512i c = high(fours[0], fours[1]), d = high(fours[2], fours[3]);
    _mm512_storeu_si512(columns + j * CHUNK, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512(columns + (j + 1) * CHUNK, _mm512_unpackhi_epi64(a, b));
    _mm512_storeu_si512(columns + (j + 2) * CHUNK, _mm512_unpacklo_epi64(c, d));
    _mm512_storeu_si512(columns + (j + 3) * CHUNK, _mm512_unpackhi_epi64(c, d));
  }
}
#else
inline void transpose(const bf16* const* rows, uint32_t* columns) {
  uint32_t words[LANES][LANES];
  for (int i = 0; i < LANES; i++) std::memcpy(words[i], rows[i], sizeof(words[i]));
  for (int j = 0; j < LANES; j++)
    for (int i = 0; i < LANES; i++) columns[j * CHUNK + i] = words[i][j];
}
#endif

// Sixteen keys of `pairs` words each -> packed[p * CHUNK + i], rounded up to 16 pairs.
inline void pack_keys(const bf16* const* keys, int64_t pairs, uint32_t* packed) {
  int64_t first = 0;
  for (; first + LANES <= pairs; first += LANES) {
    const bf16* rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = keys[i] + 2 * first;
    transpose(rows, packed + first * CHUNK);
  }
  if (first == pairs) return;
  bf16 last[LANES][2 * LANES] = {};  // what is left of each; reading on might leave the cache
  const bf16* rows[LANES];
  for (int i = 0; i < LANES; i++) {
    std::memcpy(last[i], keys[i] + 2 * first, (pairs - first) * sizeof(uint32_t));
    rows[i] = last[i];
  }
  transpose(rows, packed + first * CHUNK);
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
