// Vec on AVX2 with FMA and F16C; see simd.h.
#pragma once

#include <immintrin.h>

LA_NAMESPACE_BEGIN

struct Vec {
  __m256 v;
};
constexpr int kLanes = 8;

LA_HD Vec zero() { return {_mm256_setzero_ps()}; }
LA_HD Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }
LA_HD Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
LA_HD Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
LA_HD Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
LA_HD Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
LA_HD Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
LA_HD Vec select(uint32_t bits, Vec a, Vec b) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i hit = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(hit, lane)))};
}
LA_HD float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
LA_HD float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}

LA_HD Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
LA_HD Vec load(const BFloat16* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
LA_HD Vec load(const Float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
template <typename T>
LA_HD Vec load_first(const T* p, int n) {
  T whole[8] = {};
  for (int i = 0; i < n; ++i) whole[i] = p[i];
  return load(whole);
}

LA_HD void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
LA_HD void store(BFloat16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
LA_HD void store(Float16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, 0));
}
template <typename T>
LA_HD void store_first(T* p, Vec a, int n) {
  T whole[8];
  store(whole, a);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}

LA_HD Vec round(Vec a) { return {_mm256_round_ps(a.v, 8)}; }

// fraction * 2^whole, 0 where x < -126.
LA_HD Vec scale_by_power(Vec fraction, Vec whole, Vec x) {
  const __m256i bits = _mm256_castps_si256(fraction.v);
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(whole.v), 23);
  const __m256 keep = _mm256_cmp_ps(x.v, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
  // NaN has a meaningless power, but must stay NaN.
  const __m256 nan = _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(bits, power));
  return {_mm256_blendv_ps(_mm256_and_ps(scaled, keep), x.v, nan)};
}

LA_HD void transpose(Vec (&r)[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    const __m256 b = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
    const __m256 c = _mm256_unpacklo_ps(r[i + 2].v, r[i + 3].v);
    const __m256 d = _mm256_unpackhi_ps(r[i + 2].v, r[i + 3].v);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    r[c].v = _mm256_permute2f128_ps(t[c], t[4 + c], 0x20);
    r[4 + c].v = _mm256_permute2f128_ps(t[c], t[4 + c], 0x31);
  }
}

LA_NAMESPACE_END
