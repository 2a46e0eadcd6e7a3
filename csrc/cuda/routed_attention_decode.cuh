// routed_attention on tensor cores, for few queries and many keys.
//
// Layout: query, out [B, H_q, L_q, D]; key, value [B, H_kv, L_k, D], 16-bit, rows of D contiguous
// elements at 16-byte boundaries.
//
// Grid: one block for each (batch row, key head, block of rows, piece of the key axis); 4 warps.
// Tiles of 16 keys go around the warps of all pieces in turn, so that each gets its share of the
// visual ones, which cost more. A warp streams keys and values through its own ring in shared
// memory with asynchronous copies; warps wait for each other only at the very end. Two blocks of a
// multiprocessor have 8 warps x 2 tiles x 8 KB = 128 KB under way at D = 128; its share of 4.3 TB/s
// and a latency of a microsecond ask for 33 KB. A whole tile is copied by straight code without a
// test for each row: with 8 warps a tile may take 2 us, and instructions are what it takes them
// for.
//
// Schedule: products are turned around, S^T = K Q^T and O^T = V^T P^T, so that the 16 rows of a
// tensor-core tile are keys and its 8 columns are query rows: with G = 7 one eighth of the work is
// padding, where the usual way round would waste nine sixteenths. P^T comes out of the first
// product in the layout of an accumulator and needs one transpose (movmatrix) a tile for the
// second.
//
// A re-injection multiplies the same keys in shared memory with queries that were turned by -shift;
// weights of all sightings of a key are added before the second product. So keys and values are
// read once, and a re-injection costs half of the arithmetic of a visual key, no memory traffic.
//
// Visual mass: the logits of visual keys (log of the sum over sightings) are left in the workspace,
// 4 (G L_q) bytes a key and key head next to 4 D of keys and values: 5 % at G = 7, D = 128. They
// are normalised by the combine, which knows the whole softmax.
//
// Bytes: 4 D a key and key head, read once. FLOP: 32 D a key and key head for 8 rows, 16 D more a
// visual key and re-injection. At D = 128 that is 8 FLOP a byte (16 with two re-injections over
// everything); an H200 has 184 (790 TFLOP/s over 4.3 TB/s), so its memory is the limit.
#pragma once

#include "decode_merge.cuh"

namespace lookagain {
namespace cuda {

constexpr int kTileKeys = 16;
constexpr int kChunk = 8;  // elements of a 16-byte access

template <typename T, int kDim, int kColumns>  // kColumns blocks of 8 rows
struct Decode {
  static constexpr int kRows = 8 * kColumns;
  static constexpr int kThreads = 32 * kWarps;
  // 16 bytes more than a row: eight rows of a matrix load then lie in different banks.
  static constexpr int kPitch = kDim + kChunk;
  static constexpr int kStage = 2 * kTileKeys * kPitch;  // elements: keys, then values
  static constexpr int kSteps = kDim / 16;

  // Shared memory: [queries of 1 + R sightings][rotation tables][rings of tiles, later the merge].
  static LA_HD int64_t query_bytes(int64_t reinjections) {
    return (1 + reinjections) * kRows * kPitch * 2;
  }
  static LA_HD int64_t table_bytes(int64_t reinjections, int64_t half) {
    return (reinjections * half * 8 + 15) / 16 * 16;
  }

  const DecodeLaunch& a;
  const RoutedAttentionParams& p;
  int64_t batch_row, key_head, row_block, split;
  int lane, warp;
  RowKeys keys;
  uint32_t active;  // re-injections that some row of this block sees
  int64_t first;    // key that is read
  T* queries;       // [1 + R, kRows, kPitch]
  char* ring;

  // Of query row 8 n + 2 (lane % 4) + c: its key index, and this warp's softmax and values.
  int32_t place[kColumns][2];
  float max[kColumns][2], sum[kColumns][2];
  float out[kColumns][kSteps][4];

