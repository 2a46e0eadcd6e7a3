// What the kernels of one `routed_attention` call share: how its work is cut, and its workspace.
//
// Rows of a key head are its query heads' queries, row = query * G + head, padded to blocks of
// `block_rows`. The key axis of every batch row is cut into `splits` pieces of whole tiles.
#pragma once

#include "../core/paging.h"
#include "../core/split.h"
#include "../core/visual.h"
#include "platform.h"

namespace lookagain {
namespace cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

constexpr int kWarps = 4;  // of a block, at most
constexpr int kThreads = 32 * kWarps;

// The tensor-core kernel compiled for head size `dim` and `columns` blocks of 8 rows. A tile of a
// warp is this many blocks of 16 keys: two hide each other's latency where registers allow it.
LA_HD constexpr int decode_blocks(int dim, int columns) {
  return columns == 1 && dim <= 128 ? 2 : 1;
}
// 16 bytes more than a row: eight rows of a matrix load then lie in different banks.
LA_HD constexpr int decode_pitch(int dim) { return dim + 8; }
// Its shared memory: queries of 1 + R sightings, then rings of tiles; at the end, in their places,
// the states and the values of the warps.
LA_HD constexpr int64_t decode_query_bytes(int dim, int rows, int64_t reinjections) {
  return (1 + reinjections) * rows * decode_pitch(dim) * 2;
}
LA_HD constexpr int64_t decode_shared_bytes(int dim, int columns, int64_t reinjections, int warps,
                                            int stages) {
  const int64_t ring = static_cast<int64_t>(warps) * stages * 2 * 16 * decode_blocks(dim, columns) *
                       decode_pitch(dim) * 2;
  const int64_t merge = static_cast<int64_t>(warps) * 8 * columns * (dim + 4) * 4;
  return decode_query_bytes(dim, 8 * columns, reinjections) + (ring > merge ? ring : merge);
}

// A 16-byte access as elements.
template <typename T>
union Chunk {
  static constexpr int kElements = 16 / sizeof(T);
  uint4 bits;
  T elements[kElements];
  LA_DEVICE Chunk() {}
};

struct DecodeLaunch {
  RoutedAttentionParams p;
  int group;           // G
  int rows;            // G * L_q
  int block_rows;      // rows of one block
  int row_blocks;      // blocks that cover the rows
  int splits;          // of the key axis
  int warps;           // of a block
  int stages;          // tiles of keys and values in flight for a warp
  bool whole_tiles;    // 16 keys from a multiple of 16 on lie row by row, without gaps to fill
  bool whole_queries;  // rows of queries lie at 16-byte boundaries
  int64_t num_visual;  // L_c
  float scale;         // on logits, in units of log 2
  float* states;       // [B, H_kv, padded rows, splits, 2]: max and sum of a piece
  float* outs;         // [B, H_kv, padded rows, splits, D]: its values, not normalised
  float* logits;       // [B, H_kv, L_c, padded rows], of all sightings together, or null

  LA_HD int64_t padded_rows() const { return static_cast<int64_t>(row_blocks) * block_rows; }
  // Whether a block of the first kernel knows the whole softmax of all rows of its key head.
  LA_HD bool whole_heads() const { return splits == 1 && row_blocks == 1; }
  // Whether a second kernel merges the pieces, or norms the mass.
  LA_HD bool needs_combine() const { return splits > 1 || (logits != nullptr && !whole_heads()); }
};

// Whether rows of 16-bit elements can be read and copied 16 bytes at a time.
inline bool aligned(const HeadsView& view) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.batch_stride % 8 == 0 &&
         view.head_stride % 8 == 0 && view.row_stride % 8 == 0;
}

// The keys and the place of one batch row.
struct RowKeys {
  int begin, end;      // of the keys that some query sees in their own place
  int first_position;  // key index of query 0; may be negative
};

LA_DEVICE RowKeys row_keys(const AttentionSizes& p, int64_t batch_row) {
  int64_t end = p.key_length == nullptr ? p.keys : p.key_length[batch_row];
  int64_t begin = p.key_start == nullptr ? 0 : p.key_start[batch_row];
  // Values are not checked where a check would wait for the device: nothing outside is read.
  end = end < 0 ? 0 : (end > p.keys ? p.keys : end);
  begin = begin < 0 ? 0 : (begin > end ? end : begin);
  return {static_cast<int>(begin), static_cast<int>(end), static_cast<int>(end - p.queries)};
}

// As place_of, with block -1 for what a table does not name.
LA_DEVICE SlotPlace checked_place(const PagedCache& pages, int64_t batch_row, int64_t slot) {
  SlotPlace place = place_of(pages, batch_row, slot);
  if (pages.block_table != nullptr && place.block >= pages.num_blocks) place.block = -1;
  return place;
}

