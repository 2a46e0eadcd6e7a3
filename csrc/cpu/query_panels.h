// What the prefill, the backward and the visual mass share: rows of keys and queries brought into
// packed operands, and scores turned into weights.
//
// A query panel is kTileRows consecutive queries of one query head; panels of the G heads of a
// group that stand at the same positions follow each other. So the causal edge costs half a panel,
// and every packed key tile serves G times as many rows.
#pragma once

#include "gemm_pack.h"
#include "sightings.h"

LA_NAMESPACE_BEGIN

// Cuts one block of memory into arrays; with a null base it only counts bytes.
class Carver {
 public:
  LA_HD explicit Carver(char* base) : base_(base) {}
  template <typename T>
  LA_HD T* take(int64_t count) {
    T* array = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return array;
  }
  LA_HD int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// The rows of one key tile (of keys or of values) as elements; rows past its end are zero.
template <typename Lane>
class TileRows {
 public:
  using Element = typename Lane::Element;
  static constexpr int kGroup = 2 * kVectorWidth<typename Lane::Sum>;

  LA_HD TileRows(const HeadsView& view, const AttentionSizes& sizes, int64_t batch, int64_t head,
                 const KeyList& list, int64_t first, Element* room)
      : view_(view),
        sizes_(sizes),
        list_(list),
        batch_(batch),
        head_(head),
        first_(first),
        room_(room) {}

  // Elements of `room`: kGroup converted rows and a row of zeros.
  static LA_HD int64_t room() { return (kGroup + 1) * kMaxHeadDim; }

  // Pointers to kGroup rows from entry `offset` of the tile on.
  LA_HD void group(int64_t offset, const Element** rows) const {
    Element* zero = room_ + kGroup * kMaxHeadDim;
    for (int64_t d = 0; d < sizes_.head_dim; ++d) zero[d] = Element{};
    for (int64_t n = 0; n < kGroup; ++n) {
      const int64_t entry = first_ + offset + n;
      rows[n] = zero;
      if (entry >= list_.count) continue;
      const char* from = slot_address(view_, sizes_.dtype, sizes_, batch_, head_, list_.key(entry));
      rows[n] = element_row<Lane>(from, sizes_.dtype, sizes_.head_dim, room_ + n * kMaxHeadDim);
    }
  }

  // As columns: [panel of kGroup entries][D / kPair][kGroup].
  LA_HD void pack_transposed(int64_t count, typename Lane::Unit* to) const {
    const Element* rows[kGroup];
    for (int64_t n = 0; n < count; n += kGroup) {
      group(n, rows);
      lookagain::pack_transposed<Lane, kGroup>(rows, sizes_.head_dim,
                                               to + n * (sizes_.head_dim / Lane::kPair));
    }
  }

  // As rows: [feature panel][tile_keys / kPair][columns], `width` features.
  LA_HD void pack_paired(int64_t count, int64_t tile_keys, int64_t width,
                         typename Lane::Unit* to) const {
    const Element* rows[kGroup];
    for (int64_t n = 0; n < count; n += kGroup) {
      group(n, rows);
      lookagain::pack_paired<Lane>(rows, kGroup / Lane::kPair, n / Lane::kPair,
                                   tile_keys / Lane::kPair, sizes_.head_dim, width, to);
    }
  }

 private:
  const HeadsView& view_;
  const AttentionSizes& sizes_;
  const KeyList& list_;
  const int64_t batch_, head_, first_;
  Element* const room_;
};

// Scores are multiplied by a positive factor after masking with -inf; the sign of the scale goes
// into the queries, and a scale of nothing makes queries of zeros.
LA_HD int scale_sign(double scale) { return scale > 1e-30 ? 1 : (scale < -1e-30 ? -1 : 0); }
LA_HD double scale_size(double scale) {
  return scale_sign(scale) == 0 ? 1.0 : (scale < 0 ? -scale : scale);
}

// The kTileRows rows of one panel of queries (or of their gradients) as elements.
template <typename Lane>
class PanelRows {
 public:
  using Element = typename Lane::Element;
  using Sum = typename Lane::Sum;

  const Element* rows[kTileRows];

  // Elements of `room`: the converted rows and a row of zeros.
  static LA_HD int64_t room() { return (kTileRows + 1) * kMaxHeadDim; }

