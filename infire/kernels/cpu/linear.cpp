// y = x W^T + bias, rounded once.

#include "linear.h"

namespace infire {

void linear(const LinearArgs& args, Worker& worker) {
  const auto round = [&](int64_t row, int64_t output, const float* results, int64_t count) {
    for (int64_t n = 0; n < count; n += LANES) {
      F value = load(results + n);
      if (args.bias) value += load_bf16(args.bias + output + n);
      store_bf16(args.y + row * args.ld_y + output + n, value);
    }
  };
  multiply(*args.weight, args.x, args.ld_x, *args.num_rows, round, worker);
}

}  // namespace infire
