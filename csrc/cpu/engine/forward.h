// What every way of computing a convolution forward starts from.
#pragma once

#include <vector>

#include "operands.h"
#include "parallel.h"
#include "rows.h"
#include "taps.h"

namespace dynops::cpu {

// A vector of channels as float32, padded so that full vectors may be read past its end.
inline std::vector<float> channel_vector(const OptionalTensor& t, int64_t channels, float otherwise) {
  std::vector<float> out(size_t(channels) + 64, otherwise);
  if (t) {
    const Tensor whole = torch::stable::contiguous(*t);
    kernels().to_float(data_of<const char>(whole), dtype_of(whole), channels, out.data());
  }
  return out;
}

// scale * (y + bias) + shift as one affine map.
struct Affine {
  std::vector<float> scale, shift;
  Affine() = default;
  // + bias: `channels` values, or null for none.
  Affine(const float* bias, int64_t channels) : scale(size_t(channels) + 64, 1.f), shift(scale.size(), 0.f) {
    if (bias) std::copy_n(bias, channels, shift.begin());
  }
  Affine(const OptionalTensor& bias, const OptionalTensor& scale_in, const OptionalTensor& shift_in,
         int64_t channels)
      : scale(channel_vector(scale_in, channels, 1.f)), shift(channel_vector(bias, channels, 0.f)) {
    const std::vector<float> add = channel_vector(shift_in, channels, 0.f);
    for (int64_t c = 0; c < channels; ++c)
      shift[size_t(c)] = shift[size_t(c)] * scale[size_t(c)] + add[size_t(c)];
  }
};

struct Forward {
  Geometry g;
  int64_t in_channels, out_channels, rows;
  Dtype dtype;
  const int32_t* index;
  Source source;
  Affine affine;
  Activation activation;
  const char* weight;
  const float* gate;     // [rows] or null
  const char* residual;  // [rows, O], [N, H, W, O] or null
  const char* base;      // [N, H, W, O] or null
  char* out;             // [N, H, W, O] or [rows, O]
  bool packed_out, residual_map;
  int64_t out_stride = 0;              // bytes from an output row to the next, 0: they are contiguous
  const PanelLayout* whole = nullptr;  // of a weight that has more channels and columns than are computed
  bool turned = false;                 // the taps meet the weight's in reverse: a gradient with stride 1
  bool near = false;                   // the input was written just now, and lies in the caches
  bool each = false;                   // depthwise, though of one channel

  const char* residual_of(int64_t row) const {
    return residual + (residual_map ? index[row] : row) * out_bytes();
  }
  bool depthwise() const { return each || is_depthwise(g, in_channels, out_channels); }
  bool dot() const { return dtype == Dtype::kBFloat16 && kernels().bf16_dot && !depthwise(); }
  bool converts() const { return dtype != Dtype::kFloat32 && !dot() && !depthwise(); }
  int64_t out_bytes() const { return out_stride ? out_stride : out_channels * size_of(dtype); }
};

// The part of the output that no row writes: once, in the same parallel region as the first class, so
// that one core's stores overlap another's arithmetic.
inline void fill_part(const Forward& f, int64_t t, int64_t threads) {
  const int64_t pixels = f.g.out_pixels();
  const bool stream = pixels * f.out_bytes() >= kStreamBytes;
  fill_inactive(f.out, f.base, f.out_bytes(), f.index, f.rows, part(pixels, t, threads),
                part(pixels, t + 1, threads), stream);
}

}  // namespace dynops::cpu
