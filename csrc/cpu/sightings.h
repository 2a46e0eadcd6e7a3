// Who sees which keys, worked out once per call for the prefill, the backward and the visual mass.
//
// All keys that some query may see are named by key lists: list 0 holds a row's ordinary keys, the
// others its (selected) visual keys, gathered so that a re-injection is a dense rectangle of work.
// COPY re-injections share one list. A sighting is a list as seen from a first query on, with
// queries turned by -shift. Lists are cut into tiles of `tile_keys`, numbered through the row.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../core/config.h"
#include "../params.h"

namespace lookagain {

struct KeyList {
  const int32_t* keys;    // key index of each entry, ascending, or null: begin, begin + 1, ...
  const int32_t* tokens;  // visual token number of each entry (visual lists)
  int64_t begin;
  int64_t count;
  int64_t first_tile;

  LA_HD int64_t key(int64_t entry) const { return keys == nullptr ? begin + entry : keys[entry]; }

  // The number of entries whose key index is below `end`.
  LA_HD int64_t entries_before(int64_t end) const {
    if (keys == nullptr) return end < begin ? 0 : (end - begin < count ? end - begin : count);
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (keys[middle] < end) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

struct Sighting {
  int64_t list;
  int64_t first_query;   // queries before it see nothing
  bool causal;           // of list 0: keys up to the query's own
  const double* cosine;  // [half] of the shift, or null: not turned
  const double* sine;
};

struct RowSightings {
  int64_t first_position;  // key index of query 0; may be negative
  int64_t num_lists, num_sightings, num_tiles;
  const KeyList* lists;
  const Sighting* sightings;

  // The number of leading entries of a sighting's list that query i sees.
  LA_HD int64_t limit(const Sighting& sighting, int64_t query) const {
    if (query < sighting.first_query) return 0;
    const KeyList& list = lists[sighting.list];
    if (!sighting.causal) return list.count;
    return list.entries_before(first_position + query + 1);
  }

  LA_HD const KeyList& list_of_tile(int64_t number) const {
    int64_t index = 0;
    while (index + 1 < num_lists && lists[index + 1].first_tile <= number) ++index;
    return lists[index];
  }
};

class Sightings {
 public:
  enum class Keys { kAll, kVisual };
  // `what`: whether list 0 holds all ordinary keys, or only the visual ones among them.
  Sightings(const AttentionSizes& sizes, const VisualParams& visual, int64_t tile_keys, Keys what);
  ~Sightings();
  Sightings(const Sightings&) = delete;
  Sightings& operator=(const Sightings&) = delete;

  const RowSightings* rows = nullptr;  // [B]
  int64_t max_tiles = 0;               // of any row

 private:
  struct Storage;
  Storage* storage_;
};

// Memory for one call, 64-byte aligned. Small blocks of kind kKept come from thread_workspace,
// which keeps them for the next call; a call may hold only one such block at a time.
class Scratch {
 public:
  enum class Kind { kKept, kOwned };
  explicit Scratch(size_t bytes, Kind kind = Kind::kKept);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data;

 private:
  bool owned_;
};

}  // namespace lookagain
