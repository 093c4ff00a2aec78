// The kernels of gather_rows and scatter_rows and their launches. Free of torch: tests/pixels_on_host.cpp
// runs them on a CPU.
//
// Rows [P, C] and the pixels of a channels_last map are both contiguous. They move in words of up to 16
// bytes, one a thread, neighbours by neighbours.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../common/divisor.h"
#include "items.cuh"
#include "words.cuh"

namespace dynops::cuda {

constexpr int kRowTile = 32;       // rows, and channels, of a tile that is turned
constexpr int kTurnedThreads = 8;  // by kRowTile

// A map [N, C, H, W]; strides in elements, size in bytes of one.
struct StridedMap {
  int64_t n, channels, h, w, stride_n, stride_c, stride_h, stride_w, size;

  int64_t pixels() const { return n * h * w; }
  int64_t row_bytes() const { return channels * size; }
  bool channels_together() const { return stride_c == 1 || channels == 1; }
  bool whole() const {  // pixel after pixel
    return channels_together() && stride_w == channels && stride_h == w * channels &&
           stride_n == h * w * channels;
  }
  int64_t last() const {
    return (n - 1) * stride_n + (h - 1) * stride_h + (w - 1) * stride_w + (channels - 1) * stride_c;
  }
};

// -------------------------------------------------------------------------------------- kernels

// The word at which a pixel's channels begin: pixel after pixel, or by strides.
template <class Int>
struct WholePixels {
  Int words;

  __device__ __forceinline__ Int operator()(int32_t pixel) const { return pixel * words; }
};

template <class Int>
struct StridedPixels {
  Divisor<int32_t> h, w;
  Int stride_n, stride_h, stride_w;

  __device__ __forceinline__ Int operator()(int32_t pixel) const {
    const auto [line, x] = w.divide(pixel);
    const auto [n, y] = h.divide(line);
    return n * stride_n + y * stride_h + x * stride_w;
  }
};

// out[i] = x[index[i]], or zero where that is -1; rows of `words` words.
template <class Word, class Int, class Pixels>
__global__ void gather_row_words(const Word* __restrict__ x, const int32_t* __restrict__ index, Int total,
                                 Divisor<Int> words, Pixels begin_of, Word* __restrict__ out) {
  for (Int at = first_item<Int>(); at < total; at += item_stride<Int>()) {
    const auto [row, word] = words.divide(at);
    const int32_t pixel = index[row];
    out[at] = pixel < 0 ? Word{} : x[begin_of(pixel) + word];
  }
}

// The same from a map whose channels lie apart, as NCHW. A block turns tiles of rows by channels in shared
// memory. Its warps read one channel of neighbouring pixels, and write neighbouring channels of one row.
template <class Word>
__global__ void gather_turned(const Word* __restrict__ x, const int32_t* __restrict__ index, int64_t rows,
                              StridedMap map, Word* __restrict__ out) {
  __shared__ Word tile[kRowTile][kRowTile + 1];  // + 1: a column's elements lie in different banks
  const int lane = int(threadIdx.x) % kRowTile, first = int(threadIdx.x) / kRowTile;
  const int64_t across = ceil_div(map.channels, kRowTile);
  const int64_t tiles = ceil_div(rows, kRowTile) * across;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int64_t row = t / across * kRowTile, channel = t % across * kRowTile;
    const int32_t flat = row + lane < rows ? index[row + lane] : -1;
    const Pixel p = pixel_at(flat < 0 ? 0 : flat, int32_t(map.h), int32_t(map.w));
    const Word* pixel = x + p.n * map.stride_n + p.y * map.stride_h + p.x * map.stride_w;
    for (int c = first; c < kRowTile; c += kTurnedThreads) {
      const bool reads = flat >= 0 && channel + c < map.channels;
      tile[c][lane] = reads ? pixel[(channel + c) * map.stride_c] : Word{};
    }
    __syncthreads();
    for (int i = first; i < kRowTile; i += kTurnedThreads) {
      if (row + i < rows && channel + lane < map.channels) {
        out[(row + i) * map.channels + channel + lane] = tile[lane][i];
      }
    }
    __syncthreads();
  }
}

// out[index[i]] = rows[i].
template <class Word, class Int>
__global__ void scatter_row_words(const Word* __restrict__ rows, const int32_t* __restrict__ index, Int total,
                                  Divisor<Int> words, Word* __restrict__ out) {
  for (Int at = first_item<Int>(); at < total; at += item_stride<Int>()) {
    const auto [row, word] = words.divide(at);
    const int32_t pixel = index[row];
    if (pixel >= 0) out[pixel * words.value + word] = rows[at];
  }
}

// ------------------------------------------------------------------------------------- launches

