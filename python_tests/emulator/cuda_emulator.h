// A GPU for tests: runs the kernels of csrc/cuda on the host, unchanged, one fibre a thread.
//
// Threads of a block run in turn and give way at every barrier and warp-wide operation, in an order
// that a seed shuffles; now and then one warp runs ahead of the others, so that a missing barrier
// shows. Asynchronous copies happen when they are waited for, or at once, as the seed says for each
// block; shared memory starts as NaN. An out-of-bounds access to shared memory raises, and
// host tools (AddressSanitizer, valgrind) see those to global memory. Nothing here is about speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "core/types.h"
#include "fibre.h"

#define LA_DEVICE inline
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace emulator {

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fibre {
  Stack context;
  std::vector<char> stack;
  dim3 thread;
  bool done = false;
  long block_barriers = 0;  // barriers reached
  long warp_barriers = 0;
  std::vector<std::vector<Copy>> groups;  // committed, not waited for
  std::vector<Copy> open;
};

struct Warp {
  // Two generations, so that a fast lane's next operation leaves the slow lane's values alone.
  uint64_t slots[2][32][4];
  float numbers[2][32][12];  // operands of a product, as lanes hold them
  long arrivals = 0;         // of all lanes at barriers
  bool ended = false;        // some lane
};

constexpr size_t kGuard = 256;

struct Block {
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  std::vector<char> shared;  // behind it kGuard bytes that nobody may write
  dim3 index, grid, size;
  Stack scheduler;
  int current = 0;
  bool copies_at_once = false;
};

inline Block*& block() {
  static thread_local Block* current = nullptr;
  return current;
}
inline uint64_t& seed() {
  static uint64_t value = 1;
  return value;
}
inline long& instructions() {  // warp-wide operations, to see that a test ran what it meant to
  static long count = 0;
  return count;
}

inline Fibre& fibre() { return block()->fibres[block()->current]; }
inline int lane() { return block()->current % 32; }
inline Warp& warp() { return block()->warps[block()->current / 32]; }
inline void give_way() { fibre().context.change_to(block()->scheduler); }

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

inline void warp_barrier() {
  Block& b = *block();
  Warp& mine = warp();
  const long wanted = ++fibre().warp_barriers;
  ++mine.arrivals;
  // No lane comes to its next barrier before all have come to this one.
  while (mine.arrivals < 32 * wanted) {
    const int first = b.current / 32 * 32;
    for (int i = first; mine.ended && i < first + 32; ++i) {
      if (b.fibres[i].done && b.fibres[i].warp_barriers < wanted)
        fail("a lane ended while its warp waits for it");
    }
    give_way();
  }
}

inline void block_barrier() {
  Block& b = *block();
  const long mine = ++fibre().block_barriers;
  for (;;) {
    bool all = true;
    for (Fibre& other : b.fibres) {
      if (other.done && other.block_barriers < mine)
        fail("a thread ended while its block waits for it");
      all = all && other.block_barriers >= mine;
    }
    if (all) return;
    give_way();
  }
}

// Every lane gives `values`, then sees those of all lanes.
struct Exchange {
  uint64_t (*slots)[4];
  explicit Exchange(std::initializer_list<uint64_t> values) {
    if (lane() == 0) ++instructions();
    slots = warp().slots[(fibre().warp_barriers + 1) % 2];
    std::copy(values.begin(), values.end(), slots[lane()]);
    warp_barrier();
  }
};

inline void check_shared(const void* pointer, size_t bytes) {
  const char* p = static_cast<const char*>(pointer);
  const std::vector<char>& shared = block()->shared;
  if (p < shared.data() || p + bytes > shared.data() + shared.size() - kGuard) {
    fail("access outside of shared memory");
  }
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail("misaligned shared access");
}

inline void land(const Copy& copy) {
  std::memset(copy.to, 0, 16);
  std::memcpy(copy.to, copy.from, copy.bytes);
}

inline void finish_copies(size_t pending) {
  Fibre& f = fibre();
  while (f.groups.size() > pending) {
    if (!block()->copies_at_once) {
      for (const Copy& copy : f.groups.front()) land(copy);
    }
    f.groups.erase(f.groups.begin());
  }
}

inline const std::function<void()>*& body() {
  static thread_local const std::function<void()>* current = nullptr;
  return current;
}

inline void enter() {
  (*body())();
  if (!fibre().groups.empty() || !fibre().open.empty()) {
    for (const auto& group : fibre().groups) {
      if (!group.empty()) fail("a thread ended with copies under way");
    }
    if (!fibre().open.empty()) fail("a thread ended with copies it did not commit");
  }
  fibre().done = warp().ended = true;
  for (;;) give_way();
}

inline void run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads % 32 != 0) fail("blocks are whole warps");
  body() = &kernel;
  Block b;
  b.fibres.resize(threads);
  b.warps.resize(threads / 32);
  b.grid = grid;
  b.size = dim3(threads);
  for (Fibre& f : b.fibres) f.stack.resize(96 << 10);
  block() = &b;
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        b.index = dim3(x, y, z);
        b.copies_at_once = (seed() >> 37) % 2 != 0;
        b.shared.assign(shared_bytes + kGuard, static_cast<char>(0xff));
        for (Warp& warp : b.warps) {
          warp.arrivals = 0;
          warp.ended = false;
        }
        for (int i = 0; i < threads; ++i) {
          Fibre& f = b.fibres[i];
          f.done = false;
          f.thread = dim3(i, 0, 0);
          f.block_barriers = f.warp_barriers = 0;
          f.groups.clear();
          f.open.clear();
          f.context.prepare(f.stack, enter);
        }
        for (int left = threads; left > 0;) {
          const auto resume = [&](int i) {
            b.current = i;
            b.scheduler.change_to(b.fibres[i].context);
            if (b.fibres[i].done) --left;
          };
          seed() = seed() * 6364136223846793005ull + 1442695040888963407ull;
          std::swap(order[(seed() >> 33) % threads], order[0]);
          const int ahead = (seed() >> 40) % (threads / 32);
          for (int rounds = (seed() >> 50) % 64; rounds > 0; --rounds) {
            for (int i = 32 * ahead; i < 32 * ahead + 32; ++i) {
              if (!b.fibres[i].done) resume(i);
            }
          }
          for (int i : order) {
            if (!b.fibres[i].done) resume(i);
          }
        }
        for (size_t i = shared_bytes; i < b.shared.size(); ++i) {
          if (b.shared[i] != static_cast<char>(0xff)) fail("written past the end of shared memory");
        }
      }
    }
  }
  block() = nullptr;
}

}  // namespace emulator

