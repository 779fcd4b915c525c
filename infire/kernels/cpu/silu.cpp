// out = silu(gate) * up = gate / (1 + e^-gate) * up, in float32, rounded once.

#include "ops.h"

namespace infire {

ALWAYS_INLINE F gated(F gate, F up) { return gate / (splat(1.0f) + exponential(-gate)) * up; }

void silu(const SiluArgs& args, Worker& worker) {
  constexpr int64_t part = 512;  // columns
  const int64_t parts = (args.size + part - 1) / part;
  for (Share share(worker, *args.num_rows * parts); share.next();) {
    const int64_t row = share.item / parts, begin = share.item % parts * part;
    const bf16* gate = args.x + row * args.ld_x;
    const bf16* up = gate + args.size;
    Input* out = args.out + row * args.ld_out;
    const int64_t end = begin + part < args.size ? begin + part : args.size;
    int64_t n = begin;
    for (; n + LANES <= end; n += LANES)
      store_input(out + n, gated(load_bf16(gate + n), load_bf16(up + n)));
    if (n < end) {
      bf16 tail[2][LANES] = {};
      Input last[LANES];
      std::memcpy(tail[0], gate + n, (end - n) * sizeof(bf16));
      std::memcpy(tail[1], up + n, (end - n) * sizeof(bf16));
      store_input(last, gated(load_bf16(tail[0]), load_bf16(tail[1])));
      std::memcpy(out + n, last, (end - n) * sizeof(Input));
    }
  }
}

}  // namespace infire
