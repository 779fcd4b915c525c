// The table of operations, and what Python calls.

#include "ops.h"

namespace infire {
namespace {

template <auto function, class Args>
void call(const void* args, Worker& worker) {
  function(*static_cast<const Args*>(args), worker);
}

}  // namespace

const Operation OPERATIONS[NUM_KINDS] = {
    call<embed, EmbedArgs>,
    call<norm, NormArgs>,
    call<linear, LinearArgs>,
    call<silu, SiluArgs>,
    call<rope, RopeArgs>,
    call<attention, AttentionArgs>,
    call<head, HeadArgs>,
    call<sample, SampleArgs>,
};

}  // namespace infire

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void* infire_new_pool(int64_t num_threads) {
  return new infire::Pool(static_cast<int>(num_threads));
}

EXPORTED void infire_free_pool(void* pool) { delete static_cast<infire::Pool*>(pool); }

EXPORTED void infire_run(void* pool, const infire::Entry* entries, int64_t num_entries,
                         int64_t num_threads, int64_t* nanoseconds) {
  static_cast<infire::Pool*>(pool)->run(entries, num_entries, static_cast<int>(num_threads),
                                        nanoseconds);
}

// The size of an Input.
EXPORTED int64_t infire_input_bytes() { return sizeof(infire::Input); }

// Which of the ways to compute this library was compiled for.
EXPORTED const char* infire_instructions() {
#if INFIRE_AVX512
  return "avx512_bf16";
#elif defined(__AVX2__)
  return "avx2";
#elif defined(__ARM_NEON)
  return "neon";
#else
  return "portable";
#endif
}
