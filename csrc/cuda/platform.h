// What the kernels use of a GPU, each instruction behind one function.
//
// Two implementations: PTX here, and python_tests/emulator/cuda_emulator.h, which runs the very
// same kernels on the host, thread by thread, where there is no GPU to test them on. Fragment
// layouts are those of the PTX ISA for mma.m16n8k16: lane l of a warp holds row l / 4 and columns
// 2 (l % 4), 2 (l % 4) + 1 of an 8 x 8 matrix.
#pragma once

#include "../core/types.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define LA_DEVICE __device__ __forceinline__

namespace lookagain {
namespace cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

LA_DEVICE char* dynamic_shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

LA_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, without passing through registers. Copies the first
// `bytes` (0 or 16) and fills the rest with zeros. Visible to this thread after a wait, to its warp
// after a __syncwarp that follows.
LA_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes)
      : "memory");
}

LA_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Until at most kPending of this thread's groups are under way.
template <int kPending>
LA_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Programmatic dependent launch. A kernel that was launched with `Overlap::kYes` starts while the
// one before it in the stream still runs; what that one wrote may be read after this.
LA_DEVICE void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// Lets such a kernel start as soon as every block of this one has come here.
LA_DEVICE void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
LA_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

LA_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The transpose of an 8 x 8 matrix that a warp holds.
LA_DEVICE uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(y) : "r"(x));
  return y;
}

// c += a b for a [16, 16] row-major and b [16, 8] column-major fragments, summed in float32.
template <typename T>
LA_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
LA_DEVICE void multiply_add<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
LA_DEVICE void multiply_add<Float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                     uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats as 16-bit numbers in one register, `low` in the low half, rounded to nearest even.
template <typename T>
LA_DEVICE uint32_t pack(float low, float high);

template <>
LA_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
LA_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// 2^x, about 2 ulp; 0 for -inf.
LA_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// x == -inf for 0.
LA_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// a b + c in one instruction; a compiler that moves the extension of `a` out of a loop needs five.
LA_DEVICE int64_t multiply_add_wide(int32_t a, int32_t b, int64_t c) {
  int64_t y;
  asm("mad.wide.s32 %0, %1, %2, %3;\n" : "=l"(y) : "r"(a), "r"(b), "l"(c));
  return y;
}

// Of pi x.
LA_DEVICE void sine_cosine_pi(float x, float* sine, float* cosine) { sincospif(x, sine, cosine); }

LA_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(kAllLanes, x, mask); }
LA_DEVICE bool any_lane(bool x) { return __any_sync(kAllLanes, x); }
LA_DEVICE uint32_t ballot(bool x) { return __ballot_sync(kAllLanes, x); }
LA_DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }
LA_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

}  // namespace cuda
}  // namespace lookagain

#else
#include "cuda_emulator.h"
#endif
