// The inner loops of a product: a few rows times a few strips, in registers. Knows no threads and
// no blocks.
//
// A sum is one chain over its inputs in order, in every one of these, so that it is the same bits
// whichever of them computes it.
#pragma once

#include <utility>

#include "panel.h"

namespace infire {

#if INFIRE_AVX512
constexpr int MOST_TILE = 24;        // sums that a tile keeps in registers, of 32
constexpr int WIDE = 4, NARROW = 2;  // strips a panel has, for few rows and for many
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int MOST_TILE = 6;  // a sum takes two registers of 16, or four of 32
constexpr int WIDE = 2, NARROW = 1;
#else
constexpr int MOST_TILE = 2;  // a sum takes four registers of 16
constexpr int WIDE = 2, NARROW = 1;
#endif
constexpr int64_t PREFETCH_BYTES = 1536;
// Of 12 bits. With 8 floats a vector, decoding keeps a core too busy to look ahead by itself.
constexpr int64_t PACKED_PREFETCH_BYTES = INFIRE_AVX512 ? 2304 : 6144;

// Up to how many rows the streams of a wide panel pay.
inline int64_t few_rows(const Matrix& matrix) {
  if (INFIRE_AVX512) return 3;
  return matrix.format == BF16 ? 2 : 0;  // decoding has work enough for one stream
}

// sum += the products of an input pair of one row.
ALWAYS_INLINE F add_pair(F sum, U weights, const Input* x) {
#if INFIRE_AVX512
  return dot2(sum, weights, splat_word(static_cast<const void*>(x)));
#else
  sum = fma(low_half(weights), splat(x[0]), sum);
  return fma(high_half(weights), splat(x[1]), sum);
#endif
}

// What a tile fetches meanwhile, so much with each pair of each strip: memory works as long as
// products do. (All at once, while a panel is decoded, it kept the core waiting.)
struct Ahead {
  const uint8_t* at;
  int64_t strip_stride;
  int64_t pair_stride;
};

// ROWS rows of x times STRIPS strips of a panel, for `pairs` input pairs; continues `sums`, which
// is (ROWS, 16 * STRIPS), or begins them.
template <int ROWS, int STRIPS>
void multiply_tile(const uint8_t* panel, int64_t strip_stride, int64_t pairs, const Input* x,
                   int64_t ld_x, float* sums, bool begin, const Ahead& next) {
  const Ahead ahead = next;
  F acc[ROWS][STRIPS];
#pragma GCC unroll 24
  for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
    for (int strip = 0; strip < STRIPS; strip++)
      acc[row][strip] = begin ? F{} : load(sums + (row * STRIPS + strip) * LANES);
#if INFIRE_AVX512
  for (int64_t pair = 0; pair < pairs; pair++) {
    U some[STRIPS];
    for (int strip = 0; strip < STRIPS; strip++) {
      const uint8_t* at = panel + strip * strip_stride + PAIR_BYTES * pair;
      some[strip] = load_words(at);
      prefetch(ahead.at + strip * ahead.strip_stride + pair * ahead.pair_stride);
    }
    for (int row = 0; row < ROWS; row++) {
      const U inputs = splat_word(static_cast<const void*>(x + row * ld_x + 2 * pair));
      for (int strip = 0; strip < STRIPS; strip++)
        acc[row][strip] = dot2(acc[row][strip], some[strip], inputs);
    }
  }
#else
  for (int64_t input = 0; input < 2 * pairs; input++) {
    if (input % 2 == 0)
#pragma GCC unroll 4
      for (int strip = 0; strip < STRIPS; strip++)
        prefetch(ahead.at + strip * ahead.strip_stride + input / 2 * ahead.pair_stride);
    F some[STRIPS];
#pragma GCC unroll 4
    for (int strip = 0; strip < STRIPS; strip++)
      some[strip] = hold(load_as<F>(panel + strip * strip_stride + VECTOR_BYTES * input));
#pragma GCC unroll 24
    for (int row = 0; row < ROWS; row++) {
      const F value = splat(x[row * ld_x + input]);
#pragma GCC unroll 4
      for (int strip = 0; strip < STRIPS; strip++)
        acc[row][strip] = fma(some[strip], value, acc[row][strip]);
    }
  }
#endif
#pragma GCC unroll 24
  for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
    for (int strip = 0; strip < STRIPS; strip++)
      store(sums + (row * STRIPS + strip) * LANES, acc[row][strip]);
}

using Tile = void (*)(const uint8_t*, int64_t, int64_t, const Input*, int64_t, float*, bool,
                      const Ahead&);

// The tiles of 1 .. MOST_TILE / STRIPS rows.
template <int STRIPS, int... ROWS>
inline Tile tile_of(int64_t rows, std::integer_sequence<int, ROWS...>) {
  static constexpr Tile tiles[] = {multiply_tile<ROWS + 1, STRIPS>...};
  return tiles[rows - 1];
}

// A few rows times STRIPS strips of a matrix, where decoded weights need not leave registers.
template <int ROWS, int STRIPS>
class FewRows {
 public:
  FewRows(const Matrix& matrix, int64_t first_strip, const Input* x, int64_t ld_x)
      : matrix_(matrix),
        at_(matrix.data + first_strip * strip_bytes(matrix)),
        stride_(strip_bytes(matrix)),
        first_strip_(first_strip),
        x_(x),
        ld_x_(ld_x) {}

