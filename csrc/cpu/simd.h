// One vector of floats, `Vec`, with `kLanes` lanes, the same names for every instruction set:
//
//   zero() broadcast(x)                    load(p) load_first(p, n): p float, BFloat16 or Float16
//   add sub mul max, fma(a, b, c) = ab + c store(p, v) store_first(p, v, n), round to nearest even
//   reduce_add reduce_max exp2             select(bits, a, b): lane i is a's if bit i is set
//   transpose(rows): kLanes vectors as a square matrix, in place
//
// load_first leaves 0 in the lanes from n on and does not touch their memory.
#pragma once

#include "../core/types.h"

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_plain.h"
#endif

LA_NAMESPACE_BEGIN

// 2^f for f in [-0.5, 0.5]: a degree-6 polynomial, relative error below 8e-8 in float, exact at 0.
LA_HD Vec exp2_fraction(Vec f) {
  Vec p = broadcast(1.534581242594868e-4f);
  p = fma(p, f, broadcast(1.3399930903688073e-3f));
  p = fma(p, f, broadcast(9.618489071726799e-3f));
  p = fma(p, f, broadcast(5.550328642129898e-2f));
  p = fma(p, f, broadcast(0.24022646248340607f));
  p = fma(p, f, broadcast(0.6931471824645996f));
  return fma(p, f, broadcast(1.0f));
}

// 2^x for x <= 127, relative error below 1e-7; 0 below 2^-126 (no subnormal results), NaN for NaN.
LA_HD Vec exp2(Vec x) {
  const Vec whole = round(x);
  return scale_by_power(exp2_fraction(sub(x, whole)), whole, x);
}

LA_NAMESPACE_END