  LA_DEVICE explicit Decode(const DecodeLaunch& launch) : a(launch), p(launch.p) {
    int64_t index = blockIdx.x;
    split = index % a.splits;
    index /= a.splits;
    row_block = index % a.row_blocks;
    index /= a.row_blocks;
    key_head = index % p.key_heads;
    batch_row = index / p.key_heads;
    lane = threadIdx.x % 32;
    warp = threadIdx.x / 32;
    keys = row_keys(p, batch_row);
    const int last_row = static_cast<int>(row_block) * kRows + kRows - 1;
    active = active_reinjections(p.visual, batch_row, position(last_row));
    first = first_read(a, keys, batch_row, position(last_row));
    queries = reinterpret_cast<T*>(dynamic_shared());
    ring = dynamic_shared() + query_bytes(p.visual.num_reinjections) +
           table_bytes(p.visual.num_reinjections, p.visual.half);
  }

  // Key index of the query of a row; rows past the last count as the last.
  LA_DEVICE int64_t position(int row) const {
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
    constexpr int kChunks = kDim / kChunk;
    constexpr int kCopies = kTileKeys * kChunks / 32;  // of a lane, for keys and for values
    const int64_t first_key = tile * kTileKeys;
    SlotPlace place{-1, 0};
    if (a.whole_tiles && first_key >= keys.begin && first_key + kTileKeys <= keys.end) {
      place = checked_place(p, batch_row, first_key);
    }
    if (place.block < 0) return fetch_slot_by_slot(first_key, to);
    const T* key = slot(p.key, place);
    const T* value = slot(p.value, place);
#pragma unroll
    for (int n = 0; n < kCopies; ++n) {
      const int row = (lane + 32 * n) / kChunks, chunk = (lane + 32 * n) % kChunks;
      T* here = to + row * kPitch + chunk * kChunk;
      copy_async(here, key + row * p.key.row_stride + chunk * kChunk, 16);
      copy_async(here + kTileKeys * kPitch, value + row * p.value.row_stride + chunk * kChunk, 16);
    }
  }

