// The sampling kernel by itself, so that tests can build it for several instruction sets and hand
// it logits. Stands in for the head (which collects candidates) and for the pool of threads.

#include "sample.cpp"

#include <thread>
#include <vector>

using namespace infire;

extern "C" {

int64_t candidates_bytes() { return sizeof(Candidates); }

// Gives tile n of a row, `width` logits wide, to the thread owners[n], in the order of `tiles`.
void collect_row(const float* logits, int64_t vocabulary, int64_t limit, const int64_t* tiles,
                 const int64_t* owners, int64_t num_tiles, int64_t width, Candidates* some,
                 int64_t stride, int64_t num_threads) {
  for (int64_t thread = 0; thread < num_threads; thread++) reset(some[thread * stride], limit);
  for (int64_t n = 0; n < num_tiles; n++) {
    const int64_t first = tiles[n] * width;
    collect(some[owners[n] * stride], static_cast<int32_t>(first), logits + first,
            std::min(width, vocabulary - first));
  }
}

// What is in candidates, best first; the ids are `limit` or all that were given.
int64_t best_of(const Candidates* some, int32_t* ids, float* logits) {
  Candidates best = *some;
  if (best.count > best.limit) keep_best(best);
  std::sort(best.ranks, best.ranks + best.count, std::greater<uint64_t>());
  for (int64_t n = 0; n < best.count; n++) {
    ids[n] = id_of(best.ranks[n]);
    logits[n] = logit_of(best.ranks[n]);
  }
  return best.count;
}

void run_sample(const SampleArgs* args, int64_t num_threads) {
  std::vector<Head> heads(num_threads);
  std::vector<std::thread> threads;
  for (int64_t n = 0; n < num_threads; n++)
    threads.emplace_back([&, n] {
      char* scratch = static_cast<char*>(std::aligned_alloc(64, SCRATCH_BYTES));
      Worker worker{static_cast<int>(n), static_cast<int>(num_threads), scratch, heads.data()};
      sample(*args, worker);
      std::free(scratch);
    });
  for (auto& thread : threads) thread.join();
}
}
