// Joins two results of attention that share a softmax but not their keys: with the log-sum-exps a
// and b of the two and n = log(e^a + e^b), out = e^(a - n) out + e^(b - n) part, in place.
//
// A block takes whole rows, one for each (query, head): 16 bytes of a row a thread, or one element
// where rows do not lie at 16-byte boundaries. All threads of a row read its sums before the first
// of them writes the new one.
//
// Bytes: three rows (two read, one written) and 12 of sums. FLOP: 3 an element. The limit is the
// memory's copy rate.
#include <cmath>

#include "../core/types.h"
#include "launch.h"

namespace lookagain {
namespace cuda {
namespace {

constexpr int kJoinThreads = 256;

template <typename T, int kWide>
struct alignas(kWide * sizeof(T)) JoinPart {
  T elements[kWide];
};

template <typename T, int kWide>
__global__ void __launch_bounds__(kJoinThreads) join_kernel(const JoinParams p) {
  using Part = JoinPart<T, kWide>;
  const int parts = static_cast<int>(p.head_dim) / kWide;
  const int width = parts < kJoinThreads ? parts : kJoinThreads;  // threads of a row
  const int rows = kJoinThreads / width, row = threadIdx.x / width;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * rows + row;
  const int64_t query = index / p.heads, head = index % p.heads;
  const bool works = row < rows && query < p.queries;
  float mine = 0, other = 0, total = -INFINITY;
  if (works) {
    const float a = p.lse[head * p.lse_stride + query];
    const float b = p.part_lse[head * p.part_lse_stride + query];
    const float most = a > b ? a : b;
    if (most > -INFINITY) {
      mine = std::exp(a - most);
      other = std::exp(b - most);
      total = most + std::log(mine + other);
      const float inverse = 1 / (mine + other);
      mine *= inverse;
      other *= inverse;
    }
  }
  __syncthreads();
  if (!works) return;
  const int first = threadIdx.x % width;
  if (first == 0) p.lse[head * p.lse_stride + query] = total;
  Part* out = reinterpret_cast<Part*>(static_cast<T*>(p.out) + query * p.out_query_stride +
                                      head * p.out_head_stride);
  const Part* part = reinterpret_cast<const Part*>(
      static_cast<const T*>(p.part) + query * p.part_query_stride + head * p.part_head_stride);
  for (int i = first; i < parts; i += width) {
    const Part here = out[i], there = part[i];
    Part joined;
#pragma unroll
    for (int e = 0; e < kWide; ++e) {
      joined.elements[e] =
          from_float<T>(mine * to_float(here.elements[e]) + other * to_float(there.elements[e]));
    }
    out[i] = joined;
  }
}

template <typename T>
void join(const JoinParams& p, Stream stream) {
  constexpr int kElements = 16 / sizeof(T);
  const auto at_boundary = [](const void* data, std::initializer_list<int64_t> strides) {
    bool all = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (const int64_t stride : strides) all = all && stride % kElements == 0;
    return all;
  };
  const bool vector = p.head_dim % kElements == 0 &&
                      at_boundary(p.out, {p.out_query_stride, p.out_head_stride}) &&
                      at_boundary(p.part, {p.part_query_stride, p.part_head_stride});
  const int64_t parts = vector ? p.head_dim / kElements : p.head_dim;
  const int64_t rows = parts < kJoinThreads ? kJoinThreads / parts : 1;
  const int64_t blocks = ceiling(p.queries * p.heads, rows);
  if (vector) {
    launch<&join_kernel<T, kElements>>("join", blocks, kJoinThreads, 0, stream, p);
  } else {
    launch<&join_kernel<T, 1>>("join", blocks, kJoinThreads, 0, stream, p);
  }
}

}  // namespace

void join(const JoinParams& p, Stream stream) {
  if (p.queries == 0 || p.heads == 0 || p.head_dim == 0) return;
  if (p.dtype == DType::kBFloat16) {
    join<BFloat16>(p, stream);
  } else if (p.dtype == DType::kFloat16) {
    join<Float16>(p, stream);
  } else {
    join<float>(p, stream);
  }
}

}  // namespace cuda
}  // namespace lookagain
