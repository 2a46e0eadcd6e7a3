// The tensor-core kernels of each element type, compiled in files of their own.
#pragma once

#include "kernels.h"

namespace lookagain {
namespace cuda {

struct DecodeLaunch;

void launch_decode_bfloat16(const DecodePlan& plan, const DecodeLaunch& launch, Stream stream);
void launch_decode_float16(const DecodePlan& plan, const DecodeLaunch& launch, Stream stream);

}  // namespace cuda
}  // namespace lookagain
