// Products of a few rows with a packed matrix: the inner loop of attention. Knows no attention.
//
// A is (rows, k) elements, B is (k, columns) elements, C is (rows, columns) floats: C[r][c] is one
// chain over k in order, so an element of C is the same bits whatever rows and columns are computed
// beside it. An element is a pair of bf16, or a float where the machine does not multiply pairs.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace infire {

#if INFIRE_AVX512
using Element = uint32_t;
constexpr int PAIR_ELEMENTS = 1;
#else
using Element = float;
constexpr int PAIR_ELEMENTS = 2;  // inputs of a pair
#endif

// A tile's sums fill the registers: 24 of 32, or 6 of which each takes two of 16 or four of 32.
constexpr int TILE_ROWS = 6;
constexpr int tile_vectors(int rows) { return INFIRE_AVX512 ? 4 : rows <= 3 ? 2 : 1; }

struct Product {
  const Element* a;
  int64_t lda;
  const Element* b;
  int64_t ldb;
  int64_t num_elements;  // k
  float* c;
  int64_t ldc;
};

ALWAYS_INLINE U load_column(const uint32_t* at) { return load_words(at); }
ALWAYS_INLINE F load_column(const float* at) { return load(at); }

ALWAYS_INLINE F add_element(F sum, U column, const uint32_t* row) {
  return dot2(sum, splat_word(static_cast<const void*>(row)), column);
}

ALWAYS_INLINE F add_element(F sum, F column, const float* row) {
  return fma(column, splat(*row), sum);
}

template <int ROWS, int VECTORS>
inline void multiply_tile(const Product& product) {
  using Column = std::conditional_t<INFIRE_AVX512, U, F>;
  const Element* a = product.a;
  const Element* b = product.b;
  const int64_t lda = product.lda, ldb = product.ldb;
  F sums[ROWS][VECTORS] = {};
  for (int64_t n = 0; n < product.num_elements; n++, a++, b += ldb) {
    Column columns[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) columns[v] = load_column(b + v * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++)
        sums[r][v] = add_element(sums[r][v], columns[v], a + r * lda);
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) store(product.c + r * product.ldc + v * LANES, sums[r][v]);
}

using Multiply = void (*)(const Product&);

// Of 1 .. tile_vectors(ROWS) vectors.
template <int ROWS, std::size_t... VECTORS>
constexpr auto multiplies(std::index_sequence<VECTORS...>) {
  return std::array<Multiply, sizeof...(VECTORS)>{multiply_tile<ROWS, VECTORS + 1>...};
}

// C of ROWS rows and `num_vectors` * 16 columns.
template <int ROWS>
inline void multiply_rows(Product product, int64_t num_vectors) {
  constexpr int most = tile_vectors(ROWS);
  static constexpr auto shapes = multiplies<ROWS>(std::make_index_sequence<most>{});
  for (; num_vectors > 0; num_vectors -= most) {
    const int64_t width = std::min<int64_t>(num_vectors, most);
    shapes[width - 1](product);
    product.b += width * LANES;
    product.c += width * LANES;
  }
}

#if !INFIRE_AVX512
// A product with rows of bf16 that lie anywhere; as many rows that are needed next are fetched.
struct RowsAt {
  const float* a;  // (rows of c, num_rows)
  int64_t lda;
  const bf16* const* b;
  const bf16* const* ahead;
  int64_t num_rows;
  float* c;
  int64_t ldc;
};

// As multiply_tile; VECTORS * 16 columns from `first` on.
template <int ROWS, int VECTORS>
inline void multiply_rows_at(const RowsAt& product, int64_t first) {
  F sums[ROWS][VECTORS] = {};
  for (int64_t n = 0; n < product.num_rows; n++) {
    prefetch(product.ahead[n] + first);
    F columns[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) columns[v] = load_bf16(product.b[n] + first + v * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++)
        sums[r][v] = add_element(sums[r][v], columns[v], product.a + r * product.lda + n);
  }
  float* c = product.c + first;
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) store(c + r * product.ldc + v * LANES, sums[r][v]);
}

template <int ROWS>
inline void multiply_rows_at(const RowsAt& product, int64_t num_vectors) {
  constexpr int most = ROWS <= 3 ? 2 : 1;
  int64_t v = 0;
  for (; v + most <= num_vectors; v += most)
    multiply_rows_at<ROWS, most>(product, v * LANES);
  for (; v < num_vectors; v++) multiply_rows_at<ROWS, 1>(product, v * LANES);
}

// C of `num_rows` <= TILE_ROWS rows and `num_vectors` * 16 columns.
inline void multiply_rows_at(const RowsAt& product, int num_rows, int64_t num_vectors) {
  switch (num_rows) {
    case 1: return multiply_rows_at<1>(product, num_vectors);
    case 2: return multiply_rows_at<2>(product, num_vectors);
    case 3: return multiply_rows_at<3>(product, num_vectors);
    case 4: return multiply_rows_at<4>(product, num_vectors);
    case 5: return multiply_rows_at<5>(product, num_vectors);
    default: return multiply_rows_at<TILE_ROWS>(product, num_vectors);
  }
}
#endif

// C of `num_rows` <= TILE_ROWS rows and `num_vectors` * 16 columns.
inline void multiply(const Product& product, int num_rows, int64_t num_vectors) {
  switch (num_rows) {
    case 1: return multiply_rows<1>(product, num_vectors);
    case 2: return multiply_rows<2>(product, num_vectors);
    case 3: return multiply_rows<3>(product, num_vectors);
    case 4: return multiply_rows<4>(product, num_vectors);
    case 5: return multiply_rows<5>(product, num_vectors);
    default: return multiply_rows<TILE_ROWS>(product, num_vectors);
  }
}

}  // namespace infire
