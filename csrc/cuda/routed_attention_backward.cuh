// Gradients of routed_attention with many queries, by kernels of our own: one pass for each side.
//
// Layout: grad_out, query, out, grad_query [B, H_q, L_q, D]; key, value and their gradients
// [B, H_kv, L_k, D]; lse float32 [B, H_q, L_q]; see many_queries.cuh. With P = exp(scale S - lse)
// and dS = P (dO V^T - rowsum(dO out)):
//   query side  holds 64 packed rows of Q and dO; keys and values pass by: dQ += dS K
//   key side    holds 64 rows of K and V; packed rows of Q and dO pass by: dV += P^T dO,
//               dK += dS^T Q, and the visual mass as sums of P over counted queries
// The logits are taken twice, so that no sum is shared: nothing is atomic and the same inputs give
// the same bits. What passes by a block of keys may be cut into pieces, which a last kernel adds in
// order: early keys, and those shown again, are seen by many times more queries than late ones.
//
// A warp holds 16 rows, their operands and their sums in registers; what passes by is read by all
// four warps from a ring of two tiles in shared memory. Where a selection shows some keys of a
// block only, the products of the others are taken in vain.
//
// FLOP: 14 D for each query head, query and key seen, sightings included (10 D where one kernel
// does both sides with atomics). Bytes: 4 D for each row that passes by and 64 rows held, 128 and
// 96 FLOP a byte, from the second-level cache. Limit: tensor cores, and shared memory, which gives
// a product's right operand, 256 bytes, in two cycles where the product takes two to four.
#pragma once

#include "many_queries.cuh"

namespace lookagain {
namespace cuda {

template <typename T, int kDim>
struct Held {
  static constexpr int kRows = kHeldRows;
  static constexpr int kPitch = kDim + kPiece;
  static constexpr int kSteps = kDim / 16, kColumns = kDim / 8;
  static constexpr int kRoom = 16 * (kDim + 4);  // floats that a warp turns its sums in
};

// Log 2 of the sum of a row's weights; infinity, for weights of 0, if it sees nothing.
LA_DEVICE float lse_of(const ManyLaunch& a, const Row& row, int64_t head, int query) {
  const float lse = a.lse[row.place(a, head, query)];
  return lse == -INFINITY ? INFINITY : lse * kLog2e;
}

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

  LA_DEVICE const T* row_at(const HeadsView& view, int n) const {
    const QueryRow at(a, first_row + n);
    if (at.query >= row.queries) return nullptr;
    return row.at<const T>(view, key_head * a.group + at.head, at.query);
  }

