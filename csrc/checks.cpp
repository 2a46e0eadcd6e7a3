#include "checks.h"

#include <cmath>

namespace py = pybind11;

namespace lookagain {

using std::to_string;

bool is_empty(const TensorView& view) {
  for (int i = 0; i < view.ndim; ++i) {
    if (view.shape[i] == 0) return true;
  }
  return false;
}

TensorView checked_view(const char* name, py::handle tensor, DType dtype,
                        std::initializer_list<int64_t> shape, int device) {
  TensorView view = view_of(name, tensor, device);
  if (view.dtype != dtype) {
    throw py::type_error(std::string(name) + " must be " + dtype_name(dtype) + ", got " +
                         dtype_name(view.dtype));
  }
  bool fits = view.ndim == static_cast<int>(shape.size());
  std::string wanted;
  int axis = 0;
  for (int64_t size : shape) {
    fits = fits && (size == kAny || view.shape[axis] == size);
    wanted += (axis > 0 ? ", " : "") + (size == kAny ? std::string("any") : to_string(size));
    ++axis;
  }
  if (!fits) {
    throw py::value_error(std::string(name) + " must have shape [" + wanted + "], got " +
                          shape_text(view));
  }
  return view;
}

TensorView checked_output(const char* name, py::handle tensor, DType dtype,
                          std::initializer_list<int64_t> shape, int device) {
  TensorView view = checked_view(name, tensor, dtype, shape, device);
  if (is_empty(view)) return view;
  for (int i = 0; i < view.ndim; ++i) {
    if (view.stride[i] == 0 && view.shape[i] > 1) {
      throw py::value_error(std::string(name) + " is written to and must not be expanded, got " +
                            "stride 0 on axis " + to_string(i));
    }
  }
  return view;
}

void check_last_axis(const char* name, const TensorView& view) {
  const int last = view.ndim - 1;
  if (view.stride[last] != 1 && view.shape[last] > 1 && !is_empty(view)) {
    throw py::value_error(std::string(name) + " must be contiguous in its last axis, got stride " +
                          to_string(view.stride[last]));
  }
}

void check_contiguous(const char* name, const TensorView& view) {
  if (is_empty(view)) return;
  int64_t expected = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    if (view.shape[i] > 1 && view.stride[i] != expected) {
      throw py::value_error(std::string(name) + " must be contiguous, got stride " +
                            to_string(view.stride[i]) + " on axis " + to_string(i));
    }
    expected *= view.shape[i];
  }
}

HeadsView heads_view(const char* name, const TensorView& view) {
  check_last_axis(name, view);
  return {view.data, view.stride[0], view.stride[1], view.stride[2]};
}

bool is_floating(DType dtype) { return dtype != DType::kInt32 && dtype != DType::kBool; }

TensorView query_view(py::handle query, int device) {
  TensorView view = view_of("query", query, device);
  if (view.ndim != 4) {
    throw py::value_error("query must have shape [B, H_q, L_q, D], got " + shape_text(view));
  }
  if (!is_floating(view.dtype)) {
    throw py::type_error(std::string("query must be a floating tensor, got ") +
                         dtype_name(view.dtype));
  }
  if (view.shape[3] % 8 != 0 || view.shape[3] < 8 || view.shape[3] > 256) {
    throw py::value_error("query must have a head size of 8, 16, ... 256, got " +
                          to_string(view.shape[3]));
  }
  return view;
}

TensorView key_view(py::handle key, const TensorView& query, bool paged, int device) {
  const int64_t rows = paged ? kAny : query.shape[0];
  TensorView view =
      checked_view("key", key, query.dtype, {rows, kAny, kAny, query.shape[3]}, device);
  if (view.shape[1] == 0 || query.shape[1] % view.shape[1] != 0) {
    throw py::value_error("query must have a multiple of key's " + to_string(view.shape[1]) +
                          " heads, got " + to_string(query.shape[1]));
  }
  if (view.shape[2] >= INT32_MAX) {
    throw py::value_error("key must have fewer than 2^31 - 1 rows, got " +
                          to_string(view.shape[2]));
  }
  return view;
}

