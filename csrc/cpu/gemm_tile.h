// Register-blocked matrix products for the prefill, the backward and the visual mass.
//
// A "unit" is four bytes (eight for float64): one float, or two bfloat16 that are neighbours along
// the summed axis, as vdpbf16ps wants them. With that, one tile routine serves all dtypes:
//
//   C[kTileRows][columns] (+)= sum over k < depth of  A(row, k) * B(k, column)
//
//   A   units at a[row * row_step + k * k_step]; both steps known at compile time
//   B   units at b[k * columns + column]: a contiguous panel of 1 or 2 vectors width
//   C   accumulators at c[row * c_stride + column]
//
// AVX-512 keeps 12 x 2 vectors in registers: a step of k is 24 multiply-adds for 2 loads and 12
// broadcasts, so the multipliers (one 512-bit product a cycle on Zen 4) are the limit. Measured
// there alone: 217 of 232 GFLOP/s a core at depth 64 (bfloat16, head size 128), 191 at depth 24.
// AVX2 and NEON-sized registers take 6 x 2.
#pragma once

#include <math.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../core/types.h"

LA_NAMESPACE_BEGIN

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 12;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6;
#endif

// GCC and Clang vectors: one source for every instruction set.
template <typename Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t integers __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
};
template <typename Real>
using Vector = typename VectorOf<Real>::type;
template <typename Real>
constexpr int kVectorWidth = kVectorBytes / static_cast<int>(sizeof(Real));

