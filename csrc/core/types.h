// Storage types and their conversion to and from float, round to nearest even. A GPU has
// instructions for it.
#pragma once

#include <cstring>

#include "config.h"

LA_NAMESPACE_BEGIN

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

LA_HD float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

LA_HD uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

LA_HD double to_float(double x) { return x; }
LA_HD float to_float(float x) { return x; }
LA_HD float to_float(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

LA_HD float to_float(Float16 x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | ((rest & 0x3ff) << 13));
  if (rest >= 0x0400) return bits_to_float(sign | ((rest << 13) + 0x38000000));
  // Subnormal: the mantissa counts units of 2^-24, which float holds exactly.
  return bits_to_float(sign | float_to_bits(static_cast<float>(rest) * 5.9604644775390625e-8f));
#endif
}

template <typename T>
LA_HD T from_float(float x) {
  return static_cast<T>(x);
}

template <typename T>
LA_HD T from_float(double x) {
  return from_float<T>(static_cast<float>(x));
}

template <>
LA_HD double from_float<double>(double x) {
  return x;
}

template <>
LA_HD BFloat16 from_float<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  BFloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
#endif
}

template <>
LA_HD Float16 from_float<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  Float16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (rest < 0x38800000) {
    // Adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded to nearest even.
    const uint32_t shifted = float_to_bits(bits_to_float(rest) + 0.5f) - 0x3f000000;
    return {static_cast<uint16_t>(sign | shifted)};
  }
  return {static_cast<uint16_t>(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13))};
#endif
}

// The type sums are kept in.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

LA_NAMESPACE_END
