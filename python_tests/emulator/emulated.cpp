// The CUDA kernels and their launch code on the emulated GPU, as a shared library.
#include "cuda/kernels.h"
#include "cuda_emulator.h"

namespace lookagain {
namespace cuda {
// A small device, so that small problems are cut into pieces.
Device& emulated_device() {
  static Device device{9, 0, 4, 227 << 10, 228 << 10};
  return device;
}
const Device& current_device() { return emulated_device(); }
}  // namespace cuda
}  // namespace lookagain

#include "cuda/join.cu"
#include "cuda/many_queries.cu"
#include "cuda/many_queries_bfloat16.cu"
#include "cuda/many_queries_float16.cu"
#include "cuda/reinjection.cu"
#include "cuda/routed_attention.cu"
#include "cuda/routed_attention_bfloat16.cu"
#include "cuda/routed_attention_float16.cu"
#include "cuda/routing.cu"
#include "cuda/visual_mass.cu"

namespace {

using namespace lookagain;

// Workspaces start as NaN and last as long as the call.
struct Workspace {
  std::vector<std::vector<char>> pieces;
  cuda::Allocate allocate() {
    return [this](int64_t bytes) {
      pieces.emplace_back(bytes + 256, static_cast<char>(0xff));
      const uintptr_t first = reinterpret_cast<uintptr_t>(pieces.back().data());
      return reinterpret_cast<void*>((first + 255) / 256 * 256);
    };
  }
};

std::string message;

// 0, or 1 with the message of what was thrown.
template <typename Fn>
int guarded(Fn fn) {
  try {
    fn();
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}

}  // namespace

extern "C" {

const char* emulated_message() { return message.c_str(); }

// Of the structs that Python fills in.
void emulated_sizes(int64_t* sizes) {
  sizes[0] = sizeof(RoutedAttentionParams);
  sizes[1] = sizeof(VisualParams);
  sizes[2] = sizeof(cuda::SelectParams);
  sizes[3] = sizeof(AppendVisualParams);
  sizes[4] = sizeof(VisualMassParams);
  sizes[5] = sizeof(RoutedAttentionBackwardParams);
  sizes[6] = sizeof(cuda::JoinParams);
}

void emulated_set(uint64_t seed, int multiprocessors, int64_t shared) {
  emulator::seed() = seed;
  cuda::emulated_device().multiprocessors = multiprocessors;
  cuda::emulated_device().shared_per_block = shared;
  cuda::emulated_device().shared_per_multiprocessor = shared + 1024;
}

// {tensor cores, compiled head size, columns, splits, stages, warps}
int emulated_plan(const RoutedAttentionParams* p, int64_t num_visual, int32_t* plan) {
  cuda::DecodePlan found;
  const int failed =
      guarded([&] { found = cuda::plan_decode(*p, num_visual, cuda::current_device()); });
  if (failed) return failed;
  plan[0] = found.tensor_cores;
  plan[1] = found.dim;
  plan[2] = found.columns;
  plan[3] = found.splits;
  plan[4] = found.stages;
  plan[5] = found.warps;
  return 0;
}

int emulated_routed_attention(const RoutedAttentionParams* p, int64_t num_visual) {
  return guarded([&] {
    Workspace workspace;
    cuda::routed_attention(*p, num_visual, workspace.allocate(), nullptr);
  });
}

int emulated_visual_mass(const VisualMassParams* p) {
  return guarded([&] {
    Workspace workspace;
    cuda::visual_mass(*p, workspace.allocate(), nullptr);
  });
}

int emulated_many_queries(const RoutedAttentionBackwardParams* p, const int32_t* bounds,
                          int64_t count, int64_t longest, float* lse, int backward) {
  return guarded([&] {
    Workspace workspace;
    const cuda::PackedRows packed{bounds, count, longest};
    if (backward) {
      cuda::many_queries_backward(*p, packed, workspace.allocate(), nullptr);
    } else {
      cuda::many_queries_forward(*p, packed, lse, workspace.allocate(), nullptr);
    }
  });
}

int emulated_join(const cuda::JoinParams* p) {
  return guarded([&] { cuda::join(*p, nullptr); });
}

int emulated_select(const cuda::SelectParams* p) {
  return guarded([&] { cuda::select_visual_tokens(*p, nullptr); });
}

int emulated_append(const AppendVisualParams* p, int64_t capacity, int32_t* key_length,
                    int64_t width, int32_t* failed) {
  return guarded([&] {
    Workspace workspace;
    cuda::append_visual(*p, capacity, key_length, width, failed, workspace.allocate(), nullptr);
  });
}
}
