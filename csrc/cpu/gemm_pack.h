// Packs rows of queries, keys, values and gradients into the operands of gemm_tile.h.
//
// Rows are first brought to the lane's element type (most often they are of it already and nothing
// moves). `depth` below counts units: D / kPair along features, rows / kPair along rows.
//
//   transposed  [depth][width]           width rows side by side; summed over features (Q, K, V^T)
//   paired      [column panel][depth][columns of the panel]  summed over rows (V, K, Q, dO)
//
// Packing costs O(L D) against O(L^2 D) for the products.
#pragma once

#include "../core/paging.h"
#include "../core/rotation.h"
#include "../params.h"
#include "gemm_tile.h"

LA_NAMESPACE_BEGIN

constexpr int64_t kMaxHeadDim = 256;
constexpr double kLog2E = 1.4426950408889634;

// Calls fn(Lane{}) with the way a dtype is multiplied on this instruction set. Without bfloat16
// products, bfloat16 is packed as float, as float16 always is.
template <typename Fn>
LA_HD void dispatch_lane([[maybe_unused]] DType dtype, Fn fn) {
#if defined(LA_PLAIN)
  if (dtype == DType::kFloat64) return fn(RealLane<double>{});
#endif
#if defined(__AVX512BF16__)
  if (dtype == DType::kBFloat16) return fn(BFloat16Lane{});
#endif
  fn(RealLane<float>{});
}

LA_HD int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
LA_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LA_HD int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

LA_HD int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : (dtype == DType::kFloat32 ? 4 : 2);
}

template <typename Element>
constexpr DType kDTypeOf = DType::kFloat32;
template <>
constexpr DType kDTypeOf<double> = DType::kFloat64;
template <>
constexpr DType kDTypeOf<BFloat16> = DType::kBFloat16;
template <>
constexpr DType kDTypeOf<Float16> = DType::kFloat16;

LA_HD const char* row_address(const HeadsView& view, DType dtype, int64_t batch, int64_t head,
                              int64_t row) {
  return static_cast<const char*>(view.data) +
         (batch * view.batch_stride + head * view.head_stride + row * view.row_stride) *
             bytes_of(dtype);
}

// The same for a slot of a cache, paged or not.
LA_HD const char* slot_address(const HeadsView& view, DType dtype, const PagedCache& pages,
                               int64_t batch, int64_t head, int64_t slot) {
  return static_cast<const char*>(view.data) +
         slot_offset(view, pages, batch, head, slot) * bytes_of(dtype);
}

// A row in the precision sums are kept in.
template <typename Real>
inline void load_row(const void* from, DType dtype, int64_t head_dim, Real* to) {
  if (dtype == DType::kFloat64) {
    for (int64_t d = 0; d < head_dim; ++d) to[d] = static_cast<const double*>(from)[d];
  } else if (dtype == DType::kFloat32) {
    for (int64_t d = 0; d < head_dim; ++d) to[d] = static_cast<const float*>(from)[d];
  } else if (dtype == DType::kBFloat16) {
    for (int64_t d = 0; d < head_dim; ++d) to[d] = to_float(static_cast<const BFloat16*>(from)[d]);
  } else {
    int64_t d = 0;
#if defined(__F16C__)
    if constexpr (sizeof(Real) == 4) {
      for (; d + 8 <= head_dim; d += 8) {
        __m128i half;
        __builtin_memcpy(&half, static_cast<const Float16*>(from) + d, sizeof(half));
        const __m256 full = _mm256_cvtph_ps(half);
        __builtin_memcpy(to + d, &full, sizeof(full));
      }
    }
#endif
    for (; d < head_dim; ++d) to[d] = to_float(static_cast<const Float16*>(from)[d]);
  }
}

