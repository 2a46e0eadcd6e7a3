// Chooses the instruction set at run time from cpuid; set_isa() asks for a lower one, so that every
// path can be tested on one machine.
#include <atomic>
#include <cstring>

#include "kernels.h"

namespace lookagain {
namespace {

struct Isa {
  const char* name;
  const CpuKernels* kernels;
  bool (*supported)();
};

const Isa kIsas[] = {
    {"plain", &kernels_plain, [] { return true; }},
#ifdef LOOKAGAIN_X86
    {"avx2", &kernels_avx2,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
    {"avx512", &kernels_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
    {"avx512_bf16", &kernels_avx512_bf16,
     [] {
       return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
#endif
};

const Isa* find(const char* name) {
  const Isa* best = nullptr;
  for (const Isa& isa : kIsas) {
    const bool wanted = strcmp(name, "auto") == 0 || strcmp(name, isa.name) == 0;
    if (wanted && isa.supported()) best = &isa;
  }
  return best;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{find("auto")};
  return isa;
}

}  // namespace

const CpuKernels& cpu_kernels(DType dtype) {
  return dtype == DType::kFloat64 ? kernels_plain : *current().load()->kernels;
}

int num_isas() { return sizeof(kIsas) / sizeof(kIsas[0]); }
const char* isa_name(int index) { return kIsas[index].name; }
const char* isa_in_use() { return current().load()->name; }

bool set_isa(const char* name) {
  const Isa* isa = find(name);
  if (isa != nullptr) current().store(isa);
  return isa != nullptr;
}

}  // namespace lookagain
