// The side of queries of routed_attention_backward.cuh.
#pragma once

#include "grad_held.cuh"

namespace lookagain {
namespace cuda {

template <typename T, int kDim>
struct QueryGradients : Held<T, kDim> {
  using H = Held<T, kDim>;
  static constexpr int kBlocks = 4;     // of 8 keys, at once
  static constexpr int kTileRows = 64;  // keys that pass by together
  static constexpr int kTile = kTileRows * H::kPitch;
  static constexpr int64_t kRing = 4 * kTile * 2;  // two tiles of keys and values
  static_assert(kWarps * H::kRoom * 4 <= kRing, "sums are turned where tiles pass by");
  // Shared memory: [ring][a rotation].
  static LA_HD int64_t shared_bytes(int64_t half) { return kRing + half * 8; }

  const ManyLaunch& a;
  const RoutedAttentionBackwardParams& p;
  int key_head;
  Row row;
  int first_row, lane, warp, dim, half;
  int first_query, last_query;
  T* ring;
  float2* table;
  int position[2];
  float lse[2], delta[2];
  uint32_t query[H::kSteps][4], grad_out[H::kSteps][4];
  float grad[H::kColumns][4];

  LA_DEVICE explicit QueryGradients(const ManyLaunch& launch)
      : a(launch),
        p(launch.p),
        key_head(static_cast<int>(blockIdx.x / launch.held_blocks % launch.p.key_heads)),
        row(launch, blockIdx.x / launch.held_blocks / launch.p.key_heads),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        dim(static_cast<int>(launch.p.head_dim)),
        half(static_cast<int>(launch.p.visual.half)) {
    first_row = (a.held_blocks - 1 - static_cast<int>(blockIdx.x % a.held_blocks)) * H::kRows;
    first_query = QueryRow(a, first_row).query;
    const int last = QueryRow(a, first_row + H::kRows - 1).query;
    last_query = last < row.queries ? last : row.queries - 1;
    ring = reinterpret_cast<T*>(dynamic_shared());
    table = reinterpret_cast<float2*>(dynamic_shared() + kRing);
  }

  LA_DEVICE Wanted row_at(int n) const {
    const QueryRow at(a, first_row + n);
    return {at.query < row.queries, at.head, at.query};
  }

  // Adds one sighting of `count` keys: those of `list`, or without one the keys from `begin` on.
  // Each row sees the first `limit` of them, all rows of the block at least `least`.
  LA_DEVICE void sight(int count, const int32_t* list, int begin, const int (&limit)[2],
                       int least) {
    const Rows<T> all_keys = row.rows<T>(p.key, key_head),
                  all_values = row.rows<T>(p.value, key_head);
    const auto fetch = [&](int first, int turn) {
      T* to = ring + turn * 2 * kTile;
      copy_two<T, kDim, kTileRows>(to, to + kTile, dim, all_keys, all_values, [&](int n) -> Wanted {
        if (first + n >= count) return {false, 0, 0};
        return {true, 0, list == nullptr ? begin + first + n : list[first + n]};
      });
      copy_async_commit();
    };
    int turn = 0;
    fetch(0, turn);
    for (int first = 0; first < count; first += kTileRows, turn ^= 1) {
      const int end = first + kTileRows;
      if (end < count) {
        fetch(end, turn ^ 1);
        copy_async_wait<1>();
      } else {
        copy_async_wait<0>();
      }
      __syncthreads();
      const T* keys = ring + turn * 2 * kTile;
#pragma unroll 1
      for (int part = 0; part < kTileRows; part += 8 * kBlocks) {
        const int left[2] = {limit[0] - first - part, limit[1] - first - part};
        differentiate(keys + part * H::kPitch, end > least, left);
      }
      __syncthreads();
    }
  }

