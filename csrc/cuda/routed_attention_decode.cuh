// routed_attention on tensor cores, for few queries and many keys.
//
// Layout: query, out [B, H_q, L_q, D]; key, value [B, H_kv, L_k, D], 16-bit, rows of D contiguous
// elements at 16-byte boundaries.
//
// Grid: one block for each (batch row, key head, block of rows, piece of the key axis); 4 warps, or
// 2 where shared memory is small. Tiles of 32 keys (16 where registers are short) go around the
// warps of all pieces in turn, so that each gets its share of the visual ones, which cost more. A
// warp streams keys and values through its own ring in shared memory with asynchronous copies;
// warps wait for each other only at the very end. At D = 128 a multiprocessor has 4 warps x 2 tiles
// x 16 KB = 128 KB under way; its share of 4.3 TB/s and a latency of a microsecond ask for 33 KB. A
// block of 16 keys is copied by straight code without a test for each row.
//
// Schedule: products are turned around, S^T = K Q^T and O^T = V^T P^T, so that the 16 rows of a
// tensor-core tile are keys and its 8 columns are query rows: with G = 7 one eighth of the work is
// padding, where the usual way round would waste nine sixteenths. P^T comes out of the first
// product in the layout of an accumulator and needs one transpose (movmatrix) a block of keys for
// the second. A warp's time for a tile is a chain of dependent steps (0.8 us for 16 keys on an
// H200, at one warp a scheduler), so two blocks of 16 keys go through it side by side.
//
// A re-injection multiplies the same keys, still in registers, with queries that were turned by
// -shift; weights of all sightings of a key are added before the second product. So keys and values
// are read once, and a re-injection costs half of the arithmetic of a visual key, no memory
// traffic.
//
// Visual mass: the logits of visual keys (log of the sum over sightings) are left in the workspace,
// 4 (G L_q) bytes a key and key head next to 4 D of keys and values: 5 % at G = 7, D = 128. They
// are normalised by whoever knows the whole softmax: this block where the key axis is not cut, else
// the combine.
//
// Bytes: 4 D a key and key head, read once. FLOP: 32 D a key and key head for 8 rows, 16 D more a
// visual key and re-injection. At D = 128 that is 8 FLOP a byte (16 with two re-injections over
// everything); an H200 has 184 (790 TFLOP/s over 4.3 TB/s), so its memory is the limit.
#pragma once

#include "decode_merge.cuh"
#include "decode_queries.cuh"

namespace lookagain {
namespace cuda {

constexpr int kBlockKeys = 16;  // rows of a tensor-core product

template <typename T, int kDim, int kColumns>  // kColumns blocks of 8 rows
struct Decode {
  static constexpr int kRows = 8 * kColumns;
  static constexpr int kBlocks = decode_blocks(kDim, kColumns);
  static constexpr int kTileKeys = kBlockKeys * kBlocks;
  static constexpr int kPitch = decode_pitch(kDim);
  static constexpr int kStage = 2 * kTileKeys * kPitch;  // elements: keys, then values
  static constexpr int kSteps = kDim / 16;
  static constexpr bool kHold = kColumns == 1;  // a tile's keys stay in registers

  // Fragments of the keys of a tile.
  struct Keys {
    uint32_t part[kHold ? kBlocks : 1][kHold ? kSteps : 1][4];
  };
  using Logits = float[kBlocks][kColumns][4];

  const DecodeLaunch& a;
  const RoutedAttentionParams& p;
  int batch_row, key_head, row_block, split, lane, warp;
  RowKeys keys;
  uint32_t active;  // re-injections that some row of this block sees
  int first;        // key that is read
  T* queries;       // [1 + R, kRows, kPitch], then the rings of tiles; at the end the warps' states
  char* ring;       // of all warps; at the end their values

  // Of query row 8 n + 2 (lane % 4) + c: its key index, and this warp's softmax and values.
  int32_t place[kColumns][2];
  float max[kColumns][2], sum[kColumns][2];
  float out[kColumns][kSteps][4];

  LA_DEVICE explicit Decode(const DecodeLaunch& launch) : a(launch), p(launch.p) {
    unsigned index = blockIdx.x;  // 32-bit divisions: 64-bit ones take a tenth of a microsecond
    split = index % a.splits;
    index /= a.splits;
    row_block = index % a.row_blocks;
    index /= a.row_blocks;
    key_head = index % static_cast<unsigned>(p.key_heads);
    batch_row = index / static_cast<unsigned>(p.key_heads);
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    keys = row_keys(p, batch_row);
    const int last_row = row_block * kRows + kRows - 1;
    active = active_reinjections(p.visual, batch_row, position(last_row));
    first = first_read(a, keys, batch_row, position(last_row));
    queries = reinterpret_cast<T*>(dynamic_shared());
    ring = dynamic_shared() + decode_query_bytes(kDim, kRows, p.visual.num_reinjections);
  }

