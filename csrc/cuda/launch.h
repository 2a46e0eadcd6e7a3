// Starting a kernel, and what to say when that fails.
#pragma once

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

template <typename Params>
void launch(const char* name, void (*kernel)(Params), int64_t blocks, int threads,
            int64_t shared_bytes, Stream stream, const Params& params) {
  if (blocks == 0) return;
  if (shared_bytes > (48 << 10)) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(params);
  check(cudaGetLastError(), name);
}

#else

template <typename Params>
void launch(const char*, void (*kernel)(Params), int64_t blocks, int threads, int64_t shared_bytes,
            Stream, const Params& params) {
  if (blocks == 0) return;
  emulator::run(dim3(static_cast<unsigned>(blocks)), threads, shared_bytes,
                [&] { kernel(params); });
}

#endif

}  // namespace cuda
}  // namespace lookagain
