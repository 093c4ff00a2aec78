// The kernels of blocks.cu and their launches. Free of torch: tests/blocks_on_host.cpp runs them on a CPU.
//
// A line of a map is contiguous in both memory formats. In channels_last it is W pixels of C elements, one
// plane an image; in NCHW it is W elements, C planes. Lines are taken in words, the widest that no tile's
// edge cuts, and then both formats are one [N, planes, H, words].
//
// A thread owns a word of the output in both directions, so that each byte is written once. A scatter finds
// the tiles over its word through the inverse of the index. So the output is not filled with the base first:
// at 50 % density half of it would be written twice. Sums stay in registers, in float32 and in the order of
// the plan, without atomics.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "../common/blocks.h"
#include "items.cuh"
#include "words.cuh"

namespace dynops::cuda {

// -------------------------------------------------------------------------------------- kernels

template <class Word, class Int>
__global__ void gather_words(const Word* __restrict__ map, const int32_t* __restrict__ index, Int words,
                             BlockGrid<Int> grid, Word* __restrict__ tiles) {
  for (Int at = first_item<Int>(); at < words; at += item_stride<Int>()) {
    const Int from = grid.in_map(at, index);
    tiles[at] = from < 0 ? Word{} : map[from];
  }
}

template <class Word, class Int>
__global__ void replace_words(const Word* __restrict__ tiles, const int32_t* __restrict__ inverse,
                              const Word* __restrict__ base, Int words, BlockGrid<Int> grid,
                              Word* __restrict__ out) {
  for (Int at = first_item<Int>(); at < words; at += item_stride<Int>()) {
    const Word* from = base ? base + at : nullptr;
    grid.for_each_tile(at, inverse, [&](Int source) { from = tiles + source; });
    out[at] = from ? *from : Word{};
  }
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void from_float(float value, float& out) { out = value; }
__device__ __forceinline__ void from_float(float value, __half& out) { out = __float2half_rn(value); }
__device__ __forceinline__ void from_float(float value, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(value);
}

// Some elements, moved at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Packed {
  T values[N];
};

template <class T, int N, class Int>
__global__ void add_words(const Packed<T, N>* __restrict__ tiles, const int32_t* __restrict__ inverse,
                          const Packed<T, N>* __restrict__ base, Int words, BlockGrid<Int> grid,
                          Packed<T, N>* __restrict__ out) {
  for (Int at = first_item<Int>(); at < words; at += item_stride<Int>()) {
    float sums[N] = {};
    const auto add = [&](const Packed<T, N> word) {
#pragma unroll
      for (int k = 0; k < N; ++k) sums[k] += to_float(word.values[k]);
    };
    if (base) add(base[at]);
    grid.for_each_tile(at, inverse, [&](Int source) { add(tiles[source]); });
    Packed<T, N> word;
#pragma unroll
    for (int k = 0; k < N; ++k) from_float(sums[k], word.values[k]);
    out[at] = word;
  }
}

// All that write a pixel write the same.
template <class Int>
__global__ void mark_tiles(const int32_t* __restrict__ index, Int pixels, BlockGrid<Int> grid,
                           bool* __restrict__ mask) {
  for (Int at = first_item<Int>(); at < pixels; at += item_stride<Int>()) {
    const Int to = grid.in_map(at, index);
    if (to >= 0) mask[to] = true;
  }
}

template <class T>
__device__ __forceinline__ double to_double(T value) {
  return double(value);
}
__device__ __forceinline__ double to_double(__half value) { return double(__half2float(value)); }
__device__ __forceinline__ double to_double(__nv_bfloat16 value) { return double(__bfloat162float(value)); }

// The sum, or the larger: NaN if either is.
__device__ __forceinline__ double reduced(double a, double b, bool mean) {
  if (mean) return a + b;
  return a != a || a >= b ? a : b;
}

// active[block] = the largest, or with mean the mean, absolute value of a block > threshold; `Lanes` threads
// a block of the map. `area` is that of a whole block: outside the map is zero.
template <int Lanes, class T, class Int>
__global__ void reduce_blocks(const T* __restrict__ mask, Int blocks, BlockGrid<Int> grid, bool mean,
                              double area, double threshold, bool* __restrict__ active) {
  const Int lane = Int(threadIdx.x) % Lanes;
  for (Int block = first_item<Int>() / Lanes; block < blocks; block += item_stride<Int>() / Lanes) {
    const auto [row, bx] = grid.columns.grid.divide(block);
    const auto [n, by] = grid.rows.grid.divide(row);
    const Int top = grid.rows.begin_inside(by), left = grid.columns.begin_inside(bx);
    const Int height = grid.rows.end_inside(by) - top, width = grid.columns.end_inside(bx) - left;
    const Int inside = height > 0 && width > 0 ? height * width : 0;
    double value = 0;
    for (Int k = lane; k < inside; k += Lanes) {
      const Int line = k / width, x = left + k - line * width;
      const Int y = n * grid.rows.size.value + top + line;
      const double next = to_double(mask[y * grid.columns.size.value + x]);
      value = reduced(value, next < 0 ? -next : next, mean);
    }
    for (int lanes = Lanes / 2; lanes > 0; lanes /= 2) {
      value = reduced(value, __shfl_xor_sync(~0u, value, lanes), mean);
    }
    if (lane == 0) active[block] = (mean ? value / area : value) > threshold;
  }
}

// ------------------------------------------------------------------------------------- launches

// Bytes that divide this and the addresses divide every edge of a tile and of the map.
inline uint64_t edges(const BlockGeometry& g, int64_t pixel) {
  return uint64_t(g.width * pixel) | uint64_t(g.step_w * pixel) | uint64_t(g.first_w * pixel) |
         uint64_t(g.tile_w * pixel);
}

// The same grid with columns counted in words.
inline BlockGeometry in_words(BlockGeometry g, int64_t pixel, int64_t word) {
  for (int64_t* columns : {&g.width, &g.step_w, &g.first_w, &g.tile_w}) *columns = *columns * pixel / word;
  return g;
}

// The largest number that a kernel meets on this grid.
inline int64_t largest_number(const BlockGeometry& g, int64_t planes, int64_t tiles) {
  const int64_t rows = std::abs(g.first_h) + g.grid_h * g.step_h + g.tile_h;
  const int64_t columns = std::abs(g.first_w) + g.grid_w * g.step_w + g.tile_w;
  return std::max({g.pixels() * planes, tiles * planes * g.tile_h * g.tile_w, g.blocks(), rows, columns});
}

// Calls f(grid, total), in 32-bit numbers where the launch can do with them; total: the items of the launch.
template <class Launch, class F>
void visit_grid(const Launch& launch, const BlockGeometry& g, int64_t planes, int64_t tiles, int64_t total,
                const F& f) {
  if (largest_number(g, planes, tiles) < launch.narrow()) {
    f(BlockGrid<int32_t>(g, planes), int32_t(total));
  } else {
    f(BlockGrid<int64_t>(g, planes), total);
  }
}

template <class Launch>
void gather_tiles(const Launch& launch, const BlockGeometry& g, const Lines& lines, int64_t tiles,
                  const void* map, const int32_t* index, void* out) {
  visit_word(edges(g, lines.pixel()) | address(map) | address(out), [&](auto* null) {
    using Word = std::remove_pointer_t<decltype(null)>;
    const BlockGeometry words = in_words(g, lines.pixel(), sizeof(Word));
    const int64_t all = tiles * lines.planes * words.tile_h * words.tile_w;
    visit_grid(launch, words, lines.planes, tiles, all, [&](const auto& grid, auto total) {
      launch("gather_words", total, gather_words<Word, decltype(total)>, static_cast<const Word*>(map), index,
             total, grid, static_cast<Word*>(out));
    });
  });
}

template <class Launch>
void replace_tiles(const Launch& launch, const BlockGeometry& g, const Lines& lines, int64_t tiles,
                   const void* values, const int32_t* inverse, const void* base, void* out) {
  const uint64_t addresses = address(values) | address(base) | address(out);
  visit_word(edges(g, lines.pixel()) | addresses, [&](auto* null) {
    using Word = std::remove_pointer_t<decltype(null)>;
    const BlockGeometry words = in_words(g, lines.pixel(), sizeof(Word));
    const int64_t all = words.pixels() * lines.planes;
    visit_grid(launch, words, lines.planes, tiles, all, [&](const auto& grid, auto total) {
      launch("replace_words", total, replace_words<Word, decltype(total)>, static_cast<const Word*>(values),
             inverse, static_cast<const Word*>(base), total, grid, static_cast<Word*>(out));
    });
  });
}

template <class T, int N, class Launch>
void add_packed(const Launch& launch, const BlockGeometry& g, const Lines& lines, int64_t tiles,
                const void* values, const int32_t* inverse, const void* base, void* out) {
  using Word = Packed<T, N>;
  const BlockGeometry words = in_words(g, lines.pixel(), sizeof(Word));
  const int64_t all = words.pixels() * lines.planes;
  visit_grid(launch, words, lines.planes, tiles, all, [&](const auto& grid, auto total) {
    launch("add_words", total, add_words<T, N, decltype(total)>, static_cast<const Word*>(values), inverse,
           static_cast<const Word*>(base), total, grid, static_cast<Word*>(out));
  });
}

// In words of 16 bytes, or element by element.
template <class T, class Launch>
void add_tiles(const Launch& launch, const BlockGeometry& g, const Lines& lines, int64_t tiles,
               const void* values, const int32_t* inverse, const void* base, void* out) {
  constexpr int kPacked = 16 / sizeof(T);
  const uint64_t all = edges(g, lines.pixel()) | address(values) | address(base) | address(out);
  if (all % 16 == 0) {
    add_packed<T, kPacked>(launch, g, lines, tiles, values, inverse, base, out);
  } else {
    add_packed<T, 1>(launch, g, lines, tiles, values, inverse, base, out);
  }
}

// `mask` starts as zero.
template <class Launch>
void mark_blocks(const Launch& launch, const BlockGeometry& g, int64_t tiles, const int32_t* index,
                 bool* mask) {
  visit_grid(launch, g, 1, tiles, tiles * g.tile_h * g.tile_w, [&](const auto& grid, auto total) {
    launch("mark_tiles", total, mark_tiles<decltype(total)>, index, total, grid, mask);
  });
}

template <int Lanes, class T, class Launch>
void mask_blocks(const Launch& launch, const BlockGeometry& g, const T* mask, bool mean, double threshold,
                 bool* active) {
  visit_grid(launch, g, 1, 0, g.blocks(), [&](const auto& grid, auto blocks) {
    launch("reduce_blocks", g.blocks() * Lanes, reduce_blocks<Lanes, T, decltype(blocks)>, mask, blocks, grid,
           mean, double(g.tile_h) * double(g.tile_w), threshold, active);
  });
}

}  // namespace dynops::cuda