// Whether re-injection r shows a visual token.
LA_DEVICE bool is_shown(const VisualParams& visual, const uint8_t* selected, int32_t token) {
  if (token < 0) return false;
  return selected == nullptr || (token < visual.selected_width && selected[token] != 0);
}

// Bit r: some query up to `last` sees re-injection r.
LA_DEVICE uint32_t active_reinjections(const VisualParams& visual, int64_t batch_row,
                                       int64_t last) {
  uint32_t active = 0;
  for (int r = 0; r < visual.num_reinjections; ++r) {
    const int32_t start = visual.start[batch_row * visual.num_reinjections + r];
    if (start != kNever && start <= last) active |= 1u << r;
  }
  return active;
}

// Key index of a visual token, -1 for none.
LA_DEVICE int64_t key_of_token(const int32_t* spans, int64_t num_spans, int64_t token) {
  for (int64_t s = 0; s < num_spans; ++s) {
    const int64_t length = spans[2 * s + 1];
    if (token < length) return spans[2 * s] + token;
    token -= length > 0 ? length : 0;
  }
  return -1;
}

// First key that is read: `begin`, or a visual key before it that a query up to `last` sees again.
LA_DEVICE int first_read(const DecodeLaunch& a, const RowKeys& keys, int64_t batch_row,
                         int64_t last) {
  // Logits of visual keys are kept for all rows, whichever of them see what.
  if (a.logits != nullptr) last = keys.end - 1;
  int first = keys.begin;
  const VisualParams& visual = a.p.visual;
  if (active_reinjections(visual, batch_row, last) == 0) return first;
  const int32_t* spans = row_spans(visual, batch_row);
  for (int64_t s = 0; s < visual.num_spans; ++s) {
    if (spans[2 * s + 1] > 0 && spans[2 * s] < first) first = spans[2 * s] < 0 ? 0 : spans[2 * s];
  }
  return first;
}

LA_DEVICE bool is_visual(const int32_t* spans, int64_t num_spans, int64_t key) {
  for (int64_t s = 0; s < num_spans; ++s) {
    if (key >= spans[2 * s] && key < spans[2 * s] + static_cast<int64_t>(spans[2 * s + 1])) {
      return true;
    }
  }
  return false;
}

// Walks the spans of a row along ascending tiles of keys.
class SpanCursor {
 public:
  LA_DEVICE SpanCursor(const int32_t* spans, int64_t num_spans)
      : next_(spans), left_(static_cast<int>(num_spans)) {
    advance();
  }

  // Whether a visual key lies in [begin, end); ends never go back between calls.
  LA_DEVICE bool reaches(int64_t begin, int64_t end) {
    while (last_ <= begin && first_ != INT32_MAX) {
      token_ += last_ - first_;
      advance();
    }
    return first_ < end;
  }

  // The token number of a key below `end`, at or after the last `begin`; -1 for none.
  LA_DEVICE int32_t token(int32_t key, int64_t end) const {
    int32_t first = first_, last = last_, number = token_;
    const int32_t* next = next_;
    for (int left = left_;; --left, next += 2) {
      if (key >= first && key < last) return number + key - first;
      if (left == 0 || (last > first && last >= end)) return -1;
      number += last - first;
      first = next[0];
      last = first + (next[1] > 0 ? next[1] : 0);
    }
  }

 private:
  // To the next span that is not empty.
  LA_DEVICE void advance() {
    for (; left_ > 0; --left_, next_ += 2) {
      if (next_[1] <= 0) continue;
      first_ = next_[0];
      last_ = first_ + next_[1];
      --left_;
      next_ += 2;
      return;
    }
    first_ = last_ = INT32_MAX;
  }

  const int32_t* next_;
  int left_;
  int32_t first_ = 0, last_ = 0, token_ = 0;
};

// Logits of several sightings of one key under one softmax: `sum` weights of the form
// exp2(logit - max). Without a branch: lanes of a warp would take both ways one after the other.
LA_DEVICE void add_sighting(float logit, float* max, float* sum) {
  const float larger = fmaxf(*max, logit);
  // Nothing seen yet: any finite reference gives weights of 0.
  const float reference = larger == -INFINITY ? 0.0f : larger;
  *sum = *sum * exp2_fast(*max - reference) + exp2_fast(logit - reference);
  *max = larger;
}

// Cosine and sine of shift * inv_freq. The angle is exact in double; once reduced to a part of a
// turn, float is enough.
LA_DEVICE float2 turn_of(int32_t shift, float inv_freq) {
  const double turns =
      static_cast<double>(shift) * static_cast<double>(inv_freq) * 0.15915494309189535;
  float2 turn;
  sine_cosine_pi(2.0f * static_cast<float>(turns - rint(turns)), &turn.y, &turn.x);
  return turn;
}

}  // namespace cuda
}  // namespace lookagain
