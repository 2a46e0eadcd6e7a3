// The module `_C`: Python tensors to kernel parameters and no maths.
//
// Arguments are positional and allocated by the caller. Kernels run without the GIL.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdlib>
#include <string>

#ifdef LOOKAGAIN_CUDA_ARCHS
#include "bindings_cuda.h"
#endif
#include "checks.h"
#include "core/visual.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/routing.h"

namespace py = pybind11;

namespace lookagain {
namespace {

using std::to_string;

AttentionSizes attention_sizes(const TensorView& query, const TensorView& key, double scale,
                               int num_threads, const RowLimits& limits) {
  AttentionSizes sizes;
  sizes.dtype = query.dtype;
  sizes.batch = query.shape[0];
  sizes.query_heads = query.shape[1];
  sizes.key_heads = key.shape[1];
  sizes.queries = query.shape[2];
  sizes.keys = key.shape[2];
  sizes.head_dim = query.shape[3];
  sizes.scale = scale;
  sizes.num_threads = num_threads;
  sizes.key_start = limits.key_start.data();
  sizes.key_length = limits.key_length.data();
  return sizes;
}

// Every slot that a call reads must lie in a block that is in use: a row's keys, and visual tokens
// before its key_start that it sees again.
void check_blocks_read(const BlockTable& table, const RowLimits& limits,
                       const VisualParams& visual) {
  for (int64_t row = 0; row < table.rows; ++row) {
    const int64_t begin = limits.key_start[row], end = limits.key_length[row];
    table.check_in_use(row, begin, end, "read");
    bool seen_again = false;
    for (int64_t r = 0; r < visual.num_reinjections; ++r) {
      seen_again = seen_again || visual.start[row * visual.num_reinjections + r] < end;
    }
    if (!seen_again) continue;
    for_each_visual_run(row_spans(visual, row), visual.num_spans, 0, begin,
                        [&](int64_t first, int64_t, int64_t length) {
                          table.check_in_use(row, first, first + length, "read");
                        });
  }
}

void routed_attention(py::object query, py::object key, py::object value, py::object out,
                      py::object lse, py::object mass, py::object mass_from, py::object key_start,
                      py::object key_length, py::object spans, py::object inv_freq,
                      py::object shift, py::object start, py::object selected,
                      py::object block_table, double scale, int num_threads) {
  const TensorView q = query_view(query), k = key_view(key, q, !block_table.is_none());
  const BlockTable table(block_table, k, q.shape[0]);
  const int64_t batch = q.shape[0], keys = table.capacity, dim = q.shape[3];
  if (!block_table.is_none() && key_length.is_none()) {
    throw py::value_error("block_table needs key_length, got None");
  }
  check_scale(scale);
  const RowLimits limits(key_start, key_length, batch, keys);
  RoutedAttentionParams p;
  static_cast<AttentionSizes&>(p) = attention_sizes(q, k, scale, num_threads, limits);
  static_cast<PagedCache&>(p) = table.pages;
  p.keys = keys;
  p.query = heads_view("query", q);
  p.key = heads_view("key", k);
  p.value = heads_view(
      "value", checked_view("value", value, q.dtype, {k.shape[0], k.shape[1], k.shape[2], dim}));
  p.out =
      heads_view("out", checked_output("out", out, q.dtype, {batch, q.shape[1], q.shape[2], dim}));
  p.lse = lse_data(lse, q);
  if (is_empty(k)) p.value.data = p.out.data;  // not read; null would ask for lse and mass alone
  int64_t num_visual = kAny;
  std::vector<int32_t> from(static_cast<size_t>(batch), 0);
  if (!mass.is_none()) {
    if (spans.is_none()) throw py::value_error("mass needs spans, got None");
    TensorView view = checked_output("mass", mass, DType::kFloat32, {batch, k.shape[1], kAny});
    check_last_axis("mass", view);
    num_visual = view.shape[2];
    p.mass = view.as<float>();
    p.mass_batch_stride = view.stride[0];
    p.mass_head_stride = view.stride[1];
    if (!mass_from.is_none()) {
      from = int_values(checked_view("mass_from", mass_from, DType::kInt32, {batch}));
    }
    p.mass_from = from.data();
  }
  const VisualArguments visual(spans, inv_freq, shift, start, selected, batch, keys, dim,
                               num_visual, limits.key_length);
  p.visual = visual.params;
  check_blocks_read(table, limits, p.visual);
  if (visual.max_visual == 0) p.mass = nullptr;
  if (is_empty(q)) return;
  const CpuKernels& kernels = cpu_kernels(q.dtype);
  py::gil_scoped_release release;
  (p.queries <= kDecodeQueries ? kernels.routed_attention_decode
                               : kernels.routed_attention_prefill)(p);
}

void routed_attention_backward(py::object grad_out, py::object query, py::object key,
                               py::object value, py::object out, py::object lse,
                               py::object grad_query, py::object grad_key, py::object grad_value,
                               py::object mass, py::object counted, py::object key_start,
                               py::object key_length, py::object spans, py::object inv_freq,
                               py::object shift, py::object start, py::object selected,
                               double scale, int num_threads) {
  const TensorView q = query_view(query), k = key_view(key, q);
  const int64_t batch = q.shape[0], keys = k.shape[2], dim = q.shape[3];
  check_scale(scale);
  const RowLimits limits(key_start, key_length, batch, keys);
  RoutedAttentionBackwardParams p;
  static_cast<AttentionSizes&>(p) = attention_sizes(q, k, scale, num_threads, limits);
  const std::initializer_list<int64_t> query_shape = {batch, q.shape[1], q.shape[2], dim};
  const std::initializer_list<int64_t> key_shape = {batch, k.shape[1], keys, dim};
  p.query = heads_view("query", q);
  p.key = heads_view("key", k);
  p.value = heads_view("value", checked_view("value", value, q.dtype, key_shape));
  p.out = heads_view("out", checked_view("out", out, q.dtype, query_shape));
  p.grad_out = heads_view("grad_out", checked_view("grad_out", grad_out, q.dtype, query_shape));
  p.grad_query =
      heads_view("grad_query", checked_output("grad_query", grad_query, q.dtype, query_shape));
  p.grad_key = heads_view("grad_key", checked_output("grad_key", grad_key, q.dtype, key_shape));
  p.grad_value =
      heads_view("grad_value", checked_output("grad_value", grad_value, q.dtype, key_shape));
  if (lse.is_none()) throw py::type_error("lse must be a tensor, got None");
  p.lse = lse_data(lse, q);
  int64_t num_visual = kAny;
  if (!mass.is_none()) {
    if (spans.is_none()) throw py::value_error("mass needs spans, got None");
    const TensorView view =
        checked_output("mass", mass, DType::kFloat32, {batch, k.shape[1], kAny});
    check_last_axis("mass", view);
    p.num_visual = num_visual = view.shape[2];
    p.mass = view.as<float>();
    p.mass_batch_stride = view.stride[0];
    p.mass_head_stride = view.stride[1];
    if (!counted.is_none()) {
      const TensorView queries =
          checked_view("counted", counted, DType::kBool, {batch, q.shape[2]});
      check_contiguous("counted", queries);
      p.counted = queries.as<uint8_t>();
    }
  }
  const VisualArguments visual(spans, inv_freq, shift, start, selected, batch, keys, dim,
                               num_visual, limits.key_length);
  p.visual = visual.params;
  if (visual.max_visual == 0) p.mass = nullptr;
  const CpuKernels& kernels = cpu_kernels(q.dtype);
  py::gil_scoped_release release;
  kernels.routed_attention_backward(p);
}

void visual_mass(py::object query, py::object key, py::object lse, py::object rows,
                 py::object mass_out, py::object key_start, py::object key_length, py::object spans,
                 py::object inv_freq, py::object shift, py::object start, py::object selected,
                 double scale, int num_threads) {
  const TensorView q = query_view(query), k = key_view(key, q);
  const int64_t batch = q.shape[0], keys = k.shape[2];
  check_scale(scale);
  const RowLimits limits(key_start, key_length, batch, keys);
  VisualMassParams p;
  static_cast<AttentionSizes&>(p) = attention_sizes(q, k, scale, num_threads, limits);
  p.query = heads_view("query", q);
  p.key = heads_view("key", k);
  p.lse = lse_data(lse, q);
  const TensorView ranges = checked_view("rows", rows, DType::kInt32, {batch, kAny, 2});
  const std::vector<int32_t> range_values = int_values(ranges);
  p.rows = range_values.data();
  p.num_ranges = ranges.shape[1];
  const TensorView mass = checked_output("mass_out", mass_out, DType::kFloat32,
                                         {batch, p.num_ranges, k.shape[1], kAny});
  check_contiguous("mass_out", mass);
  p.mass = mass.as<float>();
  p.num_visual = mass.shape[3];
  if (spans.is_none()) throw py::type_error("spans must be a tensor, got None");
  const VisualArguments visual(spans, inv_freq, shift, start, selected, batch, keys, q.shape[3],
                               p.num_visual, limits.key_length);
  p.visual = visual.params;
  if (is_empty(q) || is_empty(mass)) return;  // the caller hands over zeros
  const CpuKernels& kernels = cpu_kernels(q.dtype);
  py::gil_scoped_release release;
  kernels.visual_mass(p);
}

void select_tokens(py::object mass, double ratio, py::object num_visual, py::object out) {
  const TensorView m = checked_view("mass", mass, DType::kFloat32, {kAny, kAny});
  check_last_axis("mass", m);
  if (!(ratio >= 0 && ratio <= 1)) {
    throw py::value_error("ratio must lie in 0 … 1, got " + to_string(ratio));
  }
  const std::vector<int32_t> counts =
      int_values(checked_view("num_visual", num_visual, DType::kInt32, {m.shape[0]}));
  for (size_t row = 0; row < counts.size(); ++row) {
    if (counts[row] < 0 || counts[row] > m.shape[1]) {
      throw py::value_error("num_visual must lie in 0 … " + to_string(m.shape[1]) +
                            " (the last axis of mass), got " + to_string(counts[row]) + " in row " +
                            to_string(row));
    }
  }
  const TensorView chosen = checked_output("out", out, DType::kBool, {m.shape[0], m.shape[1]});
  check_last_axis("out", chosen);
  py::gil_scoped_release release;
  select_visual_tokens(m.as<float>(), m.stride[0], ratio, counts.data(), m.shape[0], m.shape[1],
                       chosen.as<uint8_t>(), chosen.stride[0]);
}

void append_visual(py::object key_cache, py::object value_cache, py::object key_length,
                   py::object spans, py::object shift, py::object inv_freq, py::object selected,
                   py::object rows, py::object block_table, int num_threads) {
  const TensorView k = view_of("key_cache", key_cache);
  if (k.ndim != 4 || !is_floating(k.dtype)) {
    throw py::value_error("key_cache must be a floating tensor [B, H_kv, capacity, D] (paged: " +
                          std::string("[num_blocks, H_kv, block_size, D]), got ") +
                          dtype_name(k.dtype) + " " + shape_text(k));
  }
  const std::initializer_list<int64_t> shape = {k.shape[0], k.shape[1], k.shape[2], k.shape[3]};
  checked_output("key_cache", key_cache, k.dtype, shape);
  const BlockTable table(block_table, k, kAny);
  const int64_t batch = table.rows, capacity = table.capacity;
  AppendVisualParams p;
  static_cast<PagedCache&>(p) = table.pages;
  p.dtype = k.dtype;
  p.batch = batch;
  p.key_heads = k.shape[1];
  p.head_dim = k.shape[3];
  p.num_threads = num_threads;
  p.key = heads_view("key_cache", k);
  p.value = heads_view("value_cache", checked_output("value_cache", value_cache, k.dtype, shape));
  const TensorView length_view = checked_output("key_length", key_length, DType::kInt32, {batch});
  const std::vector<int32_t> length = int_values(length_view);
  p.key_length = length.data();
  const TensorView spans_view = checked_view("spans", spans, DType::kInt32, {batch, kAny, 2});
  const std::vector<int32_t> span_values = int_values(spans_view);
  p.spans = span_values.data();
  p.num_spans = spans_view.shape[1];
  const std::vector<int32_t> shifts =
      int_values(checked_view("shift", shift, DType::kInt32, {batch}));
  p.shift = shifts.data();
  p.inv_freq = inv_freq_values(inv_freq, p.head_dim, &p.half);
  int64_t num_visual = kAny;
  if (!selected.is_none()) {
    const TensorView view = checked_view("selected", selected, DType::kBool, {batch, kAny});
    check_last_axis("selected", view);
    num_visual = view.shape[1];
    p.selected = view.as<uint8_t>();
    p.selected_stride = view.stride[0];
  }
  std::vector<uint8_t> taking_part(static_cast<size_t>(batch), 1);
  if (!rows.is_none()) {
    const TensorView view = checked_view("rows", rows, DType::kBool, {batch});
    for (int64_t b = 0; b < batch; ++b) taking_part[b] = view.as<uint8_t>()[b * view.stride[0]];
  }
  p.rows = taking_part.data();

  std::vector<int64_t> count(static_cast<size_t>(batch), 0);
  for (int64_t b = 0; b < batch; ++b) {
    if (!taking_part[b]) continue;
    if (length[b] < 0 || length[b] > capacity) {
      throw py::value_error("key_length must lie in 0 … " + to_string(capacity) +
                            " (the capacity of key_cache), got " + to_string(length[b]) +
                            " in row " + to_string(b));
    }
    count[b] = check_row_spans(p.spans + b * p.num_spans * 2, p.num_spans, b, length[b],
                               "key_length", num_visual);
    const uint8_t* chosen = p.selected == nullptr ? nullptr : p.selected + b * p.selected_stride;
    if (chosen != nullptr) {
      const int64_t tokens = count[b];
      count[b] = 0;
      for (int64_t t = 0; t < tokens; ++t) count[b] += chosen[t] != 0;
    }
    if (length[b] + count[b] > capacity) {
      throw py::value_error("row " + to_string(b) + " of key_cache has no room: it holds " +
                            to_string(length[b]) + " keys, " + to_string(count[b]) +
                            " visual tokens are to be appended, its capacity is " +
                            to_string(capacity));
    }
    if (p.block_table == nullptr) continue;
    for_each_visual_run(p.spans + b * p.num_spans * 2, p.num_spans, 0, length[b],
                        [&](int64_t first, int64_t token, int64_t tokens) {
                          for (int64_t n = 0; n < tokens; ++n) {
                            if (chosen != nullptr && !chosen[token + n]) continue;
                            table.check_in_use(b, first + n, first + n + 1, "read");
                          }
                        });
    table.check_in_use(b, length[b], length[b] + count[b], "written");
  }
  const CpuKernels& kernels = cpu_kernels(k.dtype);
  py::gil_scoped_release release;
  kernels.append_visual(p);
  for (int64_t b = 0; b < batch; ++b) {
    length_view.as<int32_t>()[b * length_view.stride[0]] += static_cast<int32_t>(count[b]);
  }
}

py::dict build_info() {
  py::list isas;
  for (int i = 0; i < num_isas(); ++i) isas.append(isa_name(i));
  py::dict info;
  info["version"] = LOOKAGAIN_VERSION;
  info["isa"] = isa_in_use();
  info["isas"] = isas;
  py::list archs;
#ifdef LOOKAGAIN_CUDA_ARCHS
  archs = py::list(py::str(LOOKAGAIN_CUDA_ARCHS).attr("split")(", "));
#endif
  info["cuda_archs"] = archs;
  info["threading"] = threading_mode();
  info["compiler"] = LOOKAGAIN_COMPILER;
  return info;
}

// Also called for LOOKAGAIN_ISA when the module is loaded.
void choose_isa(const std::string& name) {
  if (set_isa(name.c_str())) return;
  std::string names = "auto";
  for (int i = 0; i < num_isas(); ++i) names += std::string(", ") + isa_name(i);
  throw py::value_error("the instruction set must be one of " + names +
                        " and this machine must have it, got " + name);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Kernels of lookagain_ext; call them through lookagain_ext.ops.";
  if (const char* name = std::getenv("LOOKAGAIN_ISA")) choose_isa(name);
  module.def("routed_attention", &routed_attention);
  module.def("routed_attention_backward", &routed_attention_backward);
  module.def("visual_mass", &visual_mass);
  module.def("select_visual_tokens", &select_tokens);
  module.def("append_visual_", &append_visual);
  module.def("build_info", &build_info);
  module.def("set_isa", &choose_isa);
  module.def("use_dlpack_exchange", &use_dlpack_exchange);
#ifdef LOOKAGAIN_CUDA_ARCHS
  define_cuda(module);
#endif
}

}  // namespace lookagain
