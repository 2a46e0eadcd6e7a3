// Gradients of routed_attention with many queries, by kernels of our own: one pass for each side.
//
// Layout: grad_out, query, out, grad_query [B, H_q, L_q, D]; key, value and their gradients
// [B, H_kv, L_k, D]; lse float32 [B, H_q, L_q]; see many_queries.cuh. With P = exp(scale S - lse)
// and dS = P (dO V^T - rowsum(dO out)):
//   query side  holds 64 packed rows of Q and dO; keys and values pass by: dQ += dS K
//   key side    holds 64 rows of K and V; packed rows of Q and dO pass by: dV += P^T dO,
//               dK += dS^T Q, and the visual mass as sums of P over counted queries
// The logits are taken twice, so that no sum is shared: nothing is atomic and the same inputs give
// the same bits. What passes by a block of keys may be cut into pieces, which a last kernel adds in
// order: early keys, and those shown again, are seen by many times more queries than late ones.
//
// A warp holds 16 rows: their sums in registers, their operands too on the side of queries; keys
// and values stay in shared memory, since two sums leave no room for them. What passes by is read
// by all four warps from a ring of two tiles. Where a selection shows some keys of a block only,
// the products of the others are taken in vain.
//
// FLOP: 14 D for each query head, query and key seen, sightings included (10 D where one kernel
// does both sides with atomics). Bytes: 4 D for each row that passes by and 64 rows held, 128 and
// 96 FLOP a byte, from the second-level cache. Limit: tensor cores, and shared memory, which gives
// a product's right operand, 256 bytes, in two cycles: about as long as an sm_80 multiprocessor
// takes for a product, and longer than a Hopper one.
#pragma once

#include "grad_key_value.cuh"
#include "grad_query.cuh"

namespace lookagain {
namespace cuda {

// rowsum(grad_out out). A warp for each query of a head.
template <typename T>
__global__ void __launch_bounds__(kThreads) grad_delta(const ManyLaunch a) {
  const RoutedAttentionBackwardParams& p = a.p;
  const int lane = threadIdx.x % 32;
  // Queries, and elements of keys, are fewer than 2^31.
  const uint32_t index = blockIdx.x * kWarps + threadIdx.x / 32;
  const uint32_t tokens = static_cast<uint32_t>(a.tokens);
  const uint32_t heads = static_cast<uint32_t>(p.query_heads), row = index / tokens;
  const uint32_t batch = row / heads, head = row - batch * heads, token = index - row * tokens;
  if (batch >= a.rows_of_tensors) return;
  const T* grad = head_row<const T>(p.grad_out, batch, head, token);
  const T* out = head_row<const T>(p.out, batch, head, token);
  float sum = 0;
  for (int d = 2 * lane; d < p.head_dim; d += 64) {
    sum += to_float(grad[d]) * to_float(out[d]) + to_float(grad[d + 1]) * to_float(out[d + 1]);
  }
  for (int step = 16; step > 0; step /= 2) sum += shuffle_xor(sum, step);
  if (lane == 0) a.delta[index] = sum;
}

// Adds the pieces of dK and dV in order. A thread for each two elements of both.
template <typename T>
__global__ void __launch_bounds__(kThreads) grad_combine(const ManyLaunch a) {
  const RoutedAttentionBackwardParams& p = a.p;
  const uint32_t size = static_cast<uint32_t>(p.key_heads * a.num_keys() * p.head_dim);
  const uint32_t dim = static_cast<uint32_t>(p.head_dim),
                 heads = static_cast<uint32_t>(p.key_heads);
  const uint32_t index = 2 * (blockIdx.x * kThreads + threadIdx.x);
  if (index >= 2 * size) return;
  const bool values = index >= size;
  const uint32_t at = values ? index - size : index, row = at / dim;
  const int64_t step = size;
  const float* from = a.sums + (values ? a.pieces * step : 0) + at;
  float one = 0, other = 0;
#pragma unroll 4
  for (int piece = 0; piece < a.pieces; ++piece) {
    const float2 part = *reinterpret_cast<const float2*>(from + piece * step);
    one += part.x;
    other += part.y;
  }
  const uint32_t keys = static_cast<uint32_t>(a.key_tokens), head = row / keys;
  T* to = head_row<T>(values ? p.grad_value : p.grad_key, head / heads, head % heads,
                      row - head * keys);
  *reinterpret_cast<uint32_t*>(to + (at - row * dim)) = pack<T>(one, other);
}

}  // namespace cuda
}  // namespace lookagain