void check_scale(double scale) {
  if (!std::isfinite(scale)) {
    throw py::value_error("scale must be finite, got " + to_string(scale));
  }
}

void* lse_data(py::handle lse, const TensorView& query, int device) {
  if (lse.is_none()) return nullptr;
  const DType precise = query.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const TensorView view =
      checked_output("lse", lse, precise, {query.shape[0], query.shape[1], query.shape[2]}, device);
  check_contiguous("lse", view);
  return view.data;
}

std::vector<int32_t> int_values(const TensorView& view) {
  int64_t count = 1;
  for (int i = 0; i < view.ndim; ++i) count *= view.shape[i];
  std::vector<int32_t> values(static_cast<size_t>(count));
  int64_t index[kMaxDims] = {};
  for (int32_t& value : values) {
    int64_t offset = 0;
    for (int i = 0; i < view.ndim; ++i) offset += index[i] * view.stride[i];
    value = view.as<int32_t>()[offset];
    for (int i = view.ndim - 1; i >= 0 && ++index[i] == view.shape[i]; --i) index[i] = 0;
  }
  return values;
}

static std::vector<int32_t> row_values(const char* name, py::handle tensor, int64_t batch,
                                       int64_t keys, int64_t otherwise) {
  if (tensor.is_none()) {
    return std::vector<int32_t>(static_cast<size_t>(batch), static_cast<int32_t>(otherwise));
  }
  std::vector<int32_t> values = int_values(checked_view(name, tensor, DType::kInt32, {batch}));
  for (size_t row = 0; row < values.size(); ++row) {
    if (values[row] < 0 || values[row] > keys) {
      throw py::value_error(std::string(name) + " must lie in 0 … " + to_string(keys) +
                            " (L_k, the slots of a row), got " + to_string(values[row]) +
                            " in row " + to_string(row));
    }
  }
  return values;
}

RowLimits::RowLimits(py::handle start, py::handle length, int64_t batch, int64_t keys)
    : key_start(row_values("key_start", start, batch, keys, 0)),
      key_length(row_values("key_length", length, batch, keys, keys)) {}

BlockTable::BlockTable(py::handle table, const TensorView& cache, int64_t batch)
    : rows(cache.shape[0]), capacity(cache.shape[2]) {
  if (table.is_none()) return;
  const TensorView view = checked_view("block_table", table, DType::kInt32, {batch, kAny});
  const int64_t num_blocks = cache.shape[0], block_size = cache.shape[2];
  rows = view.shape[0];
  blocks = view.shape[1];
  if (block_size == 0 || blocks >= INT32_MAX / block_size) {
    throw py::value_error("block_table must name 0 … 2^31 - 2 slots in each row, got " +
                          to_string(blocks) + " blocks of " + to_string(block_size) + " slots");
  }
  capacity = blocks * block_size;
  entries.resize(static_cast<size_t>(rows * blocks));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t n = 0; n < blocks; ++n) {
      const int32_t entry = view.as<int32_t>()[row * view.stride[0] + n * view.stride[1]];
      if (entry < -1 || entry >= num_blocks) {
        throw py::value_error("block_table must hold blocks 0 … " + to_string(num_blocks - 1) +
                              " of the cache or -1 (unused), got " + to_string(entry) + " in row " +
                              to_string(row) + ", entry " + to_string(n));
      }
      entries[static_cast<size_t>(row * blocks + n)] = entry;
    }
  }
  // Never null, also where no row has a block: null is a cache that is not paged.
  entries.resize(entries.size() + 1);
  pages = {entries.data(), blocks, block_size, num_blocks};
}

void BlockTable::check_in_use(int64_t row, int64_t begin, int64_t end, const char* what) const {
  if (pages.block_table == nullptr) return;
  for (int64_t n = begin / pages.block_size; n * pages.block_size < end && begin < end; ++n) {
    if (pages.block_table[row * blocks + n] >= 0) continue;
    throw py::value_error("block_table must name a block for every slot that is " +
                          std::string(what) + ", got -1 (unused) in row " + to_string(row) +
                          ", entry " + to_string(n) + ", for slots " + to_string(begin) + " … " +
                          to_string(end - 1));
  }
}

