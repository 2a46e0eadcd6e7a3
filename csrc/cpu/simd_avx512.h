// Vec on AVX-512 (F, BW, VL, DQ); see simd.h.
#pragma once

#include <immintrin.h>

LA_NAMESPACE_BEGIN

struct Vec {
  __m512 v;
};
constexpr int kLanes = 16;

LA_HD __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }

LA_HD Vec zero() { return {_mm512_setzero_ps()}; }
LA_HD Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
LA_HD Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
LA_HD Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
LA_HD Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
LA_HD Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
LA_HD Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
LA_HD Vec select(uint32_t bits, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), b.v, a.v)};
}
LA_HD float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
LA_HD float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

LA_HD Vec from_bfloat16(__m256i x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}

LA_HD Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
LA_HD Vec load(const BFloat16* p) {
  return from_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LA_HD Vec load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
LA_HD Vec load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
LA_HD Vec load_first(const BFloat16* p, int n) {
  return from_bfloat16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
LA_HD Vec load_first(const Float16* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
}

LA_HD __m256i to_bfloat16(Vec a) {
#ifdef __AVX512BF16__
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
#else
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
}

LA_HD void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
LA_HD void store(BFloat16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(a));
}
LA_HD void store(Float16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, 0));
}
LA_HD void store_first(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
LA_HD void store_first(BFloat16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), to_bfloat16(a));
}
LA_HD void store_first(Float16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(a.v, 0));
}

LA_HD Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, 8)}; }

// fraction * 2^whole, 0 where x < -126.
LA_HD Vec scale_by_power(Vec fraction, Vec whole, Vec x) {
  const __mmask16 keep = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(keep, fraction.v, whole.v)};
}

LA_HD void transpose(Vec (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512 a = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    const __m512 b = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
    const __m512 c = _mm512_unpacklo_ps(r[i + 2].v, r[i + 3].v);
    const __m512 d = _mm512_unpackhi_ps(r[i + 2].v, r[i + 3].v);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  // t[4 g + c], 128-bit lane l: column 4 l + c of rows 4 g … 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 a = _mm512_shuffle_f32x4(t[c], t[4 + c], 0x88);       // lanes 0, 2 of rows 0-7
    const __m512 b = _mm512_shuffle_f32x4(t[8 + c], t[12 + c], 0x88);  // of rows 8-15
    const __m512 d = _mm512_shuffle_f32x4(t[c], t[4 + c], 0xdd);       // lanes 1, 3
    const __m512 e = _mm512_shuffle_f32x4(t[8 + c], t[12 + c], 0xdd);
    r[c].v = _mm512_shuffle_f32x4(a, b, 0x88);
    r[8 + c].v = _mm512_shuffle_f32x4(a, b, 0xdd);
    r[4 + c].v = _mm512_shuffle_f32x4(d, e, 0x88);
    r[12 + c].v = _mm512_shuffle_f32x4(d, e, 0xdd);
  }
}

LA_NAMESPACE_END
