// The inner loops of decoding: a tile of kTile cached keys against blocks of query rows.
//
// A Tile type says how keys and queries are laid out and multiplied:
//   add_values  accumulator[row][:] = factor[row] * accumulator[row][:] + sum weight * value
// FloatTile converts everything to float. BFloat16Tile (decode_tile_bf16.h) multiplies bf16 pairs.
// `score_tile` multiplies queries and keys, kColumns keys by kFeatures features at a time, with
//   pack        a block of keys -> one column per key, so that logits come out with keys along the
//               lanes, ready for the softmax, and no sum across lanes is ever taken
//   multiply    logits[row][key] += <query row, key> over the block's features
// DotTile (decode_tile_dot.h) packs nothing and has a `score` of its own: with half as many
// registers that is faster.
//
// Packing costs a fixed number of shuffles per key, however many query rows (heads of the group x
// sightings x queries) then use the block. A block is multiplied right after it is packed: the
// processor then shuffles the next block while the products of this one are still running.
//
// `ahead` are the rows of the tile that this thread reads next: each line that is loaded asks
// for the line in the same place one tile on. Rows are short and the hardware prefetchers do not
// follow them: without this a decode from memory takes twice as long, and likewise when
// the lines are asked for in the first cache instead of the second (measured on Zen 4).
#pragma once

#include "decode_rows.h"
#include "simd.h"

LA_NAMESPACE_BEGIN

constexpr int kColumns = 2 * kLanes;  // keys or features per inner loop
constexpr int kMaxDim = 256;          // larger heads take the plain path
static_assert(kTile % kColumns == 0, "a tile is a whole number of column blocks");

// Calls fn(Rows<n>{}): the row count as a compile-time constant.
template <int N>
struct Rows {
  static constexpr int value = N;
};
template <int N, typename Fn>
LA_HD void with_rows(int rows, Fn fn) {
  if constexpr (N == 1) {
    fn(Rows<1>{});
  } else if (rows == N) {
    fn(Rows<N>{});
  } else {
    with_rows<N - 1>(rows, fn);
  }
}

LA_HD int round_up(int64_t n, int64_t step) {
  return static_cast<int>((n + step - 1) / step * step);
}

// Asks for the cache line at p, if p is the first element of a line's worth.
template <typename T>
LA_HD void prefetch(const T* p, int feature) {
  if (feature * static_cast<int>(sizeof(T)) % 64 == 0) __builtin_prefetch(p + feature, 0, 2);
}

// A block of query rows and where its logits go.
template <typename Tile>
struct ScoreJob {
  const typename Tile::Query* query;  // [rows][query_stride]
  float* logits;                      // [rows][kTile]
  int rows;
};

// logits = scale * <query row, key> for `count` keys and every job. `packed` holds two blocks: the
// next one is packed before this one is multiplied, so that its shuffles run beside the products.
template <typename Tile, typename Rows>
void score_tile(Rows keys, int count, int dim, int64_t query_stride, float scale,
                const ScoreJob<Tile>* jobs, int num_jobs, typename Tile::Key* packed) {
  constexpr int kFeatures = Tile::kFeatures;
  constexpr int64_t kBlock = kColumns * kFeatures;
  const int steps = (dim + kFeatures - 1) / kFeatures;  // blocks along the features
  const int blocks = (count + kColumns - 1) / kColumns * steps;
  auto pack = [&](int block) {
    const int j = block / steps * kColumns, d = block % steps * kFeatures;
    const int features = dim - d < kFeatures ? dim - d : kFeatures;
    auto* to = packed + block % 2 * kBlock;
    if (count - j >= kColumns && features == kFeatures) {
      Tile::pack(keys.from(j, d), kColumns, kFeatures, to);
    } else {
      Tile::pack(keys.from(j, d), count - j, features, to);
    }
  };
  pack(0);
  for (int block = 0; block < blocks; ++block) {
    if (block + 1 < blocks) pack(block + 1);
    const int j = block / steps * kColumns, d = block % steps * kFeatures;
    const int features = dim - d < kFeatures ? dim - d : kFeatures;
    const Vec factor = broadcast(d + kFeatures >= dim ? scale : 1.0f);
    for (int i = 0; i < num_jobs; ++i) {
      with_rows<Tile::kMaxRows>(jobs[i].rows, [&](auto n) {
        constexpr int R = decltype(n)::value;
        float* logits = jobs[i].logits + j;
        Vec sum[R][2];
        for (int r = 0; r < R; ++r) {
          sum[r][0] = d == 0 ? zero() : load(logits + r * kTile);
          sum[r][1] = d == 0 ? zero() : load(logits + r * kTile + kLanes);
        }
        Tile::template multiply<R>(jobs[i].query + d, query_stride, packed + block % 2 * kBlock,
                                   features, sum, keys.from(j, d));
        for (int r = 0; r < R; ++r) {
          store(logits + r * kTile, mul(sum[r][0], factor));
          store(logits + r * kTile + kLanes, mul(sum[r][1], factor));
        }
      });
    }
  }
}

