// What the gradients of a convolution share.
#pragma once

#include <cstdint>

#include "operands.h"
#include "taps.h"

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
                         int64_t max_threads, char* out);

// What the gradients of some rows of a convolution are computed from.
struct GradJob {
  const Geometry& g;
  const GradRows& grad;
  int64_t rows;
  const int32_t* index;  // [rows]: the output pixels, ascending
  Dtype dtype;
  int64_t in_channels, out_channels;

  bool depthwise() const { return is_depthwise(g, in_channels, out_channels); }
};

// The gradients of a weight, [O, C / groups, taps] (transposed: [C, O / groups, taps]), and of a bias, [O] or
// null, of the job's dtype, on at most `threads` threads.
void conv_weight_grad(const GradJob& job, const Source& source, int64_t threads, char* dw, char* db);

// dx += the gradient of the input pixels [begin, end), from one thread. dx: float32, [pixels, C]. `weight`:
// packed for the input gradient. Not for depthwise convolutions.
void add_input_grad(const GradJob& job, const char* weight, int32_t begin, int32_t end, float* dx);

// dx of a depthwise convolution, every pixel written once. `weight`: [weights, taps, C], of which
// `weight_of`, [output pixels], names each pixel's; null: there is one.
void depthwise_input_grad(const GradJob& job, const float* weight, const int32_t* weight_of, char* dx);

}  // namespace dynops::cpu