#define threadIdx (::emulator::fibre().thread)
#define blockIdx (::emulator::block()->index)
#define gridDim (::emulator::block()->grid)
#define blockDim (::emulator::block()->size)

inline void __syncthreads() { emulator::block_barrier(); }
inline void __syncwarp() { emulator::warp_barrier(); }
inline int atomicAdd(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}

namespace lookagain {
namespace cuda {

inline char* dynamic_shared() { return emulator::block()->shared.data(); }

inline void copy_async(void* shared, const void* global, int bytes) {
  emulator::check_shared(shared, 16);
  if (bytes != 0 && bytes != 16) emulator::fail("copies are 0 or 16 bytes");
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0) emulator::fail("misaligned global access");
  emulator::fibre().open.push_back({shared, global, bytes});
  if (emulator::block()->copies_at_once) emulator::land(emulator::fibre().open.back());
}

inline void copy_async_commit() {
  emulator::Fibre& f = emulator::fibre();
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

template <int kPending>
void copy_async_wait() {
  emulator::finish_copies(kPending);
}

// Kernels run one after another here.
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emulator::check_shared(row, 16);
  const emulator::Exchange all({reinterpret_cast<uint64_t>(row)});
  for (int i = 0; i < 4; ++i) {
    const char* from = reinterpret_cast<const char*>(all.slots[8 * i + emulator::lane() / 4][0]);
    std::memcpy(&r[i], from + 4 * (emulator::lane() % 4), 4);
  }
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulator::check_shared(row, 16);
  const emulator::Exchange all({reinterpret_cast<uint64_t>(row)});
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int j = 0; j < 2; ++j) {
      const uint64_t from = all.slots[8 * i + 2 * (emulator::lane() % 4) + j][0];
      std::memcpy(&pair[j], reinterpret_cast<const char*>(from) + 2 * (emulator::lane() / 4), 2);
    }
    std::memcpy(&r[i], pair, 4);
  }
}

inline uint32_t transpose(uint32_t x) {
  const emulator::Exchange all({x});
  uint32_t y = 0;
  for (int j = 0; j < 2; ++j) {
    // Element (2 (l % 4) + j, l / 4) of the matrix held: lane 4 row + column / 2, half column % 2.
    const int row = 2 * (emulator::lane() % 4) + j, column = emulator::lane() / 4;
    const uint64_t held = all.slots[4 * row + column / 2][0];
    y |= ((held >> (16 * (column % 2))) & 0xffff) << (16 * j);
  }
  return y;
}

template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t registers[6] = {a[0], a[1], a[2], a[3], b0, b1};
  float (*numbers)[12] = emulator::warp().numbers[(emulator::fibre().warp_barriers + 1) % 2];
  for (int i = 0; i < 12; ++i) {
    const uint16_t bits = static_cast<uint16_t>(registers[i / 2] >> (16 * (i % 2)));
    numbers[emulator::lane()][i] = to_float(T{bits});
  }
  const emulator::Exchange all({});
  for (int i = 0; i < 4; ++i) {
    const int row = emulator::lane() / 4 + 8 * (i / 2), column = 2 * (emulator::lane() % 4) + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      // a: register (row >= 8) + 2 (k >= 8) of lane 4 (row % 8) + k % 8 / 2; b: register k >= 8.
      const float left = numbers[4 * (row % 8) + k % 8 / 2][2 * (row / 8 + 2 * (k / 8)) + k % 2];
      const float right = numbers[4 * column + k % 8 / 2][8 + 2 * (k / 8) + k % 2];
      sum += static_cast<double>(left) * right;
    }
    c[i] = static_cast<float>(sum);
  }
}

template <typename T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }

inline int64_t multiply_add_wide(int32_t a, int32_t b, int64_t c) {
  return static_cast<int64_t>(a) * b + c;
}

inline void sine_cosine_pi(float x, float* sine, float* cosine) {
  *sine = static_cast<float>(std::sin(M_PI * x));
  *cosine = static_cast<float>(std::cos(M_PI * x));
}

inline float shuffle_xor(float x, int mask) {
  const emulator::Exchange all({float_to_bits(x)});
  return bits_to_float(static_cast<uint32_t>(all.slots[emulator::lane() ^ mask][0]));
}

inline uint32_t ballot(bool x) {
  const emulator::Exchange all({x});
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(all.slots[i][0]) << i;
  return bits;
}
inline bool any_lane(bool x) { return ballot(x) != 0; }
inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

}  // namespace cuda
}  // namespace lookagain
