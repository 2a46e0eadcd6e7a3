// routed_attention on CUDA cores: any element type, any alignment, the exact float32 arithmetic.
//
// Layout and grid as in routed_attention_decode.cuh, with blocks of 4 rows. A warp takes tiles of
// 32 keys: for the logits a lane is a key, for the values a lane is features lane, lane + 32, ...
// Keys are read straight from global memory, each lane its own row, which the first-level cache
// turns into whole lines. Bytes: as there, times the blocks of 4 rows that a key head has (the
// repeated reads mostly come from the second-level cache). It is the kernel of float32, and of
// tensors that are not aligned to 16 bytes.
#pragma once

#include "decode_merge.cuh"

namespace lookagain {
namespace cuda {

template <typename T>
struct Simt {
  static constexpr int kRows = 4;
  static constexpr int kMaxDim = 256;
  static constexpr int kPerLane = kMaxDim / 32;

  // [queries of 1 + R sightings, kRows, D; at the end the warps' values][tables][weights][states]
  static LA_HD int64_t first_bytes(int64_t reinjections, int64_t dim) {
    const int64_t rows = 1 + reinjections > kWarps ? 1 + reinjections : kWarps;
    return rows * kRows * dim * 4;
  }
  static LA_HD int64_t shared_bytes(int64_t reinjections, int64_t half, int64_t dim) {
    return first_bytes(reinjections, dim) + reinjections * half * 8 + kWarps * kRows * 32 * 4 +
           kWarps * kRows * 8 + kRows * 4;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) routed_attention_simt(const DecodeLaunch a) {
  using Traits = Simt<T>;
  constexpr int kRows = Traits::kRows;
  const RoutedAttentionParams& p = a.p;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  let_next_kernel_start();
  int64_t index = blockIdx.x;
  const int64_t split = index % a.splits;
  index /= a.splits;
  const int64_t row_block = index % a.row_blocks;
  index /= a.row_blocks;
  const int64_t key_head = index % p.key_heads, batch_row = index / p.key_heads;
  const int dim = static_cast<int>(p.head_dim), half = static_cast<int>(p.visual.half);
  const int again = static_cast<int>(p.visual.num_reinjections);
  const RowKeys keys = row_keys(p, batch_row);

  int32_t place[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int row = static_cast<int>(row_block) * kRows + r;
    place[r] =
        static_cast<int32_t>(keys.first_position + (row < a.rows ? row : a.rows - 1) / a.group);
  }
  const uint32_t active = active_reinjections(p.visual, batch_row, place[kRows - 1]);

  float* queries = reinterpret_cast<float*>(dynamic_shared());
  float* outs = queries;
  float2* table = reinterpret_cast<float2*>(dynamic_shared() + Traits::first_bytes(again, dim));
  float2* states = table + again * half;
  float* weights = reinterpret_cast<float*>(states + kWarps * kRows) + kRows + warp * kRows * 32;

  for (int i = threadIdx.x; i < again * half; i += kThreads) {
    table[i] = turn_of(p.visual.shift[batch_row * again + i / half], p.visual.inv_freq[i % half]);
  }
  for (int i = threadIdx.x; i < kRows * dim; i += kThreads) {
    const int row = static_cast<int>(row_block) * kRows + i / dim;
    const T* from =
        head_row<T>(p.query, batch_row, key_head * a.group + (row < a.rows ? row % a.group : 0),
                    row < a.rows ? row / a.group : 0);
    queries[i] = row < a.rows ? to_float(from[i % dim]) : 0.0f;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < again * kRows * dim; i += kThreads) {
    const int feature = i % dim, r = i / dim / kRows;
    const float* plain = queries + i % (kRows * dim);
    float value = *plain;
    if (feature < half) {
      value = value * table[r * half + feature].x + plain[half] * table[r * half + feature].y;
    } else if (feature < 2 * half) {
      const float2 turn = table[r * half + feature - half];
      value = value * turn.x - plain[-half] * turn.y;
    }
    queries[kRows * dim + i] = value;
  }
  __syncthreads();

  float max[kRows], sum[kRows], out[kRows][Traits::kPerLane];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    max[r] = -INFINITY;
    sum[r] = 0;
#pragma unroll
    for (int i = 0; i < Traits::kPerLane; ++i) out[r][i] = 0;
  }
  const int64_t first = first_read(a, keys, batch_row, place[kRows - 1]);
  const int32_t* spans = row_spans(p.visual, batch_row);
  // Whether some query sees a key, in its place or again. Other slots may hold anything.
  auto readable = [&](int64_t key) {
    if (key >= keys.end) return false;
    return key >= keys.begin || (key >= first && is_visual(spans, p.visual.num_spans, key));
  };
  const int64_t first_tile = first / 32;
  const int64_t tiles = keys.end > first ? (keys.end + 31) / 32 - first_tile : 0;
  SpanCursor cursor(spans, p.visual.num_spans);
  const int64_t step = static_cast<int64_t>(kWarps) * a.splits;
  for (int64_t tile = first_tile + split * kWarps + warp; tile < first_tile + tiles; tile += step) {
    const int32_t key = static_cast<int32_t>(tile * 32) + lane;
    const SlotPlace place_in_cache =
        readable(key) ? checked_place(p, batch_row, key) : SlotPlace{-1, 0};
    const bool there = place_in_cache.block >= 0;
    const T* key_row = static_cast<const T*>(p.key.data) +
                       (there ? offset_of(p.key, place_in_cache, key_head) : 0);
    float logit[kRows], weight[kRows];
    auto score = [&](const float* rows, float* logits) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) logits[r] = 0;
      for (int d = 0; d < dim; ++d) {
        const float k = there ? to_float(key_row[d]) : 0.0f;
#pragma unroll
        for (int r = 0; r < kRows; ++r) logits[r] += k * rows[r * dim + d];
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) logits[r] *= a.scale;
    };
    score(queries, logit);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!there || key < keys.begin || key > place[r]) logit[r] = -INFINITY;
      weight[r] = 1;
    }
    if (p.visual.num_spans > 0 && cursor.reaches(tile * 32, tile * 32 + 32)) {
      const int32_t token = cursor.token(key, tile * 32 + 32);
      for (uint32_t rest = active; rest != 0; rest &= rest - 1) {
        const int n = lowest_bit(rest);
        const uint8_t* selected = row_selected(p.visual, batch_row, n);
        const bool shown = there && is_shown(p.visual, selected, token);
        if (!any_lane(shown)) continue;
        float more[kRows];
        score(queries + (1 + n) * kRows * dim, more);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const bool seen = shown && place[r] >= p.visual.start[batch_row * again + n];
          add_sighting(seen ? more[r] : -INFINITY, &logit[r], &weight[r]);
        }
      }
      if (a.logits != nullptr && token >= 0 && token < a.num_visual) {
        float* kept =
            a.logits +
            ((batch_row * p.key_heads + key_head) * a.num_visual + token) * a.padded_rows() +
            row_block * kRows;
#pragma unroll
        for (int r = 0; r < kRows; ++r) kept[r] = logit[r] + log2f(weight[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float largest = logit[r];
      for (int step = 16; step > 0; step /= 2) {
        largest = fmaxf(largest, shuffle_xor(largest, step));
      }
      largest = fmaxf(largest, max[r]);
      const float reference = largest == -INFINITY ? 0.0f : largest;
      const float factor = exp2f(max[r] - reference);
      max[r] = largest;
      weight[r] *= exp2f(logit[r] - reference);
      sum[r] = sum[r] * factor + weight[r];
      weights[r * 32 + lane] = weight[r];
#pragma unroll
      for (int i = 0; i < Traits::kPerLane; ++i) out[r][i] *= factor;
    }
    __syncwarp();
    for (int j = 0; j < 32; ++j) {
      const int64_t slot = tile * 32 + j;
      if (!readable(slot)) continue;
      const SlotPlace where = checked_place(p, batch_row, slot);
      if (where.block < 0) continue;
      const T* value_row =
          static_cast<const T*>(p.value.data) + offset_of(p.value, where, key_head);
#pragma unroll
      for (int i = 0; i < Traits::kPerLane; ++i) {
        const int feature = lane + 32 * i;
        if (feature >= dim) break;
        const float v = to_float(value_row[feature]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) out[r][i] += weights[r * 32 + j] * v;
      }
    }
    __syncwarp();
  }
  __syncthreads();  // the queries are done with
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float total = sum[r];
    for (int step = 16; step > 0; step /= 2) total += shuffle_xor(total, step);
    if (lane == 0) states[warp * kRows + r] = make_float2(max[r], total);
#pragma unroll
    for (int i = 0; i < Traits::kPerLane; ++i) {
      const int feature = lane + 32 * i;
      if (feature < dim) outs[(warp * kRows + r) * dim + feature] = out[r][i];
    }
  }
  __syncthreads();
  merge_warps<T, kRows>(a, batch_row, key_head, row_block, split, states, outs, dim);
}

}  // namespace cuda
}  // namespace lookagain