template <typename Element>
struct FloatTile {
  using Storage = Element;
  using Query = float;  // packed [row][D]
  using Key = float;    // packed [kFeatures][kColumns]
  static constexpr bool kPacks = true;
  static constexpr int kFeatures = kLanes;
  static constexpr int kMaxRows = kLanes == 16 ? 8 : 6;  // query rows that fit into the registers

  // Features of one accumulator row.
  static LA_HD int accumulator_stride(int dim) { return round_up(dim, kLanes); }

  static LA_HD void pack_query(const float* row, int dim, Query* packed) {
    for (int d = 0; d < dim; ++d) packed[d] = row[d];
  }

  // `rows` holds the number of keys there are from `keys` on; past them the last one stands in, and
  // its logits are never used.
  template <typename Rows>
  static LA_HD void pack(Rows keys, int rows, int features, Key* packed) {
    for (int j = 0; j < kColumns; j += kLanes) {
      Vec block[kLanes];
      for (int n = 0; n < kLanes; ++n) {
        const int64_t row = j + n < rows ? j + n : rows - 1;
        const Element* key = keys[row];
        block[n] = features == kLanes ? load(key) : load_first(key, features);
      }
      transpose(block);
      for (int n = 0; n < kLanes; ++n) store(packed + n * kColumns + j, block[n]);
    }
  }

  template <int R, typename Rows>
  static LA_HD void multiply(const Query* query, int64_t query_stride, const Key* packed,
                             int features, Vec (&sum)[R][2], Rows keys) {
    for (int d = 0; d < features; ++d) {
      for (int n = 0; n < kColumns / kFeatures; ++n) {
        __builtin_prefetch(keys.ahead(d * (kColumns / kFeatures) + n), 0, 2);
      }
      const Vec first = load(packed + d * kColumns);
      const Vec second = load(packed + d * kColumns + kLanes);
      for (int r = 0; r < R; ++r) {
        const Vec q = broadcast(query[r * query_stride + d]);
        sum[r][0] = fma(q, first, sum[r][0]);
        sum[r][1] = fma(q, second, sum[r][1]);
      }
    }
  }

  template <int R, typename Rows>
  static void add_values(const float* weights, Rows values, int count, int dim,
                         const float* factors, float* accumulator) {
    const int width = accumulator_stride(dim);
    int d = 0;
    for (; d + kColumns <= dim; d += kColumns) {
      add_columns<R, 2>(weights, values.from(0, d), count, kLanes, factors, accumulator + d, width);
    }
    for (; d < dim; d += kLanes) {
      const int features = dim - d < kLanes ? dim - d : kLanes;
      add_columns<R, 1>(weights, values.from(0, d), count, features, factors, accumulator + d,
                        width);
    }
  }

  // Brings an accumulator row into feature order.
  static LA_HD void unpack_accumulator(const float* row, int dim, float* out) {
    for (int d = 0; d < dim; d += kLanes) store(out + d, load(row + d));
  }

 private:
  template <int R, int N, typename Rows>
  static LA_HD void add_columns(const float* weights, Rows values, int count, int features,
                                const float* factors, float* accumulator, int width) {
    Vec sum[R][N];
    for (int r = 0; r < R; ++r) {
      const Vec factor = broadcast(factors[r]);
      for (int n = 0; n < N; ++n) {
        sum[r][n] = mul(factor, load(accumulator + r * width + n * kLanes));
      }
    }
    for (int j = 0; j < count; ++j) {
      Vec value[N];
      for (int n = 0; n < N; ++n) {
        const Element* v = values[j] + n * kLanes;
        value[n] = features == kLanes ? load(v) : load_first(v, features);
        prefetch(values.ahead(j), n * kLanes);
      }
      for (int r = 0; r < R; ++r) {
        const Vec weight = broadcast(weights[r * kTile + j]);
        for (int n = 0; n < N; ++n) sum[r][n] = fma(weight, value[n], sum[r][n]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) store(accumulator + r * width + n * kLanes, sum[r][n]);
    }
  }
};

LA_NAMESPACE_END
