// visual_mass: column sums of P = exp(scale Q K^T - lse) over visual keys and ranges of queries.
//
// Layout: query [B, H_q, L_q, D], key [B, H_kv, L_k, D] (or paged), rows of D contiguous elements;
// lse float32 [B, H_q, L_q], of the whole softmax; rows int32 [B, T, 2], ranges of key indices of
// queries; mass float32 [B, T, H_kv, L_c], overwritten.
//
// Grid: one block of 4 warps for each (batch row, range, key head, block of tokens, piece of the
// queries). With the forward's lse known the rectangle needs no other key, so it is turned around:
// the keys stay, in registers, and blocks of 64 query rows (row = query * G + head, the group
// packed) pass by in shared memory, copied ahead asynchronously and read by all four warps. A warp
// holds 32 keys (16 past D = 128) as the left operands of S^T = K Q^T, so what it reads of a query
// row serves two products. Weights are added up in registers; no sum is shared, so nothing is
// atomic, and the pieces of the queries are added in order by a second kernel.
//
// A re-injection multiplies the same queries with keys turned by its shift: keys are turned once
// for all queries, and only queries that see it pass by. Blocks of queries go around the pieces in
// turn, so that each gets its share however few of the queries are counted.
//
// FLOP: 2 D for each query head, counted query and sighting of a token that it may see, and one
// exponential. Bytes: 2 D for each query row and block of tokens, from the second-level cache after
// the first; keys once a piece. At D = 128 a block of 128 keys does 128 FLOP for a byte of the
// queries, and shared memory gives a product's operands at 32 FLOP a byte: tensor cores and the
// exponentials, 512 cycles in a block of 64 rows, are the limit.
#pragma once

#include "decode_merge.cuh"
#include "query_rows.cuh"

namespace lookagain {
namespace cuda {

struct MassLaunch {
  VisualMassParams p;
  int group;         // G
  uint32_t inverse;  // (2^32 - 1) / G
  int token_blocks;  // that cover L_c
  int splits;        // of the queries
  float scale;       // on logits, in units of log 2
  float* sums;       // [splits, B, T, H_kv, L_c]: p.mass itself for one piece
};

// The place of one block, and the queries it counts. Numbers of queries, rows and keys fit into 31
// bits.
struct MassBlock {
  int64_t batch_row, range, key_head;
  int token_block, split;
  RowKeys keys;
  int begin, end;  // of the counted queries

  LA_DEVICE explicit MassBlock(const MassLaunch& a) {
    const VisualMassParams& p = a.p;
    int64_t index = blockIdx.x;
    split = static_cast<int>(index % a.splits);
    index /= a.splits;
    token_block = static_cast<int>(index % a.token_blocks);
    index /= a.token_blocks;
    key_head = index % p.key_heads;
    index /= p.key_heads;
    range = index % p.num_ranges;
    batch_row = index / p.num_ranges;
    keys = row_keys(p, batch_row);
    const int32_t* bounds = p.rows + (batch_row * p.num_ranges + range) * 2;
    const int64_t origin = keys.first_position;  // 64 bits: bounds go up to INT32_MAX
    const int64_t first = bounds[0] - origin, last = bounds[1] - origin;
    const int queries = static_cast<int>(p.queries);
    begin = first < 0 ? 0 : (first > queries ? queries : static_cast<int>(first));
    end = last < begin ? begin : (last > queries ? queries : static_cast<int>(last));
  }

  LA_DEVICE int position(int query) const { return keys.first_position + query; }

  // Slot of a token's key, -1 if it has none that some query could see.
  LA_DEVICE int key_of(const VisualMassParams& p, int64_t token) const {
    if (token >= p.num_visual) return -1;
    const int64_t key = key_of_token(row_spans(p.visual, batch_row), p.visual.num_spans, token);
    const bool there = key >= 0 && key < keys.end && checked_place(p, batch_row, key).block >= 0;
    return there ? static_cast<int>(key) : -1;
  }

  // First counted query that sees re-injection r; `end` if none does.
  LA_DEVICE int first_seeing(const VisualParams& visual, int r) const {
    const int32_t start = visual.start[batch_row * visual.num_reinjections + r];
    if (start == kNever) return end;
    const int64_t first = start - static_cast<int64_t>(keys.first_position);
    return first < begin ? begin : (first > end ? end : static_cast<int>(first));
  }

