// Starting a kernel, and what to say when that fails.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "platform.h"

namespace lookagain {
namespace cuda {

#if defined(__CUDACC__)

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("lookagain_ext: ") + what + ": " +
                           cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

// `kernel` is a template argument so that what was asked of each is remembered: the driver is told
// once a device that a kernel needs much shared memory, and to give it preference over the cache.
template <auto kernel, typename Params>
void launch(const char* name, int64_t blocks, int threads, int64_t shared_bytes, Stream stream,
            const Params& params) {
  constexpr int kMostDevices = 64;
  static std::atomic<int64_t> granted[kMostDevices];
  if (blocks == 0) return;
  if (shared_bytes > (48 << 10)) {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    if (device >= kMostDevices || granted[device].load() < shared_bytes) {
      const void* function = reinterpret_cast<const void*>(kernel);
      check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes)),
            name);
      check(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared),
            name);
      if (device < kMostDevices) granted[device].store(shared_bytes);
    }
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError(), name);
}

#else

template <auto kernel, typename Params>
void launch(const char* name, int64_t blocks, int threads, int64_t shared_bytes, Stream,
            const Params& params) {
  if (blocks == 0) return;
  if (shared_bytes > current_device().shared_per_block || blocks > INT32_MAX) emulator::fail(name);
  emulator::run(dim3(static_cast<unsigned>(blocks)), threads, shared_bytes,
                [&] { kernel(params); });
}

#endif

}  // namespace cuda
}  // namespace lookagain
