// Attention probability on each visual token, summed over ranges of queries and the G heads of a
// group: the column sums of P = exp(scale Q K^T - lse) over a small rectangle.
//
// Layouts: query [B, H_q, L_q, D], key [B, H_kv, L_k, D], lse [B, H_q, L_q], rows [B, T, 2], mass
// [B, T, H_kv, L_c], contiguous.
//
// Work: with the forward's lse known, the rectangle is independent of all other keys. One unit
// takes a tile of at most kTileKeys visual keys (ordinary, or of a re-injection) for one range and
// key head, packs it, and walks the query panels of the range; each panel's scores become column
// sums in registers. So the key axis is stationary and nothing is shared. The sums of a unit's tile
// are its own row of memory; a second pass adds them to the tokens, in order: no atomics. Without
// an lse, the forward runs first, without values.
//
// FLOP: 2 D per query head, query of a range and visible sighting of a visual token.
#include "kernels.h"
#include "parallel.h"
#include "query_panels.h"

LA_NAMESPACE_BEGIN

void routed_attention_prefill(const RoutedAttentionParams& p);

namespace {

constexpr int64_t kTileKeys = 192;

template <typename Lane>
class VisualMass {
 public:
  using Unit = typename Lane::Unit;
  using Sum = typename Lane::Sum;
  using Element = typename Lane::Element;

  VisualMass(const VisualMassParams& p, const Sum* lse)
      : p_(p),
        lse_(lse),
        sightings_(p, p.visual, kTileKeys, Sightings::Keys::kVisual),
        group_(p.query_heads / p.key_heads),
        depth_(p.head_dim / Lane::kPair) {}

  void run() {
    const int64_t heads = p_.batch * p_.num_ranges * p_.key_heads, tiles = sightings_.max_tiles;
    const int64_t threads = larger(1, p_.num_threads);
    for (int64_t n = 0; n < heads * p_.num_visual; ++n) p_.mass[n] = 0;
    Carver thread(nullptr);
    carve_thread(thread);
    const int64_t sums_bytes = round_up(heads * tiles * kTileKeys * sizeof(Sum), 64);
    Scratch scratch(sums_bytes + threads * thread.used());
    Sum* sums = reinterpret_cast<Sum*>(scratch.data);
    auto add_up = [&](int64_t index, int number) {
      Thread own = carve_thread(Carver(scratch.data + sums_bytes + number * thread.used()));
      sum_tile(index / tiles, index % tiles, sums + index * kTileKeys, own);
    };
    parallel_for(p_.num_threads, heads * tiles, add_up);
    auto scatter = [&](int64_t head, int) {
      const RowSightings& row = sightings_.rows[head / (p_.num_ranges * p_.key_heads)];
      float* mass = p_.mass + head * p_.num_visual;
      for (int64_t number = 0; number < row.num_lists; ++number) {
        const KeyList& list = row.lists[number];
        const Sum* from = sums + (head * tiles + list.first_tile) * kTileKeys;
        for (int64_t entry = 0; entry < list.count; ++entry) {
          mass[list.tokens[entry]] += static_cast<float>(from[entry]);
        }
      }
    };
    parallel_for(p_.num_threads, heads, scatter);
  }

 private:
  struct Thread {
    Element* room;
    Unit* key;    // [key panel][depth][columns], the tile
    Unit* query;  // [depth][kTileRows]
    Sum* score;   // [kTileRows][kTileKeys]
  };

  template <typename Carver_>
  Thread carve_thread(Carver_&& carver) const {
    return {carver.template take<Element>(larger(TileRows<Lane>::room(), PanelRows<Lane>::room())),
            carver.template take<Unit>(kTileKeys * depth_),
            carver.template take<Unit>(kTileRows * depth_),
            carver.template take<Sum>(kTileRows * kTileKeys)};
  }

