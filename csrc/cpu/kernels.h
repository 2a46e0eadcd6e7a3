// The kernels of one instruction set as a table, and the choice between the tables.
//
// Every source listed under LOOKAGAIN_CPU_KERNELS in CMakeLists.txt is compiled once for each
// instruction set with other flags and another `LA_ISA`; `kernels.cpp` then fills the table. Such
// sources may call inline functions only from core/ and from headers that open LA_NAMESPACE_BEGIN:
// an inline function of the standard library that is not inlined could be taken by the linker from
// the AVX-512 object and crash an older machine.
#pragma once

#include "../params.h"

namespace lookagain {

struct CpuKernels {
  void (*routed_attention_decode)(const RoutedAttentionParams&);   // L_q <= kDecodeQueries
  void (*routed_attention_prefill)(const RoutedAttentionParams&);  // any L_q
  void (*routed_attention_backward)(const RoutedAttentionBackwardParams&);
  void (*visual_mass)(const VisualMassParams&);
  void (*append_visual)(const AppendVisualParams&);
};

constexpr int64_t kDecodeQueries = 16;

extern const CpuKernels kernels_plain;
extern const CpuKernels kernels_avx2;
extern const CpuKernels kernels_avx512;
extern const CpuKernels kernels_avx512_bf16;

// The kernels for a dtype on this machine. float64 always takes the plain ones.
const CpuKernels& cpu_kernels(DType dtype);

// Names of the compiled instruction sets, best last, and of the one in use.
int num_isas();
const char* isa_name(int index);
const char* isa_in_use();

// Uses the named instruction set from now on; false if it is not compiled or this machine lacks it.
// "auto" is the best one.
bool set_isa(const char* name);

}  // namespace lookagain
