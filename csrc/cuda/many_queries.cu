// routed_attention with many queries by kernels of our own, forward and backward: how a call is
// cut, and its workspace.
#include <cstring>

#include "launch.h"
#include "many_queries_instances.h"
#include "many_queries_marks.cuh"

namespace lookagain {
namespace cuda {
namespace {

// Cuts one allocation into pieces of 256 bytes and more.
class Carver {
 public:
  template <typename T>
  void take(T** pointer, int64_t count) {
    if (count == 0) return;
    wanted_.push_back({pointer, bytes_});
    bytes_ += ceiling(count * sizeof(T), 256) * 256;
  }

  void allocate(const Allocate& allocate) {
    if (bytes_ == 0) return;
    char* memory = static_cast<char*>(allocate(bytes_));
    for (const Piece& each : wanted_) {
      const void* place = memory + each.offset;
      std::memcpy(each.pointer, &place, sizeof(place));
    }
  }

 private:
  struct Piece {
    void* pointer;  // to the pointer
    int64_t offset;
  };
  std::vector<Piece> wanted_;
  int64_t bytes_ = 0;
};

ManyLaunch describe(const RoutedAttentionBackwardParams& p, const PackedRows& packed, float* lse) {
  ManyLaunch a = {};
  a.p = p;
  a.bounds = packed.bounds;
  a.rows_of_tensors = p.batch;
  a.tokens = p.queries;
  a.key_tokens = p.keys;
  if (packed.bounds != nullptr) {
    a.p.batch = packed.count;
    a.p.queries = a.p.keys = packed.longest;
  }
  a.lse = lse;
  a.group = static_cast<int>(p.query_heads / p.key_heads);
  a.inverse = 0xffffffffu / static_cast<uint32_t>(a.group);
  a.scale = static_cast<float>(p.scale) * kLog2e;
  a.pieces = 1;
  return a;
}

void take_marks(ManyLaunch& a, Carver& carver) {
  const bool marks = a.p.visual.num_reinjections > 0 || a.p.mass != nullptr;
  carver.take(&a.token, marks ? a.num_keys() : 0);
  carver.take(&a.shown, marks ? a.num_keys() : 0);
  carver.take(&a.lists, a.num_lists() * a.num_keys());
  carver.take(&a.counts, a.num_lists() * a.p.batch);
}

void mark(const ManyLaunch& a, Stream stream) {
  if (a.token == nullptr) return;
  launch<&mark_keys>("mark_keys", ceiling(a.p.batch * a.p.keys, kThreads), kThreads, 0, stream, a);
  launch<&list_keys>("list_keys", a.p.batch * a.num_lists(), kThreads, kWarps * 4, stream, a);
}

// So many that the blocks that see most end with the others, but each has some tiles to do.
int choose_pieces(const ManyLaunch& a) {
  // Of packed sequences most blocks past the shorter ones' ends have nothing to do.
  const int64_t rows = a.bounds == nullptr ? a.p.batch * ceiling(a.p.keys, kHeldRows)
                                           : ceiling(a.key_tokens, kHeldRows) + a.p.batch;
  const int64_t blocks = rows * a.p.key_heads;
  const int64_t waves = a.p.visual.num_reinjections > 0 ? 4 : 2;
  const int64_t slots = waves * 2 * current_device().multiprocessors;
  const int64_t most = ceiling(a.p.queries * a.group, 512);
  const int64_t pieces = ceiling(slots, blocks);
  return static_cast<int>(pieces < most ? pieces : most);
}

}  // namespace

// Rows that copies of 16 bytes reach, by strides that a kernel takes as 32 bits.
bool fits(const HeadsView& view) {
  constexpr int64_t kMost = INT32_MAX / 2;
  return view.data == nullptr ||
         (aligned(view) && view.row_stride <= kMost && view.head_stride <= kMost);
}

bool takes_many_queries(const RoutedAttentionBackwardParams& p) {
  const bool halves = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  return halves && p.head_dim <= 128 && p.head_dim % 8 == 0 && p.scale > 0 &&
         p.batch * p.queries * p.query_heads < (1 << 30) &&
         p.batch * p.keys * p.key_heads * p.head_dim < (1 << 30) && fits(p.query) && fits(p.key) &&
         fits(p.value) && fits(p.out) && fits(p.grad_out);
}

void many_queries_forward(const RoutedAttentionBackwardParams& p, const PackedRows& packed,
                          float* lse, const Allocate& allocate, Stream stream) {
  if (p.batch * p.query_heads * p.queries * p.keys == 0) return;
  ManyLaunch a = describe(p, packed, lse);
  Carver carver;
  take_marks(a, carver);
  carver.allocate(allocate);
  mark(a, stream);
  a.held_blocks = static_cast<int>(ceiling(a.p.queries * a.group, kPrefillRows));
  if (p.dtype == DType::kBFloat16) return launch_prefill<BFloat16>(a, stream);
  launch_prefill<Float16>(a, stream);
}

void many_queries_backward(const RoutedAttentionBackwardParams& p, const PackedRows& packed,
                           const Allocate& allocate, Stream stream) {
  if (p.batch * p.query_heads * p.queries * p.keys == 0) return;
  ManyLaunch a = describe(p, packed, static_cast<float*>(const_cast<void*>(p.lse)));
  a.pieces = choose_pieces(a);
  const int64_t sums = a.pieces * p.key_heads * a.num_keys();
  Carver carver;
  take_marks(a, carver);
  carver.take(&a.delta, a.rows_of_tensors * p.query_heads * a.tokens);
  carver.take(&a.sums, a.pieces > 1 ? 2 * sums * p.head_dim : 0);
  carver.take(&a.key_mass, p.mass != nullptr ? sums : 0);
  carver.allocate(allocate);
  mark(a, stream);
  if (p.dtype == DType::kBFloat16) {
    launch_gradients<BFloat16>(a, stream);
  } else {
    launch_gradients<Float16>(a, stream);
  }
  if (p.mass == nullptr) return;
  launch<&grad_mass>("grad_mass", ceiling(a.p.batch * p.key_heads * a.p.keys, kThreads), kThreads,
                     0, stream, a);
}

}  // namespace cuda
}  // namespace lookagain
