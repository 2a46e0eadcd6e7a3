// Attention forward for many queries (prefill and training): out = softmax(scale Q K^T) V over all
// sightings of each key, and its log-sum-exp.
//
// Layouts: query, out [B, H_q, L_q, D], key, value [B, H_kv, L_k, D], any strides with a contiguous
// last axis; lse [B, H_q, L_q].
//
// Work: keys and values of one (row, key head) are packed once into tiles of kTileKeys for
// gemm_tile.h, ordinary keys and gathered visual keys alike. Then one unit takes about
// kPanelsPerBlock panels of kTileRows queries, the G heads of the group at the same positions, and
// walks the tiles; for each panel the scores (kTileRows x kTileKeys, in L1) become weights in place
// and are multiplied with the values. A tile of K and V is read from L3 once per block, from L2
// once per panel, and each load of it feeds 12 rows. A re-injection is one more walk over the
// packed visual keys with the block's queries turned by -shift; only blocks from its start on take
// it.
//
// Blocks are handed out longest first. Where there are many heads, a unit is a whole head instead,
// packed into memory of its thread. Each unit writes its own rows, so the result does not depend on
// the threads.
//
// FLOP: 4 D per query head, query and visible key; bytes: O(L D). The multipliers are the limit;
// the exponential adds about 12 instructions to the 2 D / kPair of each vector of scores.
#include "../core/visual.h"
#include "kernels.h"
#include "parallel.h"
#include "query_panels.h"

LA_NAMESPACE_BEGIN

void visual_mass(const VisualMassParams& p);

namespace {

constexpr int64_t kTileKeys = 384;
constexpr int64_t kPanelsPerBlock = 14;
constexpr int64_t kWholeHeads = 4;  // heads per thread from which on a unit is a whole head

template <typename Lane>
class Prefill {
 public:
  using Unit = typename Lane::Unit;
  using Sum = typename Lane::Sum;
  using Element = typename Lane::Element;

  explicit Prefill(const RoutedAttentionParams& p)
      : p_(p),
        sightings_(p, p.visual, kTileKeys, Sightings::Keys::kAll),
        group_(p.query_heads / p.key_heads),
        depth_(p.head_dim / Lane::kPair),
        width_(round_up(p.head_dim, kVectorWidth<Sum>)),
        positions_(larger(1, kPanelsPerBlock / group_)),
        panels_(positions_ * group_),
        blocks_((p.queries + positions_ * kTileRows - 1) / (positions_ * kTileRows)),
        with_values_(p.value.data != nullptr) {}

  void run() {
    const int64_t heads = p_.batch * p_.key_heads, tiles = sightings_.max_tiles;
    const int64_t threads = larger(1, p_.num_threads);
    Carver tile(nullptr), thread(nullptr);
    carve_tile(tile);
    carve_thread(thread);
    tile_bytes_ = tile.used();
    const bool whole = heads >= kWholeHeads * threads;
    const int64_t head_bytes = tiles * tile_bytes_;
    const int64_t memory_bytes = (whole ? threads : heads) * head_bytes;
    Scratch scratch(memory_bytes + threads * thread.used());
    auto thread_of = [&](int number) {
      return carve_thread(Carver(scratch.data + memory_bytes + number * thread.used()));
    };
    if (whole) {
      auto attend = [&](int64_t head, int number) {
        const Thread own = thread_of(number);
        char* memory = scratch.data + number * head_bytes;
        for (int64_t n = 0; n < tiles; ++n) pack_tile(head, n, memory, own);
        for (int64_t block = 0; block < blocks_; ++block) attend_block(head, block, memory, own);
      };
      parallel_for(p_.num_threads, heads, attend);
      return;
    }
    auto pack = [&](int64_t index, int number) {
      const int64_t head = index / tiles;
      pack_tile(head, index % tiles, scratch.data + head * head_bytes, thread_of(number));
    };
    parallel_for(p_.num_threads, heads * tiles, pack);
    auto attend = [&](int64_t index, int number) {
      const int64_t head = index % heads;
      attend_block(head, blocks_ - 1 - index / heads, scratch.data + head * head_bytes,
                   thread_of(number));
    };
    parallel_for(p_.num_threads, heads * blocks_, attend);
  }

 private:
  struct Tile {
    Unit* key;    // transposed
    Unit* value;  // paired
  };

  struct Thread {
    Element* room;
    Unit* query;            // [panel][depth][kTileRows]
    Sum* out;               // [panel][kTileRows][width]
    Sum* scores;            // [kTileRows][kTileKeys], one panel at a time
    RowState<Sum>* states;  // [panel][kTileRows]
    bool* started;          // [panel], whether `out` holds anything yet
  };

