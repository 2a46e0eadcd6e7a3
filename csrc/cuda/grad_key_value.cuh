// The side of keys of routed_attention_backward.cuh.
#pragma once

#include "grad_held.cuh"

namespace lookagain {
namespace cuda {

template <typename T, int kDim>
struct KeyGradients : Held<T, kDim> {
  using H = Held<T, kDim>;
  static constexpr int kTileRows = 32;  // that pass by together
  static constexpr int kBlocks = kTileRows / 8;
  static constexpr int kTile = kTileRows * H::kPitch;
  static constexpr int64_t kRing = 4 * kTile * 2;  // two tiles of queries and their gradients
  static constexpr int kHeld = H::kRows * H::kPitch;
  static_assert(kWarps * H::kRoom * 4 <= kRing, "sums are turned where tiles pass by");
  // Shared memory: [ring][keys][values][lse, delta, count and query of two tiles' rows][a rotation]
  // [which re-injections show some key and which all, whether some and all are seen in their
  // place].
  static constexpr int64_t kRowsAt = kRing + 2 * kHeld * 2;
  static constexpr int kValues = 4 * kTileRows;
  static LA_HD int64_t shared_bytes(int64_t half) {
    return kRowsAt + 2 * kValues * 4 + half * 8 + 16;
  }

  const ManyLaunch& a;
  const RoutedAttentionBackwardParams& p;
  int first_key, key_head;
  Row row;
  int lane, warp;
  T *ring, *keys, *values;
  float* of_rows;
  float2* table;
  float grad_key[H::kColumns][4], grad_value[H::kColumns][4];
  float mass[2];

  LA_DEVICE explicit KeyGradients(const ManyLaunch& launch)
      : a(launch),
        p(launch.p),
        first_key(static_cast<int>(blockIdx.x / launch.pieces % launch.held_blocks) * H::kRows),
        key_head(
            static_cast<int>(blockIdx.x / launch.pieces / launch.held_blocks % launch.p.key_heads)),
        row(launch, blockIdx.x / launch.pieces / launch.held_blocks / launch.p.key_heads),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32) {
    ring = reinterpret_cast<T*>(dynamic_shared());
    keys = reinterpret_cast<T*>(dynamic_shared() + kRing);
    values = keys + kHeld;
    of_rows = reinterpret_cast<float*>(dynamic_shared() + kRowsAt);
    table = reinterpret_cast<float2*>(of_rows + 2 * kValues);
  }

  // Slots of this lane's keys.
  LA_DEVICE int place(int j) const { return first_key + warp * 16 + lane / 4 + 8 * j; }

  LA_DEVICE bool is_shown(int r, int j) const {
    return place(j) < row.slots() && (a.shown[row.place_of_key(place(j))] >> r & 1) != 0;
  }

  LA_DEVICE int dim() const { return static_cast<int>(p.head_dim); }
  LA_DEVICE int half() const { return static_cast<int>(p.visual.half); }
  LA_DEVICE int piece() const { return static_cast<int>(blockIdx.x) % a.pieces; }

  // Kept in shared memory: registers are for sums.
  LA_DEVICE uint32_t* marks() const { return reinterpret_cast<uint32_t*>(table + half()); }

  LA_DEVICE void look_up_shown() const {
    uint32_t some = 0, all = first_key + H::kRows <= row.slots() ? ~0u : 0;
    if (p.visual.num_reinjections > 0) {
      const uint32_t* bits = a.shown + row.place_of_key(first_key);
#pragma unroll 8
      for (int n = 0; n < H::kRows; ++n) {
        const uint32_t shown = first_key + n < row.slots() ? bits[n] : 0;
        some |= shown;
        all &= shown;
      }
    }
    const int end = first_key + H::kRows;
    marks()[0] = some;
    marks()[1] = all;
    marks()[2] = first_key < row.keys.end && end > row.keys.begin;
    marks()[3] = first_key >= row.keys.begin && end <= row.keys.end;
  }

