// select_visual_tokens: the tokens with the largest mass, exactly, ties to the lower number.
//
// Grid: one block a row. Four passes of a radix selection find the rank of the last token taken, 8
// bits a pass, from counts in shared memory (sums of integers: the same in any order); tokens below
// it are taken, and of those at it the first ones, counted in token order. Bytes: the row of mass
// five times, from cache after the first; 5 (L_c) KB for L_c tokens. A launch takes longer than the
// bytes.
#include "../core/selection.h"
#include "launch.h"

namespace lookagain {
namespace cuda {
namespace {

constexpr int kSelectThreads = 256;

// Number of set flags in lower threads of the block; `total` gets that of all.
LA_DEVICE int count_before(bool flag, int* warp_counts, int* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t bits = ballot(flag);
  if (lane == 0) warp_counts[warp] = count_bits(bits);
  __syncthreads();
  int before = count_bits(bits & ((1u << lane) - 1));
  *total = 0;
  for (int w = 0; w < kSelectThreads / 32; ++w) {
    if (w < warp) before += warp_counts[w];
    *total += warp_counts[w];
  }
  __syncthreads();  // before the counts are written again
  return before;
}

__global__ void __launch_bounds__(kSelectThreads) select_kernel(const SelectParams p) {
  int* histogram = reinterpret_cast<int*>(dynamic_shared());
  int* chosen_bin = histogram + 256;  // [2]: the bin, and what is left to take in it
  int* warp_counts = chosen_bin + 2;
  const int64_t row = blockIdx.x;
  const float* mass = p.mass + row * p.mass_stride;
  uint8_t* out = p.out + row * p.out_stride;
  const int thread = threadIdx.x;
  int64_t n = p.num_visual[row];
  n = n < 0 ? 0 : (n > p.width ? p.width : n);
  const int64_t count = selection_count(p.ratio, n);
  if (count == 0 || count == n) {
    for (int64_t t = thread; t < p.width; t += kSelectThreads) out[t] = t < count;
    return;
  }
  uint32_t prefix = 0, mask = 0;
  int left = static_cast<int>(count);
  for (int shift = 24; shift >= 0; shift -= 8) {
    histogram[thread] = 0;
    __syncthreads();
    for (int64_t t = thread; t < n; t += kSelectThreads) {
      const uint32_t rank = static_cast<uint32_t>(selection_rank(mass[t], 0) >> 32);
      if ((rank & mask) == prefix) atomicAdd(&histogram[rank >> shift & 255], 1);
    }
    __syncthreads();
    int before = 0;  // in lower bins; each thread adds for itself, without waiting for another
#pragma unroll 8
    for (int bin = 0; bin < kSelectThreads; ++bin) before += bin < thread ? histogram[bin] : 0;
    if (before < left && left <= before + histogram[thread]) {
      chosen_bin[0] = thread;
      chosen_bin[1] = left - before;
    }
    __syncthreads();
    prefix |= static_cast<uint32_t>(chosen_bin[0]) << shift;
    mask |= 255u << shift;
    left = chosen_bin[1];
  }
  for (int64_t first = 0; first < p.width; first += kSelectThreads) {
    const int64_t t = first + thread;
    uint32_t rank = 0xffffffffu;
    if (t < n) rank = static_cast<uint32_t>(selection_rank(mass[t], 0) >> 32);
    const bool tie = t < n && rank == prefix;
    int ties = 0;
    const int before = count_before(tie, warp_counts, &ties);
    if (t < p.width) out[t] = t < n && (rank < prefix || (tie && before < left));
    left = left > ties ? left - ties : 0;
  }
}

}  // namespace

void select_visual_tokens(const SelectParams& p, Stream stream) {
  if (p.width == 0) return;
  launch<&select_kernel>("select_visual_tokens", p.batch, kSelectThreads,
                         (256 + 2 + kSelectThreads / 32) * 4, stream, p);
}

}  // namespace cuda
}  // namespace lookagain
