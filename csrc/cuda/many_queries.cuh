// What the kernels for many queries share: forward and backward of training and prefill.
//
// A *row* is one of a batch, or one of several sequences packed into a batch of one. Its queries
// are packed by key head: packed row n is query n / G of head n % G, so that 64 of them end within
// a few queries of each other and nearly no tile is cut by the causal mask in vain.
//
// Each kernel holds a block of rows (of queries, or of keys) and lets tiles of the other side pass
// by in shared memory. A re-injection turns what is held, once, and not what passes: queries by
// -shift or keys by +shift, which give the same logits but for rounding. Gradients of what is held
// are summed in the same turned frame, and turned on when the next re-injection begins: sums of all
// sightings end in one accumulator, whatever their number.
//
// Products are m16n8k16 with rows of what is held on the left. `a b^T` reads what passes by rows,
// `a b` by columns through a transposing load; the first one's result is the second one's left
// operand as it lies in the registers, rounded to 16 bits.
#pragma once

#include "decode_merge.cuh"
#include "query_rows.cuh"

namespace lookagain {
namespace cuda {

constexpr int kPiece = 8;                  // elements of a 16-byte access
constexpr int kHeldRows = 16 * kWarps;     // of a block of the backward
constexpr int kPrefillRows = 32 * kWarps;  // and of the forward

struct ManyLaunch {
  RoutedAttentionBackwardParams p;  // the forward leaves the gradients empty
  const int32_t* bounds;            // of packed sequences, [p.batch + 1], or null
  int64_t rows_of_tensors;          // B: 1 where sequences are packed
  int64_t tokens, key_tokens;       // L_q and L_k of the tensors; p has those of the longest row
  float* lse;                       // [B, H_q, tokens], natural units
  int group;                        // G
  uint32_t inverse;                 // (2^32 - 1) / G
  int held_blocks;                  // of a row and key head
  int pieces;                       // of what passes by, for a block of keys
  float scale;                      // on logits, in units of log 2
  float* delta;                     // [B, H_q, tokens], rowsum(grad_out out)
  float* sums;                      // [2, pieces, B, H_kv, L_k, D], of dK and dV; null: one piece
  float* key_mass;                  // [pieces, B, H_kv, L_k], sums of P over counted queries
  int32_t* token;                   // [B, L_k], number of a visual key in its row, else -1
  uint32_t* shown;                  // [B, L_k], bit r: re-injection r shows the key
  int32_t* lists;                   // [R, or 1 without a selection, B, L_k], keys shown, ascending
  int32_t* counts;                  // [p.batch, R or 1], how many

  LA_HD int64_t num_lists() const {
    const int64_t reinjections = p.visual.num_reinjections;
    return p.visual.selected == nullptr && reinjections > 1 ? 1 : reinjections;
  }
  LA_HD int64_t num_keys() const { return rows_of_tensors * key_tokens; }
};

// The rows of one tensor that a block reads. Strides fit into 31 bits, in bytes: a place is two
// multiplications then, and a loop that copies nothing but rows is mostly that.
template <typename T>
struct Rows {
  int64_t first;
  int row_bytes, head_bytes;

  // From head `head` and token `token` on.
  LA_DEVICE Rows(const HeadsView& view, int64_t batch, int64_t head, int64_t token)
      : first(reinterpret_cast<int64_t>(head_row<const T>(view, batch, head, token))),
        row_bytes(static_cast<int>(view.row_stride * sizeof(T))),
        head_bytes(static_cast<int>(view.head_stride * sizeof(T))) {}

  LA_DEVICE const T* at(int head, int token, int feature = 0) const {
    const int64_t place = multiply_add_wide(head, head_bytes, first + feature * 2);
    return reinterpret_cast<const T*>(multiply_add_wide(token, row_bytes, place));
  }
};

// Which row to read: there is one, of a head from the first on, at a token.
struct Wanted {
  bool there;
  int head, token;
};

// One row: where it lies, and its keys.
struct Row {
  const ManyLaunch& a;
  int number, offset;  // offset: of its first token in the tensors
  int queries;
  RowKeys keys;

  LA_DEVICE Row(const ManyLaunch& launch, int64_t row)
      : a(launch), number(static_cast<int>(row)), offset(0) {
    if (a.bounds == nullptr) {
      queries = static_cast<int>(a.p.queries);
      keys = row_keys(a.p, row);
    } else {
      offset = a.bounds[row];
      queries = a.bounds[row + 1] - offset;
      keys = {0, queries, 0};
    }
  }

  LA_DEVICE int64_t batch() const { return a.bounds == nullptr ? number : 0; }
  LA_DEVICE int slots() const { return a.bounds == nullptr ? static_cast<int>(a.p.keys) : queries; }
  LA_DEVICE int position(int query) const { return keys.first_position + query; }

