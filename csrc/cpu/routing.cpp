// ROUTE's selection: mass [B, L_c] float32 -> out [B, L_c] bool.
//
// Mass and token number are packed into one 64-bit rank whose order is total, so a partial sort
// (nth_element, linear time) finds exactly one set. A few thousand tokens take microseconds: one
// thread.
#include "routing.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "../core/selection.h"

namespace lookagain {

void select_visual_tokens(const float* mass, int64_t mass_stride, double ratio,
                          const int32_t* num_visual, int64_t batch, int64_t max_visual,
                          uint8_t* out, int64_t out_stride) {
  std::vector<uint64_t> ranks;
  for (int64_t b = 0; b < batch; ++b) {
    const float* row = mass + b * mass_stride;
    uint8_t* chosen = out + b * out_stride;
    std::memset(chosen, 0, static_cast<size_t>(max_visual));
    const int64_t n = num_visual[b];
    const int64_t keep = selection_count(ratio, n);
    if (keep == n) {
      std::memset(chosen, 1, static_cast<size_t>(n));
      continue;
    }
    ranks.resize(static_cast<size_t>(n));
    for (int64_t t = 0; t < n; ++t) ranks[t] = selection_rank(row[t], static_cast<uint32_t>(t));
    std::nth_element(ranks.begin(), ranks.begin() + keep, ranks.end());
    for (int64_t t = 0; t < keep; ++t) chosen[ranks[t] & 0xffffffffu] = 1;
  }
}

}  // namespace lookagain
