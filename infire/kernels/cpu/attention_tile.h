// Products of a few rows with a packed matrix: the inner loop of attention. Knows no attention.
//
// Pairs of bf16 are words. A is (rows, pairs) words, B is (pairs, columns) words, C is (rows,
// columns) floats: C[r][c] is the chain of dot2 over the pairs in order, so an element of C is the
// same bits whatever rows and columns are computed beside it.
#pragma once

#include <array>
#include <utility>

#include "simd.h"

namespace infire {

// A tile's sums fill the registers: 24 of 32, or 8 halves of 16 where vectors have 8 floats.
constexpr int TILE_ROWS = INFIRE_AVX512 ? 6 : 2;
constexpr int TILE_VECTORS = INFIRE_AVX512 ? 4 : 2;

struct Product {
  const uint32_t* a;
  int64_t lda;
  const uint32_t* b;
  int64_t ldb;
  int64_t num_pairs;
  float* c;
  int64_t ldc;
};

template <int ROWS, int VECTORS>
inline void multiply_tile(const Product& product) {
  const uint32_t* a = product.a;
  const uint32_t* b = product.b;
  const int64_t lda = product.lda, ldb = product.ldb;
  F sums[ROWS][VECTORS] = {};
  for (int64_t pair = 0; pair < product.num_pairs; pair++, a++, b += ldb) {
    U columns[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) columns[v] = load_words(b + v * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      const U row = splat_word(static_cast<const void*>(a + r * lda));
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sums[r][v] = dot2(sums[r][v], row, columns[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) store(product.c + r * product.ldc + v * LANES, sums[r][v]);
}

using Multiply = void (*)(const Product&);

template <std::size_t... SHAPES>
constexpr auto multiplies(std::index_sequence<SHAPES...>) {
  return std::array<Multiply, sizeof...(SHAPES)>{
      multiply_tile<SHAPES / TILE_VECTORS + 1, SHAPES % TILE_VECTORS + 1>...};
}

// C of `num_rows` <= TILE_ROWS rows and `num_vectors` * 16 columns.
inline void multiply(Product product, int num_rows, int64_t num_vectors) {
  static constexpr auto shapes =
      multiplies(std::make_index_sequence<TILE_ROWS * TILE_VECTORS>{});
  for (; num_vectors > 0; num_vectors -= TILE_VECTORS) {
    const int width = num_vectors < TILE_VECTORS ? num_vectors : TILE_VECTORS;
    shapes[(num_rows - 1) * TILE_VECTORS + width - 1](product);
    product.b += width * LANES;
    product.c += width * LANES;
  }
}

}  // namespace infire