  // Fills `sums`, which is (ROWS, 16 * STRIPS).
  void multiply(float* sums) {
    F acc[ROWS][STRIPS] = {};
    if (matrix_.format == BF16)
      multiply_bf16(acc);
    else
      multiply_u12(acc);
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
      for (int strip = 0; strip < STRIPS; strip++)
        store(sums + (row * STRIPS + strip) * LANES, acc[row][strip]);
  }

 private:
  using Sums = F[ROWS][STRIPS];

  ALWAYS_INLINE void add(Sums& acc, int strip, U weights, const Input* x) const {
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; row++)
      acc[row][strip] = add_pair(acc[row][strip], weights, x + row * ld_x_);
  }

  // How far from byte `done` of a strip lies what is fetched: so many bytes on, or where those are
  // of the next strip, which is being read, as many on in the strip that follows all of these.
  ALWAYS_INLINE int64_t ahead_of(int64_t done, int64_t bytes) const {
    return done + bytes < stride_ ? bytes : bytes + (STRIPS - 1) * stride_;
  }

  ALWAYS_INLINE void multiply_bf16(Sums& acc) const {
    for (int64_t pair = 0; pair < matrix_.num_pairs; pair++) {
      const int64_t ahead = ahead_of(pair * PAIR_BYTES, PREFETCH_BYTES);
#pragma GCC unroll 4
      for (int strip = 0; strip < STRIPS; strip++) {
        const uint8_t* at = at_ + strip * stride_ + pair * PAIR_BYTES;
        prefetch(at + ahead);
        add(acc, strip, load_words(at), x_ + 2 * pair);
      }
    }
  }

  ALWAYS_INLINE void multiply_u12(Sums& acc) const {
    const Exception* exceptions = matrix_.exceptions;
    int32_t next[STRIPS], end[STRIPS];
    Half bases[STRIPS];
    for (int strip = 0; strip < STRIPS; strip++) {
      next[strip] = matrix_.ptr[first_strip_ + strip];
      end[strip] = matrix_.ptr[first_strip_ + strip + 1];
      bases[strip] = bases_of(matrix_.base + (first_strip_ + strip) * LANES);
    }
    const int64_t groups = matrix_.num_pairs / GROUP_PAIRS;
    const uint8_t* at = at_;
    const Input* x = x_;
    for (int64_t group = 0; group < groups; group++) {
      // Groups up to the next that has an exception.
      int64_t plain = groups;
      for (int strip = 0; strip < STRIPS; strip++)
        if (next[strip] < end[strip])
          plain = std::min(plain, int64_t{exceptions[next[strip]].input} / (2 * GROUP_PAIRS));
      for (; group < plain; group++, at += GROUP_BYTES, x += 2 * GROUP_PAIRS) {
        const int64_t ahead = ahead_of(group * GROUP_BYTES, PACKED_PREFETCH_BYTES);
#pragma GCC unroll 4
        for (int strip = 0; strip < STRIPS; strip++) {
          const uint8_t* from = at + strip * stride_;
          for (int line = 0; line < 3; line++) prefetch(from + ahead + 64 * line);
          add_group(acc, strip, from, bases[strip], x);
        }
      }
      if (group == groups) break;
      for (int strip = 0; strip < STRIPS; strip++) {
        U weights[GROUP_PAIRS];
        decode_group(at + strip * stride_, bases[strip], weights);
        bf16* values = reinterpret_cast<bf16*>(weights);
        for (; next[strip] < end[strip]; next[strip]++) {
          const Exception& one = exceptions[next[strip]];
          const int64_t input = one.input - group * 2 * GROUP_PAIRS;
          if (input >= 2 * GROUP_PAIRS) break;
          values[input / 2 * 2 * LANES + one.row * 2 + input % 2] = one.value;
        }
        for (int pair = 0; pair < GROUP_PAIRS; pair++) add(acc, strip, weights[pair], x + 2 * pair);
      }
      at += GROUP_BYTES;
      x += 2 * GROUP_PAIRS;
    }
  }

  ALWAYS_INLINE void add_group(Sums& acc, int strip, const uint8_t* at, Half bases,
                               const Input* x) const {
    const Half codes = codes_of(at);
    add(acc, strip, decode_pair<0>(at, codes, bases), x);
    add(acc, strip, decode_pair<1>(at, codes, bases), x + 2);
    add(acc, strip, decode_pair<2>(at, codes, bases), x + 4);
    add(acc, strip, decode_pair<3>(at, codes, bases), x + 6);
  }

  const Matrix& matrix_;
  const uint8_t* at_;
  int64_t stride_;
  int64_t first_strip_;
  const Input* x_;
  int64_t ld_x_;
};

}  // namespace infire
