// Keys and values of a chunk, laid out as the right-hand sides of its two products: lanes are keys,
// or dimensions. Knows no positions.
#pragma once

#include <cstring>

#include "attention_tile.h"

namespace infire {

constexpr int CHUNK = 128;  // keys

inline int64_t up_to(int64_t multiple, int64_t size) {
  return (size + multiple - 1) / multiple * multiple;
}

#if INFIRE_AVX512
// Sixteen rows of sixteen words -> columns[j * ld + i] = rows[i][j]. Four rows are put side by
// side as they are loaded, which leaves half of the shuffles of a transposition in registers.
inline void transpose(const bf16* const* rows, uint32_t* columns, int64_t ld) {
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
    _mm512_storeu_si512(columns + j * ld, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512(columns + (j + 1) * ld, _mm512_unpackhi_epi64(a, b));
    _mm512_storeu_si512(columns + (j + 2) * ld, _mm512_unpacklo_epi64(c, d));
    _mm512_storeu_si512(columns + (j + 3) * ld, _mm512_unpackhi_epi64(c, d));
  }
}
#elif defined(__AVX2__)
// Words 0 .. 3 of eight rows, as four vectors of eight lanes: a row a lane. Rows are put side by
// side as they are loaded, which leaves two shuffles a vector.
ALWAYS_INLINE void transpose_words(const bf16* const* rows, __m256i* words) {
  __m256i twos[4];  // of rows i and i + 4
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i]));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i + 4]));
    twos[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }
  const __m256i a = _mm256_unpacklo_epi32(twos[0], twos[1]);
  const __m256i b = _mm256_unpacklo_epi32(twos[2], twos[3]);
  const __m256i c = _mm256_unpackhi_epi32(twos[0], twos[1]);
  const __m256i d = _mm256_unpackhi_epi32(twos[2], twos[3]);
  words[0] = _mm256_unpacklo_epi64(a, b);
  words[1] = _mm256_unpackhi_epi64(a, b);
  words[2] = _mm256_unpacklo_epi64(c, d);
  words[3] = _mm256_unpackhi_epi64(c, d);
}

// Sixteen rows of sixteen words -> columns[(2j + half) * ld + i], as floats.
inline void transpose(const bf16* const* rows, float* columns, int64_t ld) {
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  for (int i = 0; i < LANES; i += 8)
    for (int j = 0; j < LANES; j += 4) {
      const bf16* some[8];
      for (int n = 0; n < 8; n++) some[n] = rows[i + n] + 2 * j;
      __m256i words[4];
      transpose_words(some, words);
#pragma GCC unroll 4
      for (int n = 0; n < 4; n++) {
        float* at = columns + 2 * (j + n) * ld + i;
        _mm256_storeu_ps(at, _mm256_castsi256_ps(_mm256_slli_epi32(words[n], 16)));
        _mm256_storeu_ps(at + ld, _mm256_castsi256_ps(_mm256_and_si256(words[n], high)));
      }
    }
}
#else
inline void transpose(const bf16* const* rows, float* columns, int64_t ld) {
  float values[LANES][2 * LANES];
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < 2 * LANES; j++) values[i][j] = to_float(rows[i][j]);
  for (int j = 0; j < 2 * LANES; j++)
    for (int i = 0; i < LANES; i++) columns[j * ld + i] = values[i][j];
}
#endif

// Sixteen keys of `pairs` words each -> packed[e * ld + i], e an element, rounded up to 16 pairs.
inline void pack_keys(const bf16* const* keys, int64_t pairs, Element* packed,
                      int64_t ld) {
  int64_t first = 0;
  for (; first + LANES <= pairs; first += LANES) {
    const bf16* rows[LANES];
    for (int i = 0; i < LANES; i++) rows[i] = keys[i] + 2 * first;
    transpose(rows, packed + first * PAIR_ELEMENTS * ld, ld);
  }
  if (first == pairs) return;
  bf16 last[LANES][2 * LANES] = {};  // what is left of each; reading on might leave the cache
  const bf16* rows[LANES];
  for (int i = 0; i < LANES; i++) {
    std::memcpy(last[i], keys[i] + 2 * first, (pairs - first) * sizeof(uint32_t));
    rows[i] = last[i];
  }
  transpose(rows, packed + first * PAIR_ELEMENTS * ld, ld);
}

// The values of two keys, `size` each, `columns` once rounded up to 16 -> packed[d] = (low[d],
// high[d]); or as floats, one after the other.
#if INFIRE_AVX512
inline void pack_values(const bf16* low, const bf16* high, int64_t size, int64_t columns,
                        uint32_t* packed) {
  int64_t d = 0;
  for (; d + 2 * LANES <= size; d += 2 * LANES) {
    const Half a = bits<Half>(load_words(low + d)), b = bits<Half>(load_words(high + d));
    store_words(packed + d, bits<U>(__builtin_shufflevector(
        a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47)));
    store_words(packed + d + LANES, bits<U>(__builtin_shufflevector(
        a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
        24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63)));
  }
  for (; d < size; d++) packed[d] = low[d] | uint32_t{high[d]} << 16;
  for (; d < columns; d++) packed[d] = 0;
}
#else
inline void widen_row(const bf16* from, int64_t size, int64_t columns, float* to) {
  int64_t d = 0;
  for (; d + LANES <= size; d += LANES) store(to + d, load_bf16(from + d));
  for (; d < size; d++) to[d] = to_float(from[d]);
  for (; d < columns; d++) to[d] = 0.0f;
}

inline void pack_values(const bf16* low, const bf16* high, int64_t size, int64_t columns,
                        float* packed) {
  widen_row(low, size, columns, packed);
  widen_row(high, size, columns, packed + columns);
}
#endif

// A query as the left-hand side of a product.
inline void pack_query(const bf16* query, int64_t size, Element* packed) {
#if INFIRE_AVX512
  std::memcpy(packed, query, size * sizeof(bf16));
#else
  widen_row(query, size, size, packed);
#endif
}

}  // namespace infire
