// csrc/cuda/experts.cuh compiled for a CPU: every thread of every launch runs, one after another, and a
// stable sort of the standard library stands for CUB's. Built and called by test_cuda_on_host.py.
#include <cuda_runtime.h>

#include <algorithm>
#include <numeric>
#include <vector>

static dim3 blockIdx, blockDim, threadIdx, gridDim;

#include "../csrc/cuda/experts.cuh"

namespace {

// Threads that take several items each, the last before the first.
struct Host {
  template <class Kernel, class... Arguments>
  void operator()(const char*, int64_t, Kernel kernel, const Arguments&... arguments) const {
    blockDim = dim3(32);
    gridDim = dim3(3);
    for (blockIdx.x = gridDim.x; blockIdx.x-- > 0;) {
      for (threadIdx.x = blockDim.x; threadIdx.x-- > 0;) kernel(arguments...);
    }
  }
};

struct Sort {
  int64_t rows;

  void operator()(const int32_t* keys, int32_t* sorted, const int32_t* pairs, int32_t* out) const {
    std::vector<int64_t> by_key(rows);
    std::iota(by_key.begin(), by_key.end(), 0);
    std::stable_sort(by_key.begin(), by_key.end(), [&](int64_t a, int64_t b) { return keys[a] < keys[b]; });
    for (int64_t i = 0; i < rows; ++i) sorted[i] = keys[by_key[i]], out[i] = pairs[by_key[i]];
  }
};

}  // namespace

extern "C" {

#define PLAN(name, T)                                                                                   \
  void plan_##name(const void* index, int64_t tokens, int64_t topk, int32_t experts, int64_t capacity,  \
                   int32_t* order, int32_t* offsets, int32_t* position) {                               \
    const int64_t rows = tokens * topk;                                                                 \
    std::vector<int32_t> keys(rows, -1), sorted(rows, -1), pairs(rows, -1);                             \
    dynops::cuda::plan_experts(Host(), Sort{rows}, static_cast<const T*>(index), tokens, topk, experts, \
                               capacity,                                                                \
                               {order, offsets, position, keys.data(), sorted.data(), pairs.data()});   \
  }
PLAN(uint8, uint8_t)
PLAN(int8, int8_t)
PLAN(int16, int16_t)
PLAN(int32, int32_t)
PLAN(int64, int64_t)
}