  template <typename T>
  LA_DEVICE T* at(const HeadsView& view, int64_t head, int64_t token) const {
    return head_row<T>(view, batch(), head, offset + token);
  }
  // Those of a tensor from head `head` on.
  template <typename T>
  LA_DEVICE Rows<T> rows(const HeadsView& view, int head) const {
    return Rows<T>(view, batch(), head, offset);
  }

  // Place of a query in `lse` and `delta`.
  LA_DEVICE int64_t place(int64_t head, int query) const {
    return (batch() * a.p.query_heads + head) * a.tokens + (offset + query);
  }

  // Place of a key in `token` and `shown`, and in what has one for each head.
  LA_DEVICE int64_t place_of_key(int64_t key) const {
    return batch() * a.key_tokens + offset + key;
  }
  LA_DEVICE int64_t place_of_key(int64_t head, int64_t key) const {
    return (batch() * a.p.key_heads + head) * a.key_tokens + offset + key;
  }

  LA_DEVICE int first_seeing(int r) const {
    const int32_t start = a.p.visual.start[number * a.p.visual.num_reinjections + r];
    return static_cast<int>(first_query_seeing(start, keys.end, queries));
  }

  LA_DEVICE int32_t shift(int r) const {
    return a.p.visual.shift[number * a.p.visual.num_reinjections + r];
  }

  LA_DEVICE const int32_t* list(int r, int* count) const {
    const int64_t list = a.p.visual.selected == nullptr ? 0 : r;
    *count = a.counts[number * a.num_lists() + list];
    return a.lists + list * a.num_keys() + place_of_key(0);
  }
};

// Rotation by `shift`, one entry for each frequency. By all threads; visible after a barrier.
LA_DEVICE void make_table(const VisualParams& visual, int32_t shift, float2* table) {
#pragma unroll 1
  for (int i = threadIdx.x; i < visual.half; i += kThreads) {
    table[i] = turn_of(shift, visual.inv_freq[i]);
  }
}

// Calls fn(row, offset in shared memory, feature) for the 16-byte pieces of kRows rows of a tile
// that this thread copies: always at the same place of a row.
template <int kDim, int kRows, typename Fn>
LA_DEVICE void for_each_piece(Fn fn) {
  constexpr int kPitch = kDim + kPiece, kPieces = kDim / kPiece, kAtOnce = kThreads / kPieces;
  const int thread = threadIdx.x, feature = thread % kPieces * kPiece;
  if (thread >= kAtOnce * kPieces) return;
#pragma unroll 1
  for (int n = thread / kPieces; n < kRows; n += kAtOnce) fn(n, n * kPitch + feature, feature);
}

// Begins to copy kRows rows of two tensors to shared memory; `row_at(n)` says which row n is. What
// is not there becomes zeros; a copy of nothing needs a good address too, the first row's.
template <typename T, int kDim, int kRows, typename RowAt>
LA_DEVICE void copy_two(T* to, T* to_other, int dim, const Rows<T>& one, const Rows<T>& other,
                        RowAt row_at) {
  for_each_piece<kDim, kRows>([&](int n, int at, int feature) {
    const Wanted row = row_at(n);
    const bool whole = feature < dim, there = row.there && whole;
    const int head = row.there ? row.head : 0, token = row.there ? row.token : 0;
    copy_async(to + at, one.at(head, token, whole ? feature : 0), there ? 16 : 0);
    copy_async(to_other + at, other.at(head, token, whole ? feature : 0), there ? 16 : 0);
  });
}

// Of one tensor.
template <typename T, int kDim, int kRows, typename RowAt>
LA_DEVICE void copy_rows(T* to, int dim, const Rows<T>& rows, RowAt row_at) {
  for_each_piece<kDim, kRows>([&](int n, int at, int feature) {
    const Wanted row = row_at(n);
    const bool whole = feature < dim, there = row.there && whole;
    const int head = row.there ? row.head : 0, token = row.there ? row.token : 0;
    copy_async(to + at, rows.at(head, token, whole ? feature : 0), there ? 16 : 0);
  });
}

// The same rows turned by `table`, at once; visible after a barrier.
template <typename T, int kDim, int kRows, typename RowAt>
LA_DEVICE void turn_rows(T* to, int dim, const float2* table, int half, const Rows<T>& rows,
                         RowAt row_at) {
  constexpr int kPitch = kDim + kPiece, kAtOnce = 8;  // rows read before the first is written
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows / kAtOnce * kDim; i += kThreads) {
    const int first = i / kDim * kAtOnce, d = i % kDim;
    if (d >= half && d < 2 * half && d < dim) continue;  // written with its partner
    const bool turns = d < half;
    T one[kAtOnce], other[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const Wanted row = row_at(first + k);
      const bool there = row.there && d < dim;
      const T* from = rows.at(there ? row.head : 0, there ? row.token : 0, there ? d : 0);
      one[k] = there ? *from : T{0};
      other[k] = there && turns ? from[half] : T{0};
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      T* mine = to + (first + k) * kPitch + d;
      if (!turns) {
        *mine = one[k];
        continue;
      }
      const float x = to_float(one[k]), y = to_float(other[k]);
      mine[0] = from_float<T>(x * table[d].x - y * table[d].y);
      mine[half] = from_float<T>(y * table[d].x + x * table[d].y);
    }
  }
}

// Left operands of a warp: 16 rows from `tile` on.
template <typename T, int kSteps>
LA_DEVICE void load_left(uint32_t (&left)[kSteps][4], const T* tile, int pitch) {
  const int lane = threadIdx.x % 32;
  const T* row = tile + (lane % 8 + lane / 8 % 2 * 8) * pitch + lane / 16 * kPiece;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) load_matrices(left[step], row + step * 16);
}

