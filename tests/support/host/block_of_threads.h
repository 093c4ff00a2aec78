// A host stand-in for a block of CUDA threads: its threads take turns as fibers, each up to the next barrier,
// so that kernels with shared memory, __syncthreads and warp intrinsics run on a CPU as they are written.
// Include it before them.
//
// Between two barriers the threads run one after another, in ascending or in descending order: launch a
// kernel both ways, and a missing barrier shows as a wrong value. Under ThreadSanitizer it is reported: only
// barriers order the memory accesses of two fibers. A barrier that not every thread reaches ends the process.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif

// What blocks share lies where all of its threads find it, and a block runs at a time.
#undef __shared__
#define __shared__ static

static dim3 blockIdx, blockDim, threadIdx, gridDim;

namespace host {

#if defined(__SANITIZE_THREAD__)
// What keeps the turns is no part of the kernels, and their memory is theirs only.
#define UNSANITIZED __attribute__((no_sanitize("thread")))
struct Sanitizer {
  void* fiber = nullptr;

  void create() { fiber = __tsan_create_fiber(0); }
  void destroy() { __tsan_destroy_fiber(fiber); }
  void current() { fiber = __tsan_get_current_fiber(); }
  UNSANITIZED void enter() const { __tsan_switch_to_fiber(fiber, 1); }  // 1: orders nothing
  static void arrive(void* barrier) { __tsan_release(barrier); }
  static void leave(void* barrier) { __tsan_acquire(barrier); }
};
#else
#define UNSANITIZED
struct Sanitizer {
  void create() {}
  void destroy() {}
  void current() {}
  void enter() const {}
  static void arrive(void*) {}
  static void leave(void*) {}
};
#endif

enum class At { kRunning, kWarpBarrier, kBlockBarrier, kEnd };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Sanitizer sanitizer;
  At at;
  uint64_t given[2];  // to the other lanes of its warp, in turns
  unsigned exchanges;
};

constexpr size_t kStack = 128 << 10;
constexpr unsigned kLanesOfWarp = 32;

class Block {
 public:
  // Runs the block of the current blockIdx.
  void run(bool descending, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    threads_.resize(blockDim.x);
    main_sanitizer_.current();
    for (Thread& thread : threads_) start(thread);
    Sanitizer::arrive(&entry_);
    while (!finished()) {
      for (unsigned i = 0; i < threads_.size(); ++i) turn(descending ? unsigned(threads_.size()) - 1 - i : i);
      open_barriers();
    }
    Sanitizer::leave(&exit_);
    for (Thread& thread : threads_) thread.sanitizer.destroy();
  }

  UNSANITIZED void wait(At barrier) {
    Thread& self = threads_[threadIdx.x];
    void* const name = barrier == At::kWarpBarrier ? static_cast<void*>(&self - threadIdx.x % kLanesOfWarp)
                                                   : static_cast<void*>(this);
    Sanitizer::arrive(name);
    self.at = barrier;
    leave(self);
    Sanitizer::leave(name);
  }

  // What every lane of this warp gives, in `lanes`. A lane gives anew only when all have read what it gave
  // before: the exchange between lies behind a barrier.
  void exchange(uint64_t value, uint64_t (&lanes)[kLanesOfWarp]) {
    const unsigned first = threadIdx.x - threadIdx.x % kLanesOfWarp;
    Thread& self = threads_[threadIdx.x];
    const unsigned turn = self.exchanges++ % 2;
    self.given[turn] = value;
    wait(At::kWarpBarrier);
    for (unsigned lane = 0; lane < kLanesOfWarp; ++lane) lanes[lane] = threads_[first + lane].given[turn];
  }

 private:
  static void body();

