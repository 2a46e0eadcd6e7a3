// The bf16 tile on AVX512-BF16: products of bf16 pairs, summed in float (VDPBF16PS).
//
// Keys are packed as pairs of neighbouring features, [16][kColumns]; a pair of query features is
// broadcast. For the values, two neighbouring keys are interleaved feature by feature and their
// two weights broadcast as a pair, so weights are rounded to bf16 (relative error 2^-9 each, as in
// any bf16 attention that hands probabilities to a bf16 matrix product).
//
// The interleaving instructions work within 128-bit lanes, so an accumulator block of 32 features
// holds features 8 l + (0 … 3) in its first vector and 8 l + (4 … 7) in its second (l = lane);
// `unpack_accumulator` puts them in order once per work unit.
#pragma once

#include "decode_tile.h"

#ifdef __AVX512BF16__

LA_NAMESPACE_BEGIN

struct BFloat16Tile {
  using Storage = BFloat16;
  using Query = BFloat16;  // packed [row][D]
  using Key = uint32_t;    // packed [kFeatures / 2][kColumns]
  static constexpr bool kPacks = true;
  static constexpr int kFeatures = 32;
  static constexpr int kMaxRows = 8;

  static LA_HD bool takes(int64_t dim) { return dim % 32 == 0; }
  static LA_HD int accumulator_stride(int dim) { return dim; }

  static LA_HD void pack_query(const float* row, int dim, Query* packed) {
    for (int d = 0; d < dim; d += kLanes) store(packed + d, load(row + d));
  }

  template <typename Rows>
  static LA_HD void pack(Rows keys, int rows, int, Key* packed) {
    for (int j = 0; j < kColumns; j += kLanes) {
      Vec block[kLanes];
      for (int n = 0; n < kLanes; ++n) {
        const int64_t row = j + n < rows ? j + n : rows - 1;
        block[n].v = _mm512_loadu_ps(keys[row]);
      }
      transpose(block);
      for (int n = 0; n < kLanes; ++n) _mm512_storeu_ps(packed + n * kColumns + j, block[n].v);
    }
  }

  static LA_HD __m512bh pair_everywhere(const BFloat16* p) {
    int32_t pair;
    memcpy(&pair, p, sizeof(pair));
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }

  template <int R, typename Rows>
  static LA_HD void multiply(const Query* query, int64_t query_stride, const Key* packed, int,
                             Vec (&sum)[R][2], Rows keys) {
    for (int d = 0; d < kFeatures / 2; ++d) {
      __builtin_prefetch(keys.ahead(2 * d), 0, 2);
      __builtin_prefetch(keys.ahead(2 * d + 1), 0, 2);
      const Key* pairs = packed + d * kColumns;
      const __m512bh first = reinterpret_cast<__m512bh>(_mm512_loadu_si512(pairs));
      const __m512bh second = reinterpret_cast<__m512bh>(_mm512_loadu_si512(pairs + kLanes));
      for (int r = 0; r < R; ++r) {
        const __m512bh q = pair_everywhere(query + r * query_stride + 2 * d);
        sum[r][0].v = _mm512_dpbf16_ps(sum[r][0].v, first, q);
        sum[r][1].v = _mm512_dpbf16_ps(sum[r][1].v, second, q);
      }
    }
  }

  template <int R, typename Rows>
  static void add_values(const float* weights, Rows values, int count, int dim,
                         const float* factors, float* accumulator) {
    BFloat16 rounded[R * kTile];
    for (int i = 0; i < R * kTile; i += kLanes) store(rounded + i, load(weights + i));
    const int pairs = count / 2;
    for (int d = 0; d < dim; d += 32) {
      Vec sum[R][2];
      for (int r = 0; r < R; ++r) {
        const Vec factor = broadcast(factors[r]);
        for (int n = 0; n < 2; ++n) {
          sum[r][n] = mul(factor, load(accumulator + r * dim + d + n * kLanes));
        }
      }
      auto add = [&](int j, __m512i even, __m512i odd) {
        const __m512bh low = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(even, odd));
        const __m512bh high = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(even, odd));
        for (int r = 0; r < R; ++r) {
          const __m512bh weight = pair_everywhere(rounded + r * kTile + j);
          sum[r][0].v = _mm512_dpbf16_ps(sum[r][0].v, low, weight);
          sum[r][1].v = _mm512_dpbf16_ps(sum[r][1].v, high, weight);
        }
      };
      for (int p = 0; p < pairs; ++p) {
        prefetch(values.ahead(2 * p), d);
        prefetch(values.ahead(2 * p + 1), d);
        add(2 * p, _mm512_loadu_si512(values[2 * p] + d),
            _mm512_loadu_si512(values[2 * p + 1] + d));
      }
      // The weight past the last key is 0, and its value row is not read.
      if (count % 2 != 0) {
        add(count - 1, _mm512_loadu_si512(values[count - 1] + d), _mm512_setzero_si512());
      }
      for (int r = 0; r < R; ++r) {
        for (int n = 0; n < 2; ++n) store(accumulator + r * dim + d + n * kLanes, sum[r][n]);
      }
    }
  }

  static LA_HD void unpack_accumulator(const float* row, int dim, float* out) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int d = 0; d < dim; d += 32) {
      const __m512 a = load(row + d).v, b = load(row + d + kLanes).v;
      store(out + d, Vec{_mm512_permutex2var_ps(a, first, b)});
      store(out + d + kLanes, Vec{_mm512_permutex2var_ps(a, second, b)});
    }
  }
};

LA_NAMESPACE_END

#endif
