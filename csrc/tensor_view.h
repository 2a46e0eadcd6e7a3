// Python tensors as pointers, shapes and strides, without linking torch.
//
// Where the tensor's type offers DLPack's C exchange table (`__dlpack_c_exchange_api__`), a
// borrowed view comes from one C call (tens of nanoseconds). Elsewhere the attributes data_ptr(),
// shape, stride(), dtype and device are read. Both end in a TensorView that is valid while the
// Python object lives.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "params.h"

namespace lookagain {

constexpr int kMaxDims = 8;
constexpr int kCpu = -1;  // the device of a CPU tensor; others have the index of their GPU

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

const char* dtype_name(DType dtype);
std::string shape_text(const TensorView& view);

// The view of a tensor on `device`; TypeError or ValueError that names the argument otherwise.
TensorView view_of(const char* name, pybind11::handle tensor, int device = kCpu);

// kCpu, or the index of the GPU that a tensor is on; ValueError for other devices.
int device_of(const char* name, pybind11::handle tensor);

// Whether views are taken through the exchange table when there is one; for tests.
void use_dlpack_exchange(bool use);

}  // namespace lookagain
