// Packed rows to a map that lies channel by channel, and convolution to one.
#pragma once

#include <vector>

#include "../engine/forward.h"

namespace dynops::cpu {

// A map [N, C, H, W] without gaps, and the base that lies where no row goes.
struct PlaneMap {
  char* to;
  const char* base;                      // as `to`, or null: zero
  int64_t batch, channels, plane, size;  // plane: pixels of an image; size: bytes of an element

  int64_t bytes() const { return batch * channels * plane * size; }
};

// Rows [count, C] at the ascending positions `at`, or of all pixels where that is null.
struct PlaneSource {
  const char* rows;
  const int32_t* at;
  int64_t count;
  bool all;
};

// Writes some channels of some pixels of image n; `row` is working memory. A search finds the rows there.
void scatter_pixels(const PlaneMap& map, const PlaneSource& source, int64_t n, Span pixels, Span channels,
                    bool stream, std::vector<int32_t>& row);

// All of it, on all threads.
void scatter_to_planes(const PlaneMap& map, const PlaneSource& source);

}  // namespace dynops::cpu
