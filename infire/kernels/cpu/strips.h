// Weights in strips of 16 outputs, and how 12 bits become bfloat16 again. The layouts are those of
// unweight/README.md. Knows no product.
#pragma once

#include "ops.h"

namespace infire {

constexpr int64_t GROUP_PAIRS = 4;      // input pairs a group of 12-bit weights holds
constexpr int64_t GROUP_BYTES = 192;    // 128 of sign and mantissa, 64 of exponent codes
constexpr int64_t PAIR_BYTES = 64;      // one input pair of a strip in bfloat16

inline int64_t strip_bytes(const Matrix& matrix) {
  return matrix.format == BF16 ? matrix.num_pairs * PAIR_BYTES
                               : matrix.num_pairs / GROUP_PAIRS * GROUP_BYTES;
}

// The exponents that code 0 would have, of 16 outputs, where they are added: a half a weight.
inline Half bases_of(const uint8_t* base) {
  const U shifted = widen(base) << 7;
  return bits<Half>(shifted | shifted << 16);
}

// Four input pairs of a strip: 128 weights, from 192 bytes to 256.
inline void decode_group(const uint8_t* group, Half bases, U* out) {
#if INFIRE_AVX512
  alignas(64) static constexpr uint8_t twice[128] = {
      0,  0,  1,  1,  2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,  8,  8,  9,  9,  10, 10,
      11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 16, 16, 17, 17, 18, 18, 19, 19, 20, 20, 21, 21,
      22, 22, 23, 23, 24, 24, 25, 25, 26, 26, 27, 27, 28, 28, 29, 29, 30, 30, 31, 31, 32, 32,
      33, 33, 34, 34, 35, 35, 36, 36, 37, 37, 38, 38, 39, 39, 40, 40, 41, 41, 42, 42, 43, 43,
      44, 44, 45, 45, 46, 46, 47, 47, 48, 48, 49, 49, 50, 50, 51, 51, 52, 52, 53, 53, 54, 54,
      55, 55, 56, 56, 57, 57, 58, 58, 59, 59, 60, 60, 61, 61, 62, 62, 63, 63};
  const __m512i low = _mm512_load_si512(twice), high = _mm512_load_si512(twice + 64);
  const __m512i code_bits = _mm512_set1_epi16(0x0780), rest = _mm512_set1_epi16(static_cast<short>(0x807f));
  const __m512i base = bits<__m512i>(bases);
  const __m512i a = _mm512_loadu_si512(group), b = _mm512_loadu_si512(group + 64);
  const __m512i codes = _mm512_loadu_si512(group + 128);
  // A code moves to where the exponent's low bits are; base is added unless it is 0; sign and
  // mantissa, doubled into both bytes of a half, are selected around it.
  auto weights = [&](__m512i doubled, __m512i moved) {
    const __mmask32 some = _mm512_test_epi16_mask(moved, code_bits);
    const __m512i exponent =
        _mm512_maskz_add_epi16(some, _mm512_and_si512(moved, code_bits), base);
    return bits<U>(_mm512_ternarylogic_epi32(rest, doubled, exponent, 0xca));
  };
  out[0] = weights(_mm512_permutexvar_epi8(low, a), _mm512_slli_epi16(codes, 7));
  out[1] = weights(_mm512_permutexvar_epi8(high, a), _mm512_slli_epi16(codes, 3));
  out[2] = weights(_mm512_permutexvar_epi8(low, b), _mm512_srli_epi16(codes, 1));
  out[3] = weights(_mm512_permutexvar_epi8(high, b), _mm512_srli_epi16(codes, 5));
#else
  typedef uint8_t Bytes __attribute__((vector_size(32)));
  Half codes;
  std::memcpy(&codes, group + 128, sizeof(codes));
  for (int n = 0; n < GROUP_PAIRS; n++) {
    Bytes bytes;
    std::memcpy(&bytes, group + 32 * n, sizeof(bytes));
    const Half wide = __builtin_convertvector(bytes, Half);
    const Half code = (codes >> (4 * n) & 15) << 7;
    const Half exponent = (code + bases) & bits<Half>(code != 0);
    out[n] = bits<U>(((wide | wide << 8) & 0x807f) | exponent);
  }
#endif
}

}  // namespace infire