  // 32 keys; with `cut` each row sees the first `limit` of them.
  LA_DEVICE void differentiate(const T* keys, bool cut, const int (&limit)[2]) {
    float weight[kBlocks][4], change[kBlocks][4];
    multiply_by_rows<T>(weight, query, keys, H::kPitch);
    if (cut) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (8 * n + 2 * (lane % 4) + i % 2 >= limit[i / 2]) weight[n][i] = -INFINITY;
        }
      }
    }
    multiply_by_rows<T>(change, grad_out, keys + kTile, H::kPitch);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weight[n][i] = exp2_fast(weight[n][i] * a.scale - lse[i / 2]);
        change[n][i] = weight[n][i] * (change[n][i] - delta[i / 2]);
      }
    }
#pragma unroll
    for (int j = 0; j < kBlocks / 2; ++j) {
      uint32_t left[4];
      as_left<T>(left, change[2 * j], change[2 * j + 1]);
      multiply_by_columns<T>(grad, left, keys + j * 16 * H::kPitch, H::kPitch);
    }
  }

  // The queries turned by `to`; the sums from their frame `from` to that.
  LA_DEVICE void turn(int32_t from, int32_t to, bool queries_too) {
    make_table(p.visual, from - to, table);
    __syncthreads();
    turn_sums(grad, reinterpret_cast<float*>(ring) + warp * H::kRoom, table, half);
    __syncthreads();
    if (!queries_too) return;
    make_table(p.visual, -to, table);
    __syncthreads();
    turn_rows<T, kDim, H::kRows>(ring, dim, table, half, row.rows<T>(p.query, key_head * a.group),
                                 [&](int n) { return row_at(n); });
    __syncthreads();
    load_left<T>(query, ring + warp * 16 * H::kPitch, H::kPitch);
    __syncthreads();
  }

  LA_DEVICE void run() {
    if (first_query >= row.queries) return;
    const int first_head = key_head * a.group;
    copy_two<T, kDim, H::kRows>(ring, ring + kTile, dim, row.rows<T>(p.query, first_head),
                                row.rows<T>(p.grad_out, first_head),
                                [&](int n) { return row_at(n); });
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    load_left<T>(query, ring + warp * 16 * H::kPitch, H::kPitch);
    load_left<T>(grad_out, ring + kTile + warp * 16 * H::kPitch, H::kPitch);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const QueryRow at(a, first_row + warp * 16 + lane / 4 + 8 * j);
      const int64_t head = key_head * a.group + at.head;
      const bool there = at.query < row.queries;
      position[j] = row.position(at.query);
      lse[j] = there ? lse_of(row, head, at.query) : INFINITY;
      delta[j] = there ? a.delta[row.place(head, at.query)] : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < H::kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) grad[n][i] = 0;
    }
    const int begin = row.keys.begin;
    int32_t frame = 0;
#pragma unroll 1
    for (int r = -1; r < p.visual.num_reinjections; ++r) {
      const int32_t* list = nullptr;
      int count = row.position(last_query) + 1 - begin,
          least = row.position(first_query) + 1 - begin;
      int limit[2] = {position[0] + 1 - begin, position[1] + 1 - begin};
      if (r >= 0) {
        const int first = row.first_seeing(r);
        list = row.list(r, &count);
        if (first > last_query) continue;
        least = first_query >= first ? count : 0;
        limit[0] = position[0] >= row.position(first) ? count : 0;
        limit[1] = position[1] >= row.position(first) ? count : 0;
      }
      if (count <= 0) continue;
      if (r >= 0) {
        turn(frame, row.shift(r), true);
        frame = row.shift(r);
      }
      sight(count, list, begin, limit, least);
    }
    if (frame != 0) turn(frame, 0, false);
    store();
  }

  LA_DEVICE void store() const {
    const float scale = static_cast<float>(p.scale);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const QueryRow at(a, first_row + warp * 16 + lane / 4 + 8 * j);
      if (at.query >= row.queries) continue;
      T* to = row.at<T>(p.grad_query, key_head * a.group + at.head, at.query) + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < H::kColumns; ++n) {
        if (8 * n >= dim) continue;
        *reinterpret_cast<uint32_t*>(to + 8 * n) =
            pack<T>(grad[n][2 * j] * scale, grad[n][2 * j + 1] * scale);
      }
    }
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 2) grad_query(const ManyLaunch a) {
  QueryGradients<T, kDim>(a).run();
}

}  // namespace cuda
}  // namespace lookagain
