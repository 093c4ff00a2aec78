// The kernels of experts.cu and the order they run in. Free of torch: tests/experts_on_host.cpp runs them on
// a CPU, with a sort of its own.
//
// The plan is a stable partition of the pairs by expert. A capacity needs another one before it, of the pairs
// in the order of their claims: all first choices, then all second ones. A pair's rank among its expert's
// claims says whether it is kept. What is dropped has the key E in the last partition, and so ends up last,
// in the order of pairs. Both are done by multisplit.cuh, or where that does not serve, by a sort.
#pragma once

#include <cstdint>

#include "items.cuh"
#include "multisplit.cuh"

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

// keys[i] and pairs[i]: the i-th choice.
template <class T>
__global__ void write_keys(Choices<T> choices, int32_t* __restrict__ keys, int32_t* __restrict__ pairs) {
  for (int64_t i = first_item<int64_t>(); i < choices.pairs(); i += item_stride<int64_t>()) {
    const uint32_t pair = choices.pair(uint32_t(i));
    keys[i] = choices.expert(pair);
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

// Writes the first row of each expert and the row of each pair; items are the larger of rows and E + 1.
__global__ void write_places(const int32_t* __restrict__ sorted, const int32_t* __restrict__ order,
                             int64_t rows, int32_t experts, int32_t* __restrict__ offsets,
                             int32_t* __restrict__ position) {
  for (int64_t i = first_item<int64_t>(); i < rows || i <= experts; i += item_stride<int64_t>()) {
    if (i <= experts) offsets[i] = count_below(sorted, rows, int32_t(i));
    if (i < rows) position[order[i]] = sorted[i] < experts ? int32_t(i) : -1;
  }
}

// ------------------------------------------------------------------------------------- launches

// Memory of a plan of P = T * K pairs: int32 [P] but for offsets [E + 1].
struct ExpertPlanMemory {
  int32_t *order, *offsets, *position;
};

// Numbers of scratch memory that plan_experts needs.
inline int64_t expert_plan_scratch(int64_t rows, int64_t experts) {
  if (!Split::serves(rows, experts)) return 3 * rows;
  return rows + Split(rows, int32_t(experts)).counts(int32_t(experts));
}

// Two launches; four with a capacity (>= 0).
template <class Launch, class T>
void plan_by_split(const Launch& launch, const Choices<T>& choices, int64_t capacity,
                   const ExpertPlanMemory& m, int32_t* scratch) {
  int32_t *const keys = scratch, *const counts = scratch + choices.pairs();
  const PutRow rows{choices.experts, m.order, m.position};
  if (capacity < 0) return split_pairs(launch, choices, counts, m.offsets, rows);
  Choices<T> claims = choices;
  claims.by_choice = true;
  split_pairs(launch, claims, counts, m.offsets, PutKey{choices.experts, capacity, keys});
  const Choices<int32_t> kept{keys, choices.tokens, choices.topk, choices.experts, false};
  split_pairs(launch, kept, counts, m.offsets, rows);
}

// sort: stably by keys, pairs along with them.
template <class Launch, class Sort, class T>
void plan_by_sort(const Launch& launch, const Sort& sort, const Choices<T>& choices, int64_t capacity,
                  const ExpertPlanMemory& m, int32_t* scratch) {
  const int32_t experts = choices.experts;
  const int64_t rows = choices.pairs(), places = rows > experts ? rows : int64_t(experts) + 1;
  int32_t *const keys = scratch, *const sorted = scratch + rows, *const pairs = scratch + 2 * rows;
  Choices<T> claims = choices;
  claims.by_choice = capacity >= 0;
  launch("write_keys", rows, write_keys<T>, claims, keys, pairs);
  sort(keys, sorted, pairs, m.order);
  if (capacity >= 0) {
    launch("keep_first", rows, keep_first, sorted, m.order, rows, experts, capacity, keys, pairs);
    sort(keys, sorted, pairs, m.order);
  }
  launch("write_places", places, write_places, sorted, m.order, rows, experts, m.offsets, m.position);
}

// capacity < 0: no limit. There is at least one pair.
template <class Launch, class Sort, class T>
void plan_experts(const Launch& launch, const Sort& sort, const Choices<T>& choices, int64_t capacity,
                  const ExpertPlanMemory& memory, int32_t* scratch) {
  if (Split::serves(choices.pairs(), choices.experts)) {
    plan_by_split(launch, choices, capacity, memory, scratch);
  } else {
    plan_by_sort(launch, sort, choices, capacity, memory, scratch);
  }
}

}  // namespace dynops::cuda
