// routed_attention for few queries (L_q <= 16): every cached key and value is read once.
//
// Layout: query, out [B, H_q, L_q, D]; key, value [B, H_kv, L_k, D] or, with the same tiles and
// bits, paged (core/paging.h). The G query heads of a key head and the L_q queries form rows
// i * G + g; a re-injection adds the same rows once more, turned by -shift (see core/rotation.h),
// against the same packed keys. The weights of all sightings of a key are added before its value
// row is used, so values cost the same for any number of sightings.
//
// Work unit: (batch row, key head, chunk of 512 or more keys); a chunk goes through the online
// softmax in tiles of 64 keys and leaves (max, sum, accumulator) per row. Chunks depend on the
// row's length only and are merged in order by whichever thread finishes a key head last: the same
// bits for any number of threads, and for a batch row alone.
//
// Visual mass: the weights of the visual keys are kept ([rows, L_c] floats a key head, 5 % of the
// bytes of K and V at G = 7, written and read in cache) with the reference each tile had, and
// normalised after the merge.
//
// Bytes: 2 D times the element size per key and key head, read once. FLOP: 4 D G L_q per key, 2 D G
// more per additional sighting. With bf16, G = 7 and D = 128 that is 7 FLOP a byte: memory-bound on
// a whole socket. On one or two cores arithmetic and memory are near balance: on a Zen 4 core a key
// of one key head takes 28 ns from cache (15 of them VDPBF16PS at its peak rate), 36 to 41 ns
// from memory, and reading it alone 27 to 30 ns.
#include "../core/rotation.h"
#include "../core/visual.h"
#include "decode_softmax.h"
#include "decode_tile_bf16.h"
#include "decode_tile_dot.h"
#include "parallel.h"
#include "routed_attention_plain.h"

LA_NAMESPACE_BEGIN

namespace {

constexpr float kLog2e = 1.4426950408889634f;
static_assert(kTile == 64, "one bit of a uint64_t for each key of a tile");

template <typename Tile>
class Decode {
  using Storage = typename Tile::Storage;
  using Query = typename Tile::Query;

 public:
  explicit Decode(const RoutedAttentionParams& p)
      : p_(p),
        dim_(static_cast<int>(p.head_dim)),
        group_(static_cast<int>(p.query_heads / p.key_heads)),
        rows_(static_cast<int>(group_ * p.queries)),
        width_(Tile::accumulator_stride(dim_)),
        query_width_(round_up(dim_, kLanes)),
        row_blocks_((rows_ + Tile::kMaxRows - 1) / Tile::kMaxRows),
        threads_(p.num_threads < 1 ? 1 : p.num_threads),
        max_sightings_(p.visual.num_reinjections),
        // Keys of a work unit: many rows make a chunk's result large, so they get fewer chunks.
        chunk_(rows_ <= 16 ? 512 : (rows_ <= 64 ? 1024 : 2048)) {
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t chunks = num_chunks(b);
      if (chunks > max_chunks_) max_chunks_ = chunks;
      if (p.mass == nullptr) continue;
      const int64_t tokens = count_visual(row_spans(p.visual, b), p.visual.num_spans);
      if (tokens > tokens_) tokens_ = tokens;
    }
  }

  void run() {
    Arena sizes(nullptr);
    lay_out(sizes);
    Arena memory(thread_workspace(sizes.used()));
    lay_out(memory);
    for (int64_t b = 0; b < p_.batch; ++b) prepare_row(b);
    memset(finished_, 0, p_.batch * p_.key_heads * sizeof(int));
    // A thread takes its next unit before it starts on one, to know what to prefetch at its end.
    next_unit_ = 0;
    auto lane = [this](int64_t, int thread) {
      int64_t following = take_unit();
      while (following < num_units()) {
        const int64_t unit = following;
        following = take_unit();
        work(unit, following, thread);
      }
    };
    parallel_for(p_.num_threads, threads_ < num_units() ? threads_ : num_units(), lane);
  }

