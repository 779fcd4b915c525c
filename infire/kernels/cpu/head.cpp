// The product with the vocabulary. A position whose logits nobody asked for has only its best
// candidates kept: they are looked at tile by tile, and never written out.

#include "candidates.h"
#include "linear.h"

namespace infire {

void head(const HeadArgs& args, Worker& worker) {
  const int64_t num_rows = *args.num_rows;
  Candidates* candidates = args.candidates + worker.index * num_rows;
  for (int64_t row = 0; row < num_rows; row++)
    if (args.limits[row]) reset(candidates[row], args.limits[row]);
  const auto give = [&](int64_t row, int64_t output, const float* results, int64_t count) {
    count = std::min(count, args.vocabulary - output);
    if (args.limits[row])
      collect(candidates[row], static_cast<int32_t>(output), results, count);
    else
      std::memcpy(args.logits + row * args.vocabulary + output, results, count * sizeof(float));
  };
  multiply(*args.weight, args.x, args.ld_x, num_rows, give, worker);
}

}  // namespace infire
