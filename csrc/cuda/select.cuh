// The positions of a mask's active elements, in ascending order, in two launches. Blocks first count the
// active elements of their parts of the mask. Then each adds up the counts of the parts before its own, and
// writes the positions of its part from there. Free of torch: tests/pixels_on_host.cpp runs them on a CPU.
//
// Nothing waits for another block and nothing is atomic, so that there is no memory to prepare and every
// run writes the same. The mask is read twice, the second time from the L2 cache where it fits there (50 MB
// of an H100). A mask of one part, such as a batch of samples, needs the second launch only.
#pragma once

#include <algorithm>

#include "mask.cuh"
#include "warps.cuh"

namespace dynops::cuda {

constexpr int kSelectThreads = 256;
constexpr int64_t kSelectParts = 1024;  // at most: each block reads the counts of all

// -------------------------------------------------------------------------------------- kernels

// counts[part]: the active elements below, the NaN above, of `vectors` vectors of the mask.
template <class Word>
__global__ void count_active(MaskVectors<Word> mask, int64_t vectors, uint64_t* __restrict__ counts) {
  const int64_t begin = blockIdx.x * vectors;
  uint64_t sum = 0;
  for (int64_t v = begin + threadIdx.x; v < begin + vectors; v += kSelectThreads) sum += mask.counts(v);
  sum = block_prefix<kSelectThreads>(sum).total;
  if (threadIdx.x == 0) counts[blockIdx.x] = sum;
}

// The active elements of the parts before this block's below, of all parts above.
__device__ __forceinline__ uint64_t active_before(const uint64_t* __restrict__ counts) {
  uint64_t sum = 0;
  for (unsigned part = threadIdx.x; part < gridDim.x; part += kSelectThreads) {
    const uint32_t active = uint32_t(counts[part]);
    sum += uint64_t(active) << 32 | (part < blockIdx.x ? active : 0);
  }
  return block_prefix<kSelectThreads>(sum).total;
}

// index[i] = the position of the i-th active element, for i < capacity. With a count, which is the smaller
// of what is active and the capacity, -1 stands from there to the capacity. One part needs no counts.
template <class Word>
__global__ void write_active(MaskVectors<Word> mask, int64_t vectors, const uint64_t* __restrict__ counts,
                             int64_t capacity, int32_t* __restrict__ index, int32_t* __restrict__ count) {
  constexpr int kElements = MaskVectors<Word>::kElements;
  __shared__ uint16_t found[kSelectThreads * kElements];  // positions of a tile, to write side by side
  const uint64_t sums = gridDim.x == 1 ? 0 : active_before(counts);
  const int64_t begin = blockIdx.x * vectors;
  int64_t row = uint32_t(sums);
  for (int64_t tile = begin; tile < begin + vectors && row < capacity; tile += kSelectThreads) {
    const uint32_t active = mask.active(tile + threadIdx.x);
    const auto [before, total] = block_prefix<kSelectThreads>(__popc(active));
    int at = before;
    for (uint32_t left = active; left; left &= left - 1) {
      found[at++] = uint16_t(int(threadIdx.x) * kElements + __ffs(int(left)) - 1);
    }
    __syncthreads();
    const int64_t first = mask.pixel(tile);
    for (int i = threadIdx.x; i < total && row + i < capacity; i += kSelectThreads) {
      index[row + i] = int32_t(first + found[i]);
    }
    row += total;
  }
  if (!count) return;
  const int64_t all = gridDim.x == 1 ? row : int64_t(sums >> 32), valid = all < capacity ? all : capacity;
  const int64_t stride = int64_t(gridDim.x) * kSelectThreads;
  for (int64_t i = valid + int64_t(blockIdx.x) * kSelectThreads + threadIdx.x; i < capacity; i += stride) {
    index[i] = -1;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *count = int32_t(valid);
}

// ------------------------------------------------------------------------------------- launches

// A mask of at least one pixel and how it is cut: into parts of as many vectors, a multiple of the threads.
template <class Word>
struct Selection {
  MaskVectors<Word> mask;
  int64_t vectors, parts;

  explicit Selection(const MaskView<Word>& view) : mask(view) {
    const int64_t tiles = (mask.count() + kSelectThreads - 1) / kSelectThreads;
    const int64_t each = (tiles + kSelectParts - 1) / kSelectParts;
    vectors = each * kSelectThreads;
    parts = (tiles + each - 1) / each;
  }
};

// counts [parts].
template <class Launch, class Word>
void count_parts(const Launch& launch, const Selection<Word>& s, uint64_t* counts) {
  launch.blocks("count_active", s.parts, kSelectThreads, count_active<Word>, s.mask, s.vectors, counts);
}

// index [rows], where rows are the active elements that count_parts counted.
template <class Launch, class Word>
void write_compact(const Launch& launch, const Selection<Word>& s, const uint64_t* counts, int64_t rows,
                   int32_t* index) {
  launch.blocks("write_active", s.parts, kSelectThreads, write_active<Word>, s.mask, s.vectors, counts, rows,
                index, static_cast<int32_t*>(nullptr));
}

// index [capacity], count [1]; counts [parts] is scratch.
template <class Launch, class Word>
void write_capacity(const Launch& launch, const Selection<Word>& s, uint64_t* counts, int64_t capacity,
                    int32_t* index, int32_t* count) {
  if (s.parts > 1) count_parts(launch, s, counts);
  launch.blocks("write_active", s.parts, kSelectThreads, write_active<Word>, s.mask, s.vectors, counts,
                capacity, index, count);
}

}  // namespace dynops::cuda