 private:
  int64_t num_chunks(int64_t b) const {
    const int64_t keys = p_.key_length[b] - p_.key_start[b];
    return keys <= 0 ? 1 : (keys + chunk_ - 1) / chunk_;
  }

  int64_t num_units() const { return p_.batch * p_.key_heads * max_chunks_; }

  // A row of the batch and key head, and the chunk of its keys.
  struct Unit {
    int64_t b, key_head, chunk;
    int64_t begin, end;  // no keys unless begin < end
  };

  // The heads of a chunk follow each other if the cache is paged, because the blocks of a chunk
  // then lie anywhere in memory and its heads mostly in the same pages of it; else the chunks of a
  // head.
  Unit unit_at(int64_t number) const {
    const int64_t b = number / (p_.key_heads * max_chunks_);
    const int64_t rest = number % (p_.key_heads * max_chunks_);
    const bool paged = p_.block_table != nullptr;
    const int64_t chunk = paged ? rest / p_.key_heads : rest % max_chunks_;
    const int64_t begin = batch_rows_[b].begin + chunk * chunk_, end = batch_rows_[b].end;
    return {b, paged ? rest % p_.key_heads : rest / max_chunks_, chunk, begin,
            begin + chunk_ < end ? begin + chunk_ : end};
  }

  // The next unit that has keys or must be finished.
  int64_t take_unit() {
    int64_t number;
    do {
      number = __atomic_fetch_add(&next_unit_, 1, __ATOMIC_RELAXED);
      if (number >= num_units()) break;
      const Unit unit = unit_at(number);
      if (unit.chunk < batch_rows_[unit.b].chunks) break;
    } while (true);
    return number;
  }

  void lay_out(Arena& arena) {
    const int64_t heads = p_.batch * p_.key_heads;
    const int64_t half = p_.visual.half;
    batch_rows_ = arena.take<BatchRow>(p_.batch);
    sightings_ = arena.take<Sighting>(p_.batch * max_sightings_);
    tables_ = arena.take<float>(p_.batch * max_sightings_ * 2 * half);
    finished_ = arena.take<int>(heads);
    chunk_max_ = arena.take<float>(heads * max_chunks_ * rows_);
    chunk_sum_ = arena.take<float>(heads * max_chunks_ * rows_);
    chunk_out_ = arena.take<float>(heads * max_chunks_ * rows_ * query_width_);
    weights_ = arena.take<float>(heads * rows_ * tokens_);
    references_ =
        arena.take<float>(tokens_ == 0 ? 0 : heads * max_chunks_ * (chunk_ / kTile) * rows_);
    scratch_ = arena.take<Scratch<Tile>>(threads_);
    for (int64_t t = 0; t < threads_; ++t) {
      Scratch<Tile> s;
      s.queries = arena.take<Query>((1 + max_sightings_) * rows_ * query_width_);
      s.keys = arena.take<typename Tile::Key>(2 * kColumns * Tile::kFeatures);
      s.logits = arena.take<float>((1 + max_sightings_) * rows_ * kTile);
      s.jobs = arena.take<ScoreJob<Tile>>((1 + max_sightings_) * row_blocks_);
      s.accumulator = arena.take<float>(rows_ * width_);
      s.max = arena.take<float>(rows_);
      s.factors = arena.take<float>(rows_);
      s.sum = arena.take<float>(rows_ * kLanes);
      s.turned = arena.take<float>(2 * kMaxDim);
      s.shown = arena.take<uint64_t>(max_sightings_);
      s.again = arena.take<float*>(max_sightings_);
      s.listed = arena.take<RowList<Storage>>(p_.block_table == nullptr ? 0 : 2);
      if (arena.has_memory()) scratch_[t] = s;
    }
  }