// Calls f with the widest word that divides all the numbers, and the narrowest offset that reaches `bytes`.
template <class Launch, class F>
void visit_row_words(const Launch& launch, uint64_t all, int64_t bytes, const F& f) {
  visit_word(all, [&](auto* null) {
    using Word = std::remove_pointer_t<decltype(null)>;
    if (bytes / int64_t(sizeof(Word)) < launch.narrow()) {
      f(Word{}, int32_t());
    } else {
      f(Word{}, int64_t());
    }
  });
}

template <class Launch>
void gather_whole_words(const Launch& launch, int64_t rows, const StridedMap& map, const void* x,
                        const int32_t* index, void* out) {
  const int64_t bytes = map.row_bytes(), most = std::max(rows, map.pixels()) * bytes;
  visit_row_words(launch, uint64_t(bytes) | address(x) | address(out), most, [&](auto word, auto offset) {
    using Word = decltype(word);
    using Int = decltype(offset);
    const int64_t words = bytes / int64_t(sizeof(Word));
    launch("gather_row_words", rows * words, gather_row_words<Word, Int, WholePixels<Int>>,
           static_cast<const Word*>(x), index, Int(rows * words), Divisor<Int>(words),
           WholePixels<Int>{Int(words)}, static_cast<Word*>(out));
  });
}

template <class Launch>
void gather_strided_words(const Launch& launch, int64_t rows, const StridedMap& map, const void* x,
                          const int32_t* index, void* out) {
  const int64_t bytes = map.row_bytes(), most = std::max(rows * bytes, (map.last() + 1) * map.size);
  const uint64_t strides = uint64_t(map.stride_n | map.stride_h | map.stride_w) * uint64_t(map.size);
  const uint64_t all = uint64_t(bytes) | strides | address(x) | address(out);
  visit_row_words(launch, all, most, [&](auto word, auto offset) {
    using Word = decltype(word);
    using Int = decltype(offset);
    const auto in_words = [&](int64_t elements) { return elements * map.size / int64_t(sizeof(Word)); };
    const int64_t words = in_words(map.channels);
    const StridedPixels<Int> pixels{map.h, map.w, Int(in_words(map.stride_n)), Int(in_words(map.stride_h)),
                                    Int(in_words(map.stride_w))};
    launch("gather_row_words", rows * words, gather_row_words<Word, Int, StridedPixels<Int>>,
           static_cast<const Word*>(x), index, Int(rows * words), Divisor<Int>(words), pixels,
           static_cast<Word*>(out));
  });
}

template <class Launch>
void gather_turned_words(const Launch& launch, int64_t rows, const StridedMap& map, const void* x,
                         const int32_t* index, void* out) {
  visit_word(uint64_t(map.size), [&](auto* null) {
    using Word = std::remove_pointer_t<decltype(null)>;
    const int64_t tiles = ceil_div(rows, kRowTile) * ceil_div(map.channels, kRowTile);
    launch.blocks("gather_turned", tiles, kRowTile * kTurnedThreads, gather_turned<Word>,
                  static_cast<const Word*>(x), index, rows, map, static_cast<Word*>(out));
  });
}

// out [rows, C] = the pixels of x in the index, or zero where that is -1.
template <class Launch>
void gather_pixel_rows(const Launch& launch, int64_t rows, const StridedMap& map, const void* x,
                       const int32_t* index, void* out) {
  const auto gather = map.whole()               ? gather_whole_words<Launch>
                      : map.channels_together() ? gather_strided_words<Launch>
                                                : gather_turned_words<Launch>;
  gather(launch, rows, map, x, index, out);
}

// out: a channels_last map of `pixels` pixels. It holds the base, or zero, already: at the active pixels
// these bytes are written twice. To write each once, as the blocks do, would take the inverse of the index.
// That is 8 bytes a pixel and 8 a row, written and read, and one launch more. It would save one write of the
// rows. For maps that fit into the L2 cache (50 MB of an H100) that write does not go to memory.
template <class Launch>
void scatter_pixel_rows(const Launch& launch, int64_t rows, int64_t pixels, int64_t bytes, const void* values,
                        const int32_t* index, void* out) {
  const int64_t most = std::max(rows, pixels) * bytes;
  visit_row_words(launch, uint64_t(bytes) | address(values) | address(out), most,
                  [&](auto word, auto offset) {
                    using Word = decltype(word);
                    using Int = decltype(offset);
                    const int64_t words = bytes / int64_t(sizeof(Word));
                    launch("scatter_row_words", rows * words, scatter_row_words<Word, Int>,
                           static_cast<const Word*>(values), index, Int(rows * words), Divisor<Int>(words),
                           static_cast<Word*>(out));
                  });
}

}  // namespace dynops::cuda