int64_t check_row_spans(const int32_t* spans, int64_t num_spans, int64_t row, int64_t limit,
                        const char* limit_name, int64_t num_visual) {
  int64_t end = 0, tokens = 0;
  for (int64_t s = 0; s < num_spans; ++s) {
    const int64_t first = spans[2 * s], length = spans[2 * s + 1];
    const std::string got = ", got (" + to_string(first) + ", " + to_string(length) + ") as span " +
                            to_string(s) + " of row " + to_string(row);
    if (length < 0) throw py::value_error("spans must have lengths of at least 0" + got);
    if (length == 0) continue;
    if (first < end) {
      throw py::value_error("spans must be ascending and disjoint, from key " + to_string(end) +
                            " on here" + got);
    }
    if (first + length > limit) {
      throw py::value_error("spans must end at or before " + to_string(limit) + " (" + limit_name +
                            ")" + got);
    }
    end = first + length;
    tokens += length;
  }
  if (num_visual != kAny && tokens > num_visual) {
    throw py::value_error("spans must hold at most " + to_string(num_visual) +
                          " visual tokens (the last axis of the mass or of selected), got " +
                          to_string(tokens) + " in row " + to_string(row));
  }
  return tokens;
}

const float* inv_freq_values(py::handle tensor, int64_t head_dim, int64_t* half) {
  TensorView view = checked_view("inv_freq", tensor, DType::kFloat32, {kAny});
  check_last_axis("inv_freq", view);
  if (2 * view.shape[0] > head_dim) {
    throw py::value_error("inv_freq must have at most " + to_string(head_dim / 2) +
                          " frequencies for head size " + to_string(head_dim) + ", got " +
                          to_string(view.shape[0]));
  }
  *half = view.shape[0];
  return view.as<float>();
}

VisualArguments::VisualArguments(py::handle spans_tensor, py::handle inv_freq,
                                 py::handle shift_tensor, py::handle start_tensor,
                                 py::handle selected, int64_t batch, int64_t keys, int64_t head_dim,
                                 int64_t num_visual, const std::vector<int32_t>& key_length) {
  if (spans_tensor.is_none()) {
    if (!start_tensor.is_none()) throw py::value_error("start needs spans, got None");
    return;
  }
  const TensorView spans_view =
      checked_view("spans", spans_tensor, DType::kInt32, {batch, kAny, 2});
  spans = int_values(spans_view);
  params.spans = spans.data();
  params.num_spans = spans_view.shape[1];
  if (!start_tensor.is_none()) {
    const TensorView view = checked_view("start", start_tensor, DType::kInt32, {batch, kAny});
    params.num_reinjections = view.shape[1];
    start = int_values(view);
    shift = int_values(
        checked_view("shift", shift_tensor, DType::kInt32, {batch, params.num_reinjections}));
    params.start = start.data();
    params.shift = shift.data();
  }
  if (params.num_reinjections > 0)
    params.inv_freq = inv_freq_values(inv_freq, head_dim, &params.half);
  if (!selected.is_none() && params.num_reinjections > 0) {
    const TensorView view =
        checked_view("selected", selected, DType::kBool, {batch, params.num_reinjections, kAny});
    check_last_axis("selected", view);
    if (num_visual == kAny || view.shape[2] < num_visual) num_visual = view.shape[2];
    params.selected = view.as<uint8_t>();
    params.selected_batch_stride = view.stride[0];
    params.selected_stride = view.stride[1];
  }
  for (int64_t row = 0; row < batch; ++row) {
    // A span may lie ahead of the keys (an image in a later piece of the prompt), but not be seen
    // again before it is there.
    bool seen_again = false;
    for (int64_t r = 0; r < params.num_reinjections; ++r) {
      seen_again = seen_again || start[row * params.num_reinjections + r] < key_length[row];
    }
    const int64_t limit = seen_again ? key_length[row] : keys;
    const int64_t tokens =
        check_row_spans(spans.data() + row * params.num_spans * 2, params.num_spans, row, limit,
                        seen_again ? "key_length" : "L_k, the slots of a row", num_visual);
    if (tokens > max_visual) max_visual = tokens;
  }
}

}  // namespace lookagain