  // `head` counts (row of the batch, range, key head).
  void sum_tile(int64_t head, int64_t number, Sum* sums, const Thread& own) const {
    const int64_t batch = head / (p_.num_ranges * p_.key_heads), key_head = head % p_.key_heads;
    const RowSightings& row = sightings_.rows[batch];
    if (number >= row.num_tiles) return;
    for (int64_t n = 0; n < kTileKeys; ++n) sums[n] = 0;
    const int32_t* range = p_.rows + head / p_.key_heads * 2;
    const int64_t begin = larger(0, range[0] - row.first_position);
    const int64_t end = smaller(p_.queries, range[1] - row.first_position);
    const KeyList& list = row.list_of_tile(number);
    const int64_t first = (number - list.first_tile) * kTileKeys;
    if (begin >= end) return;
    TileRows<Lane>(p_.key, p_, batch, key_head, list, first, own.room)
        .pack_transposed(smaller(kTileKeys, list.count - first), own.key);
    for (int64_t s = 0; s < row.num_sightings; ++s) {
      const Sighting& sighting = row.sightings[s];
      if (&row.lists[sighting.list] != &list) continue;
      for (int64_t query = larger(begin, sighting.first_query); query < end; query += kTileRows) {
        int64_t limits[kTileRows];
        const int64_t most = panel_limits(row, sighting, query, end, first, kTileKeys, limits);
        for (int64_t g = 0; most > 0 && g < group_; ++g) {
          sum_panel(batch, key_head * group_ + g, query, sighting, limits, most, sums, own);
        }
      }
    }
  }

  void sum_panel(int64_t batch, int64_t query_head, int64_t query, const Sighting& sighting,
                 const int64_t* limits, int64_t most, Sum* sums, const Thread& own) const {
    const PanelRows<Lane> rows(p_.query, p_, batch, query_head, query, &sighting, p_.visual.half,
                               scale_sign(p_.scale), own.room);
    pack_transposed<Lane, kTileRows>(rows.rows, p_.head_dim, own.query);
    const int64_t columns = round_up(most, 2 * kVectorWidth<Sum>);
    multiply_panels<Lane, 1, kTileRows, Into::kStore>(own.query, own.key, depth_, 0, depth_,
                                                      columns, own.score, kTileKeys);
    const Vector<Sum> scale = splat(static_cast<Sum>(scale_size(p_.scale) * kLog2E));
    for (int64_t n = 0; n < kTileRows; ++n) {
      if (limits[n] == 0) continue;
      Sum* score = own.score + n * kTileKeys;
      const Sum lse = lse_[(batch * p_.query_heads + query_head) * p_.queries + query + n];
      if (lse == -INFINITY) continue;
      const Vector<Sum> offset = splat(Sum(lse * Sum(kLog2E)));
      for (int64_t key = limits[n]; key < columns; ++key) score[key] = -INFINITY;
      for (int64_t key = 0; key < columns; key += kVectorWidth<Sum>) {
        const Vector<Sum> p = exp2_of<Lane::kCoarse>(load(score + key) * scale - offset);
        store(sums + key, load(sums + key) + p);
      }
    }
  }

  const VisualMassParams& p_;
  const Sum* lse_;
  const Sightings sightings_;
  const int64_t group_, depth_;
};

}  // namespace

void visual_mass(const VisualMassParams& p) {
  if (p.num_ranges == 0 || p.num_visual == 0) return;
  const int64_t count = p.batch * p.query_heads * p.queries;
  Scratch found(p.lse == nullptr ? count * larger(4, bytes_of(p.dtype)) : 0, Scratch::Kind::kOwned);
  if (p.lse == nullptr) {
    RoutedAttentionParams forward;
    static_cast<AttentionSizes&>(forward) = p;
    forward.query = p.query;
    forward.key = p.key;
    forward.lse = found.data;
    forward.visual = p.visual;
    routed_attention_prefill(forward);
  }
  const void* lse = p.lse == nullptr ? found.data : p.lse;
  dispatch_lane(p.dtype, [&](auto lane) {
    using Lane = decltype(lane);
    VisualMass<Lane>(p, static_cast<const typename Lane::Sum*>(lse)).run();
  });
}

LA_NAMESPACE_END
