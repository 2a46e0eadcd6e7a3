// Queries of a key head packed into rows: row = query * G + head.
#pragma once

#include "platform.h"

namespace lookagain {
namespace cuda {

// Query and head of a row, from a launch's `group` G and `inverse`, (2^32 - 1) / G. Dividing takes
// several times longer than this.
struct QueryRow {
  int query, head;

  template <typename Launch>
  LA_DEVICE QueryRow(const Launch& a, int row) {
    query = static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(row)) * a.inverse >> 32);
    head = row - query * a.group;
    if (head >= a.group) {
      ++query;
      head -= a.group;
    }
  }
};

}  // namespace cuda
}  // namespace lookagain
