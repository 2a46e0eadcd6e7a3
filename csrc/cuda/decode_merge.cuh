// From the states of warps and pieces to the result: the end of each decode kernel, and the kernel
// that merges the pieces of the key axis and norms the visual mass.
#pragma once

#include "decode_launch.h"

namespace lookagain {
namespace cuda {

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

// What a row's softmax takes from its logits before they count for the mass, in units of log 2: the
// log-sum-exp, or infinity for a row that is not counted.
LA_DEVICE float counted_lse(const DecodeLaunch& a, const RowKeys& keys, int64_t batch_row, int row,
                            float max, float sum) {
  const int64_t from = a.p.mass_from == nullptr ? 0 : a.p.mass_from[batch_row];
  const bool counted = sum > 0 && keys.first_position + row / a.group >= from;
  return counted ? max + log2f(sum) : INFINITY;
}

// Adds the probabilities of tokens `first`, `first + step`, ... to the mass, for each token those
// of all rows of the key head in order. `lse` has a value for each padded row, infinity for those
// past the last. Several tokens are read before the first is used: a read takes as long as a tile.
LA_DEVICE void add_token_mass(const DecodeLaunch& a, int64_t batch_row, int64_t key_head, int first,
                              int step, const float* lse) {
  constexpr int kAtOnce = 4;
  const RoutedAttentionParams& p = a.p;
  const RowKeys keys = row_keys(p, batch_row);
  const int first_key = first_read(a, keys, batch_row, keys.end - 1);
  const int rows = static_cast<int>(a.padded_rows()), tokens = static_cast<int>(a.num_visual);
  const float* logits = a.logits + (batch_row * p.key_heads + key_head) * a.num_visual * rows;
  float* mass = p.mass + batch_row * p.mass_batch_stride + key_head * p.mass_head_stride;
  for (int token = first; token < tokens; token += kAtOnce * step) {
    float sum[kAtOnce], before[kAtOnce];
    bool seen[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int t = token + i * step;
      seen[i] = t < tokens;
      if (seen[i]) {
        const int64_t key = key_of_token(row_spans(p.visual, batch_row), p.visual.num_spans, t);
        seen[i] = key >= first_key && key < keys.end;
      }
      sum[i] = 0;
      before[i] = seen[i] ? mass[t] : 0.0f;
    }
    for (int row = 0; row < rows; row += 4) {
      float4 part[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t place = static_cast<int64_t>(token + i * step) * rows + row;
        part[i] = float4{0, 0, 0, 0};
        if (seen[i]) part[i] = *reinterpret_cast<const float4*>(logits + place);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        sum[i] += exp2_fast(part[i].x - lse[row]);
        sum[i] += exp2_fast(part[i].y - lse[row + 1]);
        sum[i] += exp2_fast(part[i].z - lse[row + 2]);
        sum[i] += exp2_fast(part[i].w - lse[row + 3]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (seen[i]) mass[token + i * step] = before[i] + sum[i];
    }
  }
}

// Merges what the warps of a block found, `states` [warp, row] (max, sum) and `outs`
// [warp, row, pitch] in shared memory, into the result or this piece's part of the workspace. Where
// the block knows the whole softmax it adds the mass too; behind the states of kWarps warps there
// is room for a float a row.
template <typename T, int kRows>
LA_DEVICE void merge_warps(const DecodeLaunch& a, int64_t batch_row, int64_t key_head,
                           int64_t row_block, int64_t split, float2* states, const float* outs,
                           int pitch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int dim = static_cast<int>(a.p.head_dim);
  const int64_t head = batch_row * a.p.key_heads + key_head;
  const bool whole = a.logits != nullptr && a.whole_heads();
  float* lse = reinterpret_cast<float*>(states + kWarps * kRows);
  for (int r = warp; r < kRows; r += a.warps) {
    const int row = static_cast<int>(row_block) * kRows + r;
    if (lane == 0 && whole) lse[r] = INFINITY;
    if (row >= a.rows) continue;
    float max = -INFINITY, sum = 0, share[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < a.warps) max = fmaxf(max, states[w * kRows + r].x);
    }
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      share[w] = 0;
      if (w >= a.warps) continue;
      const float2 state = states[w * kRows + r];
      share[w] = state.x == -INFINITY ? 0.0f : exp2_fast(state.x - max);
      sum += state.y * share[w];
    }
    const int64_t place = (head * a.padded_rows() + row) * a.splits + split;
    if (lane == 0 && a.needs_combine()) {
      reinterpret_cast<float2*>(a.states)[place] = make_float2(max, sum);
    }
    if (lane == 0 && a.splits == 1) store_lse(a, batch_row, key_head, row, max, sum);
    if (lane == 0 && whole) {
      lse[r] = counted_lse(a, row_keys(a.p, batch_row), batch_row, row, max, sum);
    }
    const float norm = sum > 0 ? 1.0f / sum : 0.0f;
    T* out = head_row<T>(a.p.out, batch_row, key_head * a.group + row % a.group, row / a.group);
    for (int d = lane; d < dim; d += 32) {
      float value = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w < a.warps) value += outs[(w * kRows + r) * pitch + d] * share[w];
      }
      if (a.splits > 1) {
        a.outs[place * dim + d] = value;
      } else {
        out[d] = from_float<T>(value * norm);
      }
    }
  }
  if (!whole) return;
  __syncthreads();
  add_token_mass(a, batch_row, key_head, threadIdx.x, blockDim.x, lse);
}

