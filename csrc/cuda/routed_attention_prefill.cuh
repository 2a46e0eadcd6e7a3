// routed_attention with many queries in one kernel: a block holds queries, keys and values pass by.
//
// Layout: query, out [B, H_q, L_q, D], key, value [B, H_kv, L_k, D], lse float32 [B, H_q, L_q]; see
// many_queries.cuh. Grid: a block of 4 warps for each 128 packed query rows of a key head, the
// last, longest ones first. A warp has 32 rows (two left operands, so that what it reads of keys
// and values serves two products each); queries stay in shared memory, keys and values have one
// buffer each: values arrive while logits are taken, the next keys while values are summed.
//
// FLOP: 4 D for each query head, query and key seen, sightings included. Bytes: 4 D for each key
// seen and 128 rows, from the second-level cache; 128 FLOP a byte. Limit: tensor cores.
#pragma once

#include "many_queries.cuh"

namespace lookagain {
namespace cuda {

template <typename T, int kDim>
struct Prefill {
  static constexpr int kTiles = 2;  // of 16 rows, for a warp
  static constexpr int kMine = 16 * kTiles;
  static constexpr int kRows = kPrefillRows;
  static_assert(kRows == kWarps * kMine, "whole warps");
  static constexpr int kPitch = kDim + kPiece;
  static constexpr int kKeys = kDim > 64 ? 32 : 64;  // that pass by together
  static constexpr int kSteps = kDim / 16, kColumns = kDim / 8, kBlocks = kKeys / 8;

  // Shared memory: [queries][keys][values][a rotation].
  static constexpr int64_t kTileBytes = kKeys * kPitch * 2, kQueryBytes = kRows * kPitch * 2;
  static LA_HD int64_t shared_bytes(int64_t half) {
    return kQueryBytes + 2 * kTileBytes + half * 8;
  }

  const ManyLaunch& a;
  const RoutedAttentionBackwardParams& p;
  int key_head;
  Row row;
  int first_row, lane, warp, dim;
  int first_query, last_query;  // of the block
  T *queries, *keys, *values;
  float2* table;
  int position[kTiles][2];  // of this lane's rows, lane / 4 and lane / 4 + 8 of a tile
  float out[kTiles][kColumns][4];
  float max[kTiles][2], sum[kTiles][2];

  LA_DEVICE explicit Prefill(const ManyLaunch& launch)
      : a(launch),
        p(launch.p),
        key_head(static_cast<int>(blockIdx.x / launch.held_blocks % launch.p.key_heads)),
        row(launch, blockIdx.x / launch.held_blocks / launch.p.key_heads),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        dim(static_cast<int>(launch.p.head_dim)) {
    first_row = (a.held_blocks - 1 - static_cast<int>(blockIdx.x % a.held_blocks)) * kRows;
    first_query = QueryRow(a, first_row).query;
    const int last = QueryRow(a, first_row + kRows - 1).query;
    last_query = last < row.queries ? last : row.queries - 1;
    queries = reinterpret_cast<T*>(dynamic_shared());
    keys = reinterpret_cast<T*>(dynamic_shared() + kQueryBytes);
    values = reinterpret_cast<T*>(dynamic_shared() + kQueryBytes + kTileBytes);
    table = reinterpret_cast<float2*>(dynamic_shared() + kQueryBytes + 2 * kTileBytes);
  }

  LA_DEVICE Wanted query_at(int n) const {
    const QueryRow at(a, first_row + n);
    return {at.query < row.queries, at.head, at.query};
  }