  // The same for tiles at the ends of a row, in small blocks, or of rows shorter than kDim: zeros
  // for keys that no query sees, whose slots may hold anything.
  LA_DEVICE void fetch_slot_by_slot(int64_t first_key, T* to) {
    constexpr int kChunks = kDim / kChunk;
#pragma unroll 1
    for (int i = lane; i < kTileKeys * kChunks; i += 32) {
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

  // The block's queries to shared memory: as they are, then turned by -shift of each active
  // re-injection. Features past D and rows past the last are zeros.
  LA_DEVICE void load_queries() {
    constexpr int kChunks = kDim / kChunk;
    float2* table =
        reinterpret_cast<float2*>(dynamic_shared() + query_bytes(p.visual.num_reinjections));
    const int half = static_cast<int>(p.visual.half), dim = static_cast<int>(p.head_dim);
    const int sightings = static_cast<int>(p.visual.num_reinjections);
    for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
      const int row = i / kChunks, feature = i % kChunks * kChunk;
      const int number = static_cast<int>(row_block) * kRows + row;
      Chunk<T> chunk;
      chunk.bits = uint4{0, 0, 0, 0};
      if (number < a.rows && feature < dim) {
        const T* from = head_row<T>(p.query, batch_row, key_head * a.group + number % a.group,
                                    number / a.group);
        if (a.whole_queries) {
          chunk.bits = *reinterpret_cast<const uint4*>(from + feature);
        } else {
          for (int e = 0; e < kChunk; ++e) chunk.elements[e] = from[feature + e];
        }
      }
      *reinterpret_cast<uint4*>(queries + row * kPitch + feature) = chunk.bits;
    }
    if (active != 0) {
      for (int i = threadIdx.x; i < sightings * half; i += kThreads) {
        if ((active >> (i / half) & 1) == 0) continue;
        const int32_t shift = p.visual.shift[batch_row * sightings + i / half];
        table[i] = turn_of(shift, p.visual.inv_freq[i % half]);
      }
      __syncthreads();
      if (half % kChunk == 0) {
        turn_queries<kChunk>(table, sightings, half);
      } else {
        turn_queries<1>(table, sightings, half);
      }
    }
    __syncthreads();
  }

  // Turned copies of the queries in shared memory, so many features at a time.
  template <int kWide>
  LA_DEVICE void turn_queries(const float2* table, int sightings, int half) {
    struct alignas(kWide * sizeof(T)) Part {
      T elements[kWide];
    };
    const int pairs = half / kWide, straight = (kDim - 2 * half) / kWide;
    const int items = pairs + straight;
    for (int i = threadIdx.x; i < sightings * kRows * items; i += kThreads) {
      const int item = i % items, row = i / items % kRows, r = i / items / kRows;
      if ((active >> r & 1) == 0) continue;
      const int feature = item < pairs ? item * kWide : 2 * half + (item - pairs) * kWide;
      const T* from = queries + row * kPitch + feature;
      T* to = queries + ((1 + r) * kRows + row) * kPitch + feature;
      Part first = *reinterpret_cast<const Part*>(from);
      if (item < pairs) {
        Part second = *reinterpret_cast<const Part*>(from + half);
#pragma unroll
        for (int e = 0; e < kWide; ++e) {
          const float2 turn = table[r * half + feature + e];
          const float x = to_float(first.elements[e]), y = to_float(second.elements[e]);
          first.elements[e] = from_float<T>(x * turn.x + y * turn.y);
          second.elements[e] = from_float<T>(y * turn.x - x * turn.y);
        }
        *reinterpret_cast<Part*>(to + half) = second;
      }
      *reinterpret_cast<Part*>(to) = first;
    }
  }

  // Logits [16 keys, rows] of a tile for the queries of one sighting, times the scale.
  LA_DEVICE void score(const T* tile, const T* rows, float (&logits)[kColumns][4]) const {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) logits[n][i] = 0;
    }
    float other[4] = {0, 0, 0, 0};  // a second chain of products, where one would be waited for
    const T* key = tile + (lane % 8 + lane / 8 % 2 * 8) * kPitch + lane / 16 * kChunk;
    const T* query = rows + lane % 8 * kPitch + lane / 8 * kChunk;
#pragma unroll(kColumns == 4 ? 1 : kSteps)  // four columns need their registers for the values
    for (int step = 0; step < kSteps; step += 2) {
      uint32_t left[2][4];
      load_matrices(left[0], key + step * 16);
      load_matrices(left[1], key + step * 16 + 16);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        uint32_t right[4];
        load_matrices(right, query + n * 8 * kPitch + step * 16);
        multiply_add<T>(logits[n], left[0], right[0], right[1]);
        multiply_add<T>(kColumns == 1 ? other : logits[n], left[1], right[2], right[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) logits[n][i] = (logits[n][i] + other[i]) * a.scale;
    }
  }

