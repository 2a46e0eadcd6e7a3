// What every header under core/ needs to be shared by host and device code.
//
// Host kernels are compiled once for each instruction set. `LA_ISA` names the inline namespace of
// that compilation, so that a function compiled with AVX-512 flags can never be linked into the
// path of a machine without it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LA_HD __host__ __device__ __forceinline__
#else
#define LA_HD inline __attribute__((always_inline))
#endif

#ifndef LA_ISA
#define LA_ISA common
#endif

#define LA_NAMESPACE_BEGIN \
  namespace lookagain {    \
  inline namespace LA_ISA {
#define LA_NAMESPACE_END \
  }                      \
  }
