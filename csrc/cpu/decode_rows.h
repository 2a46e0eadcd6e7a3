// Where the rows of a tile of keys and values lie.
//
// A stride apart, or, if the cache is paged, listed one by one. Listing them always would be
// simpler, but the loads of the addresses take 6 to 10 % of a decode where loads are what it waits
// for (AVX2, float16; measured on Zen 4).
#pragma once

#include "../core/paging.h"

LA_NAMESPACE_BEGIN

constexpr int kTile = 64;  // keys

// The rows of a tile, from some feature on, and `ahead`, those of the tile that is read next.
template <typename T>
struct EvenRows {
  const T* first;
  const T* first_ahead;
  int64_t stride;
  LA_HD const T* operator[](int64_t row) const { return first + row * stride; }
  LA_HD const T* ahead(int64_t row) const { return first_ahead + row * stride; }
  LA_HD EvenRows from(int64_t row, int feature) const {
    return {first + row * stride + feature, first_ahead + row * stride + feature, stride};
  }
  LA_HD EvenRows again() const { return {first, first, stride}; }
};

template <typename T>
struct ListedRows {
  const T* const* rows;
  const T* const* rows_ahead;
  int64_t feature;
  LA_HD const T* operator[](int64_t row) const { return rows[row] + feature; }
  LA_HD const T* ahead(int64_t row) const { return rows_ahead[row] + feature; }
  LA_HD ListedRows from(int64_t row, int more) const {
    return {rows + row, rows_ahead + row, feature + more};
  }
  LA_HD ListedRows again() const { return {rows, rows, feature}; }
};

// A tile of a paged cache.
template <typename T>
struct RowList {
  const T* keys[kTile];
  const T* values[kTile];
};

// Lists the rows of up to kTile slots of [begin, end) and returns their number. The last stands in
// for those past it, which are only prefetched.
template <typename T>
LA_HD int list_tile(const RoutedAttentionParams& p, int64_t batch, int64_t head, int64_t begin,
                    int64_t end, RowList<T>* to) {
  const T* keys = static_cast<const T*>(p.key.data);
  const T* values = static_cast<const T*>(p.value.data);
  int listed = 0;
  auto list_run = [&](SlotPlace place, int64_t, int64_t length) {
    const T* key = keys + offset_of(p.key, place, head);
    const T* value = values + offset_of(p.value, place, head);
    for (int64_t n = 0; n < length; ++n, ++listed) {
      to->keys[listed] = key + n * p.key.row_stride;
      to->values[listed] = value + n * p.value.row_stride;
    }
  };
  for_each_slot_run(p, batch, begin, end - begin < kTile ? end : begin + kTile, list_run);
  for (int n = listed; listed > 0 && n < kTile; ++n) {
    to->keys[n] = to->keys[listed - 1];
    to->values[n] = to->values[listed - 1];
  }
  return listed;
}

LA_NAMESPACE_END
