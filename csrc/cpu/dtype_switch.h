// Calls fn(T{}) with the storage type of a dtype. float64 exists in the plain build only.
#pragma once

#include "../core/paging.h"
#include "../core/types.h"
#include "../params.h"

LA_NAMESPACE_BEGIN

template <typename Fn>
LA_HD void dispatch_dtype(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn(float{});
    case DType::kBFloat16:
      return fn(BFloat16{});
    case DType::kFloat16:
      return fn(Float16{});
#ifdef LA_PLAIN
    case DType::kFloat64:
      return fn(double{});
#endif
    default:
      return;
  }
}

// Pointer to row `row` of head `head` of batch row `batch`.
template <typename T>
LA_HD T* row_of(const HeadsView& view, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(view.data) + batch * view.batch_stride + head * view.head_stride +
         row * view.row_stride;
}

// Pointer to slot `slot` of row `batch` of a cache, paged or not.
template <typename T>
LA_HD T* slot_of(const HeadsView& view, const PagedCache& pages, int64_t batch, int64_t head,
                 int64_t slot) {
  return static_cast<T*>(view.data) + slot_offset(view, pages, batch, head, slot);
}

LA_NAMESPACE_END
