// Walking over the visual tokens of one row, and who sees them again.
#pragma once

#include "../params.h"
#include "config.h"

LA_NAMESPACE_BEGIN

// Calls fn(first_key, first_token, length) for the part of each span inside keys [begin, end).
// Token numbers count through the row's spans in order.
template <typename Fn>
LA_HD void for_each_visual_run(const int32_t* spans, int64_t num_spans, int64_t begin, int64_t end,
                               Fn fn) {
  int64_t token = 0;
  for (int64_t s = 0; s < num_spans; ++s) {
    const int64_t first = spans[2 * s], length = spans[2 * s + 1];
    const int64_t from = first > begin ? first : begin;
    const int64_t to = first + length < end ? first + length : end;
    if (from < to) fn(from, token + (from - first), to - from);
    token += length;
  }
}

LA_HD int64_t count_visual(const int32_t* spans, int64_t num_spans) {
  int64_t count = 0;
  for (int64_t s = 0; s < num_spans; ++s) count += spans[2 * s + 1];
  return count;
}

LA_HD const int32_t* row_spans(const VisualParams& visual, int64_t row) {
  return visual.spans + row * visual.num_spans * 2;
}

LA_HD const uint8_t* row_selected(const VisualParams& visual, int64_t row, int64_t reinjection) {
  if (visual.selected == nullptr) return nullptr;
  return visual.selected + row * visual.selected_batch_stride +
         reinjection * visual.selected_stride;
}

// Index of the first of `num_queries` queries that sees a re-injection; num_queries if none does.
// Query i has key index key_length - num_queries + i.
LA_HD int64_t first_query_seeing(int32_t start, int64_t key_length, int64_t num_queries) {
  if (start == kNever) return num_queries;
  const int64_t first = static_cast<int64_t>(start) - (key_length - num_queries);
  return first < 0 ? 0 : (first > num_queries ? num_queries : first);
}

LA_NAMESPACE_END
