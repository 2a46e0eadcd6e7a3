// routed_attention on a GPU: how a call is cut, and which kernels take it.
#include "decode_instances.h"
#include "launch.h"
#include "routed_attention_simt.cuh"

namespace lookagain {
namespace cuda {
namespace {

int64_t padded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// The kernels of one call; `tensor_cores` is null for a type that has no such kernel.
template <typename T>
void run(const DecodePlan& plan, const DecodeLaunch& a, Stream stream,
         void (*tensor_cores)(const DecodePlan&, const DecodeLaunch&, Stream)) {
  const int64_t heads = a.p.batch * a.p.key_heads;
  if (plan.tensor_cores) {
    tensor_cores(plan, a, stream);
  } else {
    launch<&routed_attention_simt<T>>("routed_attention_simt", heads * a.row_blocks * a.splits,
                                      kThreads, plan.shared_bytes, stream, a);
  }
  if (!a.needs_combine()) return;
  const int64_t merges = a.splits > 1 ? heads * a.rows : 0;
  const int64_t tokens = a.logits == nullptr ? 0 : (a.num_visual + kThreads - 1) / kThreads;
  launch<&routed_attention_combine<T>>("routed_attention_combine", merges + heads * tokens,
                                       kThreads, combine_shared_bytes(a), stream, a, Overlap::kYes);
}

}  // namespace

DecodePlan plan_decode(const RoutedAttentionParams& p, int64_t num_visual, const Device& device) {
  constexpr int64_t kReserved = 1 << 10;  // of a block's shared memory, for the system
  DecodePlan plan;
  const int64_t rows = p.query_heads / p.key_heads * p.queries;
  const int64_t again = p.visual.num_reinjections, half = p.visual.half;
  plan.dim = p.head_dim <= 64 ? 64 : (p.head_dim <= 96 ? 96 : (p.head_dim <= 128 ? 128 : 256));
  plan.columns = rows <= 8 ? 1 : (plan.dim == 256 ? 2 : (plan.dim == 128 ? 3 : 4));
  int64_t blocks_per_multiprocessor = 1;
  if ((p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16) && aligned(p.key) &&
      aligned(p.value)) {
    // Two blocks where two or more tiles of each warp are in flight then; else one block with what
    // fits, of fewer warps if only they have a tile in flight while they work on another.
    constexpr struct {
      int blocks, warps, least_stages;
    } kWays[] = {{2, kWarps, 2}, {1, kWarps, 2}, {1, kWarps / 2, 2}, {1, kWarps / 2, 1}};
    for (const auto& way : kWays) {
      const int64_t room = device.shared_per_multiprocessor / way.blocks - kReserved;
      for (int stages = 4; stages >= way.least_stages && !plan.tensor_cores; --stages) {
        const int64_t bytes = decode_shared_bytes(plan.dim, plan.columns, again, way.warps, stages);
        if (bytes > room || bytes > device.shared_per_block) continue;
        plan.tensor_cores = true;
        plan.warps = way.warps;
        plan.stages = stages;
        plan.shared_bytes = bytes;
        blocks_per_multiprocessor = way.blocks;
      }
    }
  }
  if (plan.tensor_cores) {
    plan.block_rows = 8 * plan.columns;
  } else {
    plan.block_rows = Simt<float>::kRows;
    plan.shared_bytes = Simt<float>::shared_bytes(again, half, p.head_dim);
    blocks_per_multiprocessor = 4;
  }
  plan.row_blocks = static_cast<int>((rows + plan.block_rows - 1) / plan.block_rows);
  if (plan.shared_bytes > device.shared_per_block) {
    throw std::runtime_error(
        "lookagain_ext: routed_attention with " + std::to_string(again) +
        " columns of re-injections and head size " + std::to_string(p.head_dim) + " needs " +
        std::to_string(plan.shared_bytes) + " bytes of shared memory, this GPU has " +
        std::to_string(device.shared_per_block) + "; use fewer columns");
  }
  plan.splits =
      static_cast<int>(choose_splits(p.batch * p.key_heads * plan.row_blocks,
                                     device.multiprocessors * blocks_per_multiprocessor, p.keys));
  const int64_t heads = p.batch * p.key_heads;
  const int64_t padded_rows = static_cast<int64_t>(plan.row_blocks) * plan.block_rows;
  int64_t bytes = 0;
  const bool whole_heads = plan.splits == 1 && plan.row_blocks == 1;
  if (plan.splits > 1 || (p.mass != nullptr && !whole_heads)) {
    plan.states = bytes;
    bytes += padded(heads * padded_rows * plan.splits * 8);
  }
  if (plan.splits > 1) {
    plan.outs = bytes;
    bytes += padded(heads * padded_rows * plan.splits * p.head_dim * 4);
  }
  if (p.mass != nullptr) {
    plan.logits = bytes;
    bytes += padded(heads * num_visual * padded_rows * 4);
  }
  plan.workspace_bytes = bytes;
  return plan;
}

void routed_attention(const RoutedAttentionParams& p, int64_t num_visual, const Allocate& allocate,
                      Stream stream) {
  if (p.batch == 0 || p.query_heads == 0 || p.queries == 0) return;
  const DecodePlan plan = plan_decode(p, num_visual, current_device());
  DecodeLaunch a;
  a.p = p;
  a.group = static_cast<int>(p.query_heads / p.key_heads);
  a.rows = static_cast<int>(a.group * p.queries);
  a.block_rows = plan.block_rows;
  a.row_blocks = plan.row_blocks;
  a.splits = plan.splits;
  a.warps = plan.warps;
  a.stages = plan.stages;
  a.whole_tiles = p.head_dim == plan.dim && (p.block_table == nullptr || p.block_size % 16 == 0);
  a.whole_queries = aligned(p.query);
  a.num_visual = num_visual;
  a.scale = static_cast<float>(p.scale) * kLog2e;
  char* workspace =
      plan.workspace_bytes == 0 ? nullptr : static_cast<char*>(allocate(plan.workspace_bytes));
  a.states = reinterpret_cast<float*>(workspace + plan.states);
  a.outs = reinterpret_cast<float*>(workspace + plan.outs);
  a.logits = p.mass == nullptr ? nullptr : reinterpret_cast<float*>(workspace + plan.logits);

  if (p.dtype == DType::kBFloat16) {
    run<BFloat16>(plan, a, stream, &launch_decode_bfloat16);
  } else if (p.dtype == DType::kFloat16) {
    run<Float16>(plan, a, stream, &launch_decode_float16);
  } else {
    run<float>(plan, a, stream, nullptr);
  }
}

}  // namespace cuda
}  // namespace lookagain