  void prepare_row(int64_t b) {
    const VisualParams& visual = p_.visual;
    BatchRow& row = batch_rows_[b];
    row.begin = p_.key_start[b];
    row.end = p_.key_length[b] > row.begin ? p_.key_length[b] : row.begin;
    row.chunks = num_chunks(b);
    row.num_sightings = 0;
    row.sightings = sightings_ + b * max_sightings_;
    for (int64_t r = 0; r < max_sightings_; ++r) {
      const int64_t column = b * max_sightings_ + r;
      const int64_t first = first_query_seeing(visual.start[column], p_.key_length[b], p_.queries);
      if (first >= p_.queries) continue;
      float* cosine = tables_ + column * 2 * visual.half;
      rotation_table(visual.inv_freq, visual.half, visual.shift[column], cosine,
                     cosine + visual.half);
      row.sightings[row.num_sightings++] = {static_cast<int>(first * group_),
                                            row_selected(visual, b, r), cosine,
                                            cosine + visual.half};
    }
  }

  void work(int64_t number, int64_t following, int thread) {
    const Unit unit = unit_at(number);
    const int64_t head = unit.b * p_.key_heads + unit.key_head;
    const BatchRow& row = batch_rows_[unit.b];
    const Scratch<Tile>& s = scratch_[thread];
    pack_queries(unit, s);
    for (int i = 0; i < rows_; ++i) s.max[i] = -INFINITY;
    memset(s.sum, 0, rows_ * kLanes * sizeof(float));
    memset(s.accumulator, 0, rows_ * width_ * sizeof(float));
    if (p_.block_table == nullptr) {
      walk_even(unit, following, s);
    } else {
      walk_listed(unit, following, s);
    }
    finish_chunk(head, unit.chunk, s);
    if (__atomic_add_fetch(&finished_[head], 1, __ATOMIC_ACQ_REL) == row.chunks) {
      merge(unit.b, unit.key_head);
    }
  }

  void walk_even(const Unit& unit, int64_t following, const Scratch<Tile>& s) const {
    using Rows = EvenRows<Storage>;
    auto row_at = [&](const HeadsView& view, const Unit& at, int64_t slot) {
      return row_of<const Storage>(view, at.b, at.key_head, slot);
    };
    for (int64_t tile = unit.begin; tile < unit.end; tile += kTile) {
      Unit next = unit;
      int64_t ahead = tile + kTile;
      if (ahead >= unit.end) {
        const bool last = following >= num_units();
        if (!last) next = unit_at(following);
        ahead = last ? tile : next.begin;
      }
      const int64_t left = unit.end - tile;
      const Rows keys{row_at(p_.key, unit, tile), row_at(p_.key, next, ahead), p_.key.row_stride};
      const Rows values{row_at(p_.value, unit, tile), row_at(p_.value, next, ahead),
                        p_.value.row_stride};
      attend_tile(unit, tile, static_cast<int>(left < kTile ? left : kTile), keys, values, s);
    }
  }

  void walk_listed(const Unit& unit, int64_t following, const Scratch<Tile>& s) const {
    using Rows = ListedRows<Storage>;
    RowList<Storage>* now = s.listed;
    RowList<Storage>* next = s.listed + 1;
    int count = list_tile(p_, unit.b, unit.key_head, unit.begin, unit.end, now);
    for (int64_t tile = unit.begin; tile < unit.end; tile += kTile) {
      int count_ahead = list_tile(p_, unit.b, unit.key_head, tile + kTile, unit.end, next);
      if (count_ahead == 0 && following < num_units()) {
        const Unit other = unit_at(following);
        count_ahead = list_tile(p_, other.b, other.key_head, other.begin, other.end, next);
      }
      const RowList<Storage>* ahead = count_ahead == 0 ? now : next;
      attend_tile(unit, tile, count, Rows{now->keys, ahead->keys, 0},
                  Rows{now->values, ahead->values, 0}, s);
      RowList<Storage>* const done = now;
      now = next;
      next = done;
      count = count_ahead;
    }
  }