  // Key index of the query of a row; rows past the last count as the last.
  LA_DEVICE int position(int row) const {
    return keys.first_position + (row < a.rows ? row : a.rows - 1) / a.group;
  }

  // Whether some query sees a key, in its place or again. Other slots may hold anything.
  LA_DEVICE bool readable(int64_t key) const {
    if (key >= keys.end) return false;
    return key >= keys.begin ||
           (key >= first && is_visual(row_spans(p.visual, batch_row), p.visual.num_spans, key));
  }

  LA_DEVICE const T* slot(const HeadsView& cache, SlotPlace place) const {
    return static_cast<const T*>(cache.data) + offset_of(cache, place, key_head);
  }

  // Begins to copy keys and values of `tile` into a stage of the ring.
  LA_DEVICE void fetch(int64_t tile, T* to) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      fetch_block(tile * kTileKeys + b * kBlockKeys, to + b * kBlockKeys * kPitch);
    }
  }

  LA_DEVICE void fetch_block(int64_t first_key, T* to) {
    constexpr int kChunks = kDim / kChunk;
    constexpr int kCopies = kBlockKeys * kChunks / 32;  // of a lane, for keys and for values
    SlotPlace place{-1, 0};
    if (a.whole_tiles && first_key >= keys.begin && first_key + kBlockKeys <= keys.end) {
      place = checked_place(p, batch_row, first_key);
    }
    if (place.block < 0) return fetch_slot_by_slot(first_key, to);
    const T* key = slot(p.key, place);
    const T* value = slot(p.value, place);
#pragma unroll(kColumns == 1 ? kCopies : 2)  // registers, again
    for (int n = 0; n < kCopies; ++n) {
      const int row = (lane + 32 * n) / kChunks, chunk = (lane + 32 * n) % kChunks;
      T* here = to + row * kPitch + chunk * kChunk;
      copy_async(here, key + row * p.key.row_stride + chunk * kChunk, 16);
      copy_async(here + kTileKeys * kPitch, value + row * p.value.row_stride + chunk * kChunk, 16);
    }
  }

  // The same for blocks at the ends of a row, in small pages, or of rows shorter than kDim: zeros
  // for keys that no query sees, whose slots may hold anything.
  LA_DEVICE void fetch_slot_by_slot(int64_t first_key, T* to) {
    constexpr int kChunks = kDim / kChunk;
#pragma unroll 1
    for (int i = lane; i < kBlockKeys * kChunks; i += 32) {
      const int row = i / kChunks, chunk = i % kChunks;
      SlotPlace place{-1, 0};
      if (readable(first_key + row) && chunk * kChunk < p.head_dim) {
        place = checked_place(p, batch_row, first_key + row);
      }
      const bool there = place.block >= 0;
      const int column = there ? chunk * kChunk : 0;
      if (!there) place = {0, 0};  // where nothing is read the address still has to exist
      T* here = to + row * kPitch + chunk * kChunk;
      copy_async(here, slot(p.key, place) + column, there ? 16 : 0);
      copy_async(here + kTileKeys * kPitch, slot(p.value, place) + column, there ? 16 : 0);
    }
  }

  // Whether a slot that is readable has a block; others have no place in the softmax either.
  LA_DEVICE bool has_block(int64_t key) const {
    return p.block_table == nullptr || key >= keys.end ||
           checked_place(p, batch_row, key).block >= 0;
  }

  // The keys of two steps of 16 features from step on, of block b of a tile.
  LA_DEVICE void load_keys(const T* tile, int b, int step, uint32_t (&left)[2][4]) const {
    const T* key =
        tile + (b * kBlockKeys + lane % 8 + lane / 8 % 2 * 8) * kPitch + lane / 16 * kChunk;
    load_matrices(left[0], key + step * 16);
    load_matrices(left[1], key + step * 16 + 16);
  }

  LA_DEVICE void hold(const T* tile, Keys& held) const {
    if constexpr (kHold) {
      const T* key = tile + (lane % 8 + lane / 8 % 2 * 8) * kPitch + lane / 16 * kChunk;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          load_matrices(held.part[b][step], key + b * kBlockKeys * kPitch + step * 16);
        }
      }
    }
  }

  // Logits [keys, rows] of a tile for the queries of one sighting, times the scale.
  LA_DEVICE void score(const T* tile, const Keys& held, const T* rows, Logits& logits) const {
    // A second chain of products, where one would be waited for.
    float other[kBlocks][4];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        other[b][i] = 0;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) logits[b][n][i] = 0;
      }
    }
    const T* query = rows + lane % 8 * kPitch + lane / 8 * kChunk;
