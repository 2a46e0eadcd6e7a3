// append_visual_: writes each row's (selected) visual tokens to the end of its cache once more,
// keys turned by the row's shift.
//
// Layout: key and value [B, H_kv, capacity, D], or paged (core/paging.h). Work unit: one (batch
// row, key head). Token n of the selection goes from its span to slot key_length[b] + n; keys are
// always turned from the original, so repeated calls do not drift. Source and target never overlap,
// because spans end at or before key_length. Bytes: 4 D per token and head element size read and
// written; no FLOP to speak of, so the limit is memory bandwidth.
#include <cstring>

#include "../core/rotation.h"
#include "../core/visual.h"
#include "dtype_switch.h"
#include "parallel.h"

LA_NAMESPACE_BEGIN

template <typename T>
static void append_head(const AppendVisualParams& p, int64_t batch, int64_t head,
                        const typename Accumulate<T>::type* cosine,
                        const typename Accumulate<T>::type* sine) {
  using Real = typename Accumulate<T>::type;
  const uint8_t* selected =
      p.selected == nullptr ? nullptr : p.selected + batch * p.selected_stride;
  const int32_t* spans = p.spans + batch * p.num_spans * 2;
  T* const keys = static_cast<T*>(p.key.data);
  T* const values = static_cast<T*>(p.value.data);
  int64_t target = p.key_length[batch];
  for_each_visual_run(
      spans, p.num_spans, 0, target, [&](int64_t first, int64_t token, int64_t length) {
        for (int64_t n = 0; n < length; ++n) {
          if (selected != nullptr && !selected[token + n]) continue;
          const SlotPlace from = place_of(p, batch, first + n), to = place_of(p, batch, target);
          const T* key = keys + offset_of(p.key, from, head);
          T* new_key = keys + offset_of(p.key, to, head);
          rotate(
              cosine, sine, p.half, p.head_dim, 1,
              [&](int64_t d) { return static_cast<Real>(to_float(key[d])); },
              [&](int64_t d, Real x) { new_key[d] = from_float<T>(x); });
          // Features past rotary_dim keep every bit, NaN payloads included.
          memcpy(new_key + 2 * p.half, key + 2 * p.half, (p.head_dim - 2 * p.half) * sizeof(T));
          memcpy(values + offset_of(p.value, to, head), values + offset_of(p.value, from, head),
                 p.head_dim * sizeof(T));
          ++target;
        }
      });
}

void append_visual(const AppendVisualParams& p) {
  dispatch_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    using Real = typename Accumulate<T>::type;
    Real* tables = static_cast<Real*>(thread_workspace(p.batch * 2 * p.half * sizeof(Real)));
    for (int64_t batch = 0; batch < p.batch; ++batch) {
      Real* cosine = tables + batch * 2 * p.half;
      rotation_table(p.inv_freq, p.half, p.shift[batch], cosine, cosine + p.half);
    }
    auto unit = [&](int64_t index, int) {
      const int64_t batch = index / p.key_heads;
      if (p.rows != nullptr && !p.rows[batch]) return;
      const Real* cosine = tables + batch * 2 * p.half;
      append_head<T>(p, batch, index % p.key_heads, cosine, cosine + p.half);
    };
    parallel_for(p.num_threads, p.batch * p.key_heads, unit);
  });
}

LA_NAMESPACE_END
