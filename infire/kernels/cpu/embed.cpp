// Rows of the embedding table, out of the strips that the head multiplies with: one copy of tied
// weights serves both.

#include <algorithm>

#include "strips.h"

namespace infire {
namespace {

void lookup(const Matrix& table, int64_t id, bf16* out) {
  const int64_t strip = id / LANES, lane = id % LANES;
  const uint8_t* at = table.data + strip * strip_bytes(table);
  if (table.format == BF16) {
    for (int64_t pair = 0; pair < table.num_pairs; pair++)
      std::memcpy(out + 2 * pair, at + pair * PAIR_BYTES + 4 * lane, 4);
    return;
  }
  const Half bases = bases_of(table.base + strip * LANES);
  for (int64_t pair = 0; pair < table.num_pairs; pair += GROUP_PAIRS, at += GROUP_BYTES) {
    U weights[GROUP_PAIRS];
    decode_group(at, bases, weights);
    for (int n = 0; n < GROUP_PAIRS; n++) {
      const uint32_t word = weights[n][lane];
      std::memcpy(out + 2 * (pair + n), &word, 4);
    }
  }
  for (int32_t n = table.ptr[strip]; n < table.ptr[strip + 1]; n++)
    if (table.exceptions[n].row == lane) out[table.exceptions[n].input] = table.exceptions[n].value;
}

}  // namespace

void embed(const EmbedArgs& args, Worker& worker) {
  for (Share share(worker, args.step->num_tokens); share.next();)
    lookup(*args.table, args.step->token_ids[share.item], args.out + share.item * args.ld_out);
}

}  // namespace infire
