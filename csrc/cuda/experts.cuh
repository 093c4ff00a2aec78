// The kernels of experts.cu and the order they run in. Free of torch: tests/experts_on_host.cpp runs them on
// a CPU, with a sort of its own.
//
// The plan is a stable sort of the pairs by expert. A capacity needs another sort before it, of the pairs in
// the order of their claims: all first choices, then all second ones. A pair's rank among its expert's claims
// says whether it is kept. What is dropped has the key E in the last sort, and so ends up last, in the order
// of pairs.
#pragma once

#include <cstdint>

#include "items.cuh"

namespace dynops::cuda {

// The numbers in ascending[0, n) that are less than value.
__device__ __forceinline__ int32_t count_below(const int32_t* __restrict__ ascending, int64_t n,
                                               int32_t value) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (ascending[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return int32_t(low);
}

// -------------------------------------------------------------------------------------- kernels

// keys[i] = the expert of pair i, E where it is dropped; by_choice: of the i-th pair of all first choices,
// all second ones, ...
template <class T>
__global__ void write_keys(const T* __restrict__ index, int64_t tokens, int64_t topk, int32_t experts,
                           bool by_choice, int32_t* __restrict__ keys, int32_t* __restrict__ pairs) {
  for (int64_t i = first_item<int64_t>(); i < tokens * topk; i += item_stride<int64_t>()) {
    const int64_t pair = by_choice ? i % tokens * topk + i / tokens : i, expert = int64_t(index[pair]);
    keys[i] = expert < 0 || expert > experts ? experts : int32_t(expert);
    pairs[i] = int32_t(pair);
  }
}

// From claims sorted by expert to keys in the order of pairs, E where the expert has had its capacity.
__global__ void keep_first(const int32_t* __restrict__ sorted, const int32_t* __restrict__ claims,
                           int64_t rows, int32_t experts, int64_t capacity, int32_t* __restrict__ keys,
                           int32_t* __restrict__ pairs) {
  for (int64_t i = first_item<int64_t>(); i < rows; i += item_stride<int64_t>()) {
    const int32_t expert = sorted[i];
    keys[claims[i]] = i - count_below(sorted, rows, expert) < capacity ? expert : experts;
    pairs[i] = int32_t(i);
  }
}

// Where experts begin, and where pairs are; items are the larger of rows and E + 1.
__global__ void write_places(const int32_t* __restrict__ sorted, const int32_t* __restrict__ order,
                             int64_t rows, int32_t experts, int32_t* __restrict__ offsets,
                             int32_t* __restrict__ position) {
  for (int64_t i = first_item<int64_t>(); i < rows || i <= experts; i += item_stride<int64_t>()) {
    if (i <= experts) offsets[i] = count_below(sorted, rows, int32_t(i));
    if (i < rows) position[order[i]] = sorted[i] < experts ? int32_t(i) : -1;
  }
}

// ------------------------------------------------------------------------------------- launches

// Memory of a plan of T * K pairs: int32 [P] but for offsets [E + 1]. keys, sorted and pairs are scratch.
struct ExpertPlanMemory {
  int32_t *order, *offsets, *position, *keys, *sorted, *pairs;
};

// run: launches a kernel for a number of items; sort: stably by keys, pairs along with them.
// capacity < 0: no limit.
template <class Run, class Sort, class T>
void plan_experts(const Run& run, const Sort& sort, const T* index, int64_t tokens, int64_t topk,
                  int32_t experts, int64_t capacity, const ExpertPlanMemory& m) {
  const int64_t rows = tokens * topk, places = rows > experts ? rows : int64_t(experts) + 1;
  run("write_keys", rows, write_keys<T>, index, tokens, topk, experts, capacity >= 0, m.keys, m.pairs);
  sort(m.keys, m.sorted, m.pairs, m.order);
  if (capacity >= 0) {
    run("keep_first", rows, keep_first, m.sorted, m.order, rows, experts, capacity, m.keys, m.pairs);
    sort(m.keys, m.sorted, m.pairs, m.order);
  }
  run("write_places", places, write_places, m.sorted, m.order, rows, experts, m.offsets, m.position);
}

}  // namespace dynops::cuda
