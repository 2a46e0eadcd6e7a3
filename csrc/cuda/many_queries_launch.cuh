// Launches of the kernels for many queries, for one element type.
#pragma once

#include "launch.h"
#include "many_queries_instances.h"
#include "routed_attention_backward.cuh"
#include "routed_attention_prefill.cuh"

namespace lookagain {
namespace cuda {

// Calls run<head size compiled for>.
template <typename Run>
void with_head_size(int64_t dim, Run run) {
  if (dim <= 64) return run(std::integral_constant<int, 64>());
  if (dim <= 96) return run(std::integral_constant<int, 96>());
  return run(std::integral_constant<int, 128>());
}

template <typename T>
void launch_prefill(const ManyLaunch& a, Stream stream) {
  with_head_size(a.p.head_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    launch<&routed_attention_prefill<T, kDim>>(
        "routed_attention_prefill", a.p.batch * a.p.key_heads * a.held_blocks, kThreads,
        Prefill<T, kDim>::shared_bytes(a.p.visual.half), stream, a);
  });
}

template <typename T>
void launch_gradients(ManyLaunch& a, Stream stream) {
  const RoutedAttentionBackwardParams& p = a.p;
  const int64_t heads = p.batch * p.key_heads;
  launch<&grad_delta<T>>("grad_delta",
                         ceiling(a.rows_of_tensors * p.query_heads * a.tokens, kWarps), kThreads, 0,
                         stream, a);
  with_head_size(p.head_dim, [&](auto dim) {
    constexpr int kDim = decltype(dim)::value;
    a.held_blocks = static_cast<int>(ceiling(p.keys, kHeldRows));
    launch<&grad_key_value<T, kDim>>("grad_key_value", heads * a.held_blocks * a.pieces, kThreads,
                                     KeyGradients<T, kDim>::shared_bytes(p.visual.half), stream, a);
    a.held_blocks = static_cast<int>(ceiling(p.queries * a.group, kHeldRows));
    launch<&grad_query<T, kDim>>("grad_query", heads * a.held_blocks, kThreads,
                                 QueryGradients<T, kDim>::shared_bytes(p.visual.half), stream, a);
  });
  if (a.pieces == 1) return;
  launch<&grad_combine<T>>("grad_combine",
                           ceiling(p.key_heads * a.num_keys() * p.head_dim, kThreads), kThreads, 0,
                           stream, a);
}

}  // namespace cuda
}  // namespace lookagain