  // Adds one sighting of `count` keys: those of `list`, or without one the keys from `begin` on.
  // Each row sees the first `limit` of them, all rows of the block at least `least`.
  LA_DEVICE void sight(int count, const int32_t* list, int begin, const int (&limit)[2],
                       int least) {
    const auto fetch = [&](int first, int turn) {
      T* to = ring + turn * 2 * kTile;
      copy_two<T, kDim, kTileRows>(to, to + kTile, dim, p.key.data, [&](int n) -> TwoRows<T> {
        if (first + n >= count) return {nullptr, nullptr};
        const int slot = list == nullptr ? begin + first + n : list[first + n];
        return {row.at<const T>(p.key, key_head, slot), row.at<const T>(p.value, key_head, slot)};
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
    turn_rows<T, kDim, H::kRows>(ring, dim, table, half, [&](int n) { return row_at(p.query, n); });
    __syncthreads();
    load_left<T>(query, ring + warp * 16 * H::kPitch, H::kPitch);
    __syncthreads();
  }

  LA_DEVICE void run() {
    if (first_query >= row.queries) return;
    copy_two<T, kDim, H::kRows>(ring, ring + kTile, dim, p.query.data, [&](int n) -> TwoRows<T> {
      return {row_at(p.query, n), row_at(p.grad_out, n)};
    });
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
      lse[j] = there ? lse_of(a, row, head, at.query) : INFINITY;
      delta[j] = there ? a.delta[row.place(a, head, at.query)] : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < H::kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) grad[n][i] = 0;
    }
    const int begin = row.keys.begin, seen = row.position(last_query) + 1 - begin;
    int limit[2] = {position[0] + 1 - begin, position[1] + 1 - begin};
    if (seen > 0) sight(seen, nullptr, begin, limit, row.position(first_query) + 1 - begin);
    int32_t frame = 0;
    for (int r = 0; r < p.visual.num_reinjections; ++r) {
      const int first = row.first_seeing(a, r);
      int count = 0;
      const int32_t* list = row.list(a, r, &count);
      if (first > last_query || count == 0) continue;
      turn(frame, row.shift(a, r), true);
      frame = row.shift(a, r);
      limit[0] = position[0] >= row.position(first) ? count : 0;
      limit[1] = position[1] >= row.position(first) ? count : 0;
      sight(count, list, 0, limit, first_query >= first ? count : 0);
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
struct KeyGradients : Held<T, kDim> {
  using H = Held<T, kDim>;
  static constexpr int kTileRows = 32;  // that pass by together
  static constexpr int kBlocks = kTileRows / 8;
  static constexpr int kTile = kTileRows * H::kPitch;
  static constexpr int64_t kRing = 4 * kTile * 2;  // two tiles of queries and their gradients
  static constexpr int kHeld = H::kRows * H::kPitch;
  static_assert(kWarps * H::kRoom * 4 <= kRing, "sums are turned where tiles pass by");
  static_assert(kHeld * 2 <= kRing, "keys are turned where tiles pass by");
  // Shared memory: [ring][values][lse, delta, count and query of two tiles' rows][a rotation].
  static constexpr int64_t kRowsAt = kRing + kHeld * 2;
  static constexpr int kValues = 4 * kTileRows;
  static LA_HD int64_t shared_bytes(int64_t half) { return kRowsAt + 2 * kValues * 4 + half * 8; }

  const ManyLaunch& a;
  const RoutedAttentionBackwardParams& p;
  int first_key, key_head;
  Row row;
  int lane, warp;
  T *ring, *values;
  float* of_rows;
  float2* table;
  uint32_t key[H::kSteps][4];
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
    values = reinterpret_cast<T*>(dynamic_shared() + kRing);
    of_rows = reinterpret_cast<float*>(dynamic_shared() + kRowsAt);
    table = reinterpret_cast<float2*>(of_rows + 2 * kValues);
  }

  // Slots of this lane's keys.
  LA_DEVICE int place(int j) const { return first_key + warp * 16 + lane / 4 + 8 * j; }

  LA_DEVICE bool is_shown(int r, int j) const {
    return place(j) < row.slots && (a.shown[row.place_of_key(a, place(j))] >> r & 1) != 0;
  }

  LA_DEVICE int dim() const { return static_cast<int>(p.head_dim); }
  LA_DEVICE int half() const { return static_cast<int>(p.visual.half); }
  LA_DEVICE int piece() const { return static_cast<int>(blockIdx.x) % a.pieces; }

  // Keys that nobody sees are not read, and count as zeros.
  LA_DEVICE const T* key_at(const HeadsView& view, int n) const {
    const int slot = first_key + n;
    bool seen = slot >= row.keys.begin && slot < row.keys.end;
    if (!seen && slot < row.keys.begin && p.visual.num_reinjections > 0) {
      seen = a.shown[row.place_of_key(a, slot)] != 0;
    }
    return seen ? row.at<const T>(view, key_head, slot) : nullptr;
  }

  LA_DEVICE void fetch(int first_row, int turn, int first_query) {
    T* to = ring + turn * 2 * kTile;
    copy_two<T, kDim, kTileRows>(to, to + kTile, dim(), p.query.data, [&](int n) -> TwoRows<T> {
      const QueryRow at(a, first_row + n);
      if (at.query >= row.queries) return {nullptr, nullptr};
      const int head = key_head * a.group + at.head;
      return {row.at<const T>(p.query, head, at.query),
              row.at<const T>(p.grad_out, head, at.query)};
    });
    copy_async_commit();
    if (threadIdx.x >= kTileRows) return;
    const QueryRow at(a, first_row + static_cast<int>(threadIdx.x));
    const int64_t head = key_head * a.group + at.head;
    const bool there = at.query >= first_query && at.query < row.queries;
    float* mine = of_rows + turn * kValues + threadIdx.x;
    mine[0] = there ? lse_of(a, row, head, at.query) : INFINITY;
    mine[kTileRows] = there ? a.delta[row.place(a, head, at.query)] : 0.0f;
    const bool counts = there && (p.counted == nullptr ||
                                  p.counted[row.batch * a.tokens + row.offset + at.query] != 0);
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
    multiply_by_rows<T>(weight, key, queries, H::kPitch);
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
    turn_rows<T, kDim, H::kRows>(ring, dim(), table, half(),
                                 [&](int n) { return key_at(p.key, n); });
    __syncthreads();
    load_left<T>(key, ring + warp * 16 * H::kPitch, H::kPitch);
    __syncthreads();
  }

  LA_DEVICE void run() {
    if (first_key >= row.slots) return;
    copy_two<T, kDim, H::kRows>(ring, values, dim(), p.key.data, [&](int n) -> TwoRows<T> {
      return {key_at(p.key, n), key_at(p.value, n)};
    });
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    load_left<T>(key, ring + warp * 16 * H::kPitch, H::kPitch);
    __syncthreads();
    uint32_t any = 0, all_shown = first_key + H::kRows <= row.slots ? ~0u : 0;
    if (p.visual.num_reinjections > 0) {
      const uint32_t* bits = a.shown + row.place_of_key(a, first_key);
      for (int n = 0; n < H::kRows && first_key + n < row.slots; ++n) {
        any |= bits[n];
        all_shown &= bits[n];
      }
    }
    mass[0] = mass[1] = 0;
#pragma unroll
    for (int n = 0; n < H::kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) grad_key[n][i] = grad_value[n][i] = 0;
    }
    const int begin = row.keys.begin, end = row.keys.end, origin = row.keys.first_position;
    int from[2];
    if (first_key < end && first_key + H::kRows > begin) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const bool own = place(j) >= begin && place(j) < end;
        from[j] = own ? place(j) - origin : INT32_MAX;
      }
      const bool all = first_key >= begin && first_key + H::kRows <= end;
      const int first = first_key - origin;
      sight(first < 0 ? 0 : first, all ? first + H::kRows - 1 : INT32_MAX, from);
    }
    int32_t frame = 0;
    for (int r = 0; r < p.visual.num_reinjections; ++r) {
      if ((any >> r & 1) == 0) continue;
      turn(frame, row.shift(a, r), true);
      frame = row.shift(a, r);
      const int first = row.first_seeing(a, r);
#pragma unroll
      for (int j = 0; j < 2; ++j) from[j] = is_shown(r, j) ? first : INT32_MAX;
      sight(first, (all_shown >> r & 1) != 0 ? first : INT32_MAX, from);
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
      if (place(j) >= row.slots) continue;
      const int64_t at = row.place_of_key(a, key_head, place(j));
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
__global__ void __launch_bounds__(kThreads, 2) grad_query(const ManyLaunch a) {
  QueryGradients<T, kDim>(a).run();
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 2) grad_key_value(const ManyLaunch a) {
  KeyGradients<T, kDim>(a).run();
}

// rowsum(grad_out out). A warp for each query of a head.
template <typename T>
__global__ void __launch_bounds__(kThreads) grad_delta(const ManyLaunch a) {
  const RoutedAttentionBackwardParams& p = a.p;
  const int lane = threadIdx.x % 32;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t batch = index / a.tokens / p.query_heads;
  if (batch >= (a.bounds == nullptr ? p.batch : 1)) return;
  const int64_t head = index / a.tokens % p.query_heads, token = index % a.tokens;
  const T* grad = head_row<const T>(p.grad_out, batch, head, token);
  const T* out = head_row<const T>(p.out, batch, head, token);
  float sum = 0;
  for (int d = 2 * lane; d < p.head_dim; d += 64) {
    sum += to_float(grad[d]) * to_float(out[d]) + to_float(grad[d + 1]) * to_float(out[d + 1]);
  }
  for (int step = 16; step > 0; step /= 2) sum += shuffle_xor(sum, step);
  if (lane == 0) a.delta[index] = sum;
}

// Adds the pieces of dK and dV in order. A thread for each two elements of both.
template <typename T>
__global__ void __launch_bounds__(kThreads) grad_combine(const ManyLaunch a) {
  const RoutedAttentionBackwardParams& p = a.p;
  const int64_t size = p.key_heads * a.num_keys() * p.head_dim;
  const int64_t index = 2 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  if (index >= 2 * size) return;
  const bool values = index >= size;
  const int64_t at = values ? index - size : index, row = at / p.head_dim;
  const float* from = a.sums + (values ? a.pieces * size : 0) + at;
  float one = 0, other = 0;
#pragma unroll 4
  for (int piece = 0; piece < a.pieces; ++piece) {
    const float2 part = *reinterpret_cast<const float2*>(from + piece * size);
    one += part.x;
    other += part.y;
  }
  const int64_t key = row % a.key_tokens, head = row / a.key_tokens;
  T* to =
      head_row<T>(values ? p.grad_value : p.grad_key, head / p.key_heads, head % p.key_heads, key);
  *reinterpret_cast<uint32_t*>(to + at % p.head_dim) = pack<T>(one, other);
}

}  // namespace cuda
}  // namespace lookagain
