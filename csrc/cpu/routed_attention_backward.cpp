// Backward of routed attention: gradients of query, key and value from the forward's output and
// log-sum-exp. With one merged lse and D = rowsum(dO * O), for each sighting r (queries turned by
// -shift_r, keys and values as cached):
//
//   P = exp(scale Q_r K^T - lse)   dV += P^T dO   dS = P * (dO V^T - D)
//   dK += scale dS^T Q_r           dQ += scale R(+shift_r)(dS K)
//
// Layouts: as the forward; the gradients have the layouts of what they belong to.
//
// Work: one unit owns one (row, key head), so scores are computed once and all five products share
// them. (Two passes, one stationary in keys and one in queries, need no sums in memory but seven
// products.) It walks blocks of about kPanelsPerBlock panels of kTileRows queries; for each tile of
// kTileKeys keys, P and dS of the whole block are kept (in L2), dQ is summed in the block, and dK
// and dV of the tile in float rows of the head, read and written once per block. The score panels
// of queries above the causal edge are skipped in all five products.
// Where the heads do not divide evenly among the threads, `chunks_` units share a head, each with
// every chunks_-th block and sums of its own, added in order at the end. Nothing else is shared, so
// there are no atomics, and the same inputs and thread count give the same bits. Where there are
// many heads, a unit also packs and writes its head, in memory of its thread.
//
// Gathered visual keys have sums of their own rows, added to the row they came from at the end.
// Where the visual mass is wanted, each tile has sums of P over the counted queries as well.
//
// FLOP: 10 D per query head, query and visible key; bytes: O(L D) and the sums once per block
// (16 D bytes for each key and block of 10 D kPanelsPerBlock kTileRows FLOP: 0.01 bytes a FLOP).
// The multipliers are the limit.
#include "column_sums.h"
#include "kernels.h"
#include "parallel.h"
#include "query_panels.h"

LA_NAMESPACE_BEGIN

namespace {

constexpr int64_t kTileKeys = 192;  // a multiple of kTileRows and of two vectors
constexpr int64_t kPanelsPerBlock = 14;
constexpr int64_t kWholeHeads = 4;  // heads per thread from which on a unit is a whole head
constexpr int64_t kWriteRows = 64;

template <typename Lane>
class Backward {
 public:
  using Unit = typename Lane::Unit;
  using Sum = typename Lane::Sum;
  using Element = typename Lane::Element;
  static constexpr int64_t kPanelUnits = kTileRows / Lane::kPair;

  explicit Backward(const RoutedAttentionBackwardParams& p)
      : p_(p),
        sightings_(p, p.visual, kTileKeys, Sightings::Keys::kAll),
        group_(p.query_heads / p.key_heads),
        depth_(p.head_dim / Lane::kPair),
        width_(round_up(p.head_dim, kVectorWidth<Sum>)),
        positions_(larger(1, kPanelsPerBlock / group_)),
        panels_(positions_ * group_),
        blocks_((p.queries + positions_ * kTileRows - 1) / (positions_ * kTileRows)) {}

