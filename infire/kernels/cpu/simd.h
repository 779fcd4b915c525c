// Vectors of 16 floats, written once for every instruction set with the vector extensions of GCC
// and Clang: the compiler lowers them to AVX-512, AVX2 or NEON. Where a machine has an instruction
// that the extensions cannot say (products of bfloat16 above all), it is named. Knows no operation.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VBMI__)
#define INFIRE_AVX512 1
#else
#define INFIRE_AVX512 0
#endif

// Vectors travel in registers only between functions that are one.
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace infire {

using bf16 = uint16_t;  // a bfloat16 by its bits

constexpr int LANES = 16;
constexpr int VECTOR_BYTES = 64;

#if INFIRE_AVX512
typedef float F __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));  // words, or pairs of bf16, low half first
typedef int32_t I __attribute__((vector_size(64)));
typedef uint16_t Half __attribute__((vector_size(64)));
#else
#if defined(__AVX2__)
constexpr int PART_BYTES = 32;
#else
constexpr int PART_BYTES = 16;
#endif
constexpr int PARTS = VECTOR_BYTES / PART_BYTES;

template <class T>
using Part __attribute__((vector_size(PART_BYTES))) = T;

// A vector as the machine has it, in parts. Not one wide vector of the extensions: GCC 12 keeps
// those in memory between operations, and takes comparisons and conversions apart lane by lane.
template <class T>
struct Wide {
  Part<T> part[PARTS];

  template <class Function>
  ALWAYS_INLINE static Wide by_part(const Function& function) {
    Wide result;
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; p++) result.part[p] = function(p);
    return result;
  }

#define INFIRE_LANEWISE(op)                                                      \
  ALWAYS_INLINE friend Wide operator op(Wide a, Wide b) {                                      \
    return by_part([&](int p) { return a.part[p] op b.part[p]; });               \
  }                                                                              \
  ALWAYS_INLINE friend Wide operator op(Wide a, T b) {                                         \
    return by_part([&](int p) { return a.part[p] op b; });                       \
  }                                                                              \
  ALWAYS_INLINE friend Wide operator op(T a, Wide b) {                                         \
    return by_part([&](int p) { return a op b.part[p]; });                       \
  }                                                                              \
  ALWAYS_INLINE Wide& operator op##=(Wide other) { return *this = *this op other; }
  INFIRE_LANEWISE(+)
  INFIRE_LANEWISE(-)
  INFIRE_LANEWISE(*)
  INFIRE_LANEWISE(/)
  INFIRE_LANEWISE(&)
  INFIRE_LANEWISE(|)
#undef INFIRE_LANEWISE
  ALWAYS_INLINE friend Wide operator<<(Wide a, int by) {
    return by_part([&](int p) { return a.part[p] << by; });
  }
  ALWAYS_INLINE friend Wide operator>>(Wide a, int by) {
    return by_part([&](int p) { return a.part[p] >> by; });
  }
  ALWAYS_INLINE friend Wide operator-(Wide a) {
    return by_part([&](int p) { return -a.part[p]; });
  }
  ALWAYS_INLINE friend Wide operator~(Wide a) {
    return by_part([&](int p) { return ~a.part[p]; });
  }
  T operator[](int64_t lane) const {
    T lanes[VECTOR_BYTES / sizeof(T)];
    std::memcpy(lanes, part, sizeof(lanes));
    return lanes[lane];
  }
};

using F = Wide<float>;
using U = Wide<uint32_t>;  // words, or pairs of bf16, low half first
using I = Wide<int32_t>;
using Half = Wide<uint16_t>;
#endif

template <class To, class From>
ALWAYS_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

#if !INFIRE_AVX512
// Part by part, for the sake of registers.
template <class To, class T>
ALWAYS_INLINE To bits(Wide<T> from) {
  return To::by_part([&](int p) { return (decltype(To::part[0] + To::part[0]))from.part[p]; });
}
#endif

template <class V>
ALWAYS_INLINE V load_as(const void* at) {
  V value;
#if INFIRE_AVX512
  std::memcpy(&value, at, sizeof(V));
#else
#pragma GCC unroll 4
  for (int p = 0; p < PARTS; p++)
    std::memcpy(&value.part[p], static_cast<const char*>(at) + PART_BYTES * p, PART_BYTES);
#endif
  return value;
}

