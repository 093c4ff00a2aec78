// A stable partition of pairs by expert in two launches. Blocks first count the pairs of each expert in their
// parts of the list. Then each adds up the counts of all parts, and so knows where its own pairs go. (A
// multisplit: Ashkiani et al., PPoPP 2016.) A list of one part needs the second launch only.
//
// A warp walks its share of a part 32 pairs at a time. Lanes find the pairs of the same expert by a match, in
// the order of the lanes. No order depends on which block or warp is first.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/geometry.h"
#include "warps.cuh"

namespace dynops::cuda {

constexpr int kSplitThreads = 256, kSplitWarps = kSplitThreads / kLanes;
constexpr int kMostExperts = 1024;  // counters of 8 warps: 33 KB of shared memory
constexpr int kAhead = 4;           // pairs that a lane loads before it needs the first

// A router's choices [T, K], each an expert, or E where the pair is dropped. They are in the order of pairs,
// or by choice: all first ones, all second ones, ...
template <class T>
struct Choices {
  const T* index;
  uint32_t tokens, topk;
  int32_t experts;
  bool by_choice;

  DYNOPS_HD int64_t pairs() const { return int64_t(tokens) * topk; }
  __device__ __forceinline__ uint32_t pair(uint32_t i) const {
    return by_choice ? i % tokens * topk + i / tokens : i;
  }
  __device__ __forceinline__ int32_t expert(uint32_t pair) const {
    const int64_t expert = int64_t(index[pair]);
    return expert < 0 || expert > experts ? experts : int32_t(expert);
  }
};

// The number of pairs of each expert that a warp has seen: [warp][expert].
using Seen = int32_t[kSplitWarps][kMostExperts + 1];

// Calls f(pair, its expert, how many of that expert came before) for the share of this warp.
template <class T, class F>
__device__ __forceinline__ void walk_share(const Choices<T>& choices, int64_t share, Seen& seen, const F& f) {
  const unsigned lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int64_t begin = (int64_t(blockIdx.x) * kSplitWarps + warp) * share, rows = choices.pairs();
  const int64_t end = begin + share < rows ? begin + share : rows;
  for (int64_t at = begin; at < end; at += kAhead * kLanes) {
    uint32_t pair[kAhead];
    int32_t expert[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = at + k * kLanes + lane;
      pair[k] = i < end ? choices.pair(uint32_t(i)) : 0;
      expert[k] = i < end ? choices.expert(pair[k]) : -1;
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const unsigned same = __match_any_sync(~0u, expert[k]);
      const int earlier = __popc(same & ((1u << lane) - 1));
      const int32_t rank = expert[k] < 0 ? 0 : seen[warp][expert[k]] + earlier;
      __syncwarp();
      if (expert[k] >= 0 && earlier == 0) seen[warp][expert[k]] = rank + __popc(same);
      __syncwarp();
      if (expert[k] >= 0) f(pair[k], expert[k], rank);
    }
  }
}

// Sets `seen` to the pairs in the share of each warp.
template <class T>
__device__ __forceinline__ void count_shares(const Choices<T>& choices, int64_t share, Seen& seen) {
  for (int e = threadIdx.x; e <= choices.experts; e += kSplitThreads) {
    for (int w = 0; w < kSplitWarps; ++w) seen[w][e] = 0;
  }
  __syncthreads();
  walk_share(choices, share, seen, [](uint32_t, int32_t, int32_t) {});
  __syncthreads();
}

// -------------------------------------------------------------------------------------- kernels

// counts[part][expert] of the pairs in each part.
template <class T>
__global__ void count_pairs(Choices<T> choices, int64_t share, int32_t* __restrict__ counts) {
  __shared__ Seen seen;
  count_shares(choices, share, seen);
  for (int e = threadIdx.x; e <= choices.experts; e += kSplitThreads) {
    int32_t sum = 0;
    for (int w = 0; w < kSplitWarps; ++w) sum += seen[w][e];
    counts[int64_t(blockIdx.x) * (choices.experts + 1) + e] = sum;
  }
}

// Adds the counts of all parts to `all`, and of those before this block's to `before`. Atomically, but
// integers have the same sum in any order.
__device__ __forceinline__ void add_parts(const int32_t* __restrict__ counts, int buckets, int32_t* all,
                                          int32_t* before) {
  const int own = int(blockIdx.x) * buckets, end = int(gridDim.x) * buckets;
  for (int i = threadIdx.x; i < end; i += kSplitThreads) {
    const int32_t count = counts[i];
    if (count == 0) continue;
    atomicAdd(all + i % buckets, count);
    if (i < own) atomicAdd(before + i % buckets, count);
  }
}

// Calls put(pair, its expert, the first row of that expert, its rank among the expert's pairs) for every
// pair. Writes offsets [E + 1], the first row of each expert. One part needs no counts.
template <class T, class Put>
__global__ void place_pairs(Choices<T> choices, int64_t share, const int32_t* __restrict__ counts,
                            int32_t* __restrict__ offsets, Put put) {
  __shared__ Seen seen;
  __shared__ int32_t first[kMostExperts + 1], before[kMostExperts + 1];
  for (int e = threadIdx.x; e <= choices.experts; e += kSplitThreads) first[e] = before[e] = 0;
  count_shares(choices, share, seen);
  if (gridDim.x > 1) add_parts(counts, choices.experts + 1, first, before);
  __syncthreads();
  int32_t row = 0;
  for (int tile = 0; tile <= choices.experts; tile += kSplitThreads) {
    const int e = tile + int(threadIdx.x);
    const bool valid = e <= choices.experts;
    int32_t rank = valid ? before[e] : 0;
    for (int w = 0; w < kSplitWarps && valid; ++w) {
      const int32_t count = seen[w][e];
      seen[w][e] = rank;
      rank += count;
    }
    const auto [rows_before, rows] = block_prefix<kSplitThreads>(!valid          ? 0
                                                                 : gridDim.x > 1 ? first[e]
                                                                                 : rank);
    if (valid) first[e] = row + rows_before;
    if (valid && blockIdx.x == 0) offsets[e] = row + rows_before;
    row += rows;
  }
  __syncthreads();
  walk_share(choices, share, seen,
             [&](uint32_t pair, int32_t expert, int32_t rank) { put(pair, expert, first[expert], rank); });
}

// Puts a pair at its row.
struct PutRow {
  int32_t experts;
  int32_t *order, *position;

