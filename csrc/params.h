// Arguments of the kernels: pointers, strides and sizes, nothing that knows about tensors.
//
// Strides count elements. B rows, H_q query heads, H_kv key heads, G = H_q / H_kv, L_q queries,
// L_k cache slots, D head size, L_c visual tokens of the largest row, S spans, R re-injections.
// Everything was checked before a kernel runs.
#pragma once

#include <cstdint>

namespace lookagain {

enum class DType : int { kFloat32, kFloat16, kBFloat16, kFloat64, kInt32, kBool };

// `start` of a re-injection that a row does not have.
constexpr int32_t kNever = INT32_MAX;

// [B, H, L, D] with a contiguous last axis.
struct HeadsView {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

// How the rows of a batch lie in a cache. Null: key and value are [B, H_kv, L_k, D]. Else they are
// [blocks, H_kv, block_size, D], batch_stride lies between blocks, and L_k is the table's width
// times block_size; see core/paging.h.
struct PagedCache {
  const int32_t* block_table = nullptr;  // [B, blocks of a row], -1: unused
  int64_t block_table_stride = 0;
  int64_t block_size = 0;
  int64_t num_blocks = 0;  // of the cache
};

struct VisualParams {
  const int32_t* spans = nullptr;  // [B, S, 2], (first key, length)
  int64_t num_spans = 0;
  const float* inv_freq = nullptr;  // [half]
  int64_t half = 0;                 // rotary_dim / 2
  const int32_t* shift = nullptr;   // [B, R]
  const int32_t* start = nullptr;   // [B, R]
  int64_t num_reinjections = 0;
  const uint8_t* selected = nullptr;  // [B, R, L_c] or null: all
  int64_t selected_batch_stride = 0;
  int64_t selected_stride = 0;
  int64_t selected_width = 0;  // L_c of `selected`
};

struct AttentionSizes : PagedCache {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t query_heads = 0;
  int64_t key_heads = 0;
  int64_t queries = 0;
  int64_t keys = 0;
  int64_t head_dim = 0;
  double scale = 1;
  int num_threads = 1;
  const int32_t* key_start = nullptr;   // [B]
  const int32_t* key_length = nullptr;  // [B]
};

struct RoutedAttentionParams : AttentionSizes {
  HeadsView query, key, value, out;
  void* lse = nullptr;    // [B, H_q, L_q], float32 (float64 for float64), contiguous, or null
  float* mass = nullptr;  // [B, H_kv, L_c], added to, or null
  int64_t mass_batch_stride = 0;
  int64_t mass_head_stride = 0;
  const int32_t* mass_from = nullptr;  // [B]
  VisualParams visual;
};

struct RoutedAttentionBackwardParams : AttentionSizes {
  HeadsView grad_out, query, key, value, out;
  const void* lse = nullptr;
  HeadsView grad_query, grad_key, grad_value;  // overwritten
  float* mass = nullptr;                       // [B, H_kv, L_c], added to, or null
  int64_t mass_batch_stride = 0;
  int64_t mass_head_stride = 0;
  int64_t num_visual = 0;            // L_c of `mass`
  const uint8_t* counted = nullptr;  // [B, L_q], contiguous: queries that count for it; null: all
  VisualParams visual;
};

struct VisualMassParams : AttentionSizes {
  HeadsView query, key;
  const void* lse = nullptr;      // [B, H_q, L_q] or null: computed
  const int32_t* rows = nullptr;  // [B, T, 2], half-open ranges of key indices of queries
  int64_t num_ranges = 0;
  int64_t num_visual = 0;  // L_c
  float* mass = nullptr;   // [B, T, H_kv, L_c], contiguous, overwritten
  VisualParams visual;
};

struct AppendVisualParams : PagedCache {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t key_heads = 0;
  int64_t head_dim = 0;
  int num_threads = 1;
  HeadsView key, value;
  const int32_t* key_length = nullptr;  // [B], before the call
  const int32_t* spans = nullptr;       // [B, S, 2]
  int64_t num_spans = 0;
  const int32_t* shift = nullptr;  // [B]
  const float* inv_freq = nullptr;
  int64_t half = 0;
  const uint8_t* selected = nullptr;  // [B, L_c] or null: all
  int64_t selected_stride = 0;
  const uint8_t* rows = nullptr;  // [B] or null: all
};

}  // namespace lookagain
