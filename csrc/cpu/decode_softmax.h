// What the decode kernel works in, and the softmax over a tile's sightings.
#pragma once

#include "decode_tile.h"

LA_NAMESPACE_BEGIN

// Hands out aligned pieces of a block of memory; first used without memory, to learn the size.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = has_memory() ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  bool has_memory() const { return memory_ != nullptr; }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// A re-injection that some query of the row sees.
struct Sighting {
  int first_row;            // rows below it do not see it
  const uint8_t* selected;  // or null: all
  const float* cosine;      // [half]
  const float* sine;
};

struct BatchRow {
  int64_t begin, end;  // keys
  int64_t chunks;
  int num_sightings;
  Sighting* sightings;
};

// What a thread works in.
template <typename Tile>
struct Scratch {
  typename Tile::Query* queries;            // [1 + R][rows][query_width], plain and turned
  typename Tile::Key* keys;                 // two packed blocks
  float* logits;                            // [1 + R][rows][kTile]
  ScoreJob<Tile>* jobs;                     // [1 + R][row blocks]
  float* accumulator;                       // [rows][width]
  float* max;                               // [rows], in units of log 2
  float* factors;                           // [rows], for what was accumulated before this tile
  float* sum;                               // [rows][kLanes], to be added up
  float* turned;                            // [2][kMaxDim]
  uint64_t* shown;                          // [R], keys of the tile that a re-injection shows
  float** again;                            // [R], its logits [rows][kTile]; null if it shows none
  RowList<typename Tile::Storage>* listed;  // [2], this tile and the next, if the cache is paged
};

// Eight bool bytes as eight bits.
LA_HD uint64_t byte_bits(const uint8_t* bytes, int64_t count) {
  uint64_t word = 0;
  memcpy(&word, bytes, count < 8 ? count : 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  return (word * 0x0102040810204080ull) >> 56;
}

// Masks what row i does not see again, moves its max up to this tile's and scales its sum.
template <typename Tile>
LA_HD void raise_max(const BatchRow& row, int i, const Scratch<Tile>& s) {
  const float* plain = s.logits + i * kTile;
  Vec largest = load(plain);
  for (int j = kLanes; j < kTile; j += kLanes) largest = max(largest, load(plain + j));
  for (int a = 0; a < row.num_sightings; ++a) {
    if (s.again[a] == nullptr || i < row.sightings[a].first_row) continue;
    float* logits = s.again[a] + i * kTile;
    for (int j = 0; j < kTile; j += kLanes) {
      const uint32_t bits = static_cast<uint32_t>(s.shown[a] >> j) & ((1u << kLanes) - 1);
      const Vec seen = select(bits, load(logits + j), broadcast(-INFINITY));
      store(logits + j, seen);
      largest = max(largest, seen);
    }
  }
  const float before = s.max[i], tile_max = reduce_max(largest);
  s.factors[i] = 1.0f;
  if (!(tile_max > before)) return;
  s.max[i] = tile_max;
  s.factors[i] = exp2f(before - tile_max);
  store(s.sum + i * kLanes, mul(load(s.sum + i * kLanes), broadcast(s.factors[i])));
}

// Turns row i's logits of all sightings into one weight for each key, left where the plain
// logits were.
template <typename Tile>
LA_HD void weigh(const BatchRow& row, int i, const Scratch<Tile>& s) {
  float* weights = s.logits + i * kTile;
  // Nothing seen yet: any finite reference gives weights of 0.
  const Vec reference = broadcast(s.max[i] == -INFINITY ? 0.0f : s.max[i]);
  for (int j = 0; j < kTile; j += kLanes) {
    store(weights + j, exp2(sub(load(weights + j), reference)));
  }
  for (int a = 0; a < row.num_sightings; ++a) {
    if (s.again[a] == nullptr || i < row.sightings[a].first_row) continue;
    const float* logits = s.again[a] + i * kTile;
    for (int j = 0; j < kTile; j += kLanes) {
      const Vec weight = exp2(sub(load(logits + j), reference));
      store(weights + j, add(load(weights + j), weight));
    }
  }
  Vec sum = load(s.sum + i * kLanes);
  for (int j = 0; j < kTile; j += kLanes) sum = add(sum, load(weights + j));
  store(s.sum + i * kLanes, sum);
}

LA_NAMESPACE_END
