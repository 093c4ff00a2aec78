// What the gradients of a convolution share.
#pragma once

#include <cstdint>

#include "../common/geometry.h"
#include "engine.h"

namespace dynops::cpu {

// The gradient rows of a plan: [rows, O] packed, or read from a channels_last map.
struct GradRows {
  const char* data;
  int64_t bytes;
  const int32_t* index;  // null where packed
  const char* operator[](int64_t row) const { return data + (index ? index[row] : row) * bytes; }
};

// [taps][O][I] to the weight's own order: [O][I][taps], or transposed (O the inputs) [I][O][taps].
void reorder_weight_grad(const float* dw, const Geometry& g, int64_t outputs, int64_t inputs, Dtype dtype,
                         char* out);

}  // namespace dynops::cpu
