// The gradients of some rows of a convolution.
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

struct ConvGrad {
  Geometry g;
  GradRows grad;
  int64_t rows;
  const int32_t* index;  // [rows]: the output pixels, ascending
  Dtype dtype;
  int64_t in_channels, out_channels;

  int64_t group_in() const { return in_channels / g.groups; }
  int64_t group_out() const { return out_channels / g.groups; }
  bool depthwise() const { return is_depthwise(g, in_channels, out_channels); }
};

// The gradients of a plan's rows. grad: [rows, O] or channels_last [N, O, H, W].
inline ConvGrad conv_grad_of(const Tensor& grad, const Tensor& index, const OptionalTensor& count,
                             IntHeaderOnlyArrayRef geometry, int64_t in_channels) {
  const Geometry g = geometry_of(geometry);
  const int64_t rows = active_rows(index, count), out_channels = grad.size(1);
  const int32_t* at = checked_index(index, rows, g.out_pixels());
  const Dtype dtype = dtype_of(grad);
  const GradRows from{data_of<const char>(grad), out_channels * size_of(dtype),
                      grad.dim() == 2 ? nullptr : at};
  return {g, from, rows, at, dtype, in_channels, out_channels};
}

// Brings row `row` of `rows` to its place in packed gradients, [tile][rows][height of the tile].
inline void pack_grad_row(const float* values, const TileSplit& split, int64_t row, int64_t rows, float* to) {
  for (int32_t tile = 0; tile < split.tiles; ++tile) {
    const int64_t height = split.height(tile);
    std::copy_n(values, height, to + row * height);
    values += height;
    to += height * rows;
  }
}

// [taps][O][I] to the weight's own order: [O][I][taps], or transposed (O the inputs) [I][O][taps].
void reorder_weight_grad(const float* dw, const Geometry& g, int64_t outputs, int64_t inputs, Dtype dtype,
                         int64_t max_threads, char* out);

// The gradients of a weight, [O, C / groups, taps] (transposed: [C, O / groups, taps]), and of a bias, [O] or
// null. Both have the gradient's dtype. At most `threads` threads run.
void conv_weight_grad(const ConvGrad& c, const Source& source, int64_t threads, char* dw, char* db);

// dx += the gradient of the input pixels [begin, end), from one thread. dx: float32, [pixels, C]. `weight`:
// packed for the input gradient. Not for depthwise convolutions.
void add_input_grad(const ConvGrad& c, const char* weight, Span pixels, float* dx);

// dx of a depthwise convolution, every pixel written once. `weight`: [weights, taps, C], of which
// `weight_of`, [output pixels], names each pixel's; null: there is one.
void depthwise_input_grad(const ConvGrad& c, const float* weight, const int32_t* weight_of, char* dx);

}  // namespace dynops::cpu
