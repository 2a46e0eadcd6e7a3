// From a plan to the compiled kernel of its head size and rows.
#pragma once

#include "decode_instances.h"
#include "launch.h"
#include "routed_attention_decode.cuh"

namespace lookagain {
namespace cuda {

template <typename T, int kDim, int kColumns>
void launch_one(const DecodePlan& plan, const DecodeLaunch& a, Stream stream) {
  launch<&routed_attention_decode<T, kDim, kColumns>>(
      "routed_attention_decode", a.p.batch * a.p.key_heads * a.row_blocks * a.splits,
      32 * plan.warps, plan.shared_bytes, stream, a);
}

template <typename T>
void launch_decode(const DecodePlan& plan, const DecodeLaunch& a, Stream stream) {
  const bool one = plan.columns == 1;
  switch (plan.dim) {
    case 64:
      return one ? launch_one<T, 64, 1>(plan, a, stream) : launch_one<T, 64, 4>(plan, a, stream);
    case 96:
      return one ? launch_one<T, 96, 1>(plan, a, stream) : launch_one<T, 96, 4>(plan, a, stream);
    case 128:
      return one ? launch_one<T, 128, 1>(plan, a, stream) : launch_one<T, 128, 3>(plan, a, stream);
    default:
      return one ? launch_one<T, 256, 1>(plan, a, stream) : launch_one<T, 256, 2>(plan, a, stream);
  }
}

}  // namespace cuda
}  // namespace lookagain