  // Adds one sighting of `count` keys: those of `list`, or without one the keys from `begin` on.
  // Each row sees the first `limit` of them, all rows of the block at least `least`.
  LA_DEVICE void sight(int count, const int32_t* list, int begin, const int (&limit)[kTiles][2],
                       int least) {
    const auto fetch = [&](T* to, const HeadsView& view, int first) {
      copy_rows<T, kDim, kKeys>(to, dim, row.rows<T>(view, key_head), [&](int n) -> Wanted {
        if (first + n >= count) return {false, 0, 0};
        return {true, 0, list == nullptr ? begin + first + n : list[first + n]};
      });
      copy_async_commit();
    };
    fetch(keys, p.key, 0);
    for (int first = 0; first < count; first += kKeys) {
      copy_async_wait<0>();
      __syncthreads();
      fetch(values, p.value, first);
      float logits[kTiles][kBlocks][4];
      score(logits);
      const int end = first + kKeys;
      if (end > least) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int at = first + 8 * n + 2 * (lane % 4) + i % 2;
              if (at >= limit[tile][i / 2]) logits[tile][n][i] = -INFINITY;
            }
          }
        }
      }
      weigh(logits);
      copy_async_wait<0>();
      __syncthreads();
      if (end < count) fetch(keys, p.key, end);
#pragma unroll
      for (int j = 0; j < kBlocks / 2; ++j) {
        uint32_t left[kTiles][4];
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          as_left<T>(left[tile], logits[tile][2 * j], logits[tile][2 * j + 1]);
        }
        add_values(left, values + j * 16 * kPitch);
      }
    }
    __syncthreads();  // before queries are turned, or keys of another sighting arrive
  }

  LA_DEVICE void score(float (&logits)[kTiles][kBlocks][4]) const {
    const T* right_row = keys + lane % 8 * kPitch + lane / 8 * kPiece;
    const T* left_row =
        queries + (warp * kMine + lane % 8 + lane / 8 % 2 * 8) * kPitch + lane / 16 * kPiece;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[tile][n][i] = 0;
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; step += 2) {
      uint32_t left[kTiles][2][4];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        load_matrices(left[tile][0], left_row + tile * 16 * kPitch + step * 16);
        load_matrices(left[tile][1], left_row + tile * 16 * kPitch + step * 16 + 16);
      }
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        uint32_t right[4];
        load_matrices(right, right_row + n * 8 * kPitch + step * 16);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          multiply_add<T>(logits[tile][n], left[tile][0], right[0], right[1]);
          multiply_add<T>(logits[tile][n], left[tile][1], right[2], right[3]);
        }
      }
    }
  }

  // Logits to weights under the largest so far; what was summed before is scaled to it.
  LA_DEVICE void weigh(float (&logits)[kTiles][kBlocks][4]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float largest = -INFINITY;
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          largest = fmaxf(largest, fmaxf(logits[tile][n][2 * j], logits[tile][n][2 * j + 1]));
        }
        largest = fmaxf(largest, shuffle_xor(largest, 1));
        largest = fmaxf(largest, shuffle_xor(largest, 2));
        largest = fmaxf(largest * a.scale, max[tile][j]);
        // Nothing seen yet: any finite reference gives weights of 0.
        const float reference = largest == -INFINITY ? 0.0f : largest;
        const float factor = exp2_fast(max[tile][j] - reference);
        max[tile][j] = largest;
        float total = 0;
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
          for (int i = 2 * j; i < 2 * j + 2; ++i) {
            logits[tile][n][i] = exp2_fast(logits[tile][n][i] * a.scale - reference);
            total += logits[tile][n][i];
          }
        }
        sum[tile][j] = sum[tile][j] * factor + total;
        if (any_lane(factor != 1.0f)) {
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
            out[tile][n][2 * j] *= factor;
            out[tile][n][2 * j + 1] *= factor;
          }
        }
      }
    }
  }

  LA_DEVICE void add_values(const uint32_t (&left)[kTiles][4], const T* tile_of_values) {
    const T* from = tile_of_values + (lane % 8 + lane / 8 % 2 * 8) * kPitch + lane / 16 * kPiece;
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      uint32_t right[4];
      load_matrices_transposed(right, from + n * 8);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        multiply_add<T>(out[tile][n], left[tile], right[0], right[1]);
        multiply_add<T>(out[tile][n + 1], left[tile], right[2], right[3]);
      }
    }
  }

  LA_DEVICE void store() {
    T* mine = queries + warp * kMine * kPitch;  // this warp's, no longer needed
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float total = sum[tile][j];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        const float norm = total > 0 ? 1.0f / total : 0.0f;
        const int n = tile * 16 + lane / 4 + 8 * j;
        uint32_t* to = reinterpret_cast<uint32_t*>(mine + n * kPitch + 2 * (lane % 4));
#pragma unroll
        for (int column = 0; column < kColumns; ++column) {
          to[column * 4] =
              pack<T>(out[tile][column][2 * j] * norm, out[tile][column][2 * j + 1] * norm);
        }
        const QueryRow at(a, first_row + warp * kMine + n);
        if (lane % 4 == 0 && at.query < row.queries) {
          a.lse[row.place(key_head * a.group + at.head, at.query)] =
              total > 0 ? (max[tile][j] + log2f(total)) * kLn2 : -INFINITY;
        }
      }
    }
    __syncwarp();
    constexpr int kPieces = kDim / kPiece;
    for (int i = lane; i < kMine * kPieces; i += 32) {
      const int n = i / kPieces, feature = i % kPieces * kPiece;
      const QueryRow at(a, first_row + warp * kMine + n);
      if (at.query >= row.queries || feature >= dim) continue;
      T* to = row.at<T>(p.out, key_head * a.group + at.head, at.query) + feature;
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(mine + n * kPitch + feature);
    }
  }

  LA_DEVICE void run() {
    if (first_query >= row.queries) return;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int n = warp * kMine + tile * 16 + lane / 4 + 8 * j;
        position[tile][j] = row.position(QueryRow(a, first_row + n).query);
        max[tile][j] = -INFINITY;
        sum[tile][j] = 0;
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[tile][n][i] = 0;
      }
    }
    const auto asking = [&](int n) { return query_at(n); };
    copy_rows<T, kDim, kRows>(queries, dim, row.rows<T>(p.query, key_head * a.group), asking);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    const int begin = row.keys.begin;
#pragma unroll 1
    for (int r = -1; r < p.visual.num_reinjections; ++r) {
      const int32_t* list = nullptr;
      int count = row.position(last_query) + 1 - begin, limit[kTiles][2];
      int least = row.position(first_query) + 1 - begin, first = 0;
      if (r >= 0) {
        first = row.first_seeing(r);
        list = row.list(r, &count);
        least = first_query >= first ? count : 0;
        if (first > last_query) continue;
      }
      if (count <= 0) continue;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int mine = position[tile][j];
          limit[tile][j] = r < 0 ? mine + 1 - begin : (mine >= row.position(first) ? count : 0);
        }
      }
      if (r >= 0) {
        make_table(p.visual, -row.shift(r), table);
        __syncthreads();
        turn_rows<T, kDim, kRows>(queries, dim, table, static_cast<int>(p.visual.half),
                                  row.rows<T>(p.query, key_head * a.group), asking);
        __syncthreads();
      }
      sight(count, list, begin, limit, least);
    }
    store();
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 2) routed_attention_prefill(const ManyLaunch a) {
  Prefill<T, kDim>(a).run();
}

}  // namespace cuda
}  // namespace lookagain
