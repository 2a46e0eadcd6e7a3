// Vec on the compiler's own vectors of four floats (SSE2 or NEON underneath); see simd.h.
#pragma once

LA_NAMESPACE_BEGIN

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct Vec {
  Float4 v;
};
constexpr int kLanes = 4;

LA_HD Vec zero() { return {Float4{0, 0, 0, 0}}; }
LA_HD Vec broadcast(float x) { return {Float4{x, x, x, x}}; }
LA_HD Vec add(Vec a, Vec b) { return {a.v + b.v}; }
LA_HD Vec sub(Vec a, Vec b) { return {a.v - b.v}; }
LA_HD Vec mul(Vec a, Vec b) { return {a.v * b.v}; }
LA_HD Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
LA_HD Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
LA_HD Vec select(uint32_t bits, Vec a, Vec b) {
  const Int4 lane = {1, 2, 4, 8};
  return {(lane & static_cast<int32_t>(bits)) == lane ? a.v : b.v};
}
LA_HD float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
LA_HD float reduce_max(Vec a) {
  const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}

template <typename T>
LA_HD Vec load(const T* p) {
  return {Float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
template <typename T>
LA_HD Vec load_first(const T* p, int n) {
  Vec a = zero();
  for (int i = 0; i < n; ++i) a.v[i] = to_float(p[i]);
  return a;
}
template <typename T>
LA_HD void store_first(T* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) p[i] = from_float<T>(a.v[i]);
}
template <typename T>
LA_HD void store(T* p, Vec a) {
  store_first(p, a, kLanes);
}

// To nearest even, for |a| < 2^22; anything else comes back somewhere near.
LA_HD Vec round(Vec a) {
  const Vec magic = broadcast(12582912.0f);
  return sub(add(a, magic), magic);
}

// fraction * 2^whole, 0 where x < -126.
LA_HD Vec scale_by_power(Vec fraction, Vec whole, Vec x) {
  Vec scaled;
  for (int i = 0; i < kLanes; ++i) {
    const bool keep = x.v[i] >= -126.0f;
    const int32_t power = keep ? static_cast<int32_t>(whole.v[i]) : 0;
    const uint32_t bits = float_to_bits(fraction.v[i]) + (static_cast<uint32_t>(power) << 23);
    scaled.v[i] = x.v[i] < -126.0f ? 0.0f : (keep ? bits_to_float(bits) : x.v[i]);
  }
  return scaled;
}

LA_HD void transpose(Vec (&r)[4]) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = x;
    }
  }
}

LA_NAMESPACE_END