// to = factor * from, rounded to the dtype.
template <typename Real>
inline void store_row(const Real* from, Real factor, DType dtype, int64_t head_dim, void* to) {
  if (dtype == DType::kFloat64) {
    for (int64_t d = 0; d < head_dim; ++d) static_cast<double*>(to)[d] = from[d] * factor;
  } else if (dtype == DType::kFloat32) {
    for (int64_t d = 0; d < head_dim; ++d) {
      static_cast<float*>(to)[d] = static_cast<float>(from[d] * factor);
    }
  } else if (dtype == DType::kBFloat16) {
    for (int64_t d = 0; d < head_dim; ++d) {
      static_cast<BFloat16*>(to)[d] = from_float<BFloat16>(from[d] * factor);
    }
  } else {
    int64_t d = 0;
#if defined(__F16C__)
    if constexpr (sizeof(Real) == 4) {
      for (; d + 8 <= head_dim; d += 8) {
        __m256 full;
        __builtin_memcpy(&full, from + d, sizeof(full));
        const __m128i half = _mm256_cvtps_ph(full * factor, 0);
        __builtin_memcpy(static_cast<Float16*>(to) + d, &half, sizeof(half));
      }
    }
#endif
    for (; d < head_dim; ++d) {
      static_cast<Float16*>(to)[d] = from_float<Float16>(from[d] * factor);
    }
  }
}

// A row as elements of the lane: the row itself if it is of that dtype, else converted into `room`.
template <typename Lane>
LA_HD const typename Lane::Element* element_row(const char* from, DType dtype, int64_t head_dim,
                                                typename Lane::Element* room) {
  using Element = typename Lane::Element;
  if (dtype == kDTypeOf<Element>) return reinterpret_cast<const Element*>(from);
  if constexpr (sizeof(Element) >= 4) load_row<Element>(from, dtype, head_dim, room);
  return room;
}

// to[unit * kWidth + row] = unit `unit` of rows[row].
template <typename Lane, int kWidth>
inline void pack_transposed(const typename Lane::Element* const* rows, int64_t head_dim,
                            typename Lane::Unit* to) {
  using Unit = typename Lane::Unit;
  const int64_t depth = head_dim / Lane::kPair;
#if defined(__SSE2__)
  if constexpr (sizeof(Unit) == 4 && kWidth % 4 == 0) {
    for (int64_t unit = 0; unit < depth; unit += 4) {  // depth is a multiple of 4
      for (int row = 0; row < kWidth; row += 4) {
        __m128 block[4];
        for (int n = 0; n < 4; ++n) {
          __builtin_memcpy(&block[n], rows[row + n] + unit * Lane::kPair, sizeof(__m128));
        }
        _MM_TRANSPOSE4_PS(block[0], block[1], block[2], block[3]);
        for (int n = 0; n < 4; ++n) {
          __builtin_memcpy(to + (unit + n) * kWidth + row, &block[n], sizeof(__m128));
        }
      }
    }
    return;
  }
#endif
  for (int64_t unit = 0; unit < depth; ++unit) {
    for (int row = 0; row < kWidth; ++row) {
      __builtin_memcpy(to + unit * kWidth + row, rows[row] + unit * Lane::kPair, sizeof(Unit));
    }
  }
}

// Rows 0 .. kPair * count - 1 at units first .. first + count - 1 of an operand of `depth` units;
// features from head_dim up to `width` (whole vectors) become zero.
template <typename Lane>
inline void pack_paired(const typename Lane::Element* const* rows, int64_t count, int64_t first,
                        int64_t depth, int64_t head_dim, int64_t width, typename Lane::Unit* to) {
  using Element = typename Lane::Element;
  constexpr int64_t kPanel = 2 * kVectorWidth<typename Lane::Sum>;
  for (int64_t column = 0; column < width; column += kPanel) {
    const int64_t columns = smaller(kPanel, width - column);
    const int64_t filled = smaller(columns, head_dim - column);
    typename Lane::Unit* panel = to + column * depth + first * columns;
    for (int64_t unit = 0; unit < count; ++unit) {
      Element* out = reinterpret_cast<Element*>(panel + unit * columns);
      for (int pair = 0; pair < Lane::kPair; ++pair) {
        const Element* from = rows[unit * Lane::kPair + pair] + column;
        for (int64_t n = 0; n < filled; ++n) out[n * Lane::kPair + pair] = from[n];
        for (int64_t n = filled; n < columns; ++n) out[n * Lane::kPair + pair] = Element{};
      }
    }
  }
}

LA_NAMESPACE_END
