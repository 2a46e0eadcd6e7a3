// routed_attention on tensor cores for bfloat16; see routed_attention_decode.cuh.
#include "decode_dispatch.cuh"

namespace lookagain {
namespace cuda {

void launch_decode_bfloat16(const DecodePlan& plan, const DecodeLaunch& launch, Stream stream) {
  launch_decode<BFloat16>(plan, launch, stream);
}

}  // namespace cuda
}  // namespace lookagain