  // Keys that nobody sees are not read, and count as zeros.
  LA_DEVICE Wanted key_at(int n) const {
    const int slot = first_key + n;
    bool seen = slot >= row.keys.begin && slot < row.keys.end;
    if (!seen && slot < row.keys.begin && p.visual.num_reinjections > 0) {
      seen = a.shown[row.place_of_key(slot)] != 0;
    }
    return {seen, 0, slot};
  }

  LA_DEVICE void fetch(int first_row, int turn, int first_query) {
    T* to = ring + turn * 2 * kTile;
    const int first_head = key_head * a.group;
    copy_two<T, kDim, kTileRows>(to, to + kTile, dim(), row.rows<T>(p.query, first_head),
                                 row.rows<T>(p.grad_out, first_head), [&](int n) -> Wanted {
                                   const QueryRow at(a, first_row + n);
                                   return {at.query < row.queries, at.head, at.query};
                                 });
    copy_async_commit();
    if (threadIdx.x >= kTileRows) return;
    const QueryRow at(a, first_row + static_cast<int>(threadIdx.x));
    const int64_t head = key_head * a.group + at.head;
    const bool there = at.query >= first_query && at.query < row.queries;
    float* mine = of_rows + turn * kValues + threadIdx.x;
    mine[0] = there ? lse_of(row, head, at.query) : INFINITY;
    mine[kTileRows] = there ? a.delta[row.place(head, at.query)] : 0.0f;
    const bool counts = there && (p.counted == nullptr ||
                                  p.counted[row.batch() * a.tokens + row.offset + at.query] != 0);
    mine[2 * kTileRows] = counts ? 1.0f : 0.0f;
    reinterpret_cast<int*>(mine)[3 * kTileRows] = at.query;
  }

  // Adds one sighting. Queries before `first` see nothing, those from `last` on all keys of the
  // block that are shown; `from` has for each of this lane's keys the first query that sees it.
  LA_DEVICE void sight(int first, int last, const int (&from)[2]) {
    const int rows_end = row.queries * a.group, step = a.pieces * kTileRows;
    int at = (first * a.group / kTileRows + piece()) * kTileRows, turn = 0;
    if (at < rows_end) fetch(at, turn, first);
    for (; at < rows_end; at += step, turn ^= 1) {
      if (at + step < rows_end) {
        fetch(at + step, turn ^ 1, first);
        copy_async_wait<1>();
      } else {
        copy_async_wait<0>();
      }
      __syncthreads();
      const bool cut = QueryRow(a, at).query < last;
      differentiate(ring + turn * 2 * kTile, of_rows + turn * kValues + 2 * (lane % 4), cut, from);
      __syncthreads();
    }
  }

  LA_DEVICE void differentiate(const T* queries, const float* mine, bool cut,
                               const int (&from)[2]) {
    const T* upstream = queries + kTile;
    float weight[kBlocks][4], change[kBlocks][4];
    uint32_t left[4];
    multiply_by_rows<T, H::kSteps>(weight, keys + warp * 16 * H::kPitch, queries, H::kPitch);
    if (cut) {
      const int* asks = reinterpret_cast<const int*>(mine) + 3 * kTileRows;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (asks[8 * n + i % 2] < from[i / 2]) weight[n][i] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weight[n][i] = exp2_fast(weight[n][i] * a.scale - mine[8 * n + i % 2]);
        mass[i / 2] += weight[n][i] * mine[2 * kTileRows + 8 * n + i % 2];
      }
    }
#pragma unroll
    for (int j = 0; j < kBlocks / 2; ++j) {
      as_left<T>(left, weight[2 * j], weight[2 * j + 1]);
      multiply_by_columns<T>(grad_value, left, upstream + j * 16 * H::kPitch, H::kPitch);
    }
    multiply_by_rows<T, H::kSteps>(change, values + warp * 16 * H::kPitch, upstream, H::kPitch);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        change[n][i] = weight[n][i] * (change[n][i] - mine[kTileRows + 8 * n + i % 2]);
      }
    }