template <class V>
ALWAYS_INLINE void store_as(void* at, V value) {
#if INFIRE_AVX512
  std::memcpy(at, &value, sizeof(V));
#else
#pragma GCC unroll 4
  for (int p = 0; p < PARTS; p++)
    std::memcpy(static_cast<char*>(at) + PART_BYTES * p, &value.part[p], PART_BYTES);
#endif
}

ALWAYS_INLINE F load(const float* at) { return load_as<F>(at); }

ALWAYS_INLINE void store(float* at, F value) { store_as(at, value); }

ALWAYS_INLINE U load_words(const void* at) { return load_as<U>(at); }

ALWAYS_INLINE void store_words(void* at, U value) { store_as(at, value); }

// The same value in every lane. Not as 0 + value, which would make +0 of -0 and cost an addition.
ALWAYS_INLINE F splat(float value) {
#if INFIRE_AVX512
  return bits<F>(_mm512_set1_ps(value));
#elif defined(__AVX2__)
  const __m256 all = _mm256_set1_ps(value);
  return F::by_part([&](int) { return all; });
#else
  return F::by_part([&](int) { return Part<float>{value, value, value, value}; });
#endif
}

ALWAYS_INLINE U splat_word(uint32_t word) { return U{} + word; }

// Four bytes in every lane: a pair of bf16.
ALWAYS_INLINE U splat_word(const void* at) {
  uint32_t word;
  std::memcpy(&word, at, sizeof(word));
  return splat_word(word);
}

// Holds a vector in registers: GCC would load it anew for each use, and a core loads no more
// vectors than it multiplies.
ALWAYS_INLINE F hold(F value) {
#if defined(__AVX2__) && !INFIRE_AVX512
#pragma GCC unroll 4
  for (int p = 0; p < PARTS; p++) asm("" : "+x"(value.part[p]));
#endif
  return value;
}

// 0, 1, 2, ... 15
ALWAYS_INLINE F lane_numbers() {
  alignas(VECTOR_BYTES) static constexpr float numbers[LANES] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                                 8, 9, 10, 11, 12, 13, 14, 15};
  return load(numbers);
}

ALWAYS_INLINE F fma(F a, F b, F c) {
#if INFIRE_AVX512
  return bits<F>(_mm512_fmadd_ps(bits<__m512>(a), bits<__m512>(b), bits<__m512>(c)));
#else  // contracted, as the build asks for
  return F::by_part([&](int p) { return a.part[p] * b.part[p] + c.part[p]; });
#endif
}

// All bits of a lane set where a < b.
ALWAYS_INLINE I below(F a, F b) {
#if INFIRE_AVX512
  return a < b;
#else
  return I::by_part([&](int p) { return a.part[p] < b.part[p]; });
#endif
}

// Lane by lane, `a` where `which` has all bits set and `b` where it has none.
template <class V>
ALWAYS_INLINE V select(I which, V a, V b) {
#if INFIRE_AVX512
  return which ? a : b;
#else
  return bits<V>((which & bits<I>(a)) | (~which & bits<I>(b)));
#endif
}

ALWAYS_INLINE F maximum(F a, F b) {
#if INFIRE_AVX512 || !defined(__AVX2__)
  return select(below(b, a), a, b);
#else  // b where one is NaN or both are zeros, as above
  return F::by_part([&](int p) { return _mm256_max_ps(a.part[p], b.part[p]); });
#endif
}

template <class V, class Combine>
ALWAYS_INLINE auto fold(V value, Combine combine) {
  std::remove_cvref_t<decltype(value[0])> lanes[LANES];
  store_as(lanes, value);
#pragma GCC unroll 4
  for (int width = LANES / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; i++) lanes[i] = combine(lanes[i], lanes[i + width]);
  return lanes[0];
}

// The sum of all lanes, always added in the same order.
ALWAYS_INLINE float sum(F value) {
  return fold(value, [](float a, float b) { return a + b; });
}

ALWAYS_INLINE float largest(F value) {
  return fold(value, [](float a, float b) { return a > b ? a : b; });
}

