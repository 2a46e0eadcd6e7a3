// append_visual_: each row's visual tokens once more at the end of its cache, keys turned by a
// shift.
//
// Layout: caches [B, H_kv, capacity, D], contiguous last axis. Two launches. The first, one block a
// row, counts the row's tokens, numbers the selected ones in order and notes whether they fit. The
// second, one block for each (chunk of tokens, key head, row), copies: 16 bytes an access, keys
// turned in float32 by a table of the row's angles in shared memory. It begins by reading what the
// first noted of every row, and ends at once if one of them has no room, so that a failure writes
// nothing.
//
// Bytes: 4 D elements a token and key head (keys and values, read and written once). FLOP: 3 a key
// element. The limit is the memory's copy rate.
#include "../core/rotation.h"
#include "../core/visual.h"
#include "decode_launch.h"
#include "launch.h"

namespace lookagain {
namespace cuda {
namespace {

constexpr int kAppendThreads = 256;
constexpr int kTokens = 32;  // of a block, at a time

constexpr int32_t kFine = 0;

struct AppendLaunch {
  AppendVisualParams p;
  int64_t capacity;
  int64_t width;  // L_c of `selected`
  int32_t* key_length;
  int32_t* failed;    // [4]
  int32_t* lengths;   // [B], before the call
  int32_t* counts;    // [B]
  int32_t* problems;  // [B]
  int32_t* numbers;   // [B, L_c], the place of each selected token among them, or -1
  int64_t blocks_per_head;
};

// Sum over the block of what each thread has, to every thread.
LA_DEVICE int block_sum(int value, int* scratch) {
  float total = static_cast<float>(value);  // exact below 2^24; shuffles move floats
  for (int step = 16; step > 0; step /= 2) total += shuffle_xor(total, step);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = static_cast<int>(total);
  __syncthreads();
  int sum = 0;
  for (int w = 0; w < kAppendThreads / 32; ++w) sum += scratch[w];
  __syncthreads();
  return sum;
}

// Elements of one access.
template <typename T, int kWide>
struct alignas(kWide * sizeof(T)) AppendPart {
  T elements[kWide];
};

__global__ void __launch_bounds__(kAppendThreads) append_plan_kernel(const AppendLaunch a) {
  let_next_kernel_start();
  int* scratch = reinterpret_cast<int*>(dynamic_shared());
  const AppendVisualParams& p = a.p;
  const int64_t row = blockIdx.x;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int32_t* spans = p.spans + row * p.num_spans * 2;
  const int64_t length = a.key_length[row];
  const bool taking_part = p.rows == nullptr || p.rows[row] != 0;
  int32_t problem = length < 0 || length > a.capacity ? kAppendBadLength : kFine;
  int64_t tokens = 0, end = 0;
  for (int64_t s = 0; s < p.num_spans; ++s) {
    const int64_t first = spans[2 * s], size = spans[2 * s + 1];
    if (size == 0) continue;
    if (size < 0 || first < end || first + size > length)
      problem = problem ? problem : kAppendBadSpans;
    tokens += size > 0 ? size : 0;
    end = first + size;
  }
  int64_t count = tokens;
  if (p.selected != nullptr) {
    if (tokens > a.width) problem = problem ? problem : kAppendBadSpans;
    const int64_t known = tokens < a.width ? tokens : a.width;
    const uint8_t* selected = p.selected + row * p.selected_stride;
    count = 0;
    for (int64_t first = 0; first < a.width; first += kAppendThreads) {
      const int64_t t = first + thread;
      const bool taken = t < known && selected[t] != 0;
      const uint32_t bits = ballot(taken);
      if (lane == 0) scratch[warp] = count_bits(bits);
      __syncthreads();
      int64_t before = count + count_bits(bits & ((1u << lane) - 1));
      for (int w = 0; w < kAppendThreads / 32; ++w) {
        if (w < warp) before += scratch[w];
        count += scratch[w];
      }
      __syncthreads();
      if (t < a.width) a.numbers[row * a.width + t] = taken ? static_cast<int32_t>(before) : -1;
    }
  }
  if (problem == kFine && length + count > a.capacity) problem = kAppendNoRoom;
  if (problem == kFine && p.block_table != nullptr) {
    // Every slot that is read or written must have a block.
    int missing = 0;
    for (int64_t i = thread; i < tokens + count; i += kAppendThreads) {
      const int64_t slot = i < tokens ? key_of_token(spans, p.num_spans, i) : length + (i - tokens);
      missing += checked_place(p, row, slot).block < 0;
    }
    if (block_sum(missing, scratch) != 0) problem = kAppendNoBlock;
  }
  if (thread != 0) return;
  a.lengths[row] = static_cast<int32_t>(length);
  a.counts[row] = taking_part ? static_cast<int32_t>(count) : 0;
  a.problems[row] = taking_part ? problem : kFine;
}

// `width` lanes share a token. Each takes units of work in turn: two features of a key that turn
// together, or two that are copied; a feature here is one access wide.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kAppendThreads) append_copy_kernel(const AppendLaunch a) {
  const AppendVisualParams& p = a.p;
  int64_t index = blockIdx.x;
  const int64_t chunk = index % a.blocks_per_head;
  index /= a.blocks_per_head;
  const int64_t head = index % p.key_heads, row = index / p.key_heads;
  const int thread = threadIdx.x;
  const int half = static_cast<int>(p.half), dim = static_cast<int>(p.head_dim);
  int* scratch = reinterpret_cast<int*>(dynamic_shared());
  float2* table = reinterpret_cast<float2*>(dynamic_shared() + 64);  // [half]
  for (int i = thread; i < half; i += kAppendThreads) {
    table[i] = turn_of(p.shift[row], p.inv_freq[i]);
  }
  const int32_t* spans = p.spans + row * p.num_spans * 2;
  const int64_t tokens = count_visual(spans, p.num_spans);
  wait_for_previous_kernel();
  int bad = 0;
  for (int64_t b = thread; b < p.batch; b += kAppendThreads) bad += a.problems[b] != kFine;
  bad = block_sum(bad, scratch);  // every thread has its part of the table by now, too
  const bool first_of_all = blockIdx.x == 0 && thread == 0;
  if (first_of_all) a.failed[0] = kFine;
  if (bad != 0) {
    if (!first_of_all) return;
    int64_t b = 0;
    while (a.problems[b] == kFine) ++b;
    a.failed[0] = a.problems[b];
    a.failed[1] = static_cast<int32_t>(b);
    a.failed[2] = a.lengths[b];
    a.failed[3] = a.counts[b];
    return;
  }
  const int64_t length = a.lengths[row], count = a.counts[row];
  if (count == 0) return;
  if (chunk == 0 && head == 0 && thread == 0) {
    a.key_length[row] = static_cast<int32_t>(length + count);
  }
  const int32_t* numbers = p.selected == nullptr ? nullptr : a.numbers + row * a.width;
  constexpr int kWide = kVector ? Chunk<T>::kElements : 1;
  using Part = AppendPart<T, kWide>;
  const int pairs = half / kWide, straight = (dim - 2 * half) / kWide;
  const int copied = straight + dim / kWide;  // the rest of a key, then the value
  const int units = pairs + (copied + 1) / 2;
  int width = 1;
  while (width < units && width < 32) width *= 2;
  const int group = thread / width, groups = kAppendThreads / width;
  for (int64_t first = chunk * kTokens; first < tokens; first += a.blocks_per_head * kTokens) {
    const int here = static_cast<int>(tokens - first < kTokens ? tokens - first : kTokens);
    for (int i = group; i < here; i += groups) {
      const int64_t token = first + i;
      const int64_t number = numbers == nullptr ? token : numbers[token];
      if (number < 0) continue;
      const SlotPlace from = place_of(p, row, key_of_token(spans, p.num_spans, token));
      const SlotPlace to = place_of(p, row, length + number);
      T* const key = static_cast<T*>(p.key.data);
      T* const value = static_cast<T*>(p.value.data);
      const int64_t key_from = offset_of(p.key, from, head), key_to = offset_of(p.key, to, head);
      const int64_t value_from = offset_of(p.value, from, head);
      const int64_t value_to = offset_of(p.value, to, head);
      for (int unit = thread % width; unit < units; unit += width) {
        if (unit < pairs) {
          const int feature = unit * kWide;
          Part one = *reinterpret_cast<const Part*>(key + key_from + feature);
          Part two = *reinterpret_cast<const Part*>(key + key_from + feature + half);
#pragma unroll
          for (int e = 0; e < kWide; ++e) {
            const float2 turn = table[feature + e];
            const float x = to_float(one.elements[e]), y = to_float(two.elements[e]);
            one.elements[e] = from_float<T>(x * turn.x - y * turn.y);
            two.elements[e] = from_float<T>(y * turn.x + x * turn.y);
          }
          *reinterpret_cast<Part*>(key + key_to + feature) = one;
          *reinterpret_cast<Part*>(key + key_to + feature + half) = two;
          continue;
        }
        const int second = 2 * (unit - pairs) + 1;
        auto at = [&](int item, int64_t of_key, int64_t of_value) {
          T* element = item < straight ? key + of_key + 2 * half + item * kWide
                                       : value + of_value + (item - straight) * kWide;
          return reinterpret_cast<Part*>(element);
        };
        const bool both = second < copied;
        const Part one = *at(second - 1, key_from, value_from);
        const Part two = *at(both ? second : second - 1, key_from, value_from);
        *at(second - 1, key_to, value_to) = one;
        if (both) *at(second, key_to, value_to) = two;
      }
    }
  }
}

template <typename T>
void copy(const AppendLaunch& a, Stream stream) {
  const AppendVisualParams& p = a.p;
  constexpr int kElements = Chunk<T>::kElements;
  bool vector = p.half % kElements == 0 && p.head_dim % kElements == 0;
  for (const HeadsView* view : {&p.key, &p.value}) {
    vector = vector && reinterpret_cast<uintptr_t>(view->data) % 16 == 0 &&
             view->batch_stride % kElements == 0 && view->head_stride % kElements == 0 &&
             view->row_stride % kElements == 0;
  }
  const int64_t blocks = p.batch * p.key_heads * a.blocks_per_head;
  const int64_t shared_bytes = 64 + p.half * 8;
  if (vector) {
    launch<&append_copy_kernel<T, true>>("append_visual_copy", blocks, kAppendThreads, shared_bytes,
                                         stream, a, Overlap::kYes);
  } else {
    launch<&append_copy_kernel<T, false>>("append_visual_copy", blocks, kAppendThreads,
                                          shared_bytes, stream, a, Overlap::kYes);
  }
}

}  // namespace

void append_visual(const AppendVisualParams& p, int64_t capacity, int32_t* key_length,
                   int64_t width, int32_t* failed, const Allocate& allocate, Stream stream) {
  if (p.batch == 0 || p.key_heads == 0) return;
  AppendLaunch a;
  a.p = p;
  a.capacity = capacity;
  a.width = p.selected == nullptr ? 0 : width;
  a.key_length = key_length;
  a.failed = failed;
  int32_t* workspace = static_cast<int32_t*>(allocate((3 + a.width) * p.batch * 4));
  a.lengths = workspace;
  a.counts = workspace + p.batch;
  a.problems = workspace + 2 * p.batch;
  a.numbers = workspace + 3 * p.batch;
  // How many tokens there are is known on the device only: blocks stride over them.
  const int64_t most = p.selected == nullptr ? capacity : width;
  const int64_t wanted = (most + kTokens - 1) / kTokens;
  // One wave of them.
  const int64_t most_blocks = 8 * current_device().multiprocessors / (p.batch * p.key_heads);
  const int64_t enough = most_blocks < 1 ? 1 : most_blocks;
  a.blocks_per_head = wanted < 1 ? 1 : (wanted < enough ? wanted : enough);
  launch<&append_plan_kernel>("append_visual_plan", p.batch, kAppendThreads,
                              kAppendThreads / 32 * 4, stream, a);
  if (p.dtype == DType::kBFloat16) {
    copy<BFloat16>(a, stream);
  } else if (p.dtype == DType::kFloat16) {
    copy<Float16>(a, stream);
  } else {
    copy<float>(a, stream);
  }
}

}  // namespace cuda
}  // namespace lookagain
