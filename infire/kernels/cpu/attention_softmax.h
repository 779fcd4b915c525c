// Scores of one chunk of keys to weights, relative to the largest of them; and what two such
// results are together. Knows neither queries nor KV.
#pragma once

#include <limits>

#include "simd.h"

namespace infire {

constexpr float LOWEST = -1e30f;  // below any score; finite, so that it may be subtracted

// 2 to the power of x <= 1, within 3e-6 of it: a hundredth of what rounding to bf16 costs. Exactly
// 1 for 0, and exactly 0 below -126, where floats become subnormal.
ALWAYS_INLINE F power_of_two(F x) {
  const F lowest = splat(-126.0f);
  const F bounded = maximum(lowest, x);
  const F rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F shifted = bounded + rounder;
  const F f = bounded - (shifted - rounder);
  // Fitted to 2^f for |f| <= 1/2, by least relative error at most.
  F p = fma(splat(9.582852e-3f), f, splat(5.5906426e-2f));
  p = fma(p, f, splat(2.4024099e-1f));
  p = fma(p, f, splat(6.931242e-1f));
  p = fma(p, f, splat(1.0f));
  const F power = bits<F>(bits<I>(p) + (bits<I>(shifted) << 23));
  return select(below(x, lowest), F{}, power);
}

// Weights are at least 0, and none is subnormal.
ALWAYS_INLINE void store_weights(Input* at, F weights) {
#if INFIRE_AVX512
  const __m256i rounded = bits<__m256i>(_mm512_cvtneps_pbh(bits<__m512>(weights)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), rounded);
#else
  store(at, bits<F>((bits<U>(weights) + 0x7fff + (bits<U>(weights) >> 16 & 1)) & 0xffff0000u));
#endif
}

// Part of a chunk, by its keys.
struct Range {
  int64_t begin;
  int64_t end;

  int64_t first_vector() const { return begin / LANES; }
  int64_t end_vector() const { return (end + LANES - 1) / LANES; }
};

// Hides the scores of a vector, which begins at key `at`, that are not in `seen`.
ALWAYS_INLINE F hide(F scores, int64_t at, Range seen) {
  const F keys = splat(static_cast<float>(at)) + lane_numbers();
  const F hidden = splat(-std::numeric_limits<float>::infinity());
  const F late = select(below(keys, splat(static_cast<float>(seen.end))), scores, hidden);
  return select(below(keys, splat(static_cast<float>(seen.begin))), hidden, late);
}

// The largest score of `computed` that is in `seen`; LOWEST if none is. Hides what is not, there.
ALWAYS_INLINE float hide_and_find_top(float* scores, Range computed, Range seen) {
  F top = splat(LOWEST);
  for (int64_t v = computed.first_vector(); v < computed.end_vector(); v++) {
    F vector = load(scores + v * LANES);
    if (seen.begin > v * LANES || seen.end < (v + 1) * LANES) {
      vector = hide(vector, v * LANES, seen);
      store(scores + v * LANES, vector);
    }
    top = maximum(top, vector);
  }
  return largest(top);
}

// weights = 2^(scores * scale - top), rounded; their sums, lane by lane, before that.
ALWAYS_INLINE F weigh(const float* scores, Range computed, float scale, float top, Input* weights) {
  F total{};
  for (int64_t v = computed.first_vector(); v < computed.end_vector(); v++) {
    const F weight = power_of_two(fma(load(scores + v * LANES), splat(scale), splat(-top)));
    total += weight;
    store_weights(weights + v * LANES, weight);
  }
  return total;
}

// By what the sums relative to the lower of two tops are multiplied to be added to the others.
ALWAYS_INLINE F factor_of(F top, F other) {
  return power_of_two(select(below(top, other), top - other, other - top));
}

// Sums relative to two tops, of which `rises` says that the second is higher -> of both, there.
inline void add_scaled(float* running, const float* found, int64_t size, F factor, bool rises) {
  for (int64_t i = 0; i < size; i += LANES) {
    const F a = load(running + i), b = load(found + i);
    store(running + i, rises ? fma(a, factor, b) : fma(b, factor, a));
  }
}

}  // namespace infire
