// The visual mass as column sums of P, for a backward that has P anyway: what of a tile is summed,
// and the way of a head's sums to its visual tokens. (visual_mass.cpp is the pass of its own.)
//
// Work: an addition for each P of a counted query on a tile with visual keys, 1 FLOP beside the
// 10 D of the backward. The sums of a tile stay with those of dK and dV and have their order.
#pragma once

#include "../core/visual.h"
#include "sightings.h"

LA_NAMESPACE_BEGIN

// Whether the `count` entries of a list from `first` on hold a visual token of the row.
LA_HD bool holds_visual(const VisualParams& visual, int64_t batch, const KeyList& list,
                        int64_t first, int64_t count) {
  if (list.tokens != nullptr) return true;
  bool found = false;
  const int64_t begin = list.begin + first;
  for_each_visual_run(row_spans(visual, batch), visual.num_spans, begin, begin + count,
                      [&](int64_t, int64_t, int64_t) { found = true; });
  return found;
}

// Adds one head's sums to the mass of its visual tokens: those of ordinary keys, then each list's.
// `sums_of(chunk, tile)` are the sums of the tile's entries.
template <typename Sum, typename SumsOf>
LA_HD void add_column_sums(const RoutedAttentionBackwardParams& p, const RowSightings& row,
                           int64_t batch, int64_t key_head, int64_t tile_keys, int64_t chunks,
                           SumsOf sums_of) {
  float* mass = p.mass + batch * p.mass_batch_stride + key_head * p.mass_head_stride;
  auto add = [&](const KeyList& list, int64_t entry, int64_t token) {
    Sum total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      total += sums_of(chunk, list.first_tile + entry / tile_keys)[entry % tile_keys];
    }
    mass[token] += static_cast<float>(total);
  };
  const KeyList& plain = row.lists[0];
  for_each_visual_run(row_spans(p.visual, batch), p.visual.num_spans, plain.begin,
                      plain.begin + plain.count, [&](int64_t first, int64_t token, int64_t length) {
                        for (int64_t n = 0; n < length; ++n) {
                          add(plain, first - plain.begin + n, token + n);
                        }
                      });
  for (int64_t number = 1; number < row.num_lists; ++number) {
    const KeyList& list = row.lists[number];
    for (int64_t entry = 0; entry < list.count; ++entry) add(list, entry, list.tokens[entry]);
  }
}

LA_NAMESPACE_END
