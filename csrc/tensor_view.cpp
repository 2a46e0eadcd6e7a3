// The ABI structs below are declared from the DLPack specification, version 1; only what is used.
#include "tensor_view.h"

#include <cstring>

namespace py = pybind11;

namespace lookagain {
namespace {

struct DlDevice {
  int32_t type;
  int32_t index;
};
struct DlDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DlExchangeApi {
  uint32_t major;
  uint32_t minor;
  DlExchangeApi* older;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*borrow)(void* py_object, DlTensor* out);  // may be null
  void* current_stream;
};
constexpr uint32_t kDlpackMajor = 1;
constexpr int32_t kDlpackCpu = 1, kDlpackCuda = 2;

struct DTypeRow {
  DType dtype;
  uint8_t code;  // DLPack: 0 int, 2 float, 4 bfloat, 6 bool
  uint8_t bits;
  const char* name;
};
constexpr DTypeRow kDTypes[] = {
    {DType::kFloat32, 2, 32, "float32"},   {DType::kFloat16, 2, 16, "float16"},
    {DType::kBFloat16, 4, 16, "bfloat16"}, {DType::kFloat64, 2, 64, "float64"},
    {DType::kInt32, 0, 32, "int32"},       {DType::kBool, 6, 8, "bool"},
};

bool g_use_exchange = true;

// The table of a Python type, or null. The last type is remembered: nearly all are torch.Tensor.
const DlExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* last_type = nullptr;
  static const DlExchangeApi* last_api = nullptr;
  if (type == last_type) return last_api;
  const DlExchangeApi* api = nullptr;
  py::object holder = py::reinterpret_steal<py::object>(
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__"));
  if (!holder) {
    PyErr_Clear();
  } else if (PyCapsule_IsValid(holder.ptr(), "dlpack_exchange_api")) {
    api = static_cast<const DlExchangeApi*>(
        PyCapsule_GetPointer(holder.ptr(), "dlpack_exchange_api"));
    while (api != nullptr && api->major != kDlpackMajor) api = api->older;
    if (api != nullptr && api->borrow == nullptr) api = nullptr;
  }
  Py_INCREF(type);  // a type that is remembered must not be freed and its address reused
  Py_XDECREF(last_type);
  last_type = type;
  last_api = api;
  return api;
}

[[noreturn]] void bad_dtype(const char* name, const std::string& got) {
  throw py::type_error(std::string(name) +
                       " must be float32, float16, bfloat16, float64, int32 or bool, got " + got);
}

[[noreturn]] void bad_device(const char* name, const std::string& got, int wanted) {
  if (wanted == kCpu) {
    throw py::value_error(std::string(name) + " must be on the CPU, got a tensor on " + got +
                          "; this build has no kernels for that device");
  }
  throw py::value_error(std::string(name) + " must be on cuda:" + std::to_string(wanted) +
                        " like the others, got a tensor on " + got);
}

// A tensor of a tracer knows its shape and no more.
[[noreturn]] void bad_values(const char* name, py::handle tensor) {
  throw py::value_error(std::string(name) + " must hold values, got a " +
                        Py_TYPE(tensor.ptr())->tp_name + " without memory");
}

void check_ndim(const char* name, int64_t ndim) {
  if (ndim > kMaxDims) {
    throw py::value_error(std::string(name) + " must have at most 8 axes, got " +
                          std::to_string(ndim));
  }
}

bool view_by_exchange(const char* name, py::handle tensor, int device, TensorView* view) {
  const DlExchangeApi* api = exchange_api(Py_TYPE(tensor.ptr()));
  DlTensor dl;
  if (api == nullptr) return false;
  if (api->borrow(tensor.ptr(), &dl) != 0) {
    PyErr_Clear();  // what cannot be described as DLPack may still have a data_ptr()
    return false;
  }
  const bool here = device == kCpu ? dl.device.type == kDlpackCpu
                                   : dl.device.type == kDlpackCuda && dl.device.index == device;
  if (!here) bad_device(name, std::string(py::str(tensor.attr("device"))), device);
  const DTypeRow* row = nullptr;
  for (const DTypeRow& known : kDTypes) {
    if (known.code == dl.dtype.code && known.bits == dl.dtype.bits && dl.dtype.lanes == 1) {
      row = &known;
    }
  }
  if (row == nullptr) bad_dtype(name, std::string(py::str(tensor.attr("dtype"))));
  check_ndim(name, dl.ndim);
  view->data = static_cast<char*>(dl.data) + dl.byte_offset;
  view->dtype = row->dtype;
  view->ndim = dl.ndim;
  if (dl.ndim > 0 && dl.strides == nullptr) return false;
  bool empty = false;
  for (int i = 0; i < dl.ndim; ++i) {
    view->shape[i] = dl.shape[i];
    view->stride[i] = dl.strides[i];
    empty = empty || dl.shape[i] == 0;
  }
  if (dl.data == nullptr && !empty) bad_values(name, tensor);
  return true;
}

void view_by_attributes(const char* name, py::handle tensor, int device, TensorView* view) {
  if (!py::hasattr(tensor, "data_ptr") || !py::hasattr(tensor, "stride")) {
    throw py::type_error(std::string(name) + " must be a tensor, got " +
                         Py_TYPE(tensor.ptr())->tp_name);
  }
  if (device_of(name, tensor) != device) {
    bad_device(name, std::string(py::str(tensor.attr("device"))), device);
  }
  const std::string dtype = py::str(tensor.attr("dtype"));
  const DTypeRow* row = nullptr;
  for (const DTypeRow& known : kDTypes) {
    if (dtype == std::string("torch.") + known.name) row = &known;
  }
  if (row == nullptr) bad_dtype(name, dtype);
  const py::tuple shape(tensor.attr("shape")), stride(tensor.attr("stride")());
  check_ndim(name, static_cast<int64_t>(shape.size()));
  view->data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  view->dtype = row->dtype;
  view->ndim = static_cast<int>(shape.size());
  for (int i = 0; i < view->ndim; ++i) {
    view->shape[i] = shape[i].cast<int64_t>();
    view->stride[i] = stride[i].cast<int64_t>();
  }
}

}  // namespace

const char* dtype_name(DType dtype) {
  for (const DTypeRow& known : kDTypes) {
    if (known.dtype == dtype) return known.name;
  }
  return "unknown";
}

std::string shape_text(const TensorView& view) {
  std::string text = "[";
  for (int i = 0; i < view.ndim; ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(view.shape[i]);
  }
  return text + "]";
}

TensorView view_of(const char* name, py::handle tensor, int device) {
  TensorView view;
  if (g_use_exchange && view_by_exchange(name, tensor, device, &view)) return view;
  view_by_attributes(name, tensor, device, &view);
  return view;
}

int device_of(const char* name, py::handle tensor) {
  if (!py::hasattr(tensor, "device")) {
    throw py::type_error(std::string(name) + " must be a tensor, got " +
                         Py_TYPE(tensor.ptr())->tp_name);
  }
  const py::object device = tensor.attr("device");
  const std::string type = py::str(device.attr("type"));
  if (type == "cpu") return kCpu;
  if (type == "cuda") return device.attr("index").cast<int>();
  throw py::value_error(std::string(name) + " must be on the CPU or a CUDA device, got " +
                        std::string(py::str(device)));
}

void use_dlpack_exchange(bool use) { g_use_exchange = use; }

}  // namespace lookagain