// c = left tile^T, for kBlocks times 8 rows of `tile`. `left` is held in registers, or lies in
// shared memory, 16 rows.
template <typename T, int kSteps, int kBlocks>
LA_DEVICE void multiply_by_rows(float (&c)[kBlocks][4], const T* left, const T* tile, int pitch) {
  const int lane = threadIdx.x % 32;
  const T* from = left + (lane % 8 + lane / 8 % 2 * 8) * pitch + lane / 16 * kPiece;
  const T* row = tile + lane % 8 * pitch + lane / 8 * kPiece;
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0;
  }
#pragma unroll
  for (int step = 0; step < kSteps; step += 2) {
    uint32_t one[4], other[4];
    load_matrices(one, from + step * 16);
    load_matrices(other, from + step * 16 + 16);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      uint32_t right[4];
      load_matrices(right, row + n * 8 * pitch + step * 16);
      multiply_add<T>(c[n], one, right[0], right[1]);
      multiply_add<T>(c[n], other, right[2], right[3]);
    }
  }
}

template <typename T, int kSteps, int kBlocks>
LA_DEVICE void multiply_by_rows(float (&c)[kBlocks][4], const uint32_t (&left)[kSteps][4],
                                const T* tile, int pitch) {
  const int lane = threadIdx.x % 32;
  const T* row = tile + lane % 8 * pitch + lane / 8 * kPiece;
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0;
  }
#pragma unroll
  for (int step = 0; step < kSteps; step += 2) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      uint32_t right[4];
      load_matrices(right, row + n * 8 * pitch + step * 16);
      multiply_add<T>(c[n], left[step], right[0], right[1]);
      multiply_add<T>(c[n], left[step + 1], right[2], right[3]);
    }
  }
}

// c += left tile, for 16 rows of `tile`.
template <typename T, int kColumns>
LA_DEVICE void multiply_by_columns(float (&c)[kColumns][4], const uint32_t (&left)[4],
                                   const T* tile, int pitch) {
  const int lane = threadIdx.x % 32;
  const T* row = tile + (lane % 8 + lane / 8 % 2 * 8) * pitch + lane / 16 * kPiece;
#pragma unroll
  for (int n = 0; n < kColumns; n += 2) {
    uint32_t right[4];
    load_matrices_transposed(right, row + n * 8);
    multiply_add<T>(c[n], left, right[0], right[1]);
    multiply_add<T>(c[n + 1], left, right[2], right[3]);
  }
}

// Two neighbouring blocks of a product as a left operand.
template <typename T>
LA_DEVICE void as_left(uint32_t (&left)[4], const float (&first)[4], const float (&second)[4]) {
  left[0] = pack<T>(first[0], first[1]);
  left[1] = pack<T>(first[2], first[3]);
  left[2] = pack<T>(second[0], second[1]);
  left[3] = pack<T>(second[2], second[3]);
}

// Turns a warp's 16 rows of sums by `table`, in its part of shared memory.
template <int kColumns>
LA_DEVICE void turn_sums(float (&sum)[kColumns][4], float* room, const float2* table, int half) {
  constexpr int kPitch = kColumns * 8 + 4;
  const int lane = threadIdx.x % 32;
  float* mine = room + lane / 4 * kPitch + 2 * (lane % 4);
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) mine[i / 2 * 8 * kPitch + 8 * n + i % 2] = sum[n][i];
  }
  __syncwarp();
  for (int d = lane; d < half; d += 32) {
    const float2 turn = table[d];
#pragma unroll 8
    for (int row = 0; row < 16; ++row) {
      float *first = room + row * kPitch + d, *second = first + half;
      const float one = *first, other = *second;
      *first = one * turn.x - other * turn.y;
      *second = other * turn.x + one * turn.y;
    }
  }
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[n][i] = mine[i / 2 * 8 * kPitch + 8 * n + i % 2];
  }
}

}  // namespace cuda
}  // namespace lookagain
