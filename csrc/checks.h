// Checks of what reaches the extension, each with a message that names the argument, what was
// expected and what came; and the conversion of tensors into kernel parameters.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "tensor_view.h"

namespace lookagain {

// A size that is not checked.
constexpr int64_t kAny = -1;

// Whether there is no element.
bool is_empty(const TensorView& view);

// A tensor of the dtype and shape, on the CPU or the GPU of an index.
TensorView checked_view(const char* name, pybind11::handle tensor, DType dtype,
                        std::initializer_list<int64_t> shape, int device = kCpu);

// The same, for an output: also refuses overlapping memory (a stride of 0 on an axis longer than
// 1).
TensorView checked_output(const char* name, pybind11::handle tensor, DType dtype,
                          std::initializer_list<int64_t> shape, int device = kCpu);

// Layouts; a view without elements has any.
void check_last_axis(const char* name, const TensorView& view);
void check_contiguous(const char* name, const TensorView& view);
HeadsView heads_view(const char* name, const TensorView& view);

bool is_floating(DType dtype);
void check_scale(double scale);

// query [B, H_q, L_q, D], and key [B, H_kv, L_k, D] or a paged [blocks, H_kv, block_size, D].
TensorView query_view(pybind11::handle query, int device = kCpu);
TensorView key_view(pybind11::handle key, const TensorView& query, bool paged = false,
                    int device = kCpu);

// lse [B, H_q, L_q], contiguous, or null for None.
void* lse_data(pybind11::handle lse, const TensorView& query, int device = kCpu);

// The values of a small int32 tensor of any strides, in order.
std::vector<int32_t> int_values(const TensorView& view);

// Holds what a kernel's parameters point to during a call: small index tensors are copied, so that
// they may have any strides and cannot change between the check and the use.
struct RowLimits {
  std::vector<int32_t> key_start, key_length;

  // None: 0 and L_k. Raises unless 0 <= key_start <= L_k and 0 <= key_length <= L_k.
  RowLimits(pybind11::handle start, pybind11::handle length, int64_t batch, int64_t keys);
};

// How the slots of a batch's rows lie in a cache; see core/paging.h.
struct BlockTable {
  std::vector<int32_t> entries;
  int64_t rows = 0;      // B
  int64_t blocks = 0;    // of a row
  int64_t capacity = 0;  // slots of a row, L_k
  PagedCache pages;

  // None: `cache` is [B, H_kv, L_k, D]. Else it is [blocks, H_kv, block_size, D]; raises unless
  // every entry is one of its blocks or -1.
  BlockTable(pybind11::handle table, const TensorView& cache, int64_t batch);

  // Raises unless all slots of [begin, end) of a row lie in blocks that are in use.
  void check_in_use(int64_t row, int64_t begin, int64_t end, const char* what) const;
};

struct VisualArguments {
  std::vector<int32_t> spans, shift, start;
  VisualParams params;
  int64_t max_visual = 0;  // most visual tokens of any row

  // All None is no visual context. `num_visual` bounds the tokens of each row (kAny: unbounded).
  VisualArguments(pybind11::handle spans, pybind11::handle inv_freq, pybind11::handle shift,
                  pybind11::handle start, pybind11::handle selected, int64_t batch, int64_t keys,
                  int64_t head_dim, int64_t num_visual, const std::vector<int32_t>& key_length);
};

// Raises unless spans are ascending, disjoint, inside [0, limit) and name at most num_visual
// tokens; returns the number of tokens.
int64_t check_row_spans(const int32_t* spans, int64_t num_spans, int64_t row, int64_t limit,
                        const char* limit_name, int64_t num_visual);

const float* inv_freq_values(pybind11::handle tensor, int64_t head_dim, int64_t* half);

}  // namespace lookagain
