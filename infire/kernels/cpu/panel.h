// Panels: strips of weights as the tiles of a product read them, out of any format. Knows no
// product.
//
// Where the machine multiplies pairs of bf16, a panel is what BF16 strips are. Elsewhere it is
// floats, input by input, so that a weight is widened once and not for every row.
#pragma once

#include <algorithm>

#include "strips.h"

namespace infire {

constexpr int64_t PANEL_PAIR_BYTES = INFIRE_AVX512 ? PAIR_BYTES : 2 * PAIR_BYTES;

// Whether a matrix has to be decoded, or is a panel as it is.
inline bool is_panel(const Matrix& matrix) { return INFIRE_AVX512 && matrix.format == BF16; }

ALWAYS_INLINE void store_pair(uint8_t* panel, U pair) {
#if INFIRE_AVX512
  store_words(panel, pair);
#else
  store_as(panel, low_half(pair));
  store_as(panel + VECTOR_BYTES, high_half(pair));
#endif
}

inline void store_weight(uint8_t* panel, int64_t input, int64_t row, bf16 value) {
#if INFIRE_AVX512
  std::memcpy(panel + input / 2 * PAIR_BYTES + 4 * row + 2 * (input % 2), &value, sizeof(value));
#else
  const float wide = to_float(value);
  std::memcpy(panel + input * VECTOR_BYTES + 4 * row, &wide, sizeof(wide));
#endif
}

// Pairs of one BF16 strip.
inline void widen_strip(const uint8_t* at, int64_t pairs, uint8_t* out) {
  for (int64_t pair = 0; pair < pairs; pair++)
    store_pair(out + pair * PANEL_PAIR_BYTES, load_words(at + pair * PAIR_BYTES));
}

// Pairs of one 12-bit strip, without what its exceptions say.
inline void decode_strip(const uint8_t* at, Half bases, int64_t pairs, uint8_t* out) {
  for (int64_t pair = 0; pair < pairs; pair += GROUP_PAIRS, at += GROUP_BYTES) {
    const Half codes = codes_of(at);
    uint8_t* to = out + pair * PANEL_PAIR_BYTES;
    store_pair(to, decode_pair<0>(at, codes, bases));
    store_pair(to + PANEL_PAIR_BYTES, decode_pair<1>(at, codes, bases));
    store_pair(to + 2 * PANEL_PAIR_BYTES, decode_pair<2>(at, codes, bases));
    store_pair(to + 3 * PANEL_PAIR_BYTES, decode_pair<3>(at, codes, bases));
  }
}

// Puts what 12 bits cannot say where it belongs.
inline void patch_strip(const Matrix& matrix, int64_t strip, int64_t first_pair, int64_t pairs,
                        uint8_t* out) {
  const Exception* some = matrix.exceptions + matrix.ptr[strip];
  const Exception* end = matrix.exceptions + matrix.ptr[strip + 1];
  const int64_t first = 2 * first_pair;
  if (first)
    some = std::lower_bound(some, end, first, [](const Exception& one, int64_t input) {
      return one.input < input;
    });
  for (; some < end && some->input < first + 2 * pairs; some++)
    store_weight(out, some->input - first, some->row, some->value);
}

// `pairs` input pairs of some strips, strip after strip.
inline void decode_panel(const Matrix& matrix, int64_t first_strip, int64_t num_strips,
                         int64_t first_pair, int64_t pairs, uint8_t* out) {
  const int64_t stride = strip_bytes(matrix);
  for (int64_t n = 0; n < num_strips; n++, out += pairs * PANEL_PAIR_BYTES) {
    const int64_t strip = first_strip + n;
    const uint8_t* at = matrix.data + strip * stride;
    if (matrix.format == BF16) {
      widen_strip(at + first_pair * PAIR_BYTES, pairs, out);
      continue;
    }
    decode_strip(at + first_pair / GROUP_PAIRS * GROUP_BYTES,
                 bases_of(matrix.base + LANES * strip), pairs, out);
    patch_strip(matrix, strip, first_pair, pairs, out);
  }
}

}  // namespace infire