  template <typename Carver_>
  Tile carve_tile(Carver_&& carver) const {
    return {carver.template take<Unit>(kTileKeys * depth_),
            carver.template take<Unit>(with_values_ ? kTileKeys / Lane::kPair * width_ : 0)};
  }

  template <typename Carver_>
  Thread carve_thread(Carver_&& carver) const {
    return {carver.template take<Element>(larger(TileRows<Lane>::room(), PanelRows<Lane>::room())),
            carver.template take<Unit>(panels_ * depth_ * kTileRows),
            carver.template take<Sum>(with_values_ ? panels_ * kTileRows * width_ : 0),
            carver.template take<Sum>(kTileRows * kTileKeys),
            carver.template take<RowState<Sum>>(panels_ * kTileRows),
            carver.template take<bool>(panels_)};
  }

  Tile tile_at(char* head, int64_t number) const {
    return carve_tile(Carver(head + number * tile_bytes_));
  }

  void pack_tile(int64_t head, int64_t number, char* memory, const Thread& own) const {
    const int64_t batch = head / p_.key_heads;
    const RowSightings& row = sightings_.rows[batch];
    if (number >= row.num_tiles) return;
    const KeyList& list = row.list_of_tile(number);
    const int64_t first = (number - list.first_tile) * kTileKeys;
    const int64_t count = smaller(kTileKeys, list.count - first);
    const Tile tile = tile_at(memory, number);
    const int64_t key_head = head % p_.key_heads;
    TileRows<Lane>(p_.key, p_, batch, key_head, list, first, own.room)
        .pack_transposed(count, tile.key);
    if (!with_values_) return;
    TileRows<Lane>(p_.value, p_, batch, key_head, list, first, own.room)
        .pack_paired(count, kTileKeys, width_, tile.value);
  }

  int64_t first_query(int64_t block, int64_t panel) const {
    return (block * positions_ + panel / group_) * kTileRows;
  }

  void attend_block(int64_t head, int64_t block, char* memory, const Thread& own) const {
    const int64_t batch = head / p_.key_heads;
    const RowSightings& row = sightings_.rows[batch];
    int64_t panels = panels_;
    while (first_query(block, panels - 1) >= p_.queries) --panels;
    for (int64_t n = 0; n < panels * kTileRows; ++n) own.states[n] = {-INFINITY, 0};
    for (int64_t panel = 0; panel < panels; ++panel) own.started[panel] = false;
    const int64_t last = smaller(p_.queries, first_query(block, panels - 1) + kTileRows) - 1;
    for (int64_t s = 0; s < row.num_sightings; ++s) {
      const Sighting& sighting = row.sightings[s];
      const int64_t visible = row.limit(sighting, last);
      if (visible == 0) continue;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t query_head = head % p_.key_heads * group_ + panel % group_;
        PanelRows<Lane> rows(p_.query, p_, batch, query_head, first_query(block, panel), &sighting,
                             p_.visual.half, scale_sign(p_.scale), own.room);
        pack_transposed<Lane, kTileRows>(rows.rows, p_.head_dim,
                                         own.query + panel * depth_ * kTileRows);
      }
      const KeyList& list = row.lists[sighting.list];
      for (int64_t first = 0; first < visible; first += kTileKeys) {
        const Tile tile = tile_at(memory, list.first_tile + first / kTileKeys);
        for (int64_t panel = 0; panel < panels; ++panel) {
          attend_tile(row, sighting, first_query(block, panel), first, tile, panel, own);
        }
      }
    }
    finish(head, block, panels, own);
  }

  void attend_tile(const RowSightings& row, const Sighting& sighting, int64_t first_query,
                   int64_t first_entry, const Tile& tile, int64_t panel, const Thread& own) const {
    constexpr int64_t kPanel = 2 * kVectorWidth<Sum>;
    int64_t limits[kTileRows];
    const int64_t most =
        panel_limits(row, sighting, first_query, p_.queries, first_entry, kTileKeys, limits);
    if (most == 0) return;
    const int64_t columns = round_up(most, kPanel);
    multiply_panels<Lane, 1, kTileRows, Into::kStore>(own.query + panel * depth_ * kTileRows,
                                                      tile.key, depth_, 0, depth_, columns,
                                                      own.scores, kTileKeys);
    const Sum scale = static_cast<Sum>(scale_size(p_.scale) * kLog2E);
    Sum factors[kTileRows];
    for (int64_t n = 0; n < kTileRows; ++n) {
      factors[n] = softmax_row<Lane>(own.scores + n * kTileKeys, limits[n], columns, scale,
                                     own.states[panel * kTileRows + n]);
    }
    if (!with_values_) return;
    auto accumulate = [&](auto into) {
      multiply_panels<Lane, kTileKeys, 1, decltype(into)::kInto>(
          reinterpret_cast<const Unit*>(own.scores), tile.value, kTileKeys / Lane::kPair, 0,
          (most + Lane::kPair - 1) / Lane::kPair, width_, own.out + panel * kTileRows * width_,
          width_, factors);
    };
    if (own.started[panel]) {
      accumulate(As<Into::kScaleAdd>{});
    } else {
      accumulate(As<Into::kStore>{});
    }
    own.started[panel] = true;
  }

