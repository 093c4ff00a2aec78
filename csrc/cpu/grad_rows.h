// What both gradients of a convolution read.
#pragma once

#include <cstdint>

namespace dynops::cpu {

// The gradient rows of a plan: [rows, O] packed, or read from a channels_last map.
struct GradRows {
  const char* data;
  int64_t bytes;
  const int32_t* index;  // null where packed
  const char* operator[](int64_t row) const { return data + (index ? index[row] : row) * bytes; }
};

}  // namespace dynops::cpu