  void run() {
    const int64_t heads = p_.batch * p_.key_heads, tiles = sightings_.max_tiles;
    const int64_t threads = larger(1, p_.num_threads);
    Carver tile(nullptr), sums(nullptr), thread(nullptr);
    carve_tile(tile);
    carve_sums(sums);
    carve_thread(thread);
    tile_bytes_ = tile.used();
    sums_bytes_ = sums.used();
    const bool whole = heads >= kWholeHeads * threads;
    chunks_ = whole ? 1 : choose_chunks(heads, threads);
    const int64_t head_bytes = tiles * (tile_bytes_ + chunks_ * sums_bytes_);
    const int64_t memory_bytes = (whole ? threads : heads) * head_bytes;
    const int64_t ranges = (p_.keys + kWriteRows - 1) / kWriteRows;
    Scratch scratch(memory_bytes + threads * thread.used());
    auto thread_of = [&](int number) {
      return carve_thread(Carver(scratch.data + memory_bytes + number * thread.used()));
    };
    if (whole) {
      auto differentiate = [&](int64_t head, int number) {
        const Thread own = thread_of(number);
        char* memory = scratch.data + number * head_bytes;
        for (int64_t n = 0; n < tiles; ++n) pack_tile(head, n, memory, own);
        differentiate_chunk(head, 0, memory, own);
        for (int64_t n = 0; n < ranges; ++n) write_keys(head, n * kWriteRows, memory, own);
        add_mass(head, memory);
      };
      parallel_for(p_.num_threads, heads, differentiate);
      return;
    }
    auto memory_of = [&](int64_t head) { return scratch.data + head * head_bytes; };
    auto pack = [&](int64_t index, int number) {
      pack_tile(index / tiles, index % tiles, memory_of(index / tiles), thread_of(number));
    };
    parallel_for(p_.num_threads, heads * tiles, pack);
    auto differentiate = [&](int64_t index, int number) {
      const int64_t head = index % heads;
      differentiate_chunk(head, index / heads, memory_of(head), thread_of(number));
    };
    parallel_for(p_.num_threads, heads * chunks_, differentiate);
    auto write = [&](int64_t index, int number) {
      const int64_t head = index / ranges;
      write_keys(head, index % ranges * kWriteRows, memory_of(head), thread_of(number));
    };
    parallel_for(p_.num_threads, heads * ranges, write);
    auto add = [&](int64_t head, int) { add_mass(head, memory_of(head)); };
    if (p_.mass != nullptr) parallel_for(p_.num_threads, heads, add);
  }

 private:
  struct Tile {
    Unit* key_columns;  // transposed
    Unit* value_columns;
    Unit* key_rows;  // paired
  };

  struct Sums {
    Sum* key;  // [kTileKeys][width]
    Sum* value;
    Sum* weight;  // [kTileKeys], P of the counted queries, if the mass is wanted
  };

  struct Thread {
    Element* room;
    Unit* query;          // [panel][depth][kTileRows]
    Unit* query_rows;     // paired
    Unit* grad_out;       // as query
    Unit* grad_out_rows;  // as query_rows
    Sum* lse;             // [row], times log2(e); +inf where nothing is seen
    Sum* delta;           // [row], rowsum(dO * O)
    Sum* score;           // [kTileRows][kTileKeys], one panel
    Sum* grad_score;      // the same
    Unit* weight_pairs;   // [row / kPair][kTileKeys], the block
    Unit* grad_pairs;     // the same
    Sum* grad_query;      // [row][width], of all sightings
    Sum* grad_turned;     // of the current one
    Sum* written;         // [kWriteRows][width], twice
    int64_t* limits;      // [panel]
    uint8_t* counted;     // [row], for the mass
  };

  // Units for each thread are equal to 15 % with the fewest chunks that allow it.
  static int64_t choose_chunks(int64_t heads, int64_t threads) {
    for (int64_t chunks = 1; chunks < threads; ++chunks) {
      const int64_t rounds = (heads * chunks + threads - 1) / threads;
      if (heads * chunks * 100 >= rounds * threads * 85) return chunks;
    }
    return threads;
  }

  template <typename Carver_>
  Tile carve_tile(Carver_&& carver) const {
    return {carver.template take<Unit>(kTileKeys * depth_),
            carver.template take<Unit>(kTileKeys * depth_),
            carver.template take<Unit>(kTileKeys / Lane::kPair * width_)};
  }

  template <typename Carver_>
  Sums carve_sums(Carver_&& carver) const {
    return {carver.template take<Sum>(kTileKeys * width_),
            carver.template take<Sum>(kTileKeys * width_),
            carver.template take<Sum>(p_.mass == nullptr ? 0 : kTileKeys)};
  }

  template <typename Carver_>
  Thread carve_thread(Carver_&& carver) const {
    const int64_t rows = panels_ * kTileRows, units = rows / Lane::kPair;
    const int64_t panel = Lane::kPair == 1 ? 0 : kTileRows * kTileKeys;
    return {carver.template take<Element>(larger(TileRows<Lane>::room(), PanelRows<Lane>::room())),
            carver.template take<Unit>(rows * depth_),
            carver.template take<Unit>(units * width_),
            carver.template take<Unit>(rows * depth_),
            carver.template take<Unit>(units * width_),
            carver.template take<Sum>(rows),
            carver.template take<Sum>(rows),
            carver.template take<Sum>(panel),
            carver.template take<Sum>(panel),
            carver.template take<Unit>(units * kTileKeys),
            carver.template take<Unit>(units * kTileKeys),
            carver.template take<Sum>(rows * width_),
            carver.template take<Sum>(rows * width_),
            carver.template take<Sum>(2 * kWriteRows * width_),
            carver.template take<int64_t>(panels_),
            carver.template take<uint8_t>(rows)};
  }

