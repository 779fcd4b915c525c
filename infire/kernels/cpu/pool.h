// Threads that go through the operations of one forward pass together. Knows no operation.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace infire {

constexpr std::size_t SCRATCH_BYTES = 2 << 20;  // a thread's own
// Of a pool: a byte says how many a pass has. Even, so that what an operation keeps of each is
// a multiple of 64 bytes.
constexpr int MAX_THREADS = 254;

struct alignas(64) Head {
  std::atomic<int64_t> next{0};  // of a thread's part of the items: how many are taken
};

// What an operation is given on each thread.
struct Worker {
  int index = 0;
  int count = 1;            // threads that take part in this pass
  char* scratch = nullptr;  // SCRATCH_BYTES, 64-byte aligned
  Head* heads = nullptr;    // one a thread; 0 at the beginning of each operation
  char* shared = nullptr;   // as much as scratch, for all threads of an operation; at first 0
};

// Hands out items 0 .. num_items - 1, each once over all threads: first a thread's own part, which
// lies together in memory, then what others have left. So a thread that the operating system has
// put aside delays nobody by more than the item it is at. One Share an operation.
class Share {
 public:
  Share(Worker& worker, int64_t num_items) : worker_(worker), num_items_(num_items) {}

  bool next() {
    for (; turn_ < worker_.count; turn_++) {
      const int owner = (worker_.index + turn_) % worker_.count;
      const int64_t begin = num_items_ * owner / worker_.count;
      const int64_t end = num_items_ * (owner + 1) / worker_.count;
      if (worker_.heads[owner].next.load(std::memory_order_relaxed) >= end - begin) continue;
      item = begin + worker_.heads[owner].next.fetch_add(1, std::memory_order_relaxed);
      if (item < end) return true;
    }
    return false;
  }

  int64_t item = 0;

 private:
  Worker& worker_;
  int64_t num_items_;
  int turn_ = 0;
};

struct Entry {  // one operation of a pass
  int64_t kind;
  const void* args;
};

using Operation = void (*)(const void* args, Worker& worker);

class Pool {
 public:
  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Runs the operations one after the other on the first `count` threads, the caller being one of
  // them. `nanoseconds`, if given, gets the time of each operation added.
  void run(const Entry* entries, int64_t num_entries, int count, int64_t* nanoseconds);

 private:
  void serve(int index);
  void pass(int index, int count);
  void meet(int count);

  int num_threads_;
  std::vector<std::thread> threads_;
  std::vector<Head> heads_;
  std::vector<char*> scratch_;
  char* shared_;

  const Entry* entries_ = nullptr;
  int64_t num_entries_ = 0;
  int64_t* nanoseconds_ = nullptr;

  // Passes begun so far, times 256, and the threads of the last: in one word, so that a thread
  // that a pass does without cannot mistake it for the next. A change wakes the threads.
  alignas(64) std::atomic<uint32_t> passes_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> meetings_{0};
  std::atomic<bool> ending_{false};
};

}  // namespace infire
