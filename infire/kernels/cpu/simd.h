// Vectors of 16 floats, written once for every instruction set with the vector extensions of GCC
// and Clang: the compiler lowers them to AVX-512, AVX2 or NEON. Where AVX-512 has an instruction
// that the extensions cannot say (products of bfloat16 above all), it is named. Knows no operation.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VBMI__)
#define INFIRE_AVX512 1
#else
#define INFIRE_AVX512 0
#endif

namespace infire {

using bf16 = uint16_t;  // a bfloat16 by its bits

constexpr int LANES = 16;
typedef float F __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));  // words, or pairs of bf16, low half first
typedef int32_t I __attribute__((vector_size(64)));
typedef uint16_t Half __attribute__((vector_size(64)));

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline F load(const float* at) {
  F value;
  std::memcpy(&value, at, sizeof(F));
  return value;
}

inline void store(float* at, F value) { std::memcpy(at, &value, sizeof(F)); }

inline U load_words(const void* at) {
  U value;
  std::memcpy(&value, at, sizeof(U));
  return value;
}

inline void store_words(void* at, U value) { std::memcpy(at, &value, sizeof(U)); }

// The same value in every lane. Not as 0 + value, which would make +0 of -0 and cost an addition.
inline F splat(float value) {
#if defined(__AVX512F__)
  return bits<F>(_mm512_set1_ps(value));
#else
  return F{value, value, value, value, value, value, value, value,
           value, value, value, value, value, value, value, value};
#endif
}

inline U splat_word(uint32_t word) { return U{} + word; }

// Four bytes in every lane: a pair of bf16.
inline U splat_word(const void* at) {
  uint32_t word;
  std::memcpy(&word, at, sizeof(word));
  return splat_word(word);
}

inline F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return bits<F>(_mm512_fmadd_ps(bits<__m512>(a), bits<__m512>(b), bits<__m512>(c)));
#else
  return a * b + c;  // contracted, as the build asks for
#endif
}

#if !defined(__AVX512F__)
// Vectors that the machine has: GCC takes comparisons of wider ones apart into single numbers.
#if defined(__AVX2__)
typedef float Part __attribute__((vector_size(32)));
typedef int32_t Mask __attribute__((vector_size(32)));
#else
typedef float Part __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));
#endif
constexpr int PARTS = sizeof(F) / sizeof(Part);
struct Parts {
  Part part[PARTS];
};
struct Masks {
  Mask part[PARTS];
};
#endif

// All bits of a lane set where a < b.
inline I below(F a, F b) {
#if defined(__AVX512F__)
  return a < b;
#else
  const auto left = bits<Parts>(a), right = bits<Parts>(b);
  Masks result;
  for (int n = 0; n < PARTS; n++) result.part[n] = left.part[n] < right.part[n];
  return bits<I>(result);
#endif
}

// Lane by lane, `a` where `which` has all bits set and `b` where it has none.
template <class V>
inline V select(I which, V a, V b) {
#if defined(__AVX512F__)
  return which ? a : b;
#else
  return bits<V>((which & bits<I>(a)) | (~which & bits<I>(b)));
#endif
}

inline F maximum(F a, F b) { return select(below(b, a), a, b); }

template <class V, class Combine>
inline auto fold(V value, Combine combine) {
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; i++) value[i] = combine(value[i], value[i + width]);
  return value[0];
}

// The sum of all lanes, always added in the same order.
inline float sum(F value) {
  return fold(value, [](float a, float b) { return a + b; });
}

inline float largest(F value) {
  return fold(value, [](float a, float b) { return a > b ? a : b; });
}

inline float to_float(bf16 value) { return bits<float>(uint32_t{value} << 16); }

// Rounded to nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float value) {
  const uint32_t word = bits<uint32_t>(value);
  if (value != value) return static_cast<bf16>(word >> 16 | 0x40);
  return static_cast<bf16>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

// 16 small integers in lanes of their own. Loops and not __builtin_convertvector, which GCC 12
// takes apart lane by lane.
inline U widen(const uint16_t* at) {
#if defined(__AVX512F__)
  return bits<U>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))));
#else
  uint32_t words[LANES];
  for (int i = 0; i < LANES; i++) words[i] = at[i];
  return load_words(words);
#endif
}

inline U widen(const uint8_t* at) {
#if defined(__AVX512F__)
  return bits<U>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#else
  uint32_t words[LANES];
  for (int i = 0; i < LANES; i++) words[i] = at[i];
  return load_words(words);
#endif
}

inline void store_low_halves(uint16_t* at, U value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16(bits<__m512i>(value)));
#else
  uint32_t words[LANES];
  store_words(words, value);
  for (int i = 0; i < LANES; i++) at[i] = static_cast<uint16_t>(words[i]);
#endif
}

inline F load_bf16(const bf16* at) { return bits<F>(widen(at) << 16); }

inline void store_bf16(bf16* at, F value) {
  const U words = bits<U>(value);
  U rounded = (words + 0x7fff + (words >> 16 & 1)) >> 16;
  const I nan = bits<I>(0x7f800000 - (words & 0x7fffffff)) >> 31;  // all bits, or none
  rounded = select(nan, words >> 16 | 0x40, rounded);
  store_low_halves(at, rounded);
}

// acc[i] += a[i].low * b[i].low + a[i].high * b[i].high
inline F dot2(F acc, U a, U b) {
#if INFIRE_AVX512
  return bits<F>(_mm512_dpbf16_ps(bits<__m512>(acc), bits<__m512bh>(a), bits<__m512bh>(b)));
#else
  const U high = splat_word(0xffff0000u);
  acc = fma(bits<F>(a << 16), bits<F>(b << 16), acc);
  return fma(bits<F>(a & high), bits<F>(b & high), acc);
#endif
}

// e to the power of x, within 2 units in the last place; 0 below -87.3, which is where floats
// become subnormal, and at most e^88.
inline F exponential(F x) {
  const F highest = splat(88.0f), lowest = splat(-87.33f);
  const F bounded = select(below(highest, x), highest, select(below(x, lowest), lowest, x));
  const F rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F n = fma(bounded, splat(1.44269504088896341f), rounder) - rounder;
  F r = fma(n, splat(-0.693359375f), bounded);
  r = fma(n, splat(2.12194440e-4f), r);
  // Cephes' expf: e^r = 1 + r + r^2 P(r) for |r| <= ln(2) / 2 (https://netlib.org/cephes).
  F p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p * r, r, r) + splat(1.0f);
  const I exponent = (__builtin_convertvector(n, I) + 127) << 23;
  const F result = p * bits<F>(exponent);
  return select(below(x, lowest), F{}, result);
}

inline void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

}  // namespace infire