  __device__ __forceinline__ void operator()(uint32_t pair, int32_t expert, int32_t first,
                                             int32_t rank) const {
    order[first + rank] = int32_t(pair);
    position[pair] = expert < experts ? first + rank : -1;
  }
};

// Drops the pairs that their expert has no room for.
struct PutKey {
  int32_t experts;
  int64_t capacity;
  int32_t* keys;

  __device__ __forceinline__ void operator()(uint32_t pair, int32_t expert, int32_t, int32_t rank) const {
    keys[pair] = rank < capacity ? expert : experts;
  }
};

// ------------------------------------------------------------------------------------- launches

// The cut of a list of pairs. Nothing here was measured on a GPU; the reasons are these. A block walks 1024
// pairs in about the time that a launch takes, so that fewer are not worth another block. Each block reads
// the counts of all parts, E + 1 each: 16384 of them are 64 loads a thread, about as long. The sort is five
// or more launches and moves 40 bytes a pair. Up to 4096 pairs a block, two launches should take less;
// beyond, the sort's use of the whole GPU wins.
struct Split {
  static constexpr int64_t kPart = 1024, kCounts = 16384, kParts = 128, kMostPairs = 4096;

  int64_t share, parts;  // pairs of a warp, blocks

  Split(int64_t rows, int32_t experts) {
    const int64_t most = std::clamp<int64_t>(kCounts / (int64_t(experts) + 1), 1, kParts);
    const int64_t wanted = std::clamp<int64_t>((rows + kPart - 1) / kPart, 1, most);
    share = (rows + wanted * kSplitThreads - 1) / (wanted * kSplitThreads) * kLanes;
    parts = (rows + share * kSplitWarps - 1) / (share * kSplitWarps);
  }
  static bool serves(int64_t rows, int64_t experts) {
    return experts <= kMostExperts && Split(rows, int32_t(experts)).share * kSplitWarps <= kMostPairs;
  }
  int64_t counts(int32_t experts) const { return parts * (int64_t(experts) + 1); }
};

// counts: scratch of Split::counts numbers.
template <class Launch, class T, class Put>
void split_pairs(const Launch& launch, const Choices<T>& choices, int32_t* counts, int32_t* offsets,
                 const Put& put) {
  const Split split(choices.pairs(), choices.experts);
  if (split.parts > 1) {
    launch.blocks("count_pairs", split.parts, kSplitThreads, count_pairs<T>, choices, split.share, counts);
  }
  launch.blocks("place_pairs", split.parts, kSplitThreads, place_pairs<T, Put>, choices, split.share, counts,
                offsets, put);
}

}  // namespace dynops::cuda
