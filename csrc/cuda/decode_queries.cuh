// The queries of one block of the decode kernel, in shared memory: [1 + R, kRows, pitch], as they
// are and then turned back by the shift of each re-injection.
#pragma once

#include "decode_merge.cuh"

namespace lookagain {
namespace cuda {

constexpr int kChunk = 8;  // elements of a 16-byte access

// Turned copies of the queries in shared memory. A thread takes so many features, and those that
// turn with them, of all rows.
template <typename T, int kDim, int kRows, int kWide>
LA_DEVICE void turn_queries(const VisualParams& visual, int batch_row, uint32_t active,
                            T* queries) {
  constexpr int kPitch = decode_pitch(kDim);
  struct alignas(kWide * sizeof(T)) Part {
    T elements[kWide];
  };
  const int half = static_cast<int>(visual.half);
  const int sightings = static_cast<int>(visual.num_reinjections);
  const int pairs = half / kWide, items = pairs + (kDim - 2 * half) / kWide;
  for (int i = threadIdx.x; i < sightings * items; i += blockDim.x) {
    const int item = i % items, r = i / items;
    if ((active >> r & 1) == 0) continue;
    const bool turns = item < pairs;
    const int feature = turns ? item * kWide : 2 * half + (item - pairs) * kWide;
    float2 turn[kWide];
#pragma unroll
    for (int e = 0; e < kWide; ++e) {
      turn[e] = make_float2(1, 0);
      if (turns) {
        turn[e] = turn_of(visual.shift[batch_row * sightings + r], visual.inv_freq[feature + e]);
      }
    }
    const int partner = turns ? half : 0;
#pragma unroll 4
    for (int row = 0; row < kRows; ++row) {
      const T* from = queries + row * kPitch + feature;
      T* to = queries + ((1 + r) * kRows + row) * kPitch + feature;
      Part first = *reinterpret_cast<const Part*>(from);
      Part second = *reinterpret_cast<const Part*>(from + partner);
#pragma unroll
      for (int e = 0; e < kWide; ++e) {
        const float x = to_float(first.elements[e]), y = to_float(second.elements[e]);
        first.elements[e] = from_float<T>(x * turn[e].x + y * turn[e].y);
        second.elements[e] = from_float<T>(y * turn[e].x - x * turn[e].y);
      }
      *reinterpret_cast<Part*>(to) = first;
      if (turns) *reinterpret_cast<Part*>(to + half) = second;
    }
  }
}

// The block's queries to shared memory: as they are, then turned by -shift of each active
// re-injection. Features past D and rows past the last are zeros.
template <typename T, int kDim, int kRows>
LA_DEVICE void load_queries(const DecodeLaunch& a, int batch_row, int key_head, int row_block,
                            uint32_t active, T* queries) {
  constexpr int kPitch = decode_pitch(kDim), kChunks = kDim / kChunk;
  const RoutedAttentionParams& p = a.p;
  const int dim = static_cast<int>(p.head_dim);
  for (int i = threadIdx.x; i < kRows * kChunks; i += blockDim.x) {
    const int row = i / kChunks, feature = i % kChunks * kChunk;
    const int number = row_block * kRows + row;
    Chunk<T> chunk;
    chunk.bits = uint4{0, 0, 0, 0};
    if (number < a.rows && feature < dim) {
      const T* from =
          head_row<T>(p.query, batch_row, key_head * a.group + number % a.group, number / a.group);
      if (a.whole_queries) {
        chunk.bits = *reinterpret_cast<const uint4*>(from + feature);
      } else {
        for (int e = 0; e < kChunk; ++e) chunk.elements[e] = from[feature + e];
      }
    }
    *reinterpret_cast<uint4*>(queries + row * kPitch + feature) = chunk.bits;
  }
  __syncthreads();
  if (active == 0) return;
  if (p.visual.half % 2 == 0) {
    turn_queries<T, kDim, kRows, 2>(p.visual, batch_row, active, queries);
  } else {
    turn_queries<T, kDim, kRows, 1>(p.visual, batch_row, active, queries);
  }
  __syncthreads();
}

}  // namespace cuda
}  // namespace lookagain
