// torch's own threads, so that a dynops op and the ops around it share one pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <ranges>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "../../common/geometry.h"

namespace dynops::cpu {

// Runs task(i) for i in [0, tasks). The tasks must not throw.
template <class Task>
void parallel(int64_t tasks, const Task& task) {
  if (tasks <= 1) {
    if (tasks == 1) task(0);
    return;
  }
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// The number of threads worth starting for `work` units, at least `grain` each.
inline int64_t threads_for(double work, double grain) {
  const int64_t all = int64_t(torch::stable::get_num_threads());
  return std::clamp<int64_t>(int64_t(work / grain), 1, all);
}

// The i-th of n nearly equal shares of [0, size), cut at multiples of `step`.
inline Span share_of(int64_t size, int64_t i, int64_t n, int64_t step = 1) {
  const int64_t steps = ceil_div(size, step);
  return {std::min(size, steps * i / n * step), std::min(size, steps * (i + 1) / n * step)};
}

// The numbers of a span, for a loop.
inline auto each(Span span) { return std::views::iota(span.begin, std::max(span.begin, span.end)); }

// Runs task(i) for i in [0, size), `threads` equal shares of them side by side.
template <class Task>
void parallel_shares(int64_t size, int64_t threads, const Task& task) {
  parallel(threads, [&](int64_t t) {
    for (const int64_t i : each(share_of(size, t, threads))) task(i);
  });
}

// A copy of fewer bytes is not worth a second thread.
constexpr double kCopyBytesPerThread = 64 * 1024;

// Ends a thread's stores past the caches: other threads may read them after its task is done.
inline void end_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace dynops::cpu