  template <typename Rows>
  void attend_tile(const Unit& unit, int64_t tile, int count, Rows keys, Rows values,
                   const Scratch<Tile>& s) const {
    const int64_t b = unit.b;
    const BatchRow& row = batch_rows_[b];
    show(b, tile, count, s);
    const int jobs = list_jobs(row, s);
    const float scale = static_cast<float>(p_.scale) * kLog2e;
    if constexpr (Tile::kPacks) {
      score_tile<Tile>(keys, count, dim_, query_width_, scale, s.jobs, jobs, s.keys);
    } else {
      Tile::score(keys, count, dim_, query_width_, scale, s.jobs, jobs);
    }
    mask_unseen(b, tile, count, s);
    for (int i = 0; i < rows_; ++i) raise_max(row, i, s);
    for (int i = 0; i < rows_; ++i) weigh(row, i, s);
    if (tokens_ > 0) keep_weights(b, b * p_.key_heads + unit.key_head, tile, count, s);
    for (int block = 0; block < row_blocks_; ++block) {
      const int first = first_of_block(block);
      with_rows<Tile::kMaxRows>(first_of_block(block + 1) - first, [&](auto n) {
        Tile::template add_values<decltype(n)::value>(
            s.logits + first * kTile, block == 0 ? values : values.again(), count, dim_,
            s.factors + first, s.accumulator + first * width_);
      });
    }
  }

  // Queries as they are, followed by what each re-injection sees of them if the chunk has visual
  // keys.
  void pack_queries(const Unit& unit, const Scratch<Tile>& s) const {
    const BatchRow& row = batch_rows_[unit.b];
    bool visual = false;
    for_each_visual_run(row_spans(p_.visual, unit.b), p_.visual.num_spans, unit.begin, unit.end,
                        [&](int64_t, int64_t, int64_t) { visual = true; });
    const int sightings = visual ? row.num_sightings : 0;
    float* plain = s.turned;
    float* turned = s.turned + kMaxDim;
    for (int i = 0; i < rows_; ++i) {
      const Storage* query =
          row_of<const Storage>(p_.query, unit.b, unit.key_head * group_ + i % group_, i / group_);
      for (int d = 0; d < dim_; ++d) plain[d] = to_float(query[d]);
      Tile::pack_query(plain, dim_, s.queries + i * query_width_);
      for (int a = 0; a < sightings; ++a) {
        rotate(
            row.sightings[a].cosine, row.sightings[a].sine, p_.visual.half, dim_, -1,
            [&](int64_t d) { return plain[d]; }, [&](int64_t d, float x) { turned[d] = x; });
        Tile::pack_query(turned, dim_, s.queries + ((1 + a) * rows_ + i) * query_width_);
      }
    }
  }

  // Which keys of the tile each re-injection shows.
  void show(int64_t b, int64_t tile, int count, const Scratch<Tile>& s) const {
    const BatchRow& row = batch_rows_[b];
    for (int a = 0; a < row.num_sightings; ++a) s.shown[a] = 0;
    if (row.num_sightings == 0) return;
    for_each_visual_run(row_spans(p_.visual, b), p_.visual.num_spans, tile, tile + count,
                        [&](int64_t first, int64_t token, int64_t length) {
                          for (int a = 0; a < row.num_sightings; ++a) {
                            const uint8_t* selected = row.sightings[a].selected;
                            uint64_t bits = length == 64 ? ~0ull : (1ull << length) - 1;
                            if (selected != nullptr) {
                              bits = 0;
                              for (int64_t n = 0; n < length; n += 8) {
                                bits |= byte_bits(selected + token + n, length - n) << n;
                              }
                            }
                            s.shown[a] |= bits << (first - tile);
                          }
                        });
  }

  int first_of_block(int block) const { return rows_ * block / row_blocks_; }

  // The query rows that this tile is scored with: all of them plain, and again for each
  // re-injection that shows one of its keys. Returns the number of jobs.
  int list_jobs(const BatchRow& row, const Scratch<Tile>& s) const {
    int jobs = 0, sets = 0;
    for (int a = -1; a < row.num_sightings; ++a) {
      if (a >= 0) s.again[a] = nullptr;
      if (a >= 0 && s.shown[a] == 0) continue;
      float* logits = s.logits + sets++ * rows_ * kTile;
      if (a >= 0) s.again[a] = logits;
      for (int block = 0; block < row_blocks_; ++block) {
        const int first = first_of_block(block), last = first_of_block(block + 1);
        if (a >= 0 && last <= row.sightings[a].first_row) continue;
        s.jobs[jobs++] = {s.queries + ((1 + a) * rows_ + first) * query_width_,
                          logits + first * kTile, last - first};
      }
    }
    return jobs;
  }