  // log 2 of the sum of a row's weights; infinity, for weights of 0, if it is not counted.
  LA_DEVICE float lse_of(const MassLaunch& a, QueryRow row, int first) const {
    if (row.query < first || row.query >= end) return INFINITY;
    const int64_t head = batch_row * a.p.query_heads + key_head * a.group + row.head;
    const float lse = static_cast<const float*>(a.p.lse)[head * a.p.queries + row.query];
    return lse == -INFINITY ? INFINITY : lse * kLog2e;
  }

  LA_DEVICE void store(const MassLaunch& a, int64_t token, float sum) const {
    const VisualMassParams& p = a.p;
    if (token >= p.num_visual) return;
    const int64_t head =
        ((split * p.batch + batch_row) * p.num_ranges + range) * p.key_heads + key_head;
    a.sums[head * p.num_visual + token] = sum;
  }
};

template <typename T, int kDim>
struct Mass {
  static constexpr int kTiles = kDim > 128 ? 1 : 2;  // of 16 keys, for a warp
  static constexpr int kKeys = 16 * kTiles;
  static constexpr int kTokens = kWarps * kKeys;  // of a block
  static constexpr int kRows = 64;                // query rows that pass by together
  static constexpr int kChunk = 8;                // elements of a 16-byte access
  static constexpr int kPitch = kDim + kChunk;    // rows of a matrix load in different banks
  static constexpr int kSteps = kDim / 16;

  // Shared memory: [two blocks of queries, before them the keys][lse of their rows][a rotation].
  static constexpr int64_t kRing = 2 * kRows * kPitch * 2;
  static_assert(kTokens * kPitch * 2 <= kRing, "keys are staged where queries will pass by");
  static LA_HD int64_t shared_bytes(int64_t half) { return kRing + 2 * kRows * 4 + half * 8; }

  const MassLaunch& a;
  const VisualMassParams& p;
  MassBlock block;
  int lane, warp;
  T* ring;
  float* sums_of_rows;  // [2, kRows], log 2
  float2* table;
  int place[kTiles][2];  // slots of this lane's keys, rows lane / 4 and lane / 4 + 8 of a tile
  uint32_t left[kTiles][kSteps][4];
  float sum[kTiles][2];

  LA_DEVICE explicit Mass(const MassLaunch& launch)
      : a(launch), p(launch.p), block(launch), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
    ring = reinterpret_cast<T*>(dynamic_shared());
    sums_of_rows = reinterpret_cast<float*>(dynamic_shared() + kRing);
    table = reinterpret_cast<float2*>(sums_of_rows + 2 * kRows);
  }

  LA_DEVICE int token_of(int tile, int j) const {
    return block.token_block * kTokens + warp * kKeys + tile * 16 + lane / 4 + 8 * j;
  }

