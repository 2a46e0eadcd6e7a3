// Small kernels around those for many queries: what a re-injection shows, and the mass of tokens.
#pragma once

#include "many_queries.cuh"

namespace lookagain {
namespace cuda {

// Which keys are visual, and which re-injections show them. A thread for each key.
__global__ void __launch_bounds__(kThreads) mark_keys(const ManyLaunch a) {
  const VisualParams& visual = a.p.visual;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const Row row(a, index / a.p.keys < a.p.batch ? index / a.p.keys : 0);
  const int64_t key = index % a.p.keys;
  if (index / a.p.keys >= a.p.batch || key >= row.slots()) return;
  int64_t token = -1;
  if (key < row.keys.end) {
    for_each_visual_run(row_spans(visual, row.number), visual.num_spans, key, key + 1,
                        [&](int64_t, int64_t number, int64_t) { token = number; });
  }
  uint32_t bits = 0;
  for (int r = 0; token >= 0 && r < visual.num_reinjections; ++r) {
    const bool ever = row.first_seeing(r) < row.queries;
    const uint8_t* selected = row_selected(visual, row.number, r);
    if (ever && is_shown(visual, selected, static_cast<int32_t>(token))) bits |= 1u << r;
  }
  a.token[row.place_of_key(key)] = static_cast<int32_t>(token);
  a.shown[row.place_of_key(key)] = bits;
}

// The keys that a re-injection shows, in order. A block for each row and list, which walks from the
// first visual key to the last: in sequences of many thousands they are few.
__global__ void __launch_bounds__(kThreads) list_keys(const ManyLaunch a) {
  int* found = reinterpret_cast<int*>(dynamic_shared());  // by each warp
  const int64_t lists = a.num_lists(), list = blockIdx.x % lists;
  const Row row(a, blockIdx.x / lists);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t* to = a.lists + list * a.num_keys() + row.place_of_key(0);
  const int32_t* spans = row_spans(a.p.visual, row.number);
  int begin = row.keys.end, end = 0, count = 0;
  for (int64_t s = 0; s < a.p.visual.num_spans; ++s) {
    if (spans[2 * s + 1] <= 0) continue;
    const int64_t last = static_cast<int64_t>(spans[2 * s]) + spans[2 * s + 1];
    if (spans[2 * s] < begin) begin = spans[2 * s] < 0 ? 0 : spans[2 * s];
    if (last > end) end = last < row.keys.end ? static_cast<int>(last) : row.keys.end;
  }
  for (int first = begin; first < end; first += kThreads) {
    const int key = first + static_cast<int>(threadIdx.x);
    bool shows = false;
    if (key < end) {
      const int64_t at = row.place_of_key(key);
      shows = a.p.visual.selected == nullptr ? a.token[at] >= 0 : (a.shown[at] >> list & 1) != 0;
    }
    const uint32_t mine = ballot(shows);
    if (lane == 0) found[warp] = count_bits(mine);
    __syncthreads();
    int before = count;
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp ? found[w] : 0;
      count += found[w];
    }
    if (shows) to[before + count_bits(mine & ((1u << lane) - 1))] = key;
    __syncthreads();
  }
  if (threadIdx.x == 0) a.counts[row.number * lists + list] = count;
}

// Adds the pieces' sums over a visual key to its token's mass. A thread for each key.
__global__ void __launch_bounds__(kThreads) grad_mass(const ManyLaunch a) {
  const RoutedAttentionBackwardParams& p = a.p;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.batch * p.key_heads * p.keys) return;
  const int64_t key = index % p.keys, head = index / p.keys % p.key_heads;
  const Row row(a, index / p.keys / p.key_heads);
  if (key >= row.slots()) return;
  const int32_t token = a.token[row.place_of_key(key)];
  if (token < 0 || token >= p.num_visual) return;
  const float* from = a.key_mass + row.place_of_key(head, key);
  float sum = 0;
  for (int piece = 0; piece < a.pieces; ++piece) sum += from[piece * p.key_heads * a.num_keys()];
  p.mass[row.number * p.mass_batch_stride + head * p.mass_head_stride + token] += sum;
}

}  // namespace cuda
}  // namespace lookagain
