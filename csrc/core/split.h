// How the key axis is divided when a few rows meet many keys.
#pragma once

#include "config.h"

LA_NAMESPACE_BEGIN

// First of `tiles` tiles that piece `split` of `splits` takes; split = splits gives the end. Pieces
// differ by at most one tile.
LA_HD int64_t split_begin(int64_t tiles, int64_t split, int64_t splits) {
  const int64_t whole = tiles / splits, rest = tiles % splits;
  return whole * split + (split < rest ? split : rest);
}

// The number of pieces for `blocks` independent pieces of work on a device that runs `slots` blocks
// at once: the smallest time waves / splits, where each piece costs a hundredth more for its merge.
// Depends on nothing but its arguments, so repeated calls take the same way.
LA_HD int64_t choose_splits(int64_t blocks, int64_t slots, int64_t max_splits) {
  if (blocks < 1 || slots < 1) return 1;
  int64_t best = 1;
  double best_cost = 1e300;
  for (int64_t splits = 1; splits <= max_splits; ++splits) {
    const int64_t waves = (blocks * splits + slots - 1) / slots;
    const double cost = static_cast<double>(waves) / static_cast<double>(splits) +
                        0.01 * static_cast<double>(splits - 1) / static_cast<double>(max_splits);
    if (cost < best_cost - 1e-12) {
      best_cost = cost;
      best = splits;
    }
    if (waves > 16) break;  // the last wave no longer matters
  }
  return best;
}

LA_NAMESPACE_END
