// The CUDA half of the module `_C`.
#pragma once

#include <pybind11/pybind11.h>

namespace lookagain {

void define_cuda(pybind11::module_& module);

}  // namespace lookagain
