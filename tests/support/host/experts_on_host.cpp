// csrc/cuda/experts.cuh compiled for a CPU; a stable sort of the standard library stands for CUB's. Built and
// called by test_cuda_on_host.py.
#include "block_of_threads.h"

#include <algorithm>
#include <numeric>

#include "../../../csrc/cuda/experts.cuh"

namespace {

using namespace dynops::cuda;

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

int serves(int64_t rows, int64_t experts) { return Split::serves(rows, experts); }
int64_t parts(int64_t rows, int32_t experts) { return Split(rows, experts).parts; }
int64_t scratch(int64_t rows, int64_t experts) { return expert_plan_scratch(rows, experts); }

// sorts: by the sort, whatever the sizes; its scratch is 3 numbers a pair.
#define PLAN(name, T)                                                                                      \
  void plan_##name(int descending, int sorts, const void* index, int64_t tokens, int64_t topk,             \
                   int32_t experts, int64_t capacity, int32_t* order, int32_t* offsets, int32_t* position, \
                   int32_t* scratch) {                                                                     \
    const host::Threads launch{descending != 0};                                                           \
    const Sort sort{tokens * topk};                                                                        \
    const Choices<T> choices{static_cast<const T*>(index), uint32_t(tokens), uint32_t(topk), experts,      \
                             false};                                                                       \
    const ExpertPlanMemory memory{order, offsets, position};                                               \
    if (sorts) return plan_by_sort(launch, sort, choices, capacity, memory, scratch);                      \
    plan_experts(launch, sort, choices, capacity, memory, scratch);                                        \
  }
PLAN(uint8, uint8_t)
PLAN(int8, int8_t)
PLAN(int16, int16_t)
PLAN(int32, int32_t)
PLAN(int64, int64_t)
}
