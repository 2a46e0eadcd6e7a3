// The kernels for many queries, for float16.
#include "many_queries_launch.cuh"

namespace lookagain {
namespace cuda {

template void launch_prefill<Float16>(const ManyLaunch& a, Stream stream);
template void launch_gradients<Float16>(ManyLaunch& a, Stream stream);

}  // namespace cuda
}  // namespace lookagain
