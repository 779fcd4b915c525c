#include "pool.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "ops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace infire {
namespace {

// Looks before a thread that waits goes to sleep, some 20 microseconds: more than operations
// differ by, less than what would be felt by an engine that shares the cores.
constexpr int SPINS = 600;

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void wait_for_change(std::atomic<uint32_t>& value, uint32_t from) {
  for (int n = 0; n < SPINS; n++) {
    if (value.load(std::memory_order_acquire) != from) return;
    relax();
  }
  while (value.load(std::memory_order_acquire) == from) value.wait(from);
}

int64_t now() {
  using namespace std::chrono;
  return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Pool::Pool(int num_threads)
    : num_threads_(std::clamp(num_threads, 1, MAX_THREADS)), heads_(num_threads_) {
  shared_ = static_cast<char*>(std::aligned_alloc(64, SCRATCH_BYTES));
  std::memset(shared_, 0, SCRATCH_BYTES);
  for (int n = 0; n < num_threads_; n++)
    scratch_.push_back(static_cast<char*>(std::aligned_alloc(64, SCRATCH_BYTES)));
  for (int n = 1; n < num_threads_; n++) threads_.emplace_back([this, n] { serve(n); });
}

Pool::~Pool() {
  ending_ = true;
  passes_.fetch_add(256, std::memory_order_release);
  passes_.notify_all();
  for (auto& thread : threads_) thread.join();
  for (char* scratch : scratch_) std::free(scratch);
  std::free(shared_);
}

void Pool::run(const Entry* entries, int64_t num_entries, int count, int64_t* nanoseconds) {
  entries_ = entries;
  num_entries_ = num_entries;
  nanoseconds_ = nanoseconds;
  count = std::clamp(count, 1, num_threads_);
  if (num_threads_ > 1) {
    const uint32_t begun = passes_.load(std::memory_order_relaxed) / 256 + 1;
    passes_.store(begun * 256 + static_cast<uint32_t>(count), std::memory_order_release);
    passes_.notify_all();
  }
  pass(0, count);
}

void Pool::serve(int index) {
  for (uint32_t seen = 0;;) {
    wait_for_change(passes_, seen);
    seen = passes_.load(std::memory_order_acquire);
    if (ending_) return;
    const int count = static_cast<int>(seen % 256);
    if (index < count) pass(index, count);
  }
}

void Pool::pass(int index, int count) {
  // Copied: once the last operation is done, the caller may begin the next pass.
  const Entry* entries = entries_;
  const int64_t num_entries = num_entries_;
  int64_t* nanoseconds = index == 0 ? nanoseconds_ : nullptr;
  Worker worker{index, count, scratch_[index], heads_.data(), shared_};
  int64_t began = nanoseconds ? now() : 0;
  for (int64_t n = 0; n < num_entries; n++) {
    OPERATIONS[entries[n].kind](entries[n].args, worker);
    meet(count);
    if (nanoseconds) {
      const int64_t ended = now();
      nanoseconds[n] += ended - began;
      began = ended;
    }
  }
}

void Pool::meet(int count) {
  const uint32_t meeting = meetings_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < count) {
    wait_for_change(meetings_, meeting);
    return;
  }
  for (auto& head : heads_) head.next.store(0, std::memory_order_relaxed);
  arrived_.store(0, std::memory_order_relaxed);
  meetings_.fetch_add(1, std::memory_order_release);
  if (count > 1) meetings_.notify_all();
}

}  // namespace infire