  // Plain keys past the end of the row or later than a query.
  void mask_unseen(int64_t b, int64_t tile, int count, const Scratch<Tile>& s) const {
    const int64_t first_position = p_.key_length[b] - p_.queries;
    for (int i = 0; i < rows_; ++i) {
      const int64_t seen = first_position + i / group_ + 1 - tile;
      for (int64_t j = seen < 0 ? 0 : (seen < count ? seen : count); j < kTile; ++j) {
        s.logits[i * kTile + j] = -INFINITY;
      }
    }
  }

  void keep_weights(int64_t b, int64_t head, int64_t tile, int count,
                    const Scratch<Tile>& s) const {
    bool any = false;
    float* weights = weights_ + head * rows_ * tokens_;
    for_each_visual_run(row_spans(p_.visual, b), p_.visual.num_spans, tile, tile + count,
                        [&](int64_t key, int64_t token, int64_t length) {
                          any = true;
                          for (int r = 0; r < rows_; ++r) {
                            memcpy(weights + r * tokens_ + token,
                                   s.logits + r * kTile + (key - tile), length * sizeof(float));
                          }
                        });
    if (!any) return;
    float* references = tile_references(head, (tile - batch_rows_[b].begin) / kTile);
    for (int r = 0; r < rows_; ++r) references[r] = s.max[r];
  }

  float* tile_references(int64_t head, int64_t tile_number) const {
    return references_ + (head * max_chunks_ * (chunk_ / kTile) + tile_number) * rows_;
  }

  void finish_chunk(int64_t head, int64_t chunk, const Scratch<Tile>& s) const {
    const int64_t slot = (head * max_chunks_ + chunk) * rows_;
    for (int i = 0; i < rows_; ++i) {
      chunk_max_[slot + i] = s.max[i];
      chunk_sum_[slot + i] = reduce_add(load(s.sum + i * kLanes));
      Tile::unpack_accumulator(s.accumulator + i * width_, dim_,
                               chunk_out_ + (slot + i) * query_width_);
    }
  }

  void merge(int64_t b, int64_t key_head) const {
    const int64_t head = b * p_.key_heads + key_head;
    const int64_t chunks = batch_rows_[b].chunks;
    float* max_of = chunk_max_ + head * max_chunks_ * rows_;
    float* sum_of = chunk_sum_ + head * max_chunks_ * rows_;
    float* out_of = chunk_out_ + head * max_chunks_ * rows_ * query_width_;
    for (int i = 0; i < rows_; ++i) {
      float largest = -INFINITY, sum = 0;
      for (int64_t c = 0; c < chunks; ++c) {
        if (max_of[c * rows_ + i] > largest) largest = max_of[c * rows_ + i];
      }
      for (int64_t c = 0; c < chunks; ++c) {
        float* chunk_max = &max_of[c * rows_ + i];
        const float factor = *chunk_max == -INFINITY ? 0.0f : exp2f(*chunk_max - largest);
        sum += sum_of[c * rows_ + i] * factor;
        *chunk_max = factor;
      }
      const float inverse = sum > 0 || sum != sum ? 1.0f / sum : 0.0f;
      Storage* out = row_of<Storage>(p_.out, b, key_head * group_ + i % group_, i / group_);
      for (int d = 0; d < dim_; d += kLanes) {
        Vec total = zero();
        for (int64_t c = 0; c < chunks; ++c) {
          const Vec part = load(out_of + (c * rows_ + i) * query_width_ + d);
          total = fma(broadcast(max_of[c * rows_ + i]), part, total);
        }
        const int features = dim_ - d < kLanes ? dim_ - d : kLanes;
        store_first(out + d, mul(total, broadcast(inverse)), features);
      }
      if (p_.lse != nullptr) {
        const int64_t query_head = b * p_.query_heads + key_head * group_ + i % group_;
        static_cast<float*>(p_.lse)[query_head * p_.queries + i / group_] =
            sum == 0 ? -INFINITY : (largest + log2f(sum)) / kLog2e;
      }
      // What turns a tile's weights into probabilities: 2^(reference - max) / sum.
      max_of[i] = sum == 0 ? INFINITY : largest;
      sum_of[i] = inverse;
    }
    if (tokens_ > 0) add_mass(b, key_head, max_of, sum_of);
  }