  Tile tile_at(char* head, int64_t number) const {
    return carve_tile(Carver(head + number * tile_bytes_));
  }

  Sums sums_at(char* head, int64_t chunk, int64_t number) const {
    const int64_t tiles = sightings_.max_tiles;
    return carve_sums(Carver(head + tiles * tile_bytes_ + (chunk * tiles + number) * sums_bytes_));
  }

  void pack_tile(int64_t head, int64_t number, char* memory, const Thread& own) const {
    const int64_t batch = head / p_.key_heads, key_head = head % p_.key_heads;
    const RowSightings& row = sightings_.rows[batch];
    if (number >= row.num_tiles) return;
    const KeyList& list = row.list_of_tile(number);
    const int64_t first = (number - list.first_tile) * kTileKeys;
    const int64_t count = smaller(kTileKeys, list.count - first);
    const Tile tile = tile_at(memory, number);
    const TileRows<Lane> keys(p_.key, p_, batch, key_head, list, first, own.room);
    keys.pack_transposed(count, tile.key_columns);
    keys.pack_paired(count, kTileKeys, width_, tile.key_rows);
    TileRows<Lane>(p_.value, p_, batch, key_head, list, first, own.room)
        .pack_transposed(count, tile.value_columns);
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      const Sums sums = sums_at(memory, chunk, number);
      const int64_t used = round_up(count, kTileRows) * width_;
      for (int64_t n = 0; n < used; ++n) sums.key[n] = 0;
      for (int64_t n = 0; n < used; ++n) sums.value[n] = 0;
      for (int64_t n = 0; p_.mass != nullptr && n < kTileKeys; ++n) sums.weight[n] = 0;
    }
  }

  int64_t first_query(int64_t block, int64_t panel) const {
    return (block * positions_ + panel / group_) * kTileRows;
  }

  int64_t query_head(int64_t head, int64_t panel) const {
    return head % p_.key_heads * group_ + panel % group_;
  }

  void differentiate_chunk(int64_t head, int64_t chunk, char* memory, const Thread& own) const {
    for (int64_t block = chunk; block < blocks_; block += chunks_) {
      differentiate_block(head, chunk, block, memory, own);
    }
  }

  void differentiate_block(int64_t head, int64_t chunk, int64_t block, char* memory,
                           const Thread& own) const {
    const RowSightings& row = sightings_.rows[head / p_.key_heads];
    int64_t panels = panels_;
    while (first_query(block, panels - 1) >= p_.queries) --panels;
    pack_gradients(head, block, panels, own);
    for (int64_t n = 0; n < panels * kTileRows * width_; ++n) own.grad_query[n] = 0;
    const int64_t last = smaller(p_.queries, first_query(block, panels - 1) + kTileRows) - 1;
    for (int64_t s = 0; s < row.num_sightings; ++s) {
      const Sighting& sighting = row.sightings[s];
      const int64_t visible = row.limit(sighting, last);
      if (visible == 0) continue;
      pack_queries(head, block, panels, sighting, own);
      const bool turned = sighting.cosine != nullptr;
      Sum* grad = turned ? own.grad_turned : own.grad_query;
      if (turned) {
        for (int64_t n = 0; n < panels * kTileRows * width_; ++n) grad[n] = 0;
      }
      const KeyList& list = row.lists[sighting.list];
      for (int64_t first = 0; first < visible; first += kTileKeys) {
        const int64_t number = list.first_tile + first / kTileKeys;
        const Tile tile = tile_at(memory, number);
        const Sums sums = sums_at(memory, chunk, number);
        const bool counts = p_.mass != nullptr &&
                            holds_visual(p_.visual, head / p_.key_heads, list, first, kTileKeys);
        for (int64_t panel = 0; panel < panels; ++panel) {
          own.limits[panel] = score_panel(row, sighting, first_query(block, panel), first, tile,
                                          panel, grad, counts ? sums.weight : nullptr, own);
        }
        add_to_keys(panels, own.limits, sums, own);
      }
      if (!turned) continue;
      for (int64_t n = 0; n < panels * kTileRows; ++n) {
        Sum* from = grad + n * width_;
        PanelRows<Lane>::turn_row(sighting, p_.visual.half, 1, from);
        for (int64_t d = 0; d < p_.head_dim; ++d) own.grad_query[n * width_ + d] += from[d];
      }
    }
    write_queries(head, block, panels, own);
  }

