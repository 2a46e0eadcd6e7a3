// From the states of warps and pieces to the result: the end of each decode kernel, and the kernel
// that merges the pieces of the key axis and norms the visual mass.
#pragma once

#include "decode_launch.h"

namespace lookagain {
namespace cuda {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

template <typename T>
LA_DEVICE T* head_row(const HeadsView& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(view.data) + batch * view.batch_stride + head * view.head_stride +
         row * view.row_stride;
}

LA_DEVICE void store_lse(const DecodeLaunch& a, int64_t batch_row, int64_t key_head, int row,
                         float max, float sum) {
  if (a.p.lse == nullptr) return;
  const int64_t head = batch_row * a.p.query_heads + key_head * a.group + row % a.group;
  static_cast<float*>(a.p.lse)[head * a.p.queries + row / a.group] =
      sum > 0 ? (max + log2f(sum)) * kLn2 : -INFINITY;
}

// Merges what the warps of a block found, `states` [warp, row] (max, sum) and `outs`
// [warp, row, pitch] in shared memory, into the result or this piece's part of the workspace.
template <typename T, int kRows>
LA_DEVICE void merge_warps(const DecodeLaunch& a, int64_t batch_row, int64_t key_head,
                           int64_t row_block, int64_t split, const float2* states,
                           const float* outs, int pitch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int dim = static_cast<int>(a.p.head_dim);
  const int64_t head = batch_row * a.p.key_heads + key_head;
  for (int r = warp; r < kRows; r += kWarps) {
    const int row = static_cast<int>(row_block) * kRows + r;
    if (row >= a.rows) break;
    float max = -INFINITY, sum = 0, share[kWarps];
    for (int w = 0; w < kWarps; ++w) max = fmaxf(max, states[w * kRows + r].x);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 state = states[w * kRows + r];
      share[w] = state.x == -INFINITY ? 0.0f : exp2_fast(state.x - max);
      sum += state.y * share[w];
    }
    const int64_t place = (head * a.padded_rows() + row) * a.splits + split;
    if (lane == 0 && a.needs_combine()) {
      a.states[2 * place] = max;
      a.states[2 * place + 1] = sum;
    }
    if (lane == 0 && a.splits == 1) store_lse(a, batch_row, key_head, row, max, sum);
    const float norm = sum > 0 ? 1.0f / sum : 0.0f;
    T* out = head_row<T>(a.p.out, batch_row, key_head * a.group + row % a.group, row / a.group);
    for (int d = lane; d < dim; d += 32) {
      float value = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) value += outs[(w * kRows + r) * pitch + d] * share[w];
      if (a.splits > 1) {
        a.outs[place * dim + d] = value;
      } else {
        out[d] = from_float<T>(value * norm);
      }
    }
  }
}

// max and sum over the pieces of one row, worked out by a whole warp: the same in all its lanes.
LA_DEVICE float2 merged_state(const DecodeLaunch& a, int64_t head, int row) {
  const float* states = a.states + 2 * (head * a.padded_rows() + row) * a.splits;
  const int lane = threadIdx.x % 32;
  float max = -INFINITY, sum = 0;
  for (int s = lane; s < a.splits; s += 32) max = fmaxf(max, states[2 * s]);
  for (int step = 16; step > 0; step /= 2) max = fmaxf(max, shuffle_xor(max, step));
  // Nothing seen: any finite reference gives weights of 0.
  const float reference = max == -INFINITY ? 0.0f : max;
  for (int s = lane; s < a.splits; s += 32) {
    sum += states[2 * s + 1] * exp2_fast(states[2 * s] - reference);
  }
  for (int step = 16; step > 0; step /= 2) sum += shuffle_xor(sum, step);
  return make_float2(max, sum);
}

// Grid: [rows of all key heads when there are pieces to merge, then blocks of kThreads visual
// tokens of all key heads when mass is wanted]. Each output has one writer that adds in a fixed
// order, so the same inputs give the same bits. Bytes: outs and states once (4 D + 8 a row and
// piece), logits once. The reads of the pieces do not depend on each other, so that many are under
// way.
template <typename T>
__global__ void __launch_bounds__(kThreads) routed_attention_combine(const DecodeLaunch a) {
  const RoutedAttentionParams& p = a.p;
  const int64_t heads = p.batch * p.key_heads;
  const int64_t merges = a.splits > 1 ? heads * a.rows : 0;
  const int thread = threadIdx.x, warp = thread / 32;
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  wait_for_previous_kernel();
  if (blockIdx.x < merges) {
    const int64_t head = blockIdx.x / a.rows;
    const int row = static_cast<int>(blockIdx.x % a.rows);
    const int64_t batch_row = head / p.key_heads, key_head = head % p.key_heads;
    const float2 state = merged_state(a, head, row);
    const float reference = state.x == -INFINITY ? 0.0f : state.x;
    const float norm = state.y > 0 ? 1.0f / state.y : 0.0f;
    if (thread == 0) store_lse(a, batch_row, key_head, row, state.x, state.y);
    const int64_t first = (head * a.padded_rows() + row) * a.splits;
    float* weights = shared;  // [splits]
    for (int s = thread; s < a.splits; s += kThreads) {
      weights[s] = exp2_fast(a.states[2 * (first + s)] - reference) * norm;
    }
    __syncthreads();
    const int dim = static_cast<int>(p.head_dim);
    T* out = head_row<T>(p.out, batch_row, key_head * a.group + row % a.group, row / a.group);
    for (int d = thread; d < dim; d += kThreads) {
      const float* part = a.outs + first * dim + d;
      float value = 0;
#pragma unroll 8
      for (int s = 0; s < a.splits; ++s) value += part[static_cast<int64_t>(s) * dim] * weights[s];
      out[d] = from_float<T>(value);
    }
    return;
  }
  const int64_t blocks = (a.num_visual + kThreads - 1) / kThreads;
  const int64_t index = blockIdx.x - merges;
  const int64_t head = index / blocks;
  const int64_t batch_row = head / p.key_heads, key_head = head % p.key_heads;
  const RowKeys keys = row_keys(p, batch_row);
  const int64_t from = p.mass_from == nullptr ? 0 : p.mass_from[batch_row];
  float* lse = shared;  // [rows], in units of log 2
  for (int row = warp; row < a.rows; row += kWarps) {
    const float2 state = merged_state(a, head, row);
    const bool counted = state.y > 0 && keys.first_position + row / a.group >= from;
    if (thread % 32 == 0) lse[row] = counted ? state.x + log2f(state.y) : INFINITY;
  }
  __syncthreads();
  const int64_t token = index % blocks * kThreads + thread;
  if (token >= a.num_visual) return;
  const int64_t key = key_of_token(row_spans(p.visual, batch_row), p.visual.num_spans, token);
  if (key < first_read(a, keys, batch_row, keys.end - 1) || key >= keys.end) return;
  const float* logits = a.logits + (head * a.num_visual + token) * a.padded_rows();
  float mass = 0;
  for (int row = 0; row < a.rows; ++row) mass += exp2_fast(logits[row] - lse[row]);
  p.mass[batch_row * p.mass_batch_stride + key_head * p.mass_head_stride + token] += mass;
}

}  // namespace cuda
}  // namespace lookagain
