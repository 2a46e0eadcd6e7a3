// The kernels for many queries, for bfloat16.
#include "many_queries_launch.cuh"

namespace lookagain {
namespace cuda {

template void launch_prefill<BFloat16>(const ManyLaunch& a, Stream stream);
template void launch_gradients<BFloat16>(ManyLaunch& a, Stream stream);

}  // namespace cuda
}  // namespace lookagain
