// From logits, or from the best of them, to the next ids of each request of a step. What a row
// gets depends on its own logits, request and position only; infire/sampler.py is the reference.
//
// In this order: logit_bias, repetition penalty, frequency and presence penalties, the mask of a
// grammar; then the likeliest id (temperature 0), or temperature, top_k, top_p, min_p and a draw. Log probabilities
// are the model's own, before any of it. With drafts, the ids of a row are those that it would
// have got one step at a time.

#include "draw.h"
#include "ops.h"

namespace infire {
namespace {

void adjust(float* logits, const SampleRow& row, int64_t num) {
  for (int64_t n = 0; n < row.num_biases; n++) logits[row.bias_ids[n]] += row.bias_values[n];
  if (!row.seen) return;
  const auto repetition = static_cast<float>(row.repetition);
  const auto presence = static_cast<float>(row.presence);
  for (int64_t first = 0; first < num; first += 8) {
    const int64_t end = std::min<int64_t>(first + 8, num);
    uint64_t any = 1;
    if (end == first + 8) std::memcpy(&any, row.seen + first, sizeof(any));
    for (int64_t n = any ? first : end; n < end; n++) {
      if (!row.seen[n]) continue;
      float& logit = logits[n];
      logit = logit > 0 ? logit / repetition : logit * repetition;
      // Rounded before it is taken off, as torch does: the compiler would fuse the two.
      const auto taken = static_cast<float>(row.frequency * row.said[n]);
      logit -= taken;
      if (row.said[n]) logit -= presence;
    }
  }
}

// No id of the lowest logit there is gets chosen, as long as there is another.
void forbid(float* logits, const uint32_t* allowed, int64_t num) {
  for (int64_t first = 0; first < num; first += 32) {
    const uint32_t word = allowed[first / 32];
    if (word == ~0u) continue;
    const int64_t end = std::min<int64_t>(first + 32, num);
    for (int64_t n = first; n < end; n++)
      logits[n] = word >> (n - first) & 1 ? logits[n] : std::numeric_limits<float>::lowest();
  }
}

int32_t choose(const float* logits, int64_t num, float top, const SampleRow& row, double number) {
  const auto temperature = static_cast<float>(row.temperature);
  if (temperature <= 0) return first_of(logits, num, top);
  if (row.top_k == 0 && row.top_p >= 1 && row.min_p <= 0)
    return draw_all(logits, num, top, temperature, number);
  return draw_filtered(logits, num, top, temperature, {row.top_k, row.top_p, row.min_p}, number);
}

// The best `limit` of what all threads have found, in order of ids.
std::span<uint64_t> merge(const SampleArgs& args, int64_t limit, int64_t position, int threads,
                          std::array<uint64_t, 2 * MOST_CANDIDATES>& room) {
  int64_t count = 0;
  for (int thread = 0; thread < threads; thread++) {
    Candidates some = args.candidates[thread * *args.num_sampled + position];
    if (some.count > limit) keep_best(some);
    std::copy_n(some.ranks, some.count, room.begin() + count);
    count += some.count;
    if (count <= limit) continue;
    std::nth_element(room.begin(), room.begin() + (limit - 1), room.begin() + count,
                     std::greater<uint64_t>());
    count = limit;
  }
  std::sort(room.begin(), room.begin() + count,
            [](uint64_t a, uint64_t b) { return id_of(a) < id_of(b); });
  return {room.data(), static_cast<size_t>(count)};
}

int32_t choose(std::span<const uint64_t> ranks, const SampleRow& row, double number) {
  const float top = logit_of(*std::max_element(ranks.begin(), ranks.end()));
  std::array<float, MOST_CANDIDATES> logits;
  std::array<float, MOST_CANDIDATES> weights;
  std::array<Choice, MOST_CANDIDATES> some;
  const auto count = static_cast<int64_t>(ranks.size());
  for (int64_t n = 0; n < count; n++) logits[n] = logit_of(ranks[n]);
  for (int64_t n = 0; n < count; n += LANES)
    store(&weights[n], weights_of(load_some(&logits[n], count - n), top,
                                  static_cast<float>(row.temperature)));
  double total = 0;
  for (int64_t n = 0; n < count; n++) {
    some[n] = {ranks[n], weights[n]};
    total += weights[n];
  }
  return draw_filtered({some.data(), ranks.size()}, {0, row.top_p, row.min_p}, total, number);
}

// The logprob of an id and, in order, those of the likeliest. logits: the model's own.
void explain(const SampleArgs& args, int64_t num_top, const float* logits, float top,
             int64_t position, int32_t id) {
  const double whole = std::log(sum_all(logits, args.vocabulary, top, 1)) + top;
  args.logprobs[position] = static_cast<float>(logits[id] - whole);
  if (num_top == 0) return;
  const auto enough = [&](const std::vector<Choice>& some, double) {
    return static_cast<int64_t>(some.size()) >= num_top;
  };
  auto some = gather_until(logits, args.vocabulary, top, 1, enough);
  std::partial_sort(some.begin(), some.begin() + num_top, some.end(), better);
  for (int64_t n = 0; n < num_top; n++) {
    args.top_ids[position * args.most_top + n] = id_of(some[n].rank);
    const auto logprob = static_cast<float>(logit_of(some[n].rank) - whole);
    args.top_logprobs[position * args.most_top + n] = logprob;
  }
}

// The id of one sampled position, from logits in memory.
int32_t from_logits(const SampleArgs& args, const SampleRow& row, int64_t position, double number,
                    char* scratch) {
  const int64_t num = args.vocabulary;
  float* logits = args.logits + position * num;
  const bool adjusted = row.num_biases > 0 || row.seen || row.allowed;
  const float* raw = logits;
  const float top = settle(logits, num);
  float adjusted_top = top;
  if (adjusted) {
    if (row.num_top >= 0) {
      float* copy = reinterpret_cast<float*>(scratch);
      std::copy_n(logits, num, copy);
      raw = copy;
    }
    adjust(logits, row, num);
    if (row.allowed) forbid(logits, row.allowed, num);
    adjusted_top = settle(logits, num);
  }
  const int32_t id = choose(logits, num, adjusted_top, row, number);
  if (row.num_top >= 0) explain(args, row.num_top, raw, top, position, id);
  return id;
}

void sample_row(const SampleArgs& args, int64_t n, Worker& worker) {
  const SampleRow& row = args.rows[n];
  int64_t count = 0;
  for (bool go_on = true; go_on; count++) {
    const int64_t position = row.first + count;
    const double number = uniform(row.seed, row.index + count);
    std::array<uint64_t, 2 * MOST_CANDIDATES> room;
    const int32_t id =
        row.limit > 0
            ? choose(merge(args, row.limit, position, worker.count, room), row, number)
            : from_logits(args, row, position, number, worker.scratch);
    if (row.seen) {
      row.seen[id] = 1;
      row.said[id]++;
    }
    args.ids[position] = id;
    go_on = count < row.num_drafts && id == row.drafts[count];
  }
  args.num_ids[n] = count;
}

}  // namespace

void sample(const SampleArgs& args, Worker& worker) {
  for (Share share(worker, *args.num_rows); share.next();) sample_row(args, share.item, worker);
}

}  // namespace infire