  void add_mass(int64_t b, int64_t key_head, const float* max_of, const float* inverse) const {
    const int64_t head = b * p_.key_heads + key_head;
    const BatchRow& row = batch_rows_[b];
    const int first = static_cast<int>(
        first_query_seeing(p_.mass_from[b], p_.key_length[b], p_.queries) * group_);
    float* mass = p_.mass + b * p_.mass_batch_stride + key_head * p_.mass_head_stride;
    const float* weights = weights_ + head * rows_ * tokens_;
    float* factors = chunk_out_ + head * max_chunks_ * rows_ * query_width_;  // free by now
    for (int64_t tile = row.begin; tile < row.end; tile += kTile) {
      bool ready = false;
      const int64_t tile_end = tile + kTile < row.end ? tile + kTile : row.end;
      for_each_visual_run(
          row_spans(p_.visual, b), p_.visual.num_spans, tile, tile_end,
          [&](int64_t, int64_t token, int64_t length) {
            const float* references = tile_references(head, (tile - row.begin) / kTile);
            for (int i = first; i < rows_ && !ready; ++i) {
              factors[i] = exp2f(references[i] - max_of[i]) * inverse[i];
            }
            ready = true;
            for (int64_t n = 0; n < length; n += kLanes) {
              const int lanes = static_cast<int>(length - n < kLanes ? length - n : kLanes);
              Vec total = load_first(mass + token + n, lanes);
              for (int i = first; i < rows_; ++i) {
                total = fma(broadcast(factors[i]),
                            load_first(weights + i * tokens_ + token + n, lanes), total);
              }
              store_first(mass + token + n, total, lanes);
            }
          });
    }
  }

  const RoutedAttentionParams& p_;
  const int dim_, group_, rows_, width_, query_width_, row_blocks_;
  const int64_t threads_, max_sightings_, chunk_;
  int64_t max_chunks_ = 1, tokens_ = 0, next_unit_ = 0;
  BatchRow* batch_rows_ = nullptr;
  Sighting* sightings_ = nullptr;
  float* tables_ = nullptr;                            // [B][R][2][half]
  int* finished_ = nullptr;                            // [B H_kv] chunks
  float *chunk_max_ = nullptr, *chunk_sum_ = nullptr;  // [B H_kv][chunks][rows]
  float* chunk_out_ = nullptr;                         // [B H_kv][chunks][rows][query_width]
  float* weights_ = nullptr;                           // [B H_kv][rows][tokens]
  float* references_ = nullptr;                        // [B H_kv][tiles][rows]
  Scratch<Tile>* scratch_ = nullptr;
};

template <typename T>
void decode(const RoutedAttentionParams& p) {
  Decode<ElementTile<T>>(p).run();
}

#ifdef __AVX512BF16__
template <>
void decode<BFloat16>(const RoutedAttentionParams& p) {
  if (BFloat16Tile::takes(p.head_dim)) {
    Decode<BFloat16Tile>(p).run();
  } else {
    Decode<ElementTile<BFloat16>>(p).run();
  }
}
#endif

#ifdef LA_PLAIN
template <>
void decode<double>(const RoutedAttentionParams& p) {
  PlainAttention<double>(p).run();
}
#endif

}  // namespace

void routed_attention_decode(const RoutedAttentionParams& p) {
  const bool plain = p.head_dim > kMaxDim || visual_before_start(p);
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (plain) {
      PlainAttention<T>(p).run();
    } else {
      decode<T>(p);
    }
  });
}

LA_NAMESPACE_END
