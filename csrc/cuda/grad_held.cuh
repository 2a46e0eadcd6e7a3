// What both sides of the backward share; see routed_attention_backward.cuh.
#pragma once

#include "many_queries.cuh"

namespace lookagain {
namespace cuda {

template <typename T, int kDim>
struct Held {
  static constexpr int kRows = kHeldRows;
  static constexpr int kPitch = kDim + kPiece;
  static constexpr int kSteps = kDim / 16, kColumns = kDim / 8;
  static constexpr int kRoom = 16 * (kDim + 4);  // floats that a warp turns its sums in
};

// Log 2 of the sum of a row's weights; infinity, for weights of 0, if it sees nothing.
LA_DEVICE float lse_of(const Row& row, int64_t head, int query) {
  const float lse = row.a.lse[row.place(head, query)];
  return lse == -INFINITY ? INFINITY : lse * kLog2e;
}

}  // namespace cuda
}  // namespace lookagain
