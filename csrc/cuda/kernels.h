// The CUDA kernels as the bindings call them. Plain C++: no CUDA or torch header.
//
// Pointers in the parameters are device pointers; index tensors are contiguous and stay on the
// device, where their values are clamped instead of checked. Null key_start, key_length and
// mass_from have their defaults. Work goes to `stream`, nothing is allocated and nothing waits for
// the device, so every call can be captured in a CUDA graph. A failure to launch throws
// std::runtime_error with the kernel's name and CUDA's message.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "../params.h"

namespace lookagain {
namespace cuda {

using Stream = void*;  // cudaStream_t
// Gives a workspace of that many bytes on the current device, 256-byte aligned.
using Allocate = std::function<void*(int64_t bytes)>;

// What a launch needs to know of the current device.
struct Device {
  int major = 0, minor = 0;
  int multiprocessors = 1;
  int64_t shared_per_block = 48 << 10;
  int64_t shared_per_multiprocessor = 96 << 10;
};

const Device& current_device();

// Makes `index` the current device until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
};

// How a call's work is cut; decided from shapes and the device alone.
struct DecodePlan {
  bool tensor_cores = false;
  int dim = 0;      // head size that the kernel is compiled for
  int columns = 0;  // blocks of 8 rows in a block
  int block_rows = 0, row_blocks = 0;
  int splits = 1, stages = 1;
  int warps = 4;  // of a block
  int64_t shared_bytes = 0;
  int64_t states = 0, outs = 0, logits = 0;  // offsets in the workspace
  int64_t workspace_bytes = 0;
};

DecodePlan plan_decode(const RoutedAttentionParams& p, int64_t num_visual, const Device& device);

// `num_visual` is the width of p.mass.
void routed_attention(const RoutedAttentionParams& p, int64_t num_visual, const Allocate& allocate,
                      Stream stream);

// Overwrites p.mass; p.lse is needed. Paged caches too.
void visual_mass(const VisualMassParams& p, const Allocate& allocate, Stream stream);

// Many queries by one kernel of our own, forward, and its backward: bfloat16 and float16, head
// sizes up to 128, any re-injections. Nothing is atomic. `packed`: several sequences in a batch of
// one.
struct PackedRows {
  const int32_t* bounds = nullptr;  // [count + 1], device memory; null: none
  int64_t count = 0, longest = 0;
};
bool takes_many_queries(const RoutedAttentionBackwardParams& p);
// Writes p.out and `lse`, where there are keys; p's gradients are not used.
void many_queries_forward(const RoutedAttentionBackwardParams& p, const PackedRows& packed,
                          float* lse, const Allocate& allocate, Stream stream);
// Writes p's gradients, from p.out and p.lse; adds to p.mass.
void many_queries_backward(const RoutedAttentionBackwardParams& p, const PackedRows& packed,
                           const Allocate& allocate, Stream stream);

// Two results of attention under one softmax, over different keys; `out` and `lse` become that of
// both. Strides count elements, last axes are contiguous.
struct JoinParams {
  DType dtype = DType::kFloat32;
  int64_t queries = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;
  void* out = nullptr;  // [queries, heads, D]
  int64_t out_query_stride = 0, out_head_stride = 0;
  float* lse = nullptr;  // [heads, queries]
  int64_t lse_stride = 0;
  const void* part = nullptr;  // as out
  int64_t part_query_stride = 0, part_head_stride = 0;
  const float* part_lse = nullptr;  // as lse
  int64_t part_lse_stride = 0;
};

void join(const JoinParams& p, Stream stream);

struct SelectParams {
  const float* mass = nullptr;  // [B, L_c]
  int64_t mass_stride = 0;
  const int32_t* num_visual = nullptr;  // [B]
  double ratio = 0;
  int64_t batch = 0;
  int64_t width = 0;       // L_c
  uint8_t* out = nullptr;  // [B, L_c]
  int64_t out_stride = 0;
};

void select_visual_tokens(const SelectParams& p, Stream stream);

// Writes the same rows as the CPU kernel, and the new lengths to `key_length` (device memory). If a
// row cannot take its tokens nothing at all is written, and `failed` (device memory, int32 [4])
// gets {what, row, its length, its tokens}; else {0, ...}. `width` is that of p.selected.
constexpr int kAppendNoRoom = 1, kAppendBadLength = 2, kAppendBadSpans = 3, kAppendNoBlock = 4;
void append_visual(const AppendVisualParams& p, int64_t capacity, int32_t* key_length,
                   int64_t width, int32_t* failed, const Allocate& allocate, Stream stream);

}  // namespace cuda
}  // namespace lookagain