  // This warp's keys to registers, through shared memory: as they are, or turned by `turn`.
  LA_DEVICE void load_keys(bool turned) {
    const int half = turned ? static_cast<int>(p.visual.half) : 0;
    const int dim = static_cast<int>(p.head_dim);
    T* mine = ring + warp * kKeys * kPitch;
    const int first = block.token_block * kTokens + warp * kKeys;
    constexpr int kAtOnce = 4;  // rows read before the first is written
    constexpr int kParts = (kDim + 31) / 32;
#pragma unroll 1
    for (int row = 0; row < kKeys; row += kAtOnce) {
      T one[kAtOnce][kParts], other[kAtOnce][kParts];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int key = block.key_of(p, first + row + k);
        const T* from = static_cast<const T*>(p.key.data);
        if (key >= 0) from += slot_offset(p.key, p, block.batch_row, block.key_head, key);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const int d = lane + 32 * part;
          const bool there = key >= 0 && d < dim;
          one[k][part] = there ? from[d] : T{0};
          other[k][part] = there && d < half ? from[d + half] : T{0};
        }
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        T* to = mine + (row + k) * kPitch;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const int d = lane + 32 * part;
          if (d < half) {
            const float x = to_float(one[k][part]), y = to_float(other[k][part]);
            to[d] = from_float<T>(x * table[d].x - y * table[d].y);
            to[d + half] = from_float<T>(y * table[d].x + x * table[d].y);
          } else if (d >= 2 * half && d < kDim) {
            to[d] = one[k][part];
          }
        }
      }
    }
    __syncwarp();
    const T* row = mine + (lane % 8 + lane / 8 % 2 * 8) * kPitch + lane / 16 * kChunk;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        load_matrices(left[tile][step], row + tile * 16 * kPitch + step * 16);
      }
    }
    __syncthreads();  // before queries take the place of the keys
  }

  // Begins to copy query rows from `first_row` on into half `turn` of the ring; lse with them.
  LA_DEVICE void fetch(int first_row, int turn, int first_query) {
    constexpr int kChunks = kDim / kChunk;
    T* to = ring + turn * kRows * kPitch;
#pragma unroll 4
    for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
      const int chunk = i % kChunks;
      const QueryRow row(a, first_row + i / kChunks);
      const bool there = row.query < p.queries && chunk * kChunk < p.head_dim;
      const T* from =
          head_row<T>(p.query, block.batch_row, block.key_head * a.group + (there ? row.head : 0),
                      there ? row.query : 0);
      copy_async(to + i / kChunks * kPitch + chunk * kChunk, from + (there ? chunk * kChunk : 0),
                 there ? 16 : 0);
    }
    copy_async_commit();
    for (int i = threadIdx.x; i < kRows; i += kThreads) {
      sums_of_rows[turn * kRows + i] = block.lse_of(a, QueryRow(a, first_row + i), first_query);
    }
  }

  // Adds the weights of kRows query rows on this warp's keys; with kCausal only from the query at
  // a key's own place on.
  template <bool kCausal>
  LA_DEVICE void count(int turn, int first_row) {
    const T* queries = ring + turn * kRows * kPitch + lane % 8 * kPitch + lane / 8 * kChunk;
    const float* lse = sums_of_rows + turn * kRows + 2 * (lane % 4);
#pragma unroll 2
    for (int n = 0; n < kRows / 8; ++n) {
      float logits[kTiles][4];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) logits[tile][i] = 0;
      }
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        uint32_t right[4];
        load_matrices(right, queries + n * 8 * kPitch + step * 16);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          multiply_add<T>(logits[tile], left[tile][step], right[0], right[1]);
          multiply_add<T>(logits[tile], left[tile][step + 1], right[2], right[3]);
        }
      }
      const float norm[2] = {lse[8 * n], lse[8 * n + 1]};
      int position[2] = {0, 0};
      if (kCausal) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const QueryRow row(a, first_row + 8 * n + 2 * (lane % 4) + c);
          position[c] = block.position(row.query);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float weight = exp2_fast(logits[tile][i] * a.scale - norm[i % 2]);
          const bool seen = !kCausal || position[i % 2] >= place[tile][i / 2];
          sum[tile][i / 2] += seen ? weight : 0.0f;
        }
      }
    }
  }

  // Adds one sighting, seen by queries from `first` on, to `total`, for the keys it shows.
  LA_DEVICE void sight(int first, bool again, const uint8_t* selected, float (&total)[kTiles][2]) {
    int latest = -1;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        sum[tile][j] = 0;
        latest = place[tile][j] > latest ? place[tile][j] : latest;
      }
    }
    const int tiles_end = (block.end * a.group + kRows - 1) / kRows;
    int tile = first * a.group / kRows + block.split;
    load_keys(again);
    int turn = 0;
    if (tile < tiles_end) fetch(tile * kRows, turn, first);
    for (; tile < tiles_end; tile += a.splits, turn ^= 1) {
      const int next = tile + a.splits;
      if (next < tiles_end) {
        fetch(next * kRows, turn ^ 1, first);
        copy_async_wait<1>();
      } else {
        copy_async_wait<0>();
      }
      __syncthreads();
      const int position = block.position(QueryRow(a, tile * kRows).query);
      if (any_lane(!again && position < latest)) {
        count<true>(turn, tile * kRows);
      } else {
        count<false>(turn, tile * kRows);
      }
      __syncthreads();  // before this half is written again, or keys are staged over it
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        bool shown = place[tile][j] >= 0;
        if (again) {
          shown = shown && is_shown(p.visual, selected, token_of(tile, j));
        } else {
          shown = shown && place[tile][j] >= block.keys.begin;
        }
        if (shown) total[tile][j] += sum[tile][j];
      }
    }
  }

  LA_DEVICE void run() {
    float total[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        place[tile][j] = block.key_of(p, token_of(tile, j));
        total[tile][j] = 0;
      }
    }
    if (block.begin < block.end) {
      sight(block.begin, false, nullptr, total);
      for (int r = 0; r < p.visual.num_reinjections; ++r) {
        const int first = block.first_seeing(p.visual, r);
        if (first >= block.end) continue;
        const int32_t shift = p.visual.shift[block.batch_row * p.visual.num_reinjections + r];
        for (int i = threadIdx.x; i < p.visual.half; i += kThreads) {
          table[i] = turn_of(shift, p.visual.inv_freq[i]);
        }
        __syncthreads();
        sight(first, true, row_selected(p.visual, block.batch_row, r), total);
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float all = total[tile][j];
        all += shuffle_xor(all, 1);
        all += shuffle_xor(all, 2);
        if (lane % 4 == 0) block.store(a, token_of(tile, j), all);
      }
    }
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, kDim > 128 ? 2 : 3) visual_mass(const MassLaunch a) {
  Mass<T, kDim>(a).run();
}

