// Into how many pieces the key axis is cut when a few rows meet many keys.
#pragma once

#include "config.h"

LA_NAMESPACE_BEGIN

// The number of pieces for `blocks` independent pieces of work over `keys` keys each, on a device
// that runs `slots` blocks at once. Depends on nothing but its arguments, so repeated calls take
// the same way. What is weighed, in units of the time that one block takes for one key:
LA_HD int64_t choose_splits(int64_t blocks, int64_t slots, int64_t keys) {
  constexpr int64_t kLeast = 128;   // keys of a piece
  constexpr double kStart = 192;    // of a block: its queries, its first keys' latency, its merge
  constexpr double kMerge = 16;     // of a piece: its result, written and read again
  constexpr double kCombine = 200;  // of the second kernel
  if (blocks < 1 || slots < 1 || keys <= kLeast) return 1;
  int64_t best = 1;
  double least = 1e300;
  for (int64_t splits = 1; splits <= (keys + kLeast - 1) / kLeast; ++splits) {
    const int64_t waves = (blocks * splits + slots - 1) / slots;
    double cost = static_cast<double>(waves) *
                  (static_cast<double>(keys) / static_cast<double>(splits) + kStart);
    if (splits > 1) {
      cost += kCombine + kMerge * static_cast<double>(blocks * splits) / static_cast<double>(slots);
    }
    if (cost < least) {
      least = cost;
      best = splits;
    }
    if (waves > 8) break;  // more pieces only add their starts
  }
  return best;
}

LA_NAMESPACE_END