// max and sum over the pieces of one row, worked out by a whole warp: the same in all its lanes.
LA_DEVICE float2 merged_state(const DecodeLaunch& a, int64_t head, int row) {
  const float2* states =
      reinterpret_cast<const float2*>(a.states) + (head * a.padded_rows() + row) * a.splits;
  const int lane = threadIdx.x % 32;
  float max = -INFINITY, sum = 0;
  for (int s = lane; s < a.splits; s += 32) {
    const float2 state = states[s];
    const float larger = fmaxf(max, state.x);
    // Nothing seen: any finite reference gives weights of 0.
    const float reference = larger == -INFINITY ? 0.0f : larger;
    sum = sum * exp2_fast(max - reference) + state.y * exp2_fast(state.x - reference);
    max = larger;
  }
  const float own = max;
  for (int step = 16; step > 0; step /= 2) max = fmaxf(max, shuffle_xor(max, step));
  sum *= exp2_fast(own - (max == -INFINITY ? 0.0f : max));
  for (int step = 16; step > 0; step /= 2) sum += shuffle_xor(sum, step);
  return make_float2(max, sum);
}

// Bytes of shared memory of the combine: partial values of groups of threads (kThreads times 4 at
// most), then weights of the pieces or the log-sum-exp of each row.
LA_HD int64_t combine_shared_bytes(const DecodeLaunch& a) {
  const int64_t rows = a.logits == nullptr ? 0 : a.padded_rows();
  const int64_t floats = rows > a.splits ? rows : a.splits;
  return kThreads * 16 + (floats * 4 + 15) / 16 * 16;
}