// The same on CUDA cores, in float32: any element type, any alignment. A thread has one token and
// reads its key from global memory; 8 query rows at a time stand in shared memory, turned.
template <typename T>
struct MassSimt {
  static constexpr int kTokens = kThreads;
  static constexpr int kRows = 8;
  // [queries][lse of their rows][a rotation]
  static LA_HD int64_t shared_bytes(int64_t dim, int64_t half) {
    return kRows * (dim + 1) * 4 + half * 8;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) visual_mass_simt(const MassLaunch a) {
  constexpr int kRows = MassSimt<T>::kRows;
  const VisualMassParams& p = a.p;
  const MassBlock block(a);
  const int dim = static_cast<int>(p.head_dim), half = static_cast<int>(p.visual.half);
  float* queries = reinterpret_cast<float*>(dynamic_shared());
  float* lse = queries + kRows * dim;
  float2* table = reinterpret_cast<float2*>(lse + kRows);
  const int token = block.token_block * kThreads + threadIdx.x;
  const int key = block.key_of(p, token);
  const T* key_row = static_cast<const T*>(p.key.data);
  if (key >= 0) key_row += slot_offset(p.key, p, block.batch_row, block.key_head, key);
  float total = 0;
  for (int r = -1; r < p.visual.num_reinjections; ++r) {
    const bool again = r >= 0;
    const int first = again ? block.first_seeing(p.visual, r) : block.begin;
    if (first >= block.end) continue;
    bool shown = key >= block.keys.begin;
    if (again) {
      shown = key >= 0 && is_shown(p.visual, row_selected(p.visual, block.batch_row, r), token);
      const int32_t shift = p.visual.shift[block.batch_row * p.visual.num_reinjections + r];
      for (int i = threadIdx.x; i < half; i += kThreads) {
        table[i] = turn_of(shift, p.visual.inv_freq[i]);
      }
      __syncthreads();
    }
    const int tiles_end = (block.end * a.group + kRows - 1) / kRows;
    for (int tile = first * a.group / kRows + block.split; tile < tiles_end; tile += a.splits) {
      for (int i = threadIdx.x; i < kRows * dim; i += kThreads) {
        const QueryRow row(a, tile * kRows + i / dim);
        const int feature = i % dim;
        float value = 0;
        if (row.query < p.queries) {
          const T* from =
              head_row<T>(p.query, block.batch_row, block.key_head * a.group + row.head, row.query);
          value = to_float(from[feature]);
          if (again && feature < half) {
            value = value * table[feature].x + to_float(from[feature + half]) * table[feature].y;
          } else if (again && feature < 2 * half) {
            const float2 turn = table[feature - half];
            value = value * turn.x - to_float(from[feature - half]) * turn.y;
          }
        }
        queries[i] = value;
      }
      if (threadIdx.x < kRows) {
        lse[threadIdx.x] = block.lse_of(a, QueryRow(a, tile * kRows + threadIdx.x), first);
      }
      __syncthreads();
      float logits[kRows];
#pragma unroll
      for (int n = 0; n < kRows; ++n) logits[n] = 0;
#pragma unroll 2
      for (int d = 0; d < (shown ? dim : 0); ++d) {
        const float k = to_float(key_row[d]);
#pragma unroll
        for (int n = 0; n < kRows; ++n) logits[n] += k * queries[n * dim + d];
      }
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        const int position = block.position(QueryRow(a, tile * kRows + n).query);
        const bool seen = shown && (again || position >= key);
        if (seen) total += exp2f(logits[n] * a.scale - lse[n]);
      }
      __syncthreads();
    }
  }
  block.store(a, token, total);
}

// Adds the pieces' sums, in order. Grid: a thread for each sum.
__global__ void __launch_bounds__(kThreads) visual_mass_combine(const MassLaunch a) {
  const VisualMassParams& p = a.p;
  const int64_t size = p.batch * p.num_ranges * p.key_heads * p.num_visual;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0;
#pragma unroll 8
  for (int s = 0; s < a.splits; ++s) sum += a.sums[s * size + i];
  p.mass[i] = sum;
}

}  // namespace cuda
}  // namespace lookagain
