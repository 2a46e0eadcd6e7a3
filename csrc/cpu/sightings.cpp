// Compiled once, not per instruction set: it runs once a call and uses the standard library.
#include "sightings.h"

#include <cstdlib>
#include <new>
#include <vector>

#include "../core/rotation.h"
#include "../core/visual.h"
#include "parallel.h"

namespace lookagain {

namespace {

// More than this is given back after the call.
constexpr size_t kKeptBytes = size_t{64} << 20;

struct Entries {
  std::vector<int32_t> keys, tokens;
};

}  // namespace

struct Sightings::Storage {
  std::vector<RowSightings> rows;
  std::vector<std::vector<KeyList>> lists;
  std::vector<std::vector<Sighting>> sightings;
  std::vector<Entries> entries;
  std::vector<double> tables;
};

Sightings::Sightings(const AttentionSizes& sizes, const VisualParams& visual, int64_t tile_keys,
                     Keys what)
    : storage_(new Storage) {
  Storage& s = *storage_;
  const int64_t batch = sizes.batch, columns = visual.num_reinjections, half = visual.half;
  s.rows.resize(batch);
  s.lists.resize(batch);
  s.sightings.resize(batch);
  s.entries.resize(batch * (columns + 2));  // never grows again: lists point into it
  s.tables.resize(batch * columns * 2 * half);
  size_t used = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = sizes.key_length[b];
    auto add_list = [&](int64_t begin, int64_t end, const uint8_t* selected) {
      Entries& entries = s.entries[used++];
      for_each_visual_run(row_spans(visual, b), visual.num_spans, begin, end,
                          [&](int64_t first, int64_t token, int64_t run) {
                            for (int64_t n = 0; n < run; ++n) {
                              if (selected != nullptr && !selected[token + n]) continue;
                              entries.keys.push_back(static_cast<int32_t>(first + n));
                              entries.tokens.push_back(static_cast<int32_t>(token + n));
                            }
                          });
      s.lists[b].push_back({entries.keys.data(), entries.tokens.data(), 0,
                            static_cast<int64_t>(entries.keys.size()), 0});
    };
    const int64_t begin = sizes.key_start[b];
    if (what == Keys::kVisual) {
      add_list(begin, length, nullptr);
    } else {
      s.lists[b].push_back({nullptr, nullptr, begin, length > begin ? length - begin : 0, 0});
    }
    s.sightings[b].push_back({0, 0, true, nullptr, nullptr});
    int64_t shared = -1;
    for (int64_t r = 0; r < columns; ++r) {
      const int64_t column = b * columns + r;
      const int64_t first = first_query_seeing(visual.start[column], length, sizes.queries);
      if (first >= sizes.queries) continue;
      const uint8_t* selected = row_selected(visual, b, r);
      if (selected != nullptr || shared < 0) add_list(0, sizes.keys, selected);
      int64_t list = static_cast<int64_t>(s.lists[b].size()) - 1;
      if (selected == nullptr) list = shared = shared < 0 ? list : shared;
      if (s.lists[b][list].count == 0) continue;
      double* cosine = s.tables.data() + column * 2 * half;
      rotation_table(visual.inv_freq, half, visual.shift[column], cosine, cosine + half);
      s.sightings[b].push_back({list, first, false, cosine, cosine + half});
    }
    int64_t tiles = 0;
    for (KeyList& list : s.lists[b]) {
      list.first_tile = tiles;
      tiles += (list.count + tile_keys - 1) / tile_keys;
    }
    if (tiles > max_tiles) max_tiles = tiles;
    s.rows[b] = {length - sizes.queries,
                 static_cast<int64_t>(s.lists[b].size()),
                 static_cast<int64_t>(s.sightings[b].size()),
                 tiles,
                 s.lists[b].data(),
                 s.sightings[b].data()};
  }
  rows = s.rows.data();
}

Sightings::~Sightings() { delete storage_; }

Scratch::Scratch(size_t bytes, Kind kind) : owned_(kind == Kind::kOwned || bytes > kKeptBytes) {
  const size_t rounded = (bytes + 63) / 64 * 64;
  data = static_cast<char*>(owned_ ? std::aligned_alloc(64, rounded) : thread_workspace(rounded));
  if (data == nullptr && bytes > 0) throw std::bad_alloc();
}

Scratch::~Scratch() {
  if (owned_) std::free(data);
}

}  // namespace lookagain
