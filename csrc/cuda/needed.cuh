// The inverse of an index, and the input pixels that outputs read. Free of torch: tests/pixels_on_host.cpp
// runs them on a CPU.
#pragma once

#include "../common/geometry.h"
#include "items.cuh"

namespace dynops::cuda {

// inverse[index[i]] = i; elsewhere it holds -1 already.
__global__ void write_inverse(const int32_t* __restrict__ index, int64_t rows,
                              int32_t* __restrict__ inverse) {
  for (int64_t i = first_item<int64_t>(); i < rows; i += item_stride<int64_t>()) {
    if (index[i] >= 0) inverse[index[i]] = int32_t(i);
  }
}

// A thread for each output pixel; all that write an input pixel write the same.
__global__ void mark_needed(const int32_t* __restrict__ index, int64_t rows, Geometry g,
                            uint8_t* __restrict__ mask) {
  for (int64_t i = first_item<int64_t>(); i < rows; i += item_stride<int64_t>()) {
    if (index[i] < 0) continue;
    const Pixel p = g.out_pixel(index[i]);
    for (int32_t r = 0; r < int32_t(g.kernel_h); ++r) {
      for (int32_t s = 0; s < int32_t(g.kernel_w); ++s) {
        const int32_t q = g.in_pixel(p, r, s);
        if (q >= 0) mask[q] = 1;
      }
    }
  }
}

}  // namespace dynops::cuda