// The nearest integer below, of numbers that are integers already.
ALWAYS_INLINE I to_integers(F value) {
#if INFIRE_AVX512
  return __builtin_convertvector(value, I);
#else
  return I::by_part([&](int p) { return __builtin_convertvector(value.part[p], Part<int32_t>); });
#endif
}

ALWAYS_INLINE float to_float(bf16 value) { return bits<float>(uint32_t{value} << 16); }

// Rounded to nearest, ties to even; NaN stays NaN.
ALWAYS_INLINE bf16 to_bf16(float value) {
  const uint32_t word = bits<uint32_t>(value);
  if (value != value) return static_cast<bf16>(word >> 16 | 0x40);
  return static_cast<bf16>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

#if !INFIRE_AVX512
// As many small integers as a part has words.
template <class T>
using Small __attribute__((vector_size(PART_BYTES / 4 * sizeof(T)))) = T;

template <class T>
ALWAYS_INLINE U widen_parts(const T* at) {
  return U::by_part([&](int p) {
    Small<T> some;
    std::memcpy(&some, at + PART_BYTES / 4 * p, sizeof(some));
    return __builtin_convertvector(some, Part<uint32_t>);
  });
}
#endif

// 16 small integers in lanes of their own.
ALWAYS_INLINE U widen(const uint16_t* at) {
#if INFIRE_AVX512
  return bits<U>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))));
#elif defined(__AVX2__)
  return U::by_part([&](int p) {
    return (Part<uint32_t>)_mm256_cvtepu16_epi32(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 8 * p)));
  });
#else
  return widen_parts(at);
#endif
}

ALWAYS_INLINE U widen(const uint8_t* at) {
#if INFIRE_AVX512
  return bits<U>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#elif defined(__AVX2__)
  return U::by_part([&](int p) {
    return (Part<uint32_t>)_mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + 8 * p)));
  });
#else
  uint32_t words[LANES];
  for (int i = 0; i < LANES; i++) words[i] = at[i];
  return load_words(words);
#endif
}

ALWAYS_INLINE void store_low_halves(uint16_t* at, U value) {
#if INFIRE_AVX512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_cvtepi32_epi16(bits<__m512i>(value)));
#elif defined(__AVX2__)
  value = value & 0xffff;
  const __m256i packed = _mm256_packus_epi32((__m256i)value.part[0], (__m256i)value.part[1]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm256_permute4x64_epi64(packed, 0xd8));
#else
#pragma GCC unroll 4
  for (int p = 0; p < PARTS; p++) {
    const auto some = __builtin_convertvector(value.part[p], Small<uint16_t>);
    std::memcpy(at + PART_BYTES / 4 * p, &some, sizeof(some));
  }
#endif
}

ALWAYS_INLINE F load_bf16(const bf16* at) { return bits<F>(widen(at) << 16); }

// As to_bf16, each in the low half of its word.
ALWAYS_INLINE U rounded_words(F value) {
  const U words = bits<U>(value);
  const U rounded = (words + 0x7fff + (words >> 16 & 1)) >> 16;
  const I nan = bits<I>(0x7f800000 - (words & 0x7fffffff)) >> 31;  // all bits, or none
  return select(nan, words >> 16 | 0x40, rounded);
}

ALWAYS_INLINE F rounded(F value) { return bits<F>(rounded_words(value) << 16); }

ALWAYS_INLINE void store_bf16(bf16* at, F value) { store_low_halves(at, rounded_words(value)); }

// What products read of activations, rounded to bf16 either way: pairs where the machine
// multiplies those, else floats, so that no product has to convert them once more.
#if INFIRE_AVX512
using Input = bf16;
ALWAYS_INLINE void store_input(Input* at, F value) { store_bf16(at, value); }
#else
using Input = float;
ALWAYS_INLINE void store_input(Input* at, F value) { store(at, rounded(value)); }
#endif

// acc[i] += a[i].low * b[i].low + a[i].high * b[i].high
ALWAYS_INLINE F dot2(F acc, U a, U b) {
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
ALWAYS_INLINE F exponential(F x) {
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
  const I exponent = (to_integers(n) + 127) << 23;
  const F result = p * bits<F>(exponent);
  return select(below(x, lowest), F{}, result);
}

ALWAYS_INLINE void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

}  // namespace infire
