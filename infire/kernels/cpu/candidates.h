// The best of a row of logits that is never written out: what the head's product gives to each
// thread, tile by tile, is looked at while it is in registers. Knows no request and no draw.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "simd.h"

namespace infire {

constexpr int64_t MOST_CANDIDATES = 64;  // that may be asked for

// A logit as the sampler takes it: as torch.nan_to_num, NaN being the lowest number there is.
ALWAYS_INLINE float clean(float logit) {
  constexpr float most = std::numeric_limits<float>::max();
  if (!(logit >= -most)) return -most;
  return logit > most ? most : logit;
}

// A logit and its id in one integer: the larger it is, the likelier the id, and of equal logits
// the lowest id is first. No two of a row are equal, and none is 0.
ALWAYS_INLINE uint64_t rank_of(float logit, int32_t id) {
  const uint32_t word = bits<uint32_t>(clean(logit) + 0.0f);  // + 0: there is one zero
  const uint32_t ordered = word >> 31 ? ~word : word | 0x80000000u;
  return uint64_t{ordered} << 32 | static_cast<uint32_t>(~id);
}

inline int32_t id_of(uint64_t rank) { return static_cast<int32_t>(~static_cast<uint32_t>(rank)); }

ALWAYS_INLINE float logit_of(uint64_t rank) {
  const uint32_t ordered = static_cast<uint32_t>(rank >> 32);
  return bits<float>(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

// Bit i: a[i] >= b[i], or one of them is NaN.
ALWAYS_INLINE uint32_t not_below(F a, F b) {
#if INFIRE_AVX512
  return _mm512_cmp_ps_mask(bits<__m512>(a), bits<__m512>(b), _CMP_NLT_UQ);
#elif defined(__AVX2__)
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(a.part[0], b.part[0], _CMP_NLT_UQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(a.part[1], b.part[1], _CMP_NLT_UQ));
  return static_cast<uint32_t>(low | high << 8);
#else
  const I lanes = below(a, b);
  if (fold(lanes, [](int32_t x, int32_t y) { return x & y; })) return 0;  // as it nearly always is
  uint32_t mask = 0;
  for (int i = 0; i < LANES; i++) mask |= (lanes[i] ? 0u : 1u) << i;
  return mask;
#endif
}

// What one thread has found for one sampled position.
struct alignas(64) Candidates {
  int64_t limit;          // how many are wanted, 1 .. MOST_CANDIDATES
  int64_t count;          // how many are in `ranks`: with `limit` given or more, at least `limit`
  uint64_t worst;         // a rank that `limit` others are known to reach; 0: not known yet
  float threshold;        // its logit: what is below need not be looked at
  uint64_t ranks[128];    // in no order; the `limit` largest of all that were given among them
};

ALWAYS_INLINE void reset(Candidates& some, int64_t limit) {
  some.limit = limit;
  some.count = 0;
  some.worst = 0;
  some.threshold = -INFINITY;
}

ALWAYS_INLINE void keep_best(Candidates& some) {
  uint64_t* last = some.ranks + some.limit - 1;
  std::nth_element(some.ranks, last, some.ranks + some.count, std::greater<uint64_t>());
  some.count = some.limit;
  some.worst = *last;
  some.threshold = logit_of(some.worst);
  // Infinities are cleaned after the comparison: -inf is as good as the lowest number.
  if (some.threshold == clean(-INFINITY)) some.threshold = -INFINITY;
}

// Looks at `num` logits of the ids from `first_id` on, in any order of tiles.
ALWAYS_INLINE void collect(Candidates& some, int32_t first_id, const float* logits, int64_t num) {
  constexpr int64_t room = 128 - LANES;
  for (int64_t n = 0; n < num; n += LANES) {
    const int64_t length = std::min<int64_t>(LANES, num - n);
    uint32_t left = (1u << length) - 1;
    if (length == LANES) left = not_below(load(logits + n), splat(some.threshold));
    if (!left) continue;
    for (; left; left &= left - 1) {
      const int i = __builtin_ctz(left);
      const uint64_t rank = rank_of(logits[n + i], first_id + static_cast<int32_t>(n) + i);
      if (rank > some.worst) some.ranks[some.count++] = rank;
    }
    // Twice as many as wanted: the sooner the threshold rises, the less gets past it.
    if (some.count > std::min(room, 2 * some.limit - 1)) keep_best(some);
  }
}

}  // namespace infire