  void start(Thread& thread) {
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, body, 0);
    thread.sanitizer.create();
    thread.at = At::kRunning;
    thread.exchanges = 0;
  }

  UNSANITIZED void turn(unsigned i) {
    if (threads_[i].at != At::kRunning) return;
    threadIdx.x = i;
    threads_[i].sanitizer.enter();
    swapcontext(&main_, &threads_[i].context);
  }

  UNSANITIZED void leave(Thread& self) {
    main_sanitizer_.enter();
    swapcontext(&self.context, &main_);
  }

  UNSANITIZED bool finished() const {
    for (const Thread& thread : threads_) {
      if (thread.at != At::kEnd) return false;
    }
    return true;
  }

  UNSANITIZED bool all(size_t begin, size_t end, At where) const {
    for (size_t i = begin; i < end; ++i) {
      if (threads_[i].at != where) return false;
    }
    return true;
  }

  UNSANITIZED void open(size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) threads_[i].at = At::kRunning;
  }

  void open_barriers() {
    if (finished()) return;
    if (all(0, threads_.size(), At::kBlockBarrier)) return open(0, threads_.size());
    bool opened = false;
    for (size_t warp = 0; warp < threads_.size(); warp += kLanesOfWarp) {
      if (!all(warp, warp + kLanesOfWarp, At::kWarpBarrier)) continue;
      open(warp, warp + kLanesOfWarp);
      opened = true;
    }
    if (opened) return;
    std::fprintf(stderr, "a barrier that not every thread reaches\n");
    std::abort();
  }

  std::vector<Thread> threads_;
  ucontext_t main_;
  Sanitizer main_sanitizer_;
  const std::function<void()>* kernel_ = nullptr;
  char entry_, exit_;
};

inline Block block;

UNSANITIZED inline void Block::body() {
  Sanitizer::leave(&block.entry_);
  (*block.kernel_)();
  Sanitizer::arrive(&block.exit_);
  Thread& self = block.threads_[threadIdx.x];
  self.at = At::kEnd;
  block.leave(self);
}

// Runs the blocks [begin, end) of a grid.
UNSANITIZED inline void run_blocks(int64_t begin, int64_t end, int64_t grid, int threads, bool descending,
                                   const std::function<void()>& kernel) {
  gridDim.x = unsigned(grid);
  blockDim.x = unsigned(threads);
  for (int64_t b = begin; b < end; ++b) {
    blockIdx.x = unsigned(descending ? begin + end - 1 - b : b);
    block.run(descending, kernel);
  }
}

template <class T>
T lane_value(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T from_lane(T value, unsigned lane) {
  uint64_t bits = 0, lanes[kLanesOfWarp];
  std::memcpy(&bits, &value, sizeof(T));
  block.exchange(bits, lanes);
  return lane < kLanesOfWarp ? lane_value<T>(lanes[lane]) : value;
}

// Kernels as csrc/cuda/launch.h launches them, in threads that take several items each.
struct Threads {
  bool descending = false;
  int64_t limit = int64_t(1) << 30;

  int64_t narrow() const { return limit; }

  template <class Kernel, class... Arguments>
  void operator()(const char*, int64_t, Kernel kernel, const Arguments&... arguments) const {
    run_blocks(0, 7, 7, 32, descending, [&] { kernel(arguments...); });
  }

  template <class Kernel, class... Arguments>
  void blocks(const char*, int64_t blocks, int threads, Kernel kernel, const Arguments&... arguments) const {
    run_blocks(0, blocks, blocks, threads, descending, [&] { kernel(arguments...); });
  }
};

}  // namespace host

// --------------------------------------------------------------- what a kernel calls; every lane of a warp
// does

static inline void __syncthreads() { host::block.wait(host::At::kBlockBarrier); }
static inline void __syncwarp() { host::block.wait(host::At::kWarpBarrier); }

template <class T>
T __shfl_up_sync(unsigned, T value, unsigned lanes) {
  const unsigned lane = threadIdx.x % host::kLanesOfWarp;
  return host::from_lane(value, lane >= lanes ? lane - lanes : lane);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return host::from_lane(value, threadIdx.x % host::kLanesOfWarp ^ unsigned(lanes));
}

static inline unsigned __match_any_sync(unsigned, int32_t value) {
  uint64_t lanes[host::kLanesOfWarp];
  host::block.exchange(uint32_t(value), lanes);
  unsigned same = 0;
  for (unsigned lane = 0; lane < host::kLanesOfWarp; ++lane)
    same |= unsigned(lanes[lane] == uint32_t(value)) << lane;
  return same;
}

static inline int32_t atomicAdd(int32_t* at, int32_t value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline int __ffs(int bits) { return __builtin_ffs(bits); }
