// The kernels for many queries are compiled in a file for each element type.
#pragma once

#include "kernels.h"

namespace lookagain {
namespace cuda {

struct ManyLaunch;

template <typename T>
void launch_prefill(const ManyLaunch& a, Stream stream);

// delta, the sides of keys and of queries, and the sum of the pieces.
template <typename T>
void launch_gradients(ManyLaunch& a, Stream stream);

}  // namespace cuda
}  // namespace lookagain