  // Queries past the last are zero. `turn`: by -shift, or null. `sign` multiplies.
  LA_HD PanelRows(const HeadsView& view, const AttentionSizes& sizes, int64_t batch, int64_t head,
                  int64_t first, const Sighting* turn, int64_t half, int sign, Element* room) {
    const int64_t dim = sizes.head_dim;
    Element* zero = room + kTileRows * kMaxHeadDim;
    for (int64_t d = 0; d < dim; ++d) zero[d] = Element{};
    for (int64_t row = 0; row < kTileRows; ++row) {
      rows[row] = zero;
      if (first + row >= sizes.queries) continue;
      const char* from = row_address(view, sizes.dtype, batch, head, first + row);
      Element* own = room + row * kMaxHeadDim;
      if ((turn == nullptr || turn->cosine == nullptr) && sign == 1) {
        rows[row] = element_row<Lane>(from, sizes.dtype, dim, own);
        continue;
      }
      rows[row] = own;
      Sum wide[kMaxHeadDim];
      load_row(from, sizes.dtype, dim, wide);
      if (sign != 1) {
        for (int64_t d = 0; d < dim; ++d) wide[d] = sign == 0 ? Sum(0) : -wide[d];
      }
      if (turn != nullptr && turn->cosine != nullptr) turn_row(*turn, half, -1, wide);
      for (int64_t d = 0; d < dim; ++d) own[d] = from_float<Element>(wide[d]);
    }
  }

  // Turns a row in place by direction * shift.
  static LA_HD void turn_row(const Sighting& turn, int64_t half, int direction, Sum* row) {
    for (int64_t i = 0; i < half; ++i) {
      const Sum cosine = static_cast<Sum>(turn.cosine[i]);
      const Sum sine = static_cast<Sum>(direction * turn.sine[i]);
      const Sum first = row[i], second = row[i + half];
      row[i] = first * cosine - second * sine;
      row[i + half] = second * cosine + first * sine;
    }
  }
};

// How many keys of the tile from `first_entry` on each query of a panel sees; returns the most.
LA_HD int64_t panel_limits(const RowSightings& row, const Sighting& sighting, int64_t first_query,
                           int64_t queries, int64_t first_entry, int64_t tile_keys,
                           int64_t* limits) {
  int64_t most = 0;
  for (int64_t n = 0; n < kTileRows; ++n) {
    const int64_t query = first_query + n;
    const int64_t seen = query < queries ? row.limit(sighting, query) - first_entry : 0;
    limits[n] = larger(0, smaller(tile_keys, seen));
    most = larger(most, limits[n]);
  }
  return most;
}

// The state of the online softmax of one query; `max` is of raw scores.
template <typename Sum>
struct RowState {
  Sum max, sum;
};

// Weights of one row of scores, stored in place as elements: exp2(score * scale - max * scale) for
// the first `limit`, zero up to `columns`. Returns the factor for what was accumulated before.
template <typename Lane>
LA_HD typename Lane::Sum softmax_row(typename Lane::Sum* scores, int64_t limit, int64_t columns,
                                     typename Lane::Sum scale,
                                     RowState<typename Lane::Sum>& state) {
  using Sum = typename Lane::Sum;
  using Element = typename Lane::Element;
  constexpr int64_t kWidth = kVectorWidth<Sum>;
  const int64_t end = round_up(limit, kWidth);
  Sum factor = 1;
  if (limit > 0) {
    for (int64_t n = limit; n < end; ++n) scores[n] = -INFINITY;
    Vector<Sum> best[2] = {load(scores), load(scores)};
    int64_t n = kWidth;
    for (; n + 2 * kWidth <= end; n += 2 * kWidth) {
      best[0] = maximum<Sum>(best[0], load(scores + n));
      best[1] = maximum<Sum>(best[1], load(scores + n + kWidth));
    }
    if (n < end) best[0] = maximum<Sum>(best[0], load(scores + n));
    const Sum found = largest<Sum>(maximum<Sum>(best[0], best[1]));
    if (found > state.max) {
      // exp2 of -inf - finite: nothing was accumulated yet.
      factor = state.max == -INFINITY ? Sum(0) : Sum(::exp2((state.max - found) * scale));
      state.max = found;
    }
    const Vector<Sum> factor_of = splat(scale), offset = splat(Sum(-state.max * scale));
    Vector<Sum> sums[2] = {};
    for (n = 0; n + 2 * kWidth <= end; n += 2 * kWidth) {
      const auto p0 = exp2_of<Lane::kCoarse>(load(scores + n) * factor_of + offset);
      const auto p1 = exp2_of<Lane::kCoarse>(load(scores + n + kWidth) * factor_of + offset);
      sums[0] += p0;
      sums[1] += p1;
      Lane::store_elements(scores, n, p0);
      Lane::store_elements(scores, n + kWidth, p1);
    }
    if (n < end) {
      const auto p = exp2_of<Lane::kCoarse>(load(scores + n) * factor_of + offset);
      sums[0] += p;
      Lane::store_elements(scores, n, p);
    }
    state.sum = state.sum * factor + total<Sum>(sums[0] + sums[1]);
  }
  Element* elements = reinterpret_cast<Element*>(scores);
  for (int64_t n = end; n < columns; ++n) elements[n] = Element{};
  return factor;
}

LA_NAMESPACE_END
