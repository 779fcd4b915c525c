// Weights in strips of 16 outputs, and how 12 bits become bfloat16 again. The layouts are those of
// unweight/README.md. Knows no product.
#pragma once

#include "ops.h"

namespace infire {

constexpr int64_t GROUP_PAIRS = 4;      // input pairs a group of 12-bit weights holds
constexpr int64_t GROUP_BYTES = 192;    // 128 of sign and mantissa, 64 of exponent codes
constexpr int64_t PAIR_BYTES = 64;      // one input pair of a strip in bfloat16

ALWAYS_INLINE int64_t strip_bytes(const Matrix& matrix) {
  return matrix.format == BF16 ? matrix.num_pairs * PAIR_BYTES
                               : matrix.num_pairs / GROUP_PAIRS * GROUP_BYTES;
}

// The exponents that code 0 would have, of 16 outputs, where they are added: a half a weight.
ALWAYS_INLINE Half bases_of(const uint8_t* base) {
  const U shifted = widen(base) << 7;
  return bits<Half>(shifted | shifted << 16);
}

// One input pair, of four, of a group of a strip: 32 weights. `codes` are the group's. A code moves
// to where the exponent's low bits are; base is added unless it is 0; sign and mantissa, doubled
// into both bytes of a half, are selected around it.
template <int PAIR>
ALWAYS_INLINE U decode_pair(const uint8_t* group, Half codes, Half bases) {
#if INFIRE_AVX512
  // Byte n of a vector, twice, at 2n and 2n + 1; of pairs 0 and 2 the lower half of one.
  alignas(64) static constexpr uint8_t twice[128] = {
      0,  0,  1,  1,  2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,  8,  8,  9,  9,  10, 10,
      11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 16, 16, 17, 17, 18, 18, 19, 19, 20, 20, 21, 21,
      22, 22, 23, 23, 24, 24, 25, 25, 26, 26, 27, 27, 28, 28, 29, 29, 30, 30, 31, 31, 32, 32,
      33, 33, 34, 34, 35, 35, 36, 36, 37, 37, 38, 38, 39, 39, 40, 40, 41, 41, 42, 42, 43, 43,
      44, 44, 45, 45, 46, 46, 47, 47, 48, 48, 49, 49, 50, 50, 51, 51, 52, 52, 53, 53, 54, 54,
      55, 55, 56, 56, 57, 57, 58, 58, 59, 59, 60, 60, 61, 61, 62, 62, 63, 63};
  const __m512i code_bits = _mm512_set1_epi16(0x0780);
  const __m512i rest = _mm512_set1_epi16(static_cast<short>(0x807f));
  const __m512i bytes = _mm512_loadu_si512(group + PAIR / 2 * 64);
  const __m512i doubled = _mm512_permutexvar_epi8(_mm512_load_si512(twice + PAIR % 2 * 64), bytes);
  const __m512i all = bits<__m512i>(codes);
  const __m512i moved = PAIR < 2 ? _mm512_slli_epi16(all, PAIR == 0 ? 7 : 3)
                                 : _mm512_srli_epi16(all, PAIR == 2 ? 1 : 5);
  const __mmask32 some = _mm512_test_epi16_mask(moved, code_bits);
  const __m512i exponent =
      _mm512_maskz_add_epi16(some, _mm512_and_si512(moved, code_bits), bits<__m512i>(bases));
  return bits<U>(_mm512_ternarylogic_epi32(rest, doubled, exponent, 0xca));
#elif defined(__AVX2__)
  const __m256i code_bits = _mm256_set1_epi16(0x0780);
  const __m256i rest = _mm256_set1_epi16(static_cast<short>(0x807f));
  const __m256i twice = _mm256_setr_epi8(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9,
                                         10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15);
  return U::by_part([&](int p) {
    const __m128i* at = reinterpret_cast<const __m128i*>(group + 32 * PAIR + 16 * p);
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(at));
    const __m256i all = (__m256i)codes.part[p];
    const __m256i moved = PAIR < 2 ? _mm256_slli_epi16(all, PAIR == 0 ? 7 : 3)
                                   : _mm256_srli_epi16(all, PAIR == 2 ? 1 : 5);
    const __m256i code = _mm256_and_si256(moved, code_bits);
    // The sign of a code, 0 or 1, times the sum, which is at most 0x7f00.
    const __m256i exponent =
        _mm256_sign_epi16(_mm256_add_epi16(code, (__m256i)bases.part[p]), code);
    const __m256i doubled = _mm256_and_si256(_mm256_shuffle_epi8(bytes, twice), rest);
    return (Part<uint32_t>)_mm256_or_si256(doubled, exponent);
  });
#else
  uint16_t wide[2 * LANES];
  for (int i = 0; i < 2 * LANES; i++) wide[i] = group[32 * PAIR + i];
  const Half doubled = load_as<Half>(wide);
  const Half code = (codes >> (4 * PAIR) & 15) << 7;
  const Half none = Half::by_part([&](int p) { return (Part<uint16_t>)(code.part[p] == 0); });
  return bits<U>(((doubled | doubled << 8) & 0x807f) | ((code + bases) & ~none));
#endif
}

ALWAYS_INLINE Half codes_of(const uint8_t* group) { return load_as<Half>(group + 128); }

// Four input pairs of a strip: 128 weights, from 192 bytes to 256.
ALWAYS_INLINE void decode_group(const uint8_t* group, Half bases, U* out) {
  const Half codes = codes_of(group);
  out[0] = decode_pair<0>(group, codes, bases);
  out[1] = decode_pair<1>(group, codes, bases);
  out[2] = decode_pair<2>(group, codes, bases);
  out[3] = decode_pair<3>(group, codes, bases);
}

// A pair of bf16 as two floats.
ALWAYS_INLINE F low_half(U pair) { return bits<F>(pair << 16); }
ALWAYS_INLINE F high_half(U pair) { return bits<F>(pair & 0xffff0000u); }

}  // namespace infire
