// Attention, one query row at a time: what the fast kernels are measured against, and the path for
// float64 and for whatever a fast kernel does not take.
//
// Work unit: one (batch row, key head), so that the visual mass of a key head is summed by one
// thread in a fixed order. Keys and values are read once per query row; 4 D FLOP per key and query.
#pragma once

#include "../core/online_softmax.h"
#include "../core/rotation.h"
#include "../core/visual.h"
#include "dtype_switch.h"
#include "parallel.h"

LA_NAMESPACE_BEGIN

// Visual keys before key_start are seen by re-injections only; no chunk covers them.
inline bool visual_before_start(const RoutedAttentionParams& p) {
  if (p.visual.num_reinjections == 0) return false;
  for (int64_t b = 0; b < p.batch; ++b) {
    bool before = false;
    for_each_visual_run(row_spans(p.visual, b), p.visual.num_spans, 0, p.key_start[b],
                        [&](int64_t, int64_t, int64_t) { before = true; });
    if (before) return true;
  }
  return false;
}

template <typename T>
class PlainAttention {
 public:
  using Real = typename Accumulate<T>::type;

  explicit PlainAttention(const RoutedAttentionParams& p)
      : p_(p), group_(p.query_heads / p.key_heads), per_thread_(4 * p.head_dim) {}

  void run() {
    const int64_t units = p_.batch * p_.key_heads;
    const int64_t threads = p_.num_threads < 1 ? 1 : p_.num_threads;
    scratch_ = static_cast<Real*>(thread_workspace(threads * per_thread_ * sizeof(Real)));
    auto unit = [this](int64_t index, int thread) {
      Real* scratch = scratch_ + thread * per_thread_;
      const int64_t batch = index / p_.key_heads, key_head = index % p_.key_heads;
      for (int64_t g = 0; g < group_; ++g) {
        for (int64_t i = 0; i < p_.queries; ++i) {
          attend(batch, key_head, key_head * group_ + g, i, scratch);
        }
      }
    };
    parallel_for(p_.num_threads, units, unit);
  }

 private:
  static Real dot(const Real* query, const T* key, int64_t head_dim) {
    Real sum = 0;
    for (int64_t d = 0; d < head_dim; ++d) sum += query[d] * to_float(key[d]);
    return sum;
  }

  // Calls fn(query as this re-injection sees it, key index, token number) for every sighting.
  template <typename Fn>
  void for_each_sighting(int64_t batch, int64_t i, const T* query, Real* scratch, Fn fn) const {
    const VisualParams& visual = p_.visual;
    const int64_t dim = p_.head_dim;
    Real* turned = scratch;
    for (int64_t r = 0; r < visual.num_reinjections; ++r) {
      const int64_t column = batch * visual.num_reinjections + r;
      const int32_t start = visual.start[column];
      if (i < first_query_seeing(start, p_.key_length[batch], p_.queries)) continue;
      Real* cosine = scratch + dim;
      Real* sine = cosine + visual.half;
      rotation_table(visual.inv_freq, visual.half, visual.shift[column], cosine, sine);
      rotate(
          cosine, sine, visual.half, dim, -1, [&](int64_t d) { return to_float(query[d]); },
          [&](int64_t d, Real x) { turned[d] = x; });
      const uint8_t* selected = row_selected(visual, batch, r);
      for_each_visual_run(row_spans(visual, batch), visual.num_spans, 0, p_.keys,
                          [&](int64_t first, int64_t token, int64_t length) {
                            for (int64_t n = 0; n < length; ++n) {
                              if (selected != nullptr && !selected[token + n]) continue;
                              fn(turned, first + n, token + n);
                            }
                          });
    }
  }

  void attend(int64_t batch, int64_t key_head, int64_t head, int64_t i, Real* scratch) const {
    const int64_t dim = p_.head_dim;
    const T* query = row_of<T>(p_.query, batch, head, i);
    T* out = row_of<T>(p_.out, batch, head, i);
    const int64_t position = p_.key_length[batch] - p_.queries + i;
    Real* accumulated = scratch;
    Real* plain_query = scratch + dim;
    for (int64_t d = 0; d < dim; ++d) {
      accumulated[d] = 0;
      plain_query[d] = to_float(query[d]);
    }
    const Real scale = static_cast<Real>(p_.scale);
    OnlineSoftmax<Real> state;
    auto see = [&](const Real* q, int64_t key, int64_t) {
      const Real logit = scale * dot(q, slot_of<T>(p_.key, p_, batch, key_head, key), dim);
      const Real factor = state.raise(logit);
      const Real weight = state.add(logit);
      const T* value = slot_of<T>(p_.value, p_, batch, key_head, key);
      for (int64_t d = 0; d < dim; ++d) {
        accumulated[d] = accumulated[d] * factor + weight * to_float(value[d]);
      }
    };
    for (int64_t key = p_.key_start[batch]; key <= position; ++key) see(plain_query, key, 0);
    for_each_sighting(batch, i, query, scratch + 2 * dim, see);

    const Real inverse = state.inverse_sum();
    for (int64_t d = 0; d < dim; ++d) out[d] = from_float<T>(accumulated[d] * inverse);
    const Real lse = state.lse();
    if (p_.lse != nullptr) {
      static_cast<Real*>(p_.lse)[(batch * p_.query_heads + head) * p_.queries + i] = lse;
    }
    if (p_.mass != nullptr && state.sum > 0 && position >= p_.mass_from[batch]) {
      add_mass(batch, key_head, i, query, plain_query, position, lse, scratch);
    }
  }

  // The logits of the visual keys are computed a second time: nothing has to be kept.
  void add_mass(int64_t batch, int64_t key_head, int64_t i, const T* query, const Real* plain_query,
                int64_t position, Real lse, Real* scratch) const {
    float* mass = p_.mass + batch * p_.mass_batch_stride + key_head * p_.mass_head_stride;
    const Real scale = static_cast<Real>(p_.scale);
    auto add = [&](const Real* q, int64_t key, int64_t token) {
      const Real logit = scale * dot(q, slot_of<T>(p_.key, p_, batch, key_head, key), p_.head_dim);
      mass[token] += static_cast<float>(std::exp(logit - lse));
    };
    for_each_visual_run(row_spans(p_.visual, batch), p_.visual.num_spans, p_.key_start[batch],
                        position + 1, [&](int64_t first, int64_t token, int64_t length) {
                          for (int64_t n = 0; n < length; ++n)
                            add(plain_query, first + n, token + n);
                        });
    for_each_sighting(batch, i, query, scratch + 2 * p_.head_dim, add);
  }

  const RoutedAttentionParams& p_;
  const int64_t group_, per_thread_;
  Real* scratch_ = nullptr;
};

LA_NAMESPACE_END
