// x += delta; out = x / rms(x) * weight. Worked out in float32, each result rounded once.

#include <cmath>

#include "ops.h"

namespace infire {

void norm(const NormArgs& args, Worker& worker) {
  // Rows that lie together, so that few rows are not handed out one by one.
  constexpr int64_t together = 4;
  const int64_t num_rows = *args.num_rows;
  float* sums = reinterpret_cast<float*>(worker.scratch);
  const int64_t padded = (args.size + LANES - 1) / LANES * LANES;
  for (Share share(worker, (num_rows + together - 1) / together); share.next();) {
    const int64_t end = share.item * together + together;
    for (int64_t row = share.item * together; row < (end < num_rows ? end : num_rows); row++) {
      const int64_t from = args.index ? args.index[row] : row;
      bf16* x = args.x + from * args.ld_x;
      const bf16* delta = args.delta ? args.delta + from * args.ld_x : nullptr;
      F squares = {};
      for (int64_t n = 0; n < padded; n += LANES) {
        F value = load_bf16(x + n);
        if (delta) {
          value = rounded(value + load_bf16(delta + n));
          if (args.keep) store_low_halves(x + n, bits<U>(value) >> 16);
        }
        store(sums + n, value);
        squares = fma(value, value, squares);
      }
      const float mean = sum(squares) / static_cast<float>(args.size);
      const F scale = splat(1.0f / std::sqrt(mean + static_cast<float>(args.eps)));
      Input* out = args.out + row * args.ld_out;
      for (int64_t n = 0; n < padded; n += LANES)
        store_input(out + n, load(sums + n) * scale * load_bf16(args.weight + n));
    }
  }
}

}  // namespace infire
