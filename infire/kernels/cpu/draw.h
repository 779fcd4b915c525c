// One id of a row of logits, by its largest or by a number in [0, 1): all ids, or those that filters
// keep, without a sort of the vocabulary. Knows no request, and keeps nothing.
//
// A row's id depends on that row alone, bit by bit. Sums are in double precision.
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "candidates.h"
#include "pool.h"

namespace infire {

constexpr float LOWEST = -std::numeric_limits<float>::max();
constexpr int64_t BLOCK = 1024;        // ids of which only the sum is kept
constexpr int64_t MOST_IDS = SCRATCH_BYTES / sizeof(float);

// An id that may be drawn. Its weight is its probability over that of the likeliest.
struct Choice {
  uint64_t rank;
  double weight;
};

// Which ids may be drawn; applied in this order. The likeliest always may.
struct Filters {
  int64_t top_k;  // so many of the likeliest; 0: all
  double top_p;   // of those, the fewest that hold this part of their sum; 1: all
  double min_p;   // those at least so likely, relative to the likeliest
};

inline bool better(const Choice& a, const Choice& b) { return a.rank > b.rank; }

// --- numbers ---------------------------------------------------------------------------------

inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// In [0, 1); as infire.kernels.draw.uniform, which has the source.
inline double uniform(uint64_t seed, int64_t index) {
  const uint64_t step = static_cast<uint64_t>(index) + 1;
  return static_cast<double>(mix(mix(seed) + step * 0x9E3779B97F4A7C15u) >> 32) * 0x1p-32;
}

// --- passes over a row -------------------------------------------------------------------------

// Up to 16 logits; past the end -inf, which has the weight 0.
ALWAYS_INLINE F load_some(const float* at, int64_t num) {
  if (num >= LANES) return load(at);
  float some[LANES];
  for (int i = 0; i < LANES; i++) some[i] = i < num ? at[i] : -INFINITY;
  return load(some);
}

// The largest of a row, whose NaN and infinities are replaced by finite numbers first.
inline float settle(float* logits, int64_t num) {
  F most = splat(LOWEST);
  I broken{};
  int64_t n = 0;
  for (; n + LANES <= num; n += LANES) {
    const F some = load(logits + n);
    broken |= bits<I>(some - some);  // 0, or NaN
    most = maximum(some, most);
  }
  const bool all = fold(broken, [](int32_t a, int32_t b) { return a | b; }) != 0;
  float top = all ? LOWEST : largest(most);
  for (n = all ? 0 : n; n < num; n++) {
    logits[n] = clean(logits[n]);
    top = std::max(top, logits[n]);
  }
  return top;
}

// The first id whose logit is `top`.
inline int32_t first_of(const float* logits, int64_t num, float top) {
  int64_t n = 0;
  for (; n + LANES <= num; n += LANES)
    if (not_below(load(logits + n), splat(top))) break;
  while (n + 1 < num && logits[n] < top) n++;
  return static_cast<int32_t>(n);
}

// Of 16 logits: divided last, so that a low temperature makes no infinity of the largest.
ALWAYS_INLINE F weights_of(F logits, float top, float temperature) {
  return exponential((logits - splat(top)) / splat(temperature));
}

inline double sum_weights(const float* logits, int64_t num, float top, float temperature) {
  constexpr int half = LANES / 2;
  double sums[half] = {};
  for (int64_t n = 0; n < num; n += LANES) {
    float some[LANES];
    store(some, weights_of(load_some(logits + n, num - n), top, temperature));
    for (int i = 0; i < half; i++) sums[i] += some[i];
    for (int i = 0; i < half; i++) sums[i] += some[half + i];
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

inline double sum_all(const float* logits, int64_t num, float top, float temperature,
                      double* of_blocks = nullptr) {
  double total = 0;
  for (int64_t n = 0; n < num; n += BLOCK) {
    const double sum = sum_weights(logits + n, std::min(BLOCK, num - n), top, temperature);
    if (of_blocks) of_blocks[n / BLOCK] = sum;
    total += sum;
  }
  return total;
}

// --- draws --------------------------------------------------------------------------------------

// The id at which the sum of the weights, in order of ids, first exceeds its share.
inline int32_t draw_all(const float* logits, int64_t num, float top, float temperature,
                        double number) {
  std::array<double, MOST_IDS / BLOCK> sums;
  const double share = sum_all(logits, num, top, temperature, sums.data()) * number;
  double passed = 0;
  int64_t first = 0;
  while (first + BLOCK < num && passed + sums[first / BLOCK] <= share) {
    passed += sums[first / BLOCK];
    first += BLOCK;
  }
  // The last id of weight, should the block's sum have been rounded above that of its ids.
  int64_t last = first;
  for (int64_t n = first; n < std::min(first + BLOCK, num); n += LANES) {
    float some[LANES];
    store(some, weights_of(load_some(logits + n, num - n), top, temperature));
    for (int i = 0; i < LANES; i++) {
      if (some[i] > 0) last = n + i;
      passed += some[i];
      if (passed > share) return static_cast<int32_t>(n + i);
    }
  }
  return static_cast<int32_t>(last);
}

// The worst of the likeliest that hold `mass` between them: all before it hold less.
// Reorders `some`. Not a sort: halves are left aside until few are left.
inline uint64_t nucleus_end(std::span<Choice> some, double mass) {
  double before = 0;
  while (some.size() > 32) {
    const auto middle = some.begin() + some.size() / 2;
    std::nth_element(some.begin(), middle, some.end(), better);
    double half = 0;
    for (auto one = some.begin(); one != middle; one++) half += one->weight;
    if (before + half >= mass) {
      some = {some.begin(), middle};
    } else {
      before += half;
      some = {middle, some.end()};
    }
  }
  std::sort(some.begin(), some.end(), better);
  size_t n = 0;
  while (n + 1 < some.size() && (before += some[n].weight) < mass) n++;
  return some[n].rank;
}

// Draws one of `some`, which are in order of ids and hold all that top_k and top_p keep. `total`
// is the weight of all ids.
inline int32_t draw_filtered(std::span<const Choice> some, const Filters& filters, double total,
                      double number) {
  uint64_t end = 0;
  const auto top_k = static_cast<size_t>(filters.top_k);
  const bool few = top_k > 0 && top_k < some.size();
  if (few || filters.top_p < 1) {
    std::vector<Choice> ranked(some.begin(), some.end());
    if (few) {
      std::nth_element(ranked.begin(), ranked.begin() + (top_k - 1), ranked.end(), better);
      end = ranked[top_k - 1].rank;
    }
    if (top_k > 0) {
      total = 0;  // in order of ids: so it is the same however the candidates were found
      for (const Choice& one : some) total += one.rank >= end ? one.weight : 0;
    }
    if (few) ranked.resize(top_k);
    if (filters.top_p < 1) end = nucleus_end(ranked, filters.top_p * total);
  }
  const auto kept = [&](const Choice& one) {
    return one.rank >= end && (one.weight >= filters.min_p || one.weight >= 1);
  };
  double sum = 0;
  for (const Choice& one : some) sum += kept(one) ? one.weight : 0;
  const double share = sum * number;
  double passed = 0;
  for (const Choice& one : some) {
    passed += kept(one) ? one.weight : 0;
    if (passed > share) return id_of(one.rank);
  }
  return id_of(some.back().rank);  // of no ids with a weight
}

// All ids whose logit is at least `lowest`, in order.
inline void gather(const float* logits, int64_t num, float lowest, float top, float temperature,
            std::vector<Choice>& out) {
  out.clear();
  for (int64_t n = 0; n < num; n += LANES) {
    const F some = load_some(logits + n, num - n);
    uint32_t left = not_below(some, splat(lowest));
    if (num - n < LANES) left &= (1u << (num - n)) - 1;
    if (!left) continue;
    float weights[LANES];
    store(weights, weights_of(some, top, temperature));
    for (; left; left &= left - 1) {
      const int i = __builtin_ctz(left);
      out.push_back({rank_of(logits[n + i], static_cast<int32_t>(n) + i), weights[i]});
    }
  }
}

// The ids that a threshold on the weight keeps, one that falls until `enough` of them are found.
template <class Enough>
std::vector<Choice> gather_until(const float* logits, int64_t num, float top, float temperature,
                                 const Enough& enough) {
  std::vector<Choice> some;
  some.reserve(1024);
  for (const int halvings : {4, 8, 14, 24}) {
    const float lowest = top - temperature * static_cast<float>(halvings * M_LN2);
    gather(logits, num, lowest, top, temperature, some);
    if (enough(some, std::ldexp(1.01, -halvings))) return some;  // 1.01: rounding
  }
  gather(logits, num, -INFINITY, top, temperature, some);
  return some;
}

inline int32_t draw_filtered(const float* logits, int64_t num, float top, float temperature,
                      const Filters& filters, double number) {
  const bool nucleus = filters.top_p < 1;
  double total = 0;
  if (nucleus && filters.top_k == 0) total = sum_all(logits, num, top, temperature);
  const auto enough = [&](const std::vector<Choice>& some, double lightest) {
    if (filters.top_k > 0 && static_cast<int64_t>(some.size()) >= filters.top_k) return true;
    if (filters.min_p >= lightest && !(nucleus && filters.top_k > 0)) return true;
    if (!nucleus || filters.top_k > 0) return false;
    double mass = 0;
    for (const Choice& one : some) mass += one.weight;
    return mass >= filters.top_p * total;
  };
  return draw_filtered(gather_until(logits, num, top, temperature, enough), filters, total, number);
}

}  // namespace infire
