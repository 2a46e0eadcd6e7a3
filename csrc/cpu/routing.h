#pragma once

#include <cstdint>

namespace lookagain {

// out[b, t] = token t is among the ceil(ratio * num_visual[b] - 1e-9) of row b's first
// num_visual[b] tokens with the largest mass; ties go to the lower number.
void select_visual_tokens(const float* mass, int64_t mass_stride, double ratio,
                          const int32_t* num_visual, int64_t batch, int64_t max_visual,
                          uint8_t* out, int64_t out_stride);

}  // namespace lookagain