  void finish(int64_t head, int64_t block, int64_t panels, const Thread& own) const {
    const int64_t batch = head / p_.key_heads;
    const Sum scale = static_cast<Sum>(scale_size(p_.scale));
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t query_head = head % p_.key_heads * group_ + panel % group_;
      if (with_values_ && !own.started[panel]) {
        for (int64_t n = 0; n < kTileRows * width_; ++n) {
          own.out[panel * kTileRows * width_ + n] = 0;
        }
      }
      for (int64_t n = 0; n < kTileRows; ++n) {
        const int64_t query = first_query(block, panel) + n;
        if (query >= p_.queries) break;
        const RowState<Sum>& state = own.states[panel * kTileRows + n];
        // `sum` is NaN where an input was, and stays visible.
        const bool empty = state.sum == 0;
        if (with_values_) {
          char* to = const_cast<char*>(row_address(p_.out, p_.dtype, batch, query_head, query));
          store_row(own.out + (panel * kTileRows + n) * width_, empty ? Sum(0) : 1 / state.sum,
                    p_.dtype, p_.head_dim, to);
        }
        if (p_.lse != nullptr) {
          static_cast<Sum*>(p_.lse)[(batch * p_.query_heads + query_head) * p_.queries + query] =
              empty ? Sum(-INFINITY) : state.max * scale + Sum(::log(state.sum));
        }
      }
    }
  }

  const RoutedAttentionParams& p_;
  const Sightings sightings_;
  const int64_t group_, depth_, width_;
  const int64_t positions_, panels_, blocks_;  // of a block: panels side by side, panels in all
  const bool with_values_;
  int64_t tile_bytes_ = 0;
};

// Adds the mass of the queries from mass_from on, with the lse just found.
void add_mass(const RoutedAttentionParams& p, const void* lse) {
  int64_t num_visual = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    num_visual = larger(num_visual, count_visual(row_spans(p.visual, b), p.visual.num_spans));
  }
  const int64_t heads = p.batch * p.key_heads;
  const int64_t range_bytes = round_up(p.batch * 2 * sizeof(int32_t), 64);
  Scratch scratch(range_bytes + heads * num_visual * sizeof(float), Scratch::Kind::kOwned);
  int32_t* ranges = reinterpret_cast<int32_t*>(scratch.data);
  float* found = reinterpret_cast<float*>(scratch.data + range_bytes);
  for (int64_t b = 0; b < p.batch; ++b) {
    ranges[2 * b] = p.mass_from[b];
    ranges[2 * b + 1] = INT32_MAX;
  }
  VisualMassParams mass;
  static_cast<AttentionSizes&>(mass) = p;
  mass.query = p.query;
  mass.key = p.key;
  mass.lse = lse;
  mass.rows = ranges;
  mass.num_ranges = 1;
  mass.num_visual = num_visual;
  mass.mass = found;
  mass.visual = p.visual;
  visual_mass(mass);
  for (int64_t head = 0; head < heads; ++head) {
    float* to =
        p.mass + head / p.key_heads * p.mass_batch_stride + head % p.key_heads * p.mass_head_stride;
    for (int64_t n = 0; n < num_visual; ++n) to[n] += found[head * num_visual + n];
  }
}

}  // namespace

void routed_attention_prefill(const RoutedAttentionParams& p) {
  const int64_t count = p.batch * p.query_heads * p.queries;
  const bool need_lse = p.mass != nullptr && p.lse == nullptr;
  Scratch lse(need_lse ? count * larger(4, bytes_of(p.dtype)) : 0, Scratch::Kind::kOwned);
  RoutedAttentionParams forward = p;
  if (need_lse) forward.lse = lse.data;
  dispatch_lane(p.dtype, [&](auto lane) { Prefill<decltype(lane)>(forward).run(); });
  if (p.mass != nullptr) add_mass(p, forward.lse);
}

LA_NAMESPACE_END
