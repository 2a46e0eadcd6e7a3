// visual_mass on a GPU: how a call is cut, and which kernel takes it.
#include "visual_mass.cuh"

#include "launch.h"

namespace lookagain {
namespace cuda {
namespace {

// As many pieces of the queries as give every multiprocessor some blocks, but each piece some
// blocks of rows to pass by.
int choose_pieces(const MassLaunch& a, int64_t rows_of_block, int64_t blocks_per_multiprocessor) {
  const VisualMassParams& p = a.p;
  const int64_t blocks = p.batch * p.num_ranges * p.key_heads * a.token_blocks;
  const int64_t slots = 2 * blocks_per_multiprocessor * current_device().multiprocessors;
  const int64_t most = (p.queries * a.group + 4 * rows_of_block - 1) / (4 * rows_of_block);
  const int64_t pieces = (slots + blocks - 1) / blocks;
  return static_cast<int>(pieces < most ? pieces : most);
}

template <typename Kernel>
void plan(MassLaunch& a, int64_t blocks_per_multiprocessor) {
  a.token_blocks = static_cast<int>((a.p.num_visual + Kernel::kTokens - 1) / Kernel::kTokens);
  a.splits = choose_pieces(a, Kernel::kRows, blocks_per_multiprocessor);
}

// The pieces' sums and, for several, adding them up.
template <auto kernel>
void add_up(MassLaunch& a, const char* name, int64_t shared_bytes, const Allocate& allocate,
            Stream stream) {
  const VisualMassParams& p = a.p;
  const int64_t heads = p.batch * p.num_ranges * p.key_heads, size = heads * p.num_visual;
  a.sums = a.splits == 1 ? p.mass : static_cast<float*>(allocate(a.splits * size * 4));
  launch<kernel>(name, heads * a.token_blocks * a.splits, kThreads, shared_bytes, stream, a);
  if (a.splits == 1) return;
  launch<&visual_mass_combine>("visual_mass_combine", (size + kThreads - 1) / kThreads, kThreads, 0,
                               stream, a);
}

template <typename T, int kDim>
void run_tensor_cores(MassLaunch& a, const Allocate& allocate, Stream stream) {
  plan<Mass<T, kDim>>(a, kDim > 128 ? 2 : 3);
  add_up<&visual_mass<T, kDim>>(a, "visual_mass", Mass<T, kDim>::shared_bytes(a.p.visual.half),
                                allocate, stream);
}

template <typename T>
void run_type(MassLaunch& a, bool tensor_cores, const Allocate& allocate, Stream stream) {
  if constexpr (sizeof(T) == 2) {
    if (tensor_cores) {
      const int64_t dim = a.p.head_dim;
      if (dim <= 64) return run_tensor_cores<T, 64>(a, allocate, stream);
      if (dim <= 96) return run_tensor_cores<T, 96>(a, allocate, stream);
      if (dim <= 128) return run_tensor_cores<T, 128>(a, allocate, stream);
      return run_tensor_cores<T, 256>(a, allocate, stream);
    }
  }
  plan<MassSimt<T>>(a, 8);
  const int64_t bytes = MassSimt<T>::shared_bytes(a.p.head_dim, a.p.visual.half);
  add_up<&visual_mass_simt<T>>(a, "visual_mass_simt", bytes, allocate, stream);
}

}  // namespace

void visual_mass(const VisualMassParams& p, const Allocate& allocate, Stream stream) {
  if (p.batch * p.num_ranges * p.num_visual * p.queries * p.query_heads == 0) return;
  MassLaunch a;
  a.p = p;
  a.group = static_cast<int>(p.query_heads / p.key_heads);
  a.inverse = 0xffffffffu / static_cast<uint32_t>(a.group);
  a.scale = static_cast<float>(p.scale) * kLog2e;
  const bool tensor_cores = aligned(p.query);
  if (p.dtype == DType::kBFloat16) return run_type<BFloat16>(a, tensor_cores, allocate, stream);
  if (p.dtype == DType::kFloat16) return run_type<Float16>(a, tensor_cores, allocate, stream);
  run_type<float>(a, false, allocate, stream);
}

}  // namespace cuda
}  // namespace lookagain