#pragma unroll
    for (int j = 0; j < kBlocks / 2; ++j) {
      as_left<T>(left, change[2 * j], change[2 * j + 1]);
      multiply_by_columns<T>(grad_key, left, queries + j * 16 * H::kPitch, H::kPitch);
    }
  }

  // The keys turned by `to`; their sums from the frame `from` to that.
  LA_DEVICE void turn(int32_t from, int32_t to, bool keys_too) {
    make_table(p.visual, to - from, table);
    __syncthreads();
    turn_sums(grad_key, reinterpret_cast<float*>(ring) + warp * H::kRoom, table, half());
    __syncthreads();
    if (!keys_too) return;
    make_table(p.visual, to, table);
    __syncthreads();
    turn_rows<T, kDim, H::kRows>(keys, dim(), table, half(), row.rows<T>(p.key, key_head),
                                 [&](int n) { return key_at(n); });
    __syncthreads();
  }

  LA_DEVICE void run() {
    if (first_key >= row.slots()) return;
    copy_two<T, kDim, H::kRows>(keys, values, dim(), row.rows<T>(p.key, key_head),
                                row.rows<T>(p.value, key_head), [&](int n) { return key_at(n); });
    copy_async_commit();
    copy_async_wait<0>();
    if (threadIdx.x == 0) look_up_shown();
    __syncthreads();
    mass[0] = mass[1] = 0;
#pragma unroll
    for (int n = 0; n < H::kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) grad_key[n][i] = grad_value[n][i] = 0;
    }
    int32_t frame = 0;
#pragma unroll 1
    for (int r = -1; r < p.visual.num_reinjections; ++r) {
      if (r < 0 ? marks()[2] == 0 : (marks()[0] >> r & 1) == 0) continue;
      const int origin = row.keys.first_position;
      int first = first_key - origin, last = marks()[3] != 0 ? first + H::kRows - 1 : INT32_MAX,
          from[2];
      first = first < 0 ? 0 : first;
      if (r >= 0) {
        turn(frame, row.shift(r), true);
        frame = row.shift(r);
        first = row.first_seeing(r);
        last = (marks()[1] >> r & 1) != 0 ? first : INT32_MAX;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int slot = place(j);
        const bool sees = r < 0 ? slot >= row.keys.begin && slot < row.keys.end : is_shown(r, j);
        from[j] = !sees ? INT32_MAX : (r < 0 ? slot - origin : first);
      }
      sight(first, last, from);
    }
    if (frame != 0) turn(frame, 0, false);
    store();
  }

  LA_DEVICE void store() {
    const float scale = static_cast<float>(p.scale);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float sum = mass[j];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (place(j) >= row.slots()) continue;
      const int64_t at = row.place_of_key(key_head, place(j));
      const int64_t size = p.key_heads * a.num_keys();
      if (p.mass != nullptr && lane % 4 == 0) a.key_mass[piece() * size + at] = sum;
      if (a.sums == nullptr) {
        store_row(row.at<T>(p.grad_key, key_head, place(j)), grad_key, j, scale);
        store_row(row.at<T>(p.grad_value, key_head, place(j)), grad_value, j, 1.0f);
      } else {
        float* to = a.sums + (piece() * size + at) * dim();
        store_row(to, grad_key, j, scale);
        store_row(to + a.pieces * size * dim(), grad_value, j, 1.0f);
      }
    }
  }

  template <typename To>
  LA_DEVICE void store_row(To* to, const float (&grad)[H::kColumns][4], int j, float scale) const {
    to += 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < H::kColumns; ++n) {
      if (8 * n >= dim()) continue;
      const float one = grad[n][2 * j] * scale, other = grad[n][2 * j + 1] * scale;
      if constexpr (sizeof(To) == 4) {
        *reinterpret_cast<float2*>(to + 8 * n) = make_float2(one, other);
      } else {
        *reinterpret_cast<uint32_t*>(to + 8 * n) = pack<To>(one, other);
      }
    }
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 2) grad_key_value(const ManyLaunch a) {
  KeyGradients<T, kDim>(a).run();
}

}  // namespace cuda
}  // namespace lookagain