#pragma unroll(kColumns == 1 ? kSteps : 1)  // several columns need their registers for the values
    for (int step = 0; step < kSteps; step += 2) {
      uint32_t left[kHold ? 1 : kBlocks][2][4];
      if constexpr (!kHold) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) load_keys(tile, b, step, left[b]);
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        uint32_t right[4];
        load_matrices(right, query + n * 8 * kPitch + step * 16);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          if constexpr (kHold) {
            multiply_add<T>(logits[b][n], held.part[b][step], right[0], right[1]);
            multiply_add<T>(other[b], held.part[b][step + 1], right[2], right[3]);
          } else {
            multiply_add<T>(logits[b][n], left[b][0], right[0], right[1]);
            multiply_add<T>(logits[b][n], left[b][1], right[2], right[3]);
          }
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          logits[b][n][i] = (kHold ? logits[b][n][i] + other[b][i] : logits[b][n][i]) * a.scale;
        }
      }
    }
  }

  // Adds what re-injections show of a tile to its logits, and keeps them for the mass.
  LA_DEVICE void look_again(const T* tile, const Keys& held, const SpanCursor& cursor,
                            int64_t first_key, const bool (&present)[kBlocks][2], Logits& logits,
                            Logits& weights) const {
    int32_t token[kBlocks][2];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        token[b][j] =
            cursor.token(static_cast<int32_t>(first_key) + b * kBlockKeys + lane / 4 + 8 * j,
                         first_key + kTileKeys);
      }
    }
    for (uint32_t rest = active; rest != 0; rest &= rest - 1) {
      const int r = lowest_bit(rest);
      const uint8_t* selected = row_selected(p.visual, batch_row, r);
      bool shown[kBlocks][2], some = false;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          shown[b][j] = present[b][j] && is_shown(p.visual, selected, token[b][j]);
          some = some || shown[b][j];
        }
      }
      if (!any_lane(some)) continue;
      const int32_t start = p.visual.start[batch_row * p.visual.num_reinjections + r];
      Logits again;
      score(tile, held, queries + (1 + r) * kRows * kPitch, again);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const bool seen = shown[b][i / 2] && place[n][i % 2] >= start;
            add_sighting(seen ? again[b][n][i] : -INFINITY, &logits[b][n][i], &weights[b][n][i]);
          }
        }
      }
    }
    if (a.logits == nullptr) return;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (token[b][j] < 0 || token[b][j] >= a.num_visual) continue;
        float* to =
            a.logits +
            ((batch_row * p.key_heads + key_head) * a.num_visual + token[b][j]) * a.padded_rows() +
            row_block * kRows + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          float2 pair;
          pair.x = logits[b][n][2 * j] + log2_fast(weights[b][n][2 * j]);
          pair.y = logits[b][n][2 * j + 1] + log2_fast(weights[b][n][2 * j + 1]);
          *reinterpret_cast<float2*>(to + 8 * n) = pair;
        }
      }
    }
  }

  LA_DEVICE void attend(const T* tile, int64_t first_key, SpanCursor& cursor) {
    Keys held;
    hold(tile, held);
    Logits logits, weights;
    bool present[kBlocks][2];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t key = first_key + b * kBlockKeys + lane / 4;
      present[b][0] = has_block(key);
      present[b][1] = has_block(key + 8);
    }
    score(tile, held, queries, logits);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int32_t key =
              static_cast<int32_t>(first_key) + b * kBlockKeys + lane / 4 + i / 2 * 8;
          const bool seen = key >= keys.begin && key <= place[n][i % 2] && present[b][i / 2];
          if (!seen) logits[b][n][i] = -INFINITY;
          weights[b][n][i] = 1;
        }
      }
    }
    const bool visual = p.visual.num_spans > 0 && cursor.reaches(first_key, first_key + kTileKeys);
    if (visual && (active != 0 || a.logits != nullptr)) {
      look_again(tile, held, cursor, first_key, present, logits, weights);
    }
    uint32_t packed[kBlocks][kColumns][2];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      float factor[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float largest = -INFINITY;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          largest = fmaxf(largest, fmaxf(logits[b][n][c], logits[b][n][c + 2]));
        }
        largest = fmaxf(largest, shuffle_xor(largest, 4));
        largest = fmaxf(largest, shuffle_xor(largest, 8));
        largest = fmaxf(largest, shuffle_xor(largest, 16));
        largest = fmaxf(largest, max[n][c]);
        // Nothing seen yet: any finite reference gives weights of 0.
        const float reference = largest == -INFINITY ? 0.0f : largest;
        factor[c] = exp2_fast(max[n][c] - reference);
        max[n][c] = largest;
        sum[n][c] *= factor[c];
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          weights[b][n][c] *= exp2_fast(logits[b][n][c] - reference);
          weights[b][n][c + 2] *= exp2_fast(logits[b][n][c + 2] - reference);
          sum[n][c] += weights[b][n][c] + weights[b][n][c + 2];
        }
      }
      if (any_lane(factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out[n][step][i] *= factor[i % 2];
        }
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        packed[b][n][0] = transpose(pack<T>(weights[b][n][0], weights[b][n][1]));
        packed[b][n][1] = transpose(pack<T>(weights[b][n][2], weights[b][n][3]));
      }
    }
    const T* value = tile + (kTileKeys + lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * kChunk;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t left[4];
        load_matrices_transposed(left, value + b * kBlockKeys * kPitch + step * 16);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          multiply_add<T>(out[n][step], left, packed[b][n][0], packed[b][n][1]);
        }
      }
    }
  }

  LA_DEVICE void wait_for_tile() const {
    // The immediate of the wait has to be a constant.
    switch (a.stages) {
      case 1:
        copy_async_wait<0>();
        break;
      case 2:
        copy_async_wait<1>();
        break;
      case 3:
        copy_async_wait<2>();
        break;
      default:
        copy_async_wait<3>();
        break;
    }
    __syncwarp();
  }

  LA_DEVICE void run() {
    const int first_tile = first / kTileKeys;
    // Keys past the last query of these rows are seen by none of them, unless shown again.
    const int last_row = row_block * kRows + kRows - 1;
    int end = keys.end;
    if (active == 0 && a.logits == nullptr && position(last_row) + 1 < end) {
      end = position(last_row) + 1 > keys.begin ? position(last_row) + 1 : keys.begin;
    }
    const int tiles = end > first ? (end + kTileKeys - 1) / kTileKeys - first_tile : 0;
    // Tiles go around the warps of all pieces in turn: each gets its share of the visual ones.
    const int step = a.warps * a.splits;
    const int begin = split * a.warps + warp;
    const int mine = begin < tiles ? (tiles - begin + step - 1) / step : 0;
    int64_t tile = first_tile + begin;
    T* const ring_begin =
        reinterpret_cast<T*>(ring) + static_cast<int64_t>(warp) * a.stages * kStage;
    T* const ring_end = ring_begin + a.stages * kStage;
    for (int i = 0; i < a.stages - 1; ++i) {
      if (i < mine) fetch(tile + static_cast<int64_t>(i) * step, ring_begin + i * kStage);
      copy_async_commit();
    }
    let_next_kernel_start();
    load_queries<T, kDim, kRows>(a, batch_row, key_head, row_block, active, queries);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        place[n][c] =
            static_cast<int32_t>(position(last_row - kRows + 1 + 8 * n + 2 * (lane % 4) + c));
        max[n][c] = -INFINITY;
        sum[n][c] = 0;
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][step][i] = 0;
      }
    }
    SpanCursor cursor(row_spans(p.visual, batch_row), p.visual.num_spans);
    T* here = ring_begin;
    T* ahead = ring_begin + (a.stages - 1) * kStage;
    for (int i = 0; i < mine; ++i, tile += step) {
      if (i + a.stages - 1 < mine) {
        fetch(tile + static_cast<int64_t>(a.stages - 1) * step, ahead);
      }
      copy_async_commit();
      wait_for_tile();
      attend(here, tile * kTileKeys, cursor);
      __syncwarp();  // before the next fetch overwrites this tile
      here = here + kStage == ring_end ? ring_begin : here + kStage;
      ahead = ahead + kStage == ring_end ? ring_begin : ahead + kStage;
    }
    copy_async_wait<0>();
    __syncthreads();
    finish();
  }

  // Merges the warps' states and writes the result, or this piece of it.
  LA_DEVICE void finish() {
    float2* states = reinterpret_cast<float2*>(queries);  // [warp, row]; the queries are done with
    float* outs = reinterpret_cast<float*>(ring);         // [warp, row, kDim + 4]
    constexpr int kOutPitch = kDim + 4;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float total = sum[n][c];
        total += shuffle_xor(total, 4);
        total += shuffle_xor(total, 8);
        total += shuffle_xor(total, 16);
        const int r = 8 * n + 2 * (lane % 4) + c;
        if (lane < 4) states[warp * kRows + r] = make_float2(max[n][c], total);
        float* to = outs + (warp * kRows + r) * kOutPitch + lane / 4;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          to[16 * step] = out[n][step][c];
          to[16 * step + 8] = out[n][step][c + 2];
        }
      }
    }
    __syncthreads();
    merge_warps<T, kRows>(a, batch_row, key_head, row_block, split, states, outs, kOutPitch);
  }
};

template <typename T, int kDim, int kColumns>
__global__ void __launch_bounds__(kThreads, 1) routed_attention_decode(const DecodeLaunch a) {
  Decode<T, kDim, kColumns>(a).run();
}

}  // namespace cuda
}  // namespace lookagain
