// Where a slot of a row lies in a cache, paged or not.
//
// A paged cache is [blocks of all rows, H_kv, block_size, D]: slot j of a row is slot
// j % block_size of the block that the row's table lists at j / block_size. A cache that is not
// paged is one block for each row.
#pragma once

#include "../params.h"
#include "config.h"

LA_NAMESPACE_BEGIN

struct SlotPlace {
  int64_t block;
  int64_t slot;  // within the block
};

// Only for slots whose block is in use.
LA_HD SlotPlace place_of(const PagedCache& pages, int64_t row, int64_t slot) {
  if (pages.block_table == nullptr) return {row, slot};
  // Slots fit into 31 bits, and dividing those is several times faster.
  const uint32_t size = static_cast<uint32_t>(pages.block_size);
  const uint32_t number = static_cast<uint32_t>(slot) / size;
  return {pages.block_table[row * pages.block_table_stride + number],
          static_cast<uint32_t>(slot) - number * size};
}

// Elements from the start of the cache.
LA_HD int64_t offset_of(const HeadsView& view, SlotPlace place, int64_t head) {
  return place.block * view.batch_stride + head * view.head_stride + place.slot * view.row_stride;
}

LA_HD int64_t slot_offset(const HeadsView& view, const PagedCache& pages, int64_t row, int64_t head,
                          int64_t slot) {
  return offset_of(view, place_of(pages, row, slot), head);
}

// Calls fn(place, first_slot, length) for each run of slots of [begin, end) that lie in one block,
// so a row_stride apart.
template <typename Fn>
LA_HD void for_each_slot_run(const PagedCache& pages, int64_t row, int64_t begin, int64_t end,
                             Fn fn) {
  while (begin < end) {
    const SlotPlace place = place_of(pages, row, begin);
    const int64_t left = pages.block_table == nullptr ? end : pages.block_size - place.slot;
    const int64_t length = end - begin < left ? end - begin : left;
    fn(place, begin, length);
    begin += length;
  }
}

LA_NAMESPACE_END
