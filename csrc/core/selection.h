// How many tokens ROUTE keeps, and in which order mass is ranked.
#pragma once

#include <cmath>

#include "types.h"

LA_NAMESPACE_BEGIN

// ceil(ratio * n), the 1e-9 keeping products that are whole up to rounding whole.
LA_HD int64_t selection_count(double ratio, int64_t n) {
  const double count = std::ceil(ratio * static_cast<double>(n) - 1e-9);
  return count <= 0 ? 0 : (count >= static_cast<double>(n) ? n : static_cast<int64_t>(count));
}

// A number that is smaller for a token to be taken earlier: larger mass first, then the lower
// token number. NaN ranks above everything, as in torch.sort.
LA_HD uint64_t selection_rank(float mass, uint32_t token) {
  uint32_t bits = float_to_bits(mass);
  if (mass != mass) {
    bits = 0xffffffffu;
  } else if (mass == 0) {
    bits = 0x80000000u;  // -0 ties with +0
  } else {
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  return static_cast<uint64_t>(~bits) << 32 | token;
}

LA_NAMESPACE_END