// Grid: [rows of all key heads when there are pieces to merge, then blocks of kThreads visual
// tokens of all key heads when mass is wanted]. Each output has one writer that adds in a fixed
// order, so the same inputs give the same bits. Bytes: outs and states once (4 D + 8 a row and
// piece), logits once. It starts while the first kernel ends (programmatic dependent launch), and
// is a chain of latencies: pieces are dealt out over groups of threads, 4 features a thread, and
// the first reads of each are under way before their weights are known.
template <typename T>
__global__ void __launch_bounds__(kThreads) routed_attention_combine(const DecodeLaunch a) {
  const RoutedAttentionParams& p = a.p;
  const unsigned heads = static_cast<unsigned>(p.batch * p.key_heads);
  const unsigned merges = a.splits > 1 ? heads * a.rows : 0;
  const int thread = threadIdx.x, warp = thread / 32;
  float4* partial = reinterpret_cast<float4*>(dynamic_shared());  // [kThreads]
  float* shared = reinterpret_cast<float*>(partial + kThreads);
  wait_for_previous_kernel();
  if (blockIdx.x < merges) {
    const unsigned head = blockIdx.x / a.rows;
    const int row = static_cast<int>(blockIdx.x % a.rows);
    const int64_t batch_row = head / static_cast<unsigned>(p.key_heads);
    const int64_t key_head = head % static_cast<unsigned>(p.key_heads);
    const int64_t first = (head * a.padded_rows() + row) * a.splits;
    const int dim = static_cast<int>(p.head_dim), quads = dim / 4;  // D is a multiple of 8
    const int groups = kThreads / quads, group = thread / quads, quad = thread % quads;
    const float4* outs = reinterpret_cast<const float4*>(a.outs + first * dim) + quad;
    constexpr int kAhead = 8;
    float4 ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int s = group + i * groups;
      ahead[i] = float4{0, 0, 0, 0};
      if (group < groups && s < a.splits) ahead[i] = outs[static_cast<int64_t>(s) * quads];
    }
    const float2 state = merged_state(a, head, row);
    const float reference = state.x == -INFINITY ? 0.0f : state.x;
    const float norm = state.y > 0 ? 1.0f / state.y : 0.0f;
    if (thread == 0) store_lse(a, batch_row, key_head, row, state.x, state.y);
    float* weights = shared;  // [splits]
    for (int s = thread; s < a.splits; s += kThreads) {
      weights[s] = exp2_fast(a.states[2 * (first + s)] - reference) * norm;
    }
    __syncthreads();
    float4 value{0, 0, 0, 0};
    auto add = [&](const float4& part, int s) {
      const float weight = weights[s];
      value.x += part.x * weight;
      value.y += part.y * weight;
      value.z += part.z * weight;
      value.w += part.w * weight;
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int s = group + i * groups;
      if (group < groups && s < a.splits) add(ahead[i], s);
    }
    if (group < groups) {
#pragma unroll 4
      for (int s = group + kAhead * groups; s < a.splits; s += groups) {
        add(outs[static_cast<int64_t>(s) * quads], s);
      }
    }
    partial[thread] = value;
    __syncthreads();
    if (thread >= quads) return;
    for (int g = 1; g < groups; ++g) {
      const float4 more = partial[g * quads + thread];
      value.x += more.x;
      value.y += more.y;
      value.z += more.z;
      value.w += more.w;
    }
    T* out = head_row<T>(p.out, batch_row, key_head * a.group + row % a.group, row / a.group) +
             4 * thread;
    out[0] = from_float<T>(value.x);
    out[1] = from_float<T>(value.y);
    out[2] = from_float<T>(value.z);
    out[3] = from_float<T>(value.w);
    return;
  }
  const unsigned blocks = static_cast<unsigned>((a.num_visual + kThreads - 1) / kThreads);
  const unsigned index = blockIdx.x - merges;
  const unsigned head = index / blocks;
  const int64_t batch_row = head / static_cast<unsigned>(p.key_heads);
  const int64_t key_head = head % static_cast<unsigned>(p.key_heads);
  const RowKeys keys = row_keys(p, batch_row);
  float* lse = shared;  // [padded rows]
  for (int row = warp; row < a.padded_rows(); row += kWarps) {
    float found = INFINITY;
    if (row < a.rows) {
      const float2 state = merged_state(a, head, row);
      found = counted_lse(a, keys, batch_row, row, state.x, state.y);
    }
    if (thread % 32 == 0) lse[row] = found;
  }
  __syncthreads();
  add_token_mass(a, batch_row, key_head, static_cast<int>(index % blocks) * kThreads + thread,
                 static_cast<int>(blocks) * kThreads, lse);
}

}  // namespace cuda
}  // namespace lookagain
