// parallel_for over work units, and scratch memory for a call.
//
// Units are handed out one after another through an atomic counter, so threads that are slowed down
// by other processes simply take fewer. A kernel that writes the result of each unit to its own
// place, and merges in a fixed order, is therefore independent of timing and of the thread count.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lookagain {

// Calls task(context, index, thread) for every index < count on up to num_threads threads (thread <
// num_threads); inline for num_threads <= 1.
using ParallelTask = void (*)(void* context, int64_t index, int thread);
void parallel_for(int num_threads, int64_t count, ParallelTask task, void* context);

template <typename Fn>
inline __attribute__((always_inline)) void parallel_for(int num_threads, int64_t count, Fn& fn) {
  parallel_for(
      num_threads, count,
      [](void* context, int64_t index, int thread) { (*static_cast<Fn*>(context))(index, thread); },
      &fn);
}

// "torch's OpenMP" or "own threads".
const char* threading_mode();

// 64-byte aligned memory of the calling thread, valid until its next call and never cleared. Kept
// between calls: fresh pages would cost more than a short decode.
void* thread_workspace(size_t bytes);

}  // namespace lookagain
