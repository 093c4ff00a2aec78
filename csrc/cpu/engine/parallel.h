// torch's own threads, so that a dynops op and the ops around it share one pool.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

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

// How many threads are worth starting for `work` units, at least `grain` each.
inline int64_t threads_for(double work, double grain) {
  const int64_t all = int64_t(torch::stable::get_num_threads());
  return std::clamp<int64_t>(int64_t(work / grain), 1, all);
}

// The i-th of n nearly equal parts of [0, size), cut at multiples of `step`.
inline int64_t part(int64_t size, int64_t i, int64_t n, int64_t step = 1) {
  const int64_t steps = (size + step - 1) / step;
  return std::min(size, steps * i / n * step);
}

}  // namespace dynops::cpu