template <typename Real>
LA_HD Vector<Real> load(const Real* from) {
  Vector<Real> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <typename Real>
LA_HD void store(Real* to, const Vector<Real>& v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

template <typename Real>
LA_HD Vector<Real> splat(Real x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4) return (Vector<Real>)_mm512_set1_ps(x);
#endif
  return x - Vector<Real>{};
}

// The larger of each lane, `b` where either is NaN.
template <typename Real>
LA_HD Vector<Real> maximum(const Vector<Real>& a, const Vector<Real>& b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real) == 4) {
    // Unmasked, g++ 12 warns of an uninitialised operand.
    return (Vector<Real>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
  }
#elif defined(__AVX__)
  if constexpr (sizeof(Real) == 4) return (Vector<Real>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

template <typename Real>
LA_HD Real largest(const Vector<Real>& v) {
  Real best = v[0];
  for (int i = 1; i < kVectorWidth<Real>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

template <typename Real>
LA_HD Real total(const Vector<Real>& v) {
  Real lanes[kVectorWidth<Real>];
  __builtin_memcpy(lanes, &v, sizeof(v));
  for (int width = kVectorWidth<Real> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// 2^x for x <= 127: exactly 0 from -126.5 down (so that -inf masks), NaN for NaN.
// Relative error 4e-9 + rounding, or 3e-6 where the result is rounded to bfloat16 anyhow.
template <bool kCoarse>
LA_HD Vector<float> exp2_of(Vector<float> x) {
  using Floats = Vector<float>;
  using Integers = VectorOf<float>::integers;
  // Adding 1.5 * 2^23 + 127 rounds to an integer n and leaves n + 127 in the low bits.
  const Floats magic = splat(12583039.0f);
  x = maximum<float>(splat(-127.0f), x);
  const Floats shifted = x + magic;
  const Floats f = x - (shifted - magic);
  Floats p;
  if constexpr (kCoarse) {
    p = 0x1.3997dp-7f * f + 0x1.ca1440p-5f;
    p = p * f + 0x1.ec06dap-3f;
    p = p * f + 0x1.62e0dcp-1f;
    p = p * f + 0x1.ffffe8p-1f;
  } else {
    p = 0x1.41d330p-13f * f + 0x1.5f456ap-10f;
    p = p * f + 0x1.3b2dbcp-7f;
    p = p * f + 0x1.c6aed4p-5f;
    p = p * f + 0x1.ebfbdap-3f;
    p = p * f + 0x1.62e430p-1f;
    p = p * f + 1.0f;
  }
  return p * (Floats)((Integers)shifted << 23);
}

template <bool kCoarse>
LA_HD Vector<double> exp2_of(Vector<double> x) {
  for (int i = 0; i < kVectorWidth<double>; ++i) x[i] = ::exp2(x[i]);
  return x;
}

// How a dtype is multiplied. Element: what inputs are converted to before packing.
template <typename Real>
struct RealLane {
  using Element = Real;
  using Unit = Real;
  using Sum = Real;
  static constexpr int kPair = 1;
  static constexpr bool kCoarse = false;
  static LA_HD void multiply_add(Vector<Sum>& c, const Vector<Unit>& a, const Vector<Unit>& b) {
    c += a * b;
  }
  static LA_HD void store_elements(Unit* row, int64_t column, const Vector<Sum>& v) {
    store(row + column, v);
  }
  // Units whose pair lies along rows.
  static LA_HD void store_units(Unit* to, const Vector<Sum>* rows) { store(to, rows[0]); }
};

#if defined(__AVX512BF16__)
struct BFloat16Lane {
  using Element = BFloat16;
  using Unit = float;  // only moved, never calculated with
  using Sum = float;
  static constexpr int kPair = 2;
  static constexpr bool kCoarse = true;
  static LA_HD void multiply_add(Vector<Sum>& c, const Vector<Unit>& a, const Vector<Unit>& b) {
    c = (Vector<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  static LA_HD void store_elements(Unit* row, int64_t column, const Vector<Sum>& v) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(reinterpret_cast<BFloat16*>(row) + column, &rounded, sizeof(rounded));
  }
  static LA_HD void store_units(Unit* to, const Vector<Sum>* rows) {
    const __m512i first =
        _mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)_mm512_cvtneps_pbh((__m512)rows[0]));
    const __m512i second =
        _mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)_mm512_cvtneps_pbh((__m512)rows[1]));
    const __m512i units = first | _mm512_maskz_slli_epi32(0xffff, second, 16);
    __builtin_memcpy(to, &units, sizeof(units));
  }
};
#endif

enum class Into { kStore, kAdd, kScaleAdd };
template <Into kWhere>
struct As {  // to pass it to a generic lambda
  static constexpr Into kInto = kWhere;
};

// kColumns vectors of columns; `factor` (kScaleAdd) multiplies each row of C first.
template <typename Lane, int kColumns, int kRowStep, int kKStep, Into kInto>
__attribute__((noinline)) void multiply_tile(const typename Lane::Unit* a,
                                             const typename Lane::Unit* b, int64_t depth,
                                             typename Lane::Sum* c, int64_t c_stride,
                                             const typename Lane::Sum* factor) {
  using Unit = typename Lane::Unit;
  using Sum = typename Lane::Sum;
  constexpr int kWidth = kVectorWidth<Sum>;
  Vector<Sum> sums[kTileRows][kColumns];
#pragma GCC unroll 12
  for (int row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 2
    for (int column = 0; column < kColumns; ++column) sums[row][column] = Vector<Sum>{};
  }
  // Sums of a key tile come from L3, in pieces too short for the hardware to follow.
  if constexpr (kInto == Into::kAdd) {
    for (int row = 0; row < kTileRows; ++row) {
      for (int n = 0; n < kColumns * kVectorBytes; n += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(c + row * c_stride) + n, 1);
      }
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector<Unit> right[kColumns];
#pragma GCC unroll 2
    for (int column = 0; column < kColumns; ++column) right[column] = load(b + column * kWidth);
#pragma GCC unroll 12
    for (int row = 0; row < kTileRows; ++row) {
      const Vector<Unit> left = splat(a[row * kRowStep]);
#pragma GCC unroll 2
      for (int column = 0; column < kColumns; ++column) {
        Lane::multiply_add(sums[row][column], left, right[column]);
      }
    }
    // A walk down a column of a block meets a new line at each step, and a new page too soon for
    // the hardware to follow.
    if constexpr (kKStep * sizeof(Unit) > 64) __builtin_prefetch(a + 8 * kKStep);
    a += kKStep;
    b += kColumns * kWidth;
  }
#pragma GCC unroll 12
  for (int row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 2
    for (int column = 0; column < kColumns; ++column) {
      Sum* to = c + row * c_stride + column * kWidth;
      if constexpr (kInto == Into::kAdd) sums[row][column] += load(to);
      if constexpr (kInto == Into::kScaleAdd) sums[row][column] += load(to) * factor[row];
      store(to, sums[row][column]);
    }
  }
}

// C[kTileRows][width] for a whole row of panels of B, which were packed for `panel_depth`; its
// units from `first` on are used.
template <typename Lane, int kRowStep, int kKStep, Into kInto>
LA_HD void multiply_panels(const typename Lane::Unit* a, const typename Lane::Unit* b,
                           int64_t panel_depth, int64_t first, int64_t depth, int64_t width,
                           typename Lane::Sum* c, int64_t c_stride,
                           const typename Lane::Sum* factor = nullptr) {
  constexpr int kWidth = kVectorWidth<typename Lane::Sum>;
  int64_t column = 0;
  for (; column + 2 * kWidth <= width; column += 2 * kWidth) {
    multiply_tile<Lane, 2, kRowStep, kKStep, kInto>(
        a, b + column * panel_depth + first * 2 * kWidth, depth, c + column, c_stride, factor);
  }
  if (column < width) {
    multiply_tile<Lane, 1, kRowStep, kKStep, kInto>(a, b + column * panel_depth + first * kWidth,
                                                    depth, c + column, c_stride, factor);
  }
}

LA_NAMESPACE_END