  void pack_gradients(int64_t head, int64_t block, int64_t panels, const Thread& own) const {
    const int64_t batch = head / p_.key_heads;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t from = query_head(head, panel), first = first_query(block, panel);
      const PanelRows<Lane> rows(p_.grad_out, p_, batch, from, first, nullptr, 0, 1, own.room);
      pack_both(rows, panel, own.grad_out, own.grad_out_rows);
      for (int64_t n = 0; n < kTileRows; ++n) {
        const int64_t query = first + n, at = panel * kTileRows + n;
        own.lse[at] = INFINITY;
        own.delta[at] = 0;
        own.counted[at] = 0;
        if (query >= p_.queries) continue;
        own.counted[at] = p_.counted == nullptr || p_.counted[batch * p_.queries + query];
        const Sum lse =
            static_cast<const Sum*>(p_.lse)[(batch * p_.query_heads + from) * p_.queries + query];
        if (lse == -INFINITY) continue;
        own.lse[at] = lse * Sum(kLog2E);
        Sum grad[kMaxHeadDim], out[kMaxHeadDim];
        load_row(row_address(p_.grad_out, p_.dtype, batch, from, query), p_.dtype, p_.head_dim,
                 grad);
        load_row(row_address(p_.out, p_.dtype, batch, from, query), p_.dtype, p_.head_dim, out);
        Vector<Sum> dot{};
        int64_t d = 0;
        for (; d + kVectorWidth<Sum> <= p_.head_dim; d += kVectorWidth<Sum>) {
          dot += load(grad + d) * load(out + d);
        }
        Sum delta = total<Sum>(dot);
        for (; d < p_.head_dim; ++d) delta += grad[d] * out[d];
        own.delta[at] = delta;
      }
    }
  }

  void pack_queries(int64_t head, int64_t block, int64_t panels, const Sighting& sighting,
                    const Thread& own) const {
    for (int64_t panel = 0; panel < panels; ++panel) {
      const PanelRows<Lane> rows(p_.query, p_, head / p_.key_heads, query_head(head, panel),
                                 first_query(block, panel), &sighting, p_.visual.half,
                                 scale_sign(p_.scale), own.room);
      pack_both(rows, panel, own.query, own.query_rows);
    }
  }

  void pack_both(const PanelRows<Lane>& rows, int64_t panel, Unit* columns, Unit* paired) const {
    pack_transposed<Lane, kTileRows>(rows.rows, p_.head_dim, columns + panel * depth_ * kTileRows);
    pack_paired<Lane>(rows.rows, kPanelUnits, panel * kPanelUnits, panels_ * kPanelUnits,
                      p_.head_dim, width_, paired);
  }

  // P and dS of one panel, and its part of dQ; returns how many keys of the tile some row sees.
  // The counted rows of P are added to `weight_sums` unless it is null.
  int64_t score_panel(const RowSightings& row, const Sighting& sighting, int64_t first_query,
                      int64_t first_entry, const Tile& tile, int64_t panel, Sum* grad_query,
                      Sum* weight_sums, const Thread& own) const {
    int64_t limits[kTileRows];
    const int64_t most =
        panel_limits(row, sighting, first_query, p_.queries, first_entry, kTileKeys, limits);
    if (most == 0) return 0;
    const int64_t columns = round_up(most, 2 * kVectorWidth<Sum>);
    Unit* weight_pairs = own.weight_pairs + panel * kPanelUnits * kTileKeys;
    Unit* grad_pairs = own.grad_pairs + panel * kPanelUnits * kTileKeys;
    // Without pairs, what is read by rows and by columns is the same.
    Sum *score = own.score, *grad_score = own.grad_score;
    if constexpr (Lane::kPair == 1) {
      score = weight_pairs;
      grad_score = grad_pairs;
    }
    multiply_panels<Lane, 1, kTileRows, Into::kStore>(own.query + panel * depth_ * kTileRows,
                                                      tile.key_columns, depth_, 0, depth_, columns,
                                                      score, kTileKeys);
    multiply_panels<Lane, 1, kTileRows, Into::kStore>(own.grad_out + panel * depth_ * kTileRows,
                                                      tile.value_columns, depth_, 0, depth_,
                                                      columns, grad_score, kTileKeys);
    for (int64_t n = 0; n < kTileRows; ++n) {
      for (int64_t key = limits[n]; key < columns; ++key) score[n * kTileKeys + key] = -INFINITY;
    }
    // The products that sum over queries take kTileRows keys at a time.
    const int64_t end = larger(columns, round_up(most, kTileRows));
    for (int64_t n = 0; n < kPanelUnits; ++n) {
      const int64_t row_pair = panel * kTileRows + n * Lane::kPair;
      const Sum* pair = score + n * Lane::kPair * kTileKeys;
      Sum* grad_pair = grad_score + n * Lane::kPair * kTileKeys;
      Unit *weight = weight_pairs + n * kTileKeys, *grad = grad_pairs + n * kTileKeys;
      if (weight_sums != nullptr &&
          (own.counted[row_pair] || own.counted[row_pair + Lane::kPair - 1])) {
        differentiate_softmax<true>(pair, grad_pair, row_pair, columns, end, weight, grad,
                                    weight_sums, own);
      } else {
        differentiate_softmax<false>(pair, grad_pair, row_pair, columns, end, weight, grad, nullptr,
                                     own);
      }
    }
    multiply_panels<Lane, kTileKeys, 1, Into::kAdd>(
        reinterpret_cast<const Unit*>(grad_score), tile.key_rows, kTileKeys / Lane::kPair, 0,
        (most + Lane::kPair - 1) / Lane::kPair, width_, grad_query + panel * kTileRows * width_,
        width_);
    return most;
  }

  // kPair rows: P into weight_pairs, dS into grad_pairs and, by rows, in place of grad_score. With
  // kCounts, P of the counted rows is added to weight_sums, as it was before any rounding.
  template <bool kCounts>
  LA_HD void differentiate_softmax(const Sum* score, Sum* grad_score, int64_t row, int64_t columns,
                                   int64_t end, Unit* weight_pairs, Unit* grad_pairs,
                                   Sum* weight_sums, const Thread& own) const {
    const Vector<Sum> scale = splat(static_cast<Sum>(scale_size(p_.scale) * kLog2E));
    for (int64_t n = 0; n < columns; n += kVectorWidth<Sum>) {
      Vector<Sum> weight[Lane::kPair], grad[Lane::kPair];
#pragma GCC unroll 2
      for (int pair = 0; pair < Lane::kPair; ++pair) {
        const int64_t at = pair * kTileKeys + n;
        weight[pair] =
            exp2_of<Lane::kCoarse>(load(score + at) * scale - splat(own.lse[row + pair]));
        grad[pair] = weight[pair] * (load(grad_score + at) - splat(own.delta[row + pair]));
        if constexpr (kCounts) {
          if (own.counted[row + pair]) store(weight_sums + n, load(weight_sums + n) + weight[pair]);
        }
        if constexpr (Lane::kPair == 2) {
          Lane::store_elements(reinterpret_cast<Unit*>(grad_score + pair * kTileKeys), n,
                               grad[pair]);
        }
      }
      Lane::store_units(weight_pairs + n, weight);
      Lane::store_units(grad_pairs + n, grad);
    }
    for (int64_t n = columns; n < end; ++n) weight_pairs[n] = grad_pairs[n] = Unit{};
  }

  // dV += P^T dO and dK += dS^T Q, for one tile and the panels that see a key.
  void add_to_keys(int64_t panels, const int64_t* limits, const Sums& sums,
                   const Thread& own) const {
    int64_t from = 0;
    for (int64_t key = 0; key < limits[panels - 1]; key += kTileRows) {
      while (limits[from] <= key) ++from;
      const int64_t first = from * kPanelUnits, depth = (panels - from) * kPanelUnits;
      multiply_panels<Lane, 1, kTileKeys, Into::kAdd>(
          own.weight_pairs + first * kTileKeys + key, own.grad_out_rows, panels_ * kPanelUnits,
          first, depth, width_, sums.value + key * width_, width_);
      multiply_panels<Lane, 1, kTileKeys, Into::kAdd>(
          own.grad_pairs + first * kTileKeys + key, own.query_rows, panels_ * kPanelUnits, first,
          depth, width_, sums.key + key * width_, width_);
    }
  }

  void write_queries(int64_t head, int64_t block, int64_t panels, const Thread& own) const {
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int64_t n = 0; n < kTileRows; ++n) {
        const int64_t query = first_query(block, panel) + n;
        if (query >= p_.queries) break;
        char* to = const_cast<char*>(row_address(p_.grad_query, p_.dtype, head / p_.key_heads,
                                                 query_head(head, panel), query));
        store_row(own.grad_query + (panel * kTileRows + n) * width_, static_cast<Sum>(p_.scale),
                  p_.dtype, p_.head_dim, to);
      }
    }
  }

  // Rows first .. first + kWriteRows - 1 of grad_key and grad_value: every list's sums, in order.
  void write_keys(int64_t head, int64_t first, char* memory, const Thread& own) const {
    const int64_t batch = head / p_.key_heads, key_head = head % p_.key_heads;
    const RowSightings& row = sightings_.rows[batch];
    const int64_t end = smaller(p_.keys, first + kWriteRows);
    Sum *key_sums = own.written, *value_sums = own.written + kWriteRows * width_;
    for (int64_t n = 0; n < 2 * kWriteRows * width_; ++n) own.written[n] = 0;
    for (int64_t number = 0; number < row.num_lists; ++number) {
      const KeyList& list = row.lists[number];
      for (int64_t entry = list.entries_before(first); entry < list.count; ++entry) {
        const int64_t at = list.key(entry) - first;
        if (at >= end - first) break;
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
          const Sums sums = sums_at(memory, chunk, list.first_tile + entry / kTileKeys);
          const int64_t offset = entry % kTileKeys * width_;
          for (int64_t d = 0; d < p_.head_dim; ++d) {
            key_sums[at * width_ + d] += sums.key[offset + d];
            value_sums[at * width_ + d] += sums.value[offset + d];
          }
        }
      }
    }
    const Sum scale = static_cast<Sum>(scale_size(p_.scale));
    for (int64_t key = first; key < end; ++key) {
      const int64_t at = (key - first) * width_;
      store_row(key_sums + at, scale, p_.dtype, p_.head_dim,
                const_cast<char*>(row_address(p_.grad_key, p_.dtype, batch, key_head, key)));
      store_row(value_sums + at, Sum(1), p_.dtype, p_.head_dim,
                const_cast<char*>(row_address(p_.grad_value, p_.dtype, batch, key_head, key)));
    }
  }

  void add_mass(int64_t head, char* memory) const {
    if (p_.mass == nullptr) return;
    const int64_t batch = head / p_.key_heads;
    add_column_sums<Sum>(
        p_, sightings_.rows[batch], batch, head % p_.key_heads, kTileKeys, chunks_,
        [&](int64_t chunk, int64_t number) { return sums_at(memory, chunk, number).weight; });
  }

  const RoutedAttentionBackwardParams& p_;
  const Sightings sightings_;
  const int64_t group_, depth_, width_;
  const int64_t positions_, panels_, blocks_;  // of a block: panels side by side, panels in all
  int64_t tile_bytes_ = 0, sums_bytes_ = 0, chunks_ = 1;
};

}  // namespace

void routed_attention_backward(const RoutedAttentionBackwardParams& p) {
  dispatch_lane(p.dtype, [&](auto lane) { Backward<decltype(lane)>(p).run(); });
}

LA_NAMESPACE_END
