// The tile of decoding where there are 16 registers of 8 floats (AVX2): features along the lanes.
// `ElementTile` is the choice between it and FloatTile.
//
// Keys and values are used as they lie in memory, turned into floats in registers once for each
// block of up to four query rows. A logit is then a sum across lanes; four of them together take
// 7 shuffles. Turning a key around as FloatTile does takes 48 shuffles and 32 passes through the
// first cache, which pays only where the registers hold more query rows.
//
// A product takes four cycles and two start in each, so eight sums must be under way, and twelve
// are better (measured on Zen 3, D = 128: 1.4 and 1.7 products a cycle). With what they multiply
// they fill the registers: 4 rows by 3 keys, or 3 by 4.
//
// At G = 7 and D = 128 a key has 112 products for its logits and 112 for its value, 112 cycles
// in all. From cache it takes 160 to 180 (float32, bfloat16), against 230 to 250 with FloatTile.
#pragma once

#include "decode_tile.h"

#if defined(__AVX2__) && !defined(__AVX512F__)

LA_NAMESPACE_BEGIN

// The sums of four vectors.
LA_HD __m128 reduce_add(Vec a, Vec b, Vec c, Vec d) {
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c.v, d.v), _mm256_unpackhi_ps(c.v, d.v));
  const __m256 all =
      _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// `Element` is what the cache holds; D is a multiple of kLanes.
template <typename Element>
struct DotTile {
  using Storage = Element;
  using Query = float;  // packed [row][D]
  using Key = float;    // no key is packed, so no room is needed for them
  static constexpr bool kPacks = false;
  static constexpr int kFeatures = 0;
  static constexpr int kMaxRows = 4;
  // Keys that all rows are multiplied with before the next: they stay in the first cache.
  static constexpr int kGroup = 8;

  static LA_HD int accumulator_stride(int dim) { return dim; }

  static LA_HD void pack_query(const float* row, int dim, Query* packed) {
    for (int d = 0; d < dim; d += kLanes) store(packed + d, load(row + d));
  }

  // logits = scale * <query row, key>; past `count` the last key stands in.
  template <typename Rows>
  static LA_HD void score(Rows keys, int count, int dim, int64_t query_stride, float scale,
                          const ScoreJob<DotTile>* jobs, int num_jobs) {
    for (int j = 0; j < count; j += kGroup) {
      const Element* group[kGroup];
      for (int n = 0; n < kGroup; ++n) group[n] = keys[j + n < count ? j + n : count - 1];
      for (int i = 0; i < num_jobs; ++i) {
        with_rows<kMaxRows>(jobs[i].rows, [&](auto n) {
          constexpr int R = decltype(n)::value;
          score_group<R>(jobs[i].query, query_stride, group, keys.from(j, 0), dim, scale,
                         jobs[i].logits + j);
        });
      }
    }
  }

  template <int R, typename Rows>
  static void add_values(const float* weights, Rows values, int count, int dim,
                         const float* factors, float* accumulator) {
    constexpr int N = R == 4 ? 2 : (R == 1 ? 8 : 4);
    int d = 0;
    for (; d + N * kLanes <= dim; d += N * kLanes) {
      add_columns<R, N>(weights, values.from(0, d), count, dim, factors, accumulator + d);
    }
    for (; d < dim; d += kLanes) {
      add_columns<R, 1>(weights, values.from(0, d), count, dim, factors, accumulator + d);
    }
  }

  // Accumulator rows are in feature order.
  static LA_HD void unpack_accumulator(const float* row, int dim, float* out) {
    for (int d = 0; d < dim; d += kLanes) store(out + d, load(row + d));
  }

 private:
  // One block of rows against kGroup keys. A function of its own, for the sake of the registers.
  template <int R, typename Rows>
  static __attribute__((noinline)) void score_group(const Query* query, int64_t query_stride,
                                                    const Element* const* group, Rows keys, int dim,
                                                    float scale, float* logits) {
    constexpr int K = R == 4 ? 3 : (R == 1 ? 8 : 4);
    constexpr int kRest = kGroup % K;
    for (int k = 0; k + K <= kGroup; k += K) {
      score_keys<R, K>(query, query_stride, group + k, keys.from(k, 0), dim, scale, logits + k);
    }
    if constexpr (kRest > 0) {
      constexpr int k = kGroup - kRest;
      score_keys<R, kRest>(query, query_stride, group + k, keys.from(k, 0), dim, scale, logits + k);
    }
  }

  // The loops over rows and keys must be gone before the compiler decides what lies in registers.
  template <int R, int K, typename Rows>
  static LA_HD void score_keys(const Query* query, int64_t query_stride,
                               const Element* const* group, Rows keys, int dim, float scale,
                               float* logits) {
    Vec sum[R][K];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) sum[r][k] = zero();
    }
    for (int d = 0; d < dim; d += kLanes) {
      // Each block of rows asks again: from memory a float32 decode then takes a tenth less.
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) prefetch(keys.ahead(k), d);
      Vec q[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) q[r] = load(query + r * query_stride + d);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) {
        const Vec key = load(group[k] + d);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r][k] = fma(q[r], key, sum[r][k]);
      }
    }
    const __m128 factor = _mm_set1_ps(scale);
    if constexpr (K == 2) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r += 2) {
        const __m128 x = reduce_add(sum[r][0], sum[r][1], sum[r + 1][0], sum[r + 1][1]);
        const __m128 scaled = _mm_mul_ps(factor, x);
        _mm_storel_pi(reinterpret_cast<__m64*>(logits + r * kTile), scaled);
        _mm_storeh_pi(reinterpret_cast<__m64*>(logits + (r + 1) * kTile), scaled);
      }
      return;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int k = 0; k < K; k += 4) {
        // Of three keys, the fourth logit is overwritten by what comes next.
        const Vec last = sum[r][k + 3 < K ? k + 3 : k];
        const __m128 x = reduce_add(sum[r][k], sum[r][k + 1], sum[r][k + 2], last);
        _mm_storeu_ps(logits + r * kTile + k, _mm_mul_ps(factor, x));
      }
    }
  }

  // N vectors of features.
  template <int R, int N, typename Rows>
  static LA_HD void add_columns(const float* weights, Rows values, int count, int width,
                                const float* factors, float* accumulator) {
    Vec sum[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec factor = broadcast(factors[r]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        sum[r][n] = mul(factor, load(accumulator + r * width + n * kLanes));
      }
    }
    for (int j = 0; j < count; ++j) {
      const Element* row = values[j];
      Vec weight[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) weight[r] = broadcast(weights[r * kTile + j]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const Vec value = load(row + n * kLanes);
        prefetch(values.ahead(j), n * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r][n] = fma(weight[r], value, sum[r][n]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) store(accumulator + r * width + n * kLanes, sum[r][n]);
    }
  }
};

template <typename Element>
using ElementTile = DotTile<Element>;

LA_NAMESPACE_END

#else

LA_NAMESPACE_BEGIN

template <typename Element>
using ElementTile = FloatTile<Element>;

LA_NAMESPACE_END

#endif
