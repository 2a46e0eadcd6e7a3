// Threads come from the OpenMP runtime that torch has loaded already: its workers are awake after a
// torch op, and a second set of threads would compete with them for the cores. The runtime is
// looked up in the running process (`GOMP_parallel`), so the extension links no OpenMP library.
//
// Its barrier waits for every thread of the team, also for one that found nothing left to do. Where
// more threads want to run than there are cores, that one may be off its core for a whole time
// slice: measured on two cores with a load of 7, a 0.4 ms decode then takes 16 ms in the median.
// So when the barrier was slow, the next calls use a small pool of our own, which waits only for
// threads that took work (0.7 ms in the same measurement), and the runtime is tried again later.
// The pool is also the fallback where there is no such runtime; its threads sleep between calls.
// LOOKAGAIN_THREADS=own or =openmp fixes the choice.
#include "parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <string>
#include <thread>

namespace lookagain {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The path of the loaded libgomp; torch's own if several are loaded.
int remember_libgomp(dl_phdr_info* info, size_t, void* found) {
  auto* path = static_cast<std::string*>(found);
  if (info->dlpi_name == nullptr || strstr(info->dlpi_name, "libgomp") == nullptr) return 0;
  if (path->empty() || strstr(info->dlpi_name, "torch") != nullptr) *path = info->dlpi_name;
  return 0;
}

bool asked_for(const char* mode) {
  const char* value = std::getenv("LOOKAGAIN_THREADS");
  return value != nullptr && strcmp(value, mode) == 0;
}

GompParallel find_gomp() {
  if (asked_for("own")) return nullptr;
  std::string path;
  dl_iterate_phdr(remember_libgomp, &path);
  if (path.empty()) return nullptr;
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
}

// Looked for at the first call of a kernel: by then its tensors have brought torch along.
GompParallel gomp() {
  static const GompParallel function = find_gomp();
  return function;
}

int64_t now_ns() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

struct Job {
  ParallelTask task;
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<int> threads{0};
  std::atomic<int64_t> finished_ns{0};  // when the last thread that took work was done

  void work() {
    int64_t index = next.fetch_add(1, std::memory_order_relaxed);
    if (index >= count) return;
    const int thread = threads.fetch_add(1, std::memory_order_relaxed);
    for (; index < count; index = next.fetch_add(1, std::memory_order_relaxed)) {
      task(context, index, thread);
    }
    const int64_t now = now_ns();
    int64_t last = finished_ns.load(std::memory_order_relaxed);
    while (last < now && !finished_ns.compare_exchange_weak(last, now)) {
    }
  }
};

class Pool {
 public:
  void run(Job& job, int num_threads) {
    std::lock_guard<std::mutex> one_at_a_time(run_mutex_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (num_workers_ < num_threads - 1) {
        std::thread([this] { loop(); }).detach();
        ++num_workers_;
      }
      job_ = &job;
      places_ = num_threads - 1;
    }
    for (int i = 1; i < num_threads; ++i) wake_.notify_one();
    job.work();
    // Nothing is left to take. Threads that have not woken up by now are not waited for.
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    done_.wait(lock, [this] { return active_ == 0; });
  }

 private:
  void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return job_ != nullptr && places_ > 0; });
      Job* job = job_;
      --places_;
      ++active_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex run_mutex_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int num_workers_ = 0, places_ = 0, active_ = 0;
};

// Never destroyed: its threads may outlive static destructors. A forked child has none of the
// threads, so it starts with a fresh pool.
Pool* g_pool = nullptr;

Pool& pool() {
  static const bool once = [] {
    g_pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; });
    return true;
  }();
  (void)once;
  return *g_pool;
}

// How many calls still avoid OpenMP, and how many it will be after the next slow barrier.
std::atomic<int> g_calls_to_avoid{0}, g_avoid_next{16};
constexpr int64_t kSlowBarrierNs = 300000;
constexpr int kMostCallsAvoided = 1024;

bool take_openmp() {
  if (gomp() == nullptr) return false;
  if (g_calls_to_avoid.load(std::memory_order_relaxed) <= 0) return true;
  g_calls_to_avoid.fetch_sub(1, std::memory_order_relaxed);
  return false;
}

void run_with_openmp(Job& job, int num_threads) {
  static const bool always = asked_for("openmp");
  gomp()([](void* data) { static_cast<Job*>(data)->work(); }, &job,
         static_cast<unsigned>(num_threads), 0);
  if (always) return;
  if (now_ns() - job.finished_ns.load() < kSlowBarrierNs) {
    g_avoid_next.store(16, std::memory_order_relaxed);
    return;
  }
  const int avoid = g_avoid_next.load(std::memory_order_relaxed);
  g_calls_to_avoid.store(avoid, std::memory_order_relaxed);
  g_avoid_next.store(avoid < kMostCallsAvoided ? 2 * avoid : avoid, std::memory_order_relaxed);
}

struct Workspace {
  void* data = nullptr;
  size_t bytes = 0;
  ~Workspace() { std::free(data); }
};

}  // namespace

void parallel_for(int num_threads, int64_t count, ParallelTask task, void* context) {
  if (num_threads > count) num_threads = static_cast<int>(count);
  if (num_threads <= 1) {
    for (int64_t index = 0; index < count; ++index) task(context, index, 0);
    return;
  }
  Job job{task, context, count};
  if (take_openmp()) {
    run_with_openmp(job, num_threads);
  } else {
    pool().run(job, num_threads);
  }
}

const char* threading_mode() { return find_gomp() != nullptr ? "torch's OpenMP" : "own threads"; }

void* thread_workspace(size_t bytes) {
  thread_local Workspace workspace;
  if (bytes > workspace.bytes) {
    std::free(workspace.data);
    const size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    workspace.data = std::aligned_alloc(64, rounded);
    workspace.bytes = workspace.data == nullptr ? 0 : rounded;
    if (workspace.data == nullptr) throw std::bad_alloc();
  }
  return workspace.data;
}

}  // namespace lookagain