  // Adds what re-injections show of a tile to its logits, and keeps them for the mass.
  LA_DEVICE void look_again(const T* tile, const SpanCursor& cursor, int64_t first_key,
                            const bool (&present)[2], float (&logits)[kColumns][4],
                            float (&weights)[kColumns][4]) const {
    int32_t token[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      token[j] =
          cursor.token(static_cast<int32_t>(first_key) + lane / 4 + 8 * j, first_key + kTileKeys);
    }
    for (uint32_t rest = active; rest != 0; rest &= rest - 1) {
      const int r = lowest_bit(rest);
      const uint8_t* selected = row_selected(p.visual, batch_row, r);
      bool shown[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        shown[j] = present[j] && is_shown(p.visual, selected, token[j]);
      }
      if (!any_lane(shown[0] || shown[1])) continue;
      const int32_t start = p.visual.start[batch_row * p.visual.num_reinjections + r];
      float again[kColumns][4];
      score(tile, queries + (1 + r) * kRows * kPitch, again);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool seen = shown[i / 2] && place[n][i % 2] >= start;
          add_sighting(seen ? again[n][i] : -INFINITY, &logits[n][i], &weights[n][i]);
        }
      }
    }
    if (a.logits == nullptr) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (token[j] < 0 || token[j] >= a.num_visual) continue;
      float* to =
          a.logits +
          ((batch_row * p.key_heads + key_head) * a.num_visual + token[j]) * a.padded_rows() +
          row_block * kRows + 2 * (lane % 4);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        float2 pair;
        pair.x = logits[n][2 * j] + log2_fast(weights[n][2 * j]);
        pair.y = logits[n][2 * j + 1] + log2_fast(weights[n][2 * j + 1]);
        *reinterpret_cast<float2*>(to + 8 * n) = pair;
      }
    }
  }

  LA_DEVICE void attend(const T* tile, int64_t first_key, SpanCursor& cursor) {
    float logits[kColumns][4], weights[kColumns][4];
    const bool present[2] = {has_block(first_key + lane / 4), has_block(first_key + lane / 4 + 8)};
    score(tile, queries, logits);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t key = static_cast<int32_t>(first_key) + lane / 4 + i / 2 * 8;
        const bool seen = key >= keys.begin && key <= place[n][i % 2] && present[i / 2];
        if (!seen) logits[n][i] = -INFINITY;
        weights[n][i] = 1;
      }
    }
    const bool visual = p.visual.num_spans > 0 && cursor.reaches(first_key, first_key + kTileKeys);
    if (visual && (active != 0 || a.logits != nullptr)) {
      look_again(tile, cursor, first_key, present, logits, weights);
    }
    uint32_t packed[kColumns][2];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      float factor[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float largest = fmaxf(logits[n][c], logits[n][c + 2]);
        largest = fmaxf(largest, shuffle_xor(largest, 4));
        largest = fmaxf(largest, shuffle_xor(largest, 8));
        largest = fmaxf(largest, shuffle_xor(largest, 16));
        largest = fmaxf(largest, max[n][c]);
        // Nothing seen yet: any finite reference gives weights of 0.
        const float reference = largest == -INFINITY ? 0.0f : largest;
        factor[c] = exp2_fast(max[n][c] - reference);
        max[n][c] = largest;
        weights[n][c] *= exp2_fast(logits[n][c] - reference);
        weights[n][c + 2] *= exp2_fast(logits[n][c + 2] - reference);
        sum[n][c] = sum[n][c] * factor[c] + (weights[n][c] + weights[n][c + 2]);
      }
      if (any_lane(factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out[n][step][i] *= factor[i % 2];
        }
      }
      packed[n][0] = transpose(pack<T>(weights[n][0], weights[n][1]));
      packed[n][1] = transpose(pack<T>(weights[n][2], weights[n][3]));
    }
    const T* value = tile + (kTileKeys + lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * kChunk;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t left[4];
      load_matrices_transposed(left, value + step * 16);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        multiply_add<T>(out[n][step], left, packed[n][0], packed[n][1]);
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
    const int64_t first_tile = first / kTileKeys;
    // Keys past the last query of these rows are seen by none of them, unless shown again.
    const int last_row = static_cast<int>(row_block) * kRows + kRows - 1;
    int64_t end = keys.end;
    if (active == 0 && a.logits == nullptr && position(last_row) + 1 < end) {
      end = position(last_row) + 1 > keys.begin ? position(last_row) + 1 : keys.begin;
    }
    const int64_t tiles = end > first ? (end + kTileKeys - 1) / kTileKeys - first_tile : 0;
    // Tiles go around the warps of all pieces in turn: each gets its share of the visual ones.
    const int64_t step = static_cast<int64_t>(kWarps) * a.splits;
    int64_t tile = split * kWarps + warp;
    const int mine = static_cast<int>(tile < tiles ? (tiles - tile + step - 1) / step : 0);
    tile += first_tile;
    T* const ring_begin =
        reinterpret_cast<T*>(ring) + static_cast<int64_t>(warp) * a.stages * kStage;
    T* const ring_end = ring_begin + a.stages * kStage;
    for (int i = 0; i < a.stages - 1; ++i) {
      if (i < mine) fetch(tile + i * step, ring_begin + i * kStage);
      copy_async_commit();
    }
    let_next_kernel_start();
    load_queries();
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
      if (i + a.stages - 1 < mine) fetch(tile + (a.stages - 1) * step, ahead);
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
__global__ void __launch_bounds__(Decode<T, kDim, kColumns>::kThreads)
    routed_attention_decode(const DecodeLaunch a) {
  Decode<T, kDim, kColumns>(a).run();
}

}  // namespace cuda
}  // namespace lookagain
