// Starting a kernel, and what to say when that fails.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "platform.h"

namespace lookagain {
namespace cuda {

// Whether a kernel may start while the one before it in the stream still runs. It must then call
// wait_for_previous_kernel, and that one let_next_kernel_start.
enum class Overlap { kNo, kYes };

inline int64_t ceiling(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(__CUDACC__)

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("lookagain_ext: ") + what + ": " +
                           cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")");
}

// What was asked of a kernel on a device, and what the driver said of it.
struct Known {
  std::atomic<int64_t> granted{0};  // bytes of shared memory
  std::atomic<int> overlaps{-1};    // whether its code has the instructions for Overlap::kYes
};

// `kernel` is a template argument so that what is known of each is remembered: the driver is told
// once a device that a kernel needs much shared memory, and to give it preference over the cache.
template <auto kernel, typename Params>
void launch(const char* name, int64_t blocks, int threads, int64_t shared_bytes, Stream stream,
            const Params& params, Overlap overlap = Overlap::kNo) {
  constexpr int kMostDevices = 64;
  static Known known[kMostDevices];
  if (blocks == 0) return;
  const void* function = reinterpret_cast<const void*>(kernel);
  const bool much = shared_bytes > (48 << 10);
  bool overlaps = false;
  if (much || overlap == Overlap::kYes) {
    int device = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    Known fresh;
    Known& here = device < kMostDevices ? known[device] : fresh;
    if (much && here.granted.load() < shared_bytes) {
      check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes)),
            name);
      check(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared),
            name);
      here.granted.store(shared_bytes);
    }
    if (overlap == Overlap::kYes) {
      if (here.overlaps.load() < 0) {
        cudaFuncAttributes attributes;
        check(cudaFuncGetAttributes(&attributes, function), name);
        here.overlaps.store(attributes.ptxVersion >= 90);
      }
      overlaps = here.overlaps.load() != 0;
    }
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlaps ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, params), name);
}

#else

template <auto kernel, typename Params>
void launch(const char* name, int64_t blocks, int threads, int64_t shared_bytes, Stream,
            const Params& params, Overlap = Overlap::kNo) {
  if (blocks == 0) return;
  if (shared_bytes > current_device().shared_per_block || blocks > INT32_MAX) emulator::fail(name);
  emulator::run(dim3(static_cast<unsigned>(blocks)), threads, shared_bytes,
                [&] { kernel(params); });
}

#endif

}  // namespace cuda
}  // namespace lookagain
