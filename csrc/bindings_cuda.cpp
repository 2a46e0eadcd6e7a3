// Tensors on a GPU to kernel parameters.
//
// As in bindings.cpp: arguments are positional and allocated by the caller. Shapes, dtypes, layouts
// and devices are checked here; values of index tensors are not, since reading them would wait for
// the device. `stream` is the caller's current stream as an integer, `allocate` a function that
// takes a number of bytes and returns a tensor of that many on the query's device.
#include "bindings_cuda.h"

#include <cmath>

#include "checks.h"
#include "cuda/kernels.h"

namespace py = pybind11;

namespace lookagain {
namespace {

using std::to_string;

constexpr int64_t kMostReinjections = 32;  // one bit each in the kernels

// A contiguous index tensor on the device, or null for None.
template <typename T>
const T* device_values(const char* name, py::handle tensor, DType dtype,
                       std::initializer_list<int64_t> shape, int device) {
  if (tensor.is_none()) return nullptr;
  const TensorView view = checked_view(name, tensor, dtype, shape, device);
  check_contiguous(name, view);
  return view.as<const T>();
}

const float* frequencies(py::handle inv_freq, int64_t head_dim, int device, int64_t* half) {
  const TensorView view = checked_view("inv_freq", inv_freq, DType::kFloat32, {kAny}, device);
  check_contiguous("inv_freq", view);
  *half = view.shape[0];
  if (2 * *half > head_dim) {
    throw py::value_error("inv_freq must have at most " + to_string(head_dim / 2) +
                          " frequencies for head size " + to_string(head_dim) + ", got " +
                          to_string(*half));
  }
  return view.as<float>();
}

VisualParams visual_params(py::handle spans, py::handle inv_freq, py::handle shift,
                           py::handle start, py::handle selected, int64_t batch, int64_t head_dim,
                           int device) {
  VisualParams p;
  if (spans.is_none()) return p;
  const TensorView runs = checked_view("spans", spans, DType::kInt32, {batch, kAny, 2}, device);
  check_contiguous("spans", runs);
  p.spans = runs.as<int32_t>();
  p.num_spans = runs.shape[1];
  p.inv_freq = frequencies(inv_freq, head_dim, device, &p.half);
  const TensorView shifts = checked_view("shift", shift, DType::kInt32, {batch, kAny}, device);
  check_contiguous("shift", shifts);
  p.shift = shifts.as<int32_t>();
  p.num_reinjections = shifts.shape[1];
  if (p.num_reinjections > kMostReinjections) {
    throw py::value_error("shift must have at most 32 columns on a GPU, got " +
                          to_string(p.num_reinjections));
  }
  p.start =
      device_values<int32_t>("start", start, DType::kInt32, {batch, p.num_reinjections}, device);
  if (!selected.is_none()) {
    const TensorView view =
        checked_view("selected", selected, DType::kBool, {batch, p.num_reinjections, kAny}, device);
    check_last_axis("selected", view);
    p.selected = view.as<uint8_t>();
    p.selected_batch_stride = view.stride[0];
    p.selected_stride = view.stride[1];
    p.selected_width = view.shape[2];
  }
  return p;
}

// The block table of a paged cache; leaves `p` as it is for None. Returns the slots of a row.
int64_t paged_capacity(py::handle block_table, const TensorView& cache, int64_t batch, int device,
                       PagedCache* p, int64_t* rows) {
  *rows = cache.shape[0];
  if (block_table.is_none()) return cache.shape[2];
  const TensorView view =
      checked_view("block_table", block_table, DType::kInt32, {batch, kAny}, device);
  check_last_axis("block_table", view);
  const int64_t blocks = view.shape[1], block_size = cache.shape[2];
  if (block_size == 0 || blocks >= INT32_MAX / block_size) {
    throw py::value_error("block_table must name 0 … 2^31 - 2 slots in each row, got " +
                          to_string(blocks) + " blocks of " + to_string(block_size) + " slots");
  }
  *rows = view.shape[0];
  *p = {view.as<int32_t>(), view.stride[0], block_size, cache.shape[0]};
  return blocks * block_size;
}

// Keeps what Python allocated until the launch has been made; after that the allocator's own
// ordering by stream protects it.
struct Workspace {
  py::object allocate, tensor;
  void* operator()(int64_t bytes) {
    tensor = allocate(bytes);
    return reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  }
};

cuda::Stream stream_of(uintptr_t stream) { return reinterpret_cast<cuda::Stream>(stream); }

void cuda_routed_attention(py::object query, py::object key, py::object value, py::object out,
                           py::object lse, py::object mass, py::object mass_from,
                           py::object key_start, py::object key_length, py::object spans,
                           py::object inv_freq, py::object shift, py::object start,
                           py::object selected, py::object block_table, double scale,
                           uintptr_t stream, py::object allocate) {
  const int device = device_of("query", query);
  const TensorView q = query_view(query, device);
  const TensorView k = key_view(key, q, !block_table.is_none(), device);
  if (q.dtype == DType::kFloat64) {
    throw py::type_error("query must be float32, float16 or bfloat16 on a GPU, got float64");
  }
  const int64_t batch = q.shape[0], dim = q.shape[3];
  check_scale(scale);
  RoutedAttentionParams p;
  int64_t rows = 0;
  p.keys = paged_capacity(block_table, k, batch, device, &p, &rows);
  if (!block_table.is_none() && key_length.is_none()) {
    throw py::value_error("block_table needs key_length, got None");
  }
  p.dtype = q.dtype;
  p.batch = batch;
  p.query_heads = q.shape[1];
  p.key_heads = k.shape[1];
  p.queries = q.shape[2];
  p.head_dim = dim;
  p.scale = scale;
  p.key_start = device_values<int32_t>("key_start", key_start, DType::kInt32, {batch}, device);
  p.key_length = device_values<int32_t>("key_length", key_length, DType::kInt32, {batch}, device);
  p.mass_from = device_values<int32_t>("mass_from", mass_from, DType::kInt32, {batch}, device);
  p.query = heads_view("query", q);
  p.key = heads_view("key", k);
  p.value = heads_view("value", checked_view("value", value, q.dtype,
                                             {k.shape[0], k.shape[1], k.shape[2], dim}, device));
  p.out = heads_view(
      "out", checked_output("out", out, q.dtype, {batch, q.shape[1], q.shape[2], dim}, device));
  p.lse = lse_data(lse, q, device);
  p.visual = visual_params(spans, inv_freq, shift, start, selected, batch, dim, device);
  int64_t num_visual = 0;
  if (!mass.is_none()) {
    if (spans.is_none()) throw py::value_error("mass needs spans, got None");
    const TensorView view =
        checked_output("mass", mass, DType::kFloat32, {batch, k.shape[1], kAny}, device);
    check_last_axis("mass", view);
    num_visual = view.shape[2];
    if (num_visual > 0) p.mass = view.as<float>();
    p.mass_batch_stride = view.stride[0];
    p.mass_head_stride = view.stride[1];
  }
  const cuda::DeviceGuard guard(device);
  Workspace workspace{allocate, {}};
  cuda::routed_attention(p, num_visual, std::ref(workspace), stream_of(stream));
}

void cuda_visual_mass(py::object query, py::object key, py::object lse, py::object rows,
                      py::object mass, py::object key_start, py::object key_length,
                      py::object spans, py::object inv_freq, py::object shift, py::object start,
                      py::object selected, py::object block_table, double scale, uintptr_t stream,
                      py::object allocate) {
  const int device = device_of("query", query);
  const TensorView q = query_view(query, device);
  const TensorView k = key_view(key, q, !block_table.is_none(), device);
  if (q.dtype == DType::kFloat64) {
    throw py::type_error("query must be float32, float16 or bfloat16 on a GPU, got float64");
  }
  const int64_t batch = q.shape[0], dim = q.shape[3];
  check_scale(scale);
  VisualMassParams p;
  int64_t cache_rows = 0;
  p.keys = paged_capacity(block_table, k, batch, device, &p, &cache_rows);
  p.dtype = q.dtype;
  p.batch = batch;
  p.query_heads = q.shape[1];
  p.key_heads = k.shape[1];
  p.queries = q.shape[2];
  p.head_dim = dim;
  p.scale = scale;
  p.key_start = device_values<int32_t>("key_start", key_start, DType::kInt32, {batch}, device);
  p.key_length = device_values<int32_t>("key_length", key_length, DType::kInt32, {batch}, device);
  p.query = heads_view("query", q);
  p.key = heads_view("key", k);
  p.lse = lse_data(lse, q, device);
  if (p.lse == nullptr) throw py::type_error("lse must be a tensor, got None");
  const TensorView ranges = checked_view("rows", rows, DType::kInt32, {batch, kAny, 2}, device);
  check_contiguous("rows", ranges);
  p.rows = ranges.as<int32_t>();
  p.num_ranges = ranges.shape[1];
  const TensorView view = checked_output("mass", mass, DType::kFloat32,
                                         {batch, p.num_ranges, k.shape[1], kAny}, device);
  check_contiguous("mass", view);
  p.mass = view.as<float>();
  p.num_visual = view.shape[3];
  if (spans.is_none()) throw py::type_error("spans must be a tensor, got None");
  p.visual = visual_params(spans, inv_freq, shift, start, selected, batch, dim, device);
  const cuda::DeviceGuard guard(device);
  Workspace workspace{allocate, {}};
  cuda::visual_mass(p, std::ref(workspace), stream_of(stream));
}

// `gradients`: None for a forward, which writes `out` and `lse`; else (grad_out, grad_query,
// grad_key, grad_value), of which the last three are written. `bounds` of packed sequences, whose
// longest has `longest` tokens.
void cuda_many_queries(py::object query, py::object key, py::object value, py::object out,
                       py::object lse, py::object gradients, py::object mass, py::object counted,
                       py::object key_start, py::object key_length, py::object spans,
                       py::object inv_freq, py::object shift, py::object start, py::object selected,
                       py::object bounds, int64_t longest, double scale, uintptr_t stream,
                       py::object allocate) {
  const int device = device_of("query", query);
  const TensorView q = query_view(query, device), k = key_view(key, q, false, device);
  const int64_t batch = q.shape[0], dim = q.shape[3];
  const std::initializer_list<int64_t> query_shape = {batch, q.shape[1], q.shape[2], dim};
  const std::initializer_list<int64_t> key_shape = {batch, k.shape[1], k.shape[2], dim};
  check_scale(scale);
  RoutedAttentionBackwardParams p;
  p.dtype = q.dtype;
  p.batch = batch;
  p.query_heads = q.shape[1];
  p.key_heads = k.shape[1];
  p.queries = q.shape[2];
  p.keys = k.shape[2];
  p.head_dim = dim;
  p.scale = scale;
  cuda::PackedRows packed;
  int64_t rows = batch;
  if (!bounds.is_none()) {
    const TensorView view = checked_view("bounds", bounds, DType::kInt32, {kAny}, device);
    check_contiguous("bounds", view);
    if (batch != 1 || q.shape[2] != k.shape[2] || view.shape[0] < 2 || longest > q.shape[2]) {
      throw py::value_error("bounds need one row of as many queries as keys");
    }
    rows = view.shape[0] - 1;
    packed = {view.as<const int32_t>(), rows, longest};
  }
  p.key_start = device_values<int32_t>("key_start", key_start, DType::kInt32, {rows}, device);
  p.key_length = device_values<int32_t>("key_length", key_length, DType::kInt32, {rows}, device);
  p.query = heads_view("query", q);
  p.key = heads_view("key", k);
  p.value = heads_view("value", checked_view("value", value, q.dtype, key_shape, device));
  const auto output = [&](const char* name, py::handle tensor,
                          std::initializer_list<int64_t> shape) {
    return heads_view(name, checked_output(name, tensor, q.dtype, shape, device));
  };
  p.out = output("out", out, query_shape);
  p.lse = lse_data(lse, q, device);
  if (p.lse == nullptr) throw py::type_error("lse must be a tensor, got None");
  p.visual = visual_params(spans, inv_freq, shift, start, selected, rows, dim, device);
  if (!mass.is_none()) {
    if (spans.is_none()) throw py::value_error("mass needs spans, got None");
    const TensorView view =
        checked_output("mass", mass, DType::kFloat32, {rows, k.shape[1], kAny}, device);
    check_last_axis("mass", view);
    if (view.shape[2] > 0) p.mass = view.as<float>();
    p.mass_batch_stride = view.stride[0];
    p.mass_head_stride = view.stride[1];
    p.num_visual = view.shape[2];
  }
  p.counted = device_values<uint8_t>("counted", counted, DType::kBool, {batch, q.shape[2]}, device);
  const bool backward = !gradients.is_none();
  if (backward) {
    const py::tuple tensors = py::cast<py::tuple>(gradients);
    p.grad_out =
        heads_view("grad_out", checked_view("grad_out", tensors[0], q.dtype, query_shape, device));
    p.grad_query = output("grad_query", tensors[1], query_shape);
    p.grad_key = output("grad_key", tensors[2], key_shape);
    p.grad_value = output("grad_value", tensors[3], key_shape);
  }
  if (!cuda::takes_many_queries(p)) {
    throw py::value_error(
        "query, key, value, out and grad_out must be bfloat16 or float16, with rows at 16-byte "
        "boundaries, head sizes up to 128 and a positive scale, for the kernels of many queries");
  }
  const cuda::DeviceGuard guard(device);
  Workspace workspace{allocate, {}};
  if (backward) {
    cuda::many_queries_backward(p, packed, std::ref(workspace), stream_of(stream));
  } else {
    float* sums = static_cast<float*>(const_cast<void*>(p.lse));
    cuda::many_queries_forward(p, packed, sums, std::ref(workspace), stream_of(stream));
  }
}

// `out` [queries, heads, D] and float32 `lse` [heads, queries] take in `part` and `part_lse`.
void cuda_join(py::object out, py::object lse, py::object part, py::object part_lse,
               uintptr_t stream) {
  const int device = device_of("out", out);
  const TensorView into = view_of("out", out, device);
  if (into.ndim != 3 || (into.dtype != DType::kFloat32 && into.dtype != DType::kFloat16 &&
                         into.dtype != DType::kBFloat16)) {
    throw py::value_error(
        std::string("out must be a float32, float16 or bfloat16 tensor [queries, heads, D], got ") +
        dtype_name(into.dtype) + " " + shape_text(into));
  }
  const int64_t queries = into.shape[0], heads = into.shape[1];
  const std::initializer_list<int64_t> shape = {queries, heads, into.shape[2]};
  const TensorView from = checked_view("part", part, into.dtype, shape, device);
  const TensorView sums = checked_output("lse", lse, DType::kFloat32, {heads, queries}, device);
  const TensorView more =
      checked_view("part_lse", part_lse, DType::kFloat32, {heads, queries}, device);
  check_last_axis("out", checked_output("out", out, into.dtype, shape, device));
  check_last_axis("part", from);
  check_last_axis("lse", sums);
  check_last_axis("part_lse", more);
  cuda::JoinParams p;
  p.dtype = into.dtype;
  p.queries = queries;
  p.heads = heads;
  p.head_dim = into.shape[2];
  p.out = into.as<void>();
  p.out_query_stride = into.stride[0];
  p.out_head_stride = into.stride[1];
  p.lse = sums.as<float>();
  p.lse_stride = sums.stride[0];
  p.part = from.as<void>();
  p.part_query_stride = from.stride[0];
  p.part_head_stride = from.stride[1];
  p.part_lse = more.as<float>();
  p.part_lse_stride = more.stride[0];
  const cuda::DeviceGuard guard(device);
  cuda::join(p, stream_of(stream));
}

void cuda_select_visual_tokens(py::object mass, double ratio, py::object num_visual, py::object out,
                               uintptr_t stream) {
  const int device = device_of("mass", mass);
  const TensorView m = checked_view("mass", mass, DType::kFloat32, {kAny, kAny}, device);
  check_last_axis("mass", m);
  if (!(ratio >= 0 && ratio <= 1)) {
    throw py::value_error("ratio must lie in 0 … 1, got " + to_string(ratio));
  }
  const TensorView chosen =
      checked_output("out", out, DType::kBool, {m.shape[0], m.shape[1]}, device);
  check_last_axis("out", chosen);
  cuda::SelectParams p;
  p.mass = m.as<float>();
  p.mass_stride = m.stride[0];
  p.num_visual =
      device_values<int32_t>("num_visual", num_visual, DType::kInt32, {m.shape[0]}, device);
  if (p.num_visual == nullptr) throw py::type_error("num_visual must be a tensor, got None");
  p.ratio = ratio;
  p.batch = m.shape[0];
  p.width = m.shape[1];
  p.out = chosen.as<uint8_t>();
  p.out_stride = chosen.stride[0];
  const cuda::DeviceGuard guard(device);
  cuda::select_visual_tokens(p, stream_of(stream));
}

void cuda_append_visual(py::object key_cache, py::object value_cache, py::object key_length,
                        py::object spans, py::object shift, py::object inv_freq,
                        py::object selected, py::object rows, py::object block_table,
                        py::object failed, uintptr_t stream, py::object allocate) {
  const int device = device_of("key_cache", key_cache);
  const TensorView k = view_of("key_cache", key_cache, device);
  if (k.ndim != 4 ||
      (k.dtype != DType::kFloat32 && k.dtype != DType::kFloat16 && k.dtype != DType::kBFloat16)) {
    throw py::value_error(
        std::string("key_cache must be a float32, float16 or bfloat16 tensor "
                    "[B, H_kv, capacity, D] (paged: [num_blocks, H_kv, block_size, D]), got ") +
        dtype_name(k.dtype) + " " + shape_text(k));
  }
  const std::initializer_list<int64_t> shape = {k.shape[0], k.shape[1], k.shape[2], k.shape[3]};
  AppendVisualParams p;
  int64_t batch = 0;
  const int64_t capacity = paged_capacity(block_table, k, kAny, device, &p, &batch);
  p.dtype = k.dtype;
  p.batch = batch;
  p.key_heads = k.shape[1];
  p.head_dim = k.shape[3];
  p.key = heads_view("key_cache", checked_output("key_cache", key_cache, k.dtype, shape, device));
  p.value =
      heads_view("value_cache", checked_output("value_cache", value_cache, k.dtype, shape, device));
  const TensorView length =
      checked_output("key_length", key_length, DType::kInt32, {batch}, device);
  check_contiguous("key_length", length);
  const TensorView runs = checked_view("spans", spans, DType::kInt32, {batch, kAny, 2}, device);
  check_contiguous("spans", runs);
  p.spans = runs.as<int32_t>();
  p.num_spans = runs.shape[1];
  p.shift = device_values<int32_t>("shift", shift, DType::kInt32, {batch}, device);
  if (p.shift == nullptr) throw py::type_error("shift must be a tensor, got None");
  p.inv_freq = frequencies(inv_freq, p.head_dim, device, &p.half);
  int64_t width = 0;
  if (!selected.is_none()) {
    const TensorView view = checked_view("selected", selected, DType::kBool, {batch, kAny}, device);
    check_last_axis("selected", view);
    p.selected = view.as<uint8_t>();
    p.selected_stride = view.stride[0];
    width = view.shape[1];
  }
  p.rows = device_values<uint8_t>("rows", rows, DType::kBool, {batch}, device);
  const TensorView report = checked_output("failed", failed, DType::kInt32, {4}, device);
  const cuda::DeviceGuard guard(device);
  Workspace workspace{allocate, {}};
  cuda::append_visual(p, capacity, length.as<int32_t>(), width, report.as<int32_t>(),
                      std::ref(workspace), stream_of(stream));
}

}  // namespace

void define_cuda(py::module_& module) {
  module.def("cuda_routed_attention", &cuda_routed_attention);
  module.def("cuda_visual_mass", &cuda_visual_mass);
  module.def("cuda_many_queries", &cuda_many_queries);
  module.def("cuda_join", &cuda_join);
  module.def("cuda_select_visual_tokens", &cuda_select_visual_tokens);
  module.def("cuda_append_visual_", &cuda_append_visual);
}

}  // namespace lookagain
