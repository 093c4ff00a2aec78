// The forward convolution as every way of computing it sees it.
#pragma once

#include <vector>

#include "operands.h"
#include "parallel.h"
#include "taps.h"

namespace dynops::cpu {

// Contiguous values of a dtype; null: none.
struct Values {
  const char* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
};

// A vector of channels as float32, padded so that full vectors may be read past its end.
inline std::vector<float> channel_vector(Values values, int64_t channels, float otherwise) {
  std::vector<float> out(channels + 64, otherwise);
  if (values.data) kernels().to_float(values.data, values.dtype, channels, out.data());
  return out;
}

inline std::vector<float> channel_vector(const OptionalTensor& t, int64_t channels, float otherwise) {
  if (!t) return channel_vector(Values{}, channels, otherwise);
  const Tensor whole = torch::stable::contiguous(*t);
  return channel_vector(Values{data_of<const char>(whole), dtype_of(whole)}, channels, otherwise);
}

// scale * (y + bias) + shift as one affine map.
struct Affine {
  std::vector<float> scale, shift;
  // + bias: `channels` values, or null for none.
  explicit Affine(int64_t channels, const float* bias = nullptr)
      : scale(channels + 64, 1.f), shift(scale.size(), 0.f) {
    if (bias) std::copy_n(bias, channels, shift.begin());
  }
  template <class Vector>  // OptionalTensor or Values
  Affine(const Vector& bias, const Vector& scale_in, const Vector& shift_in, int64_t channels)
      : scale(channel_vector(scale_in, channels, 1.f)), shift(channel_vector(bias, channels, 0.f)) {
    const std::vector<float> add = channel_vector(shift_in, channels, 0.f);
    for (int64_t c = 0; c < channels; ++c) shift[c] = shift[c] * scale[c] + add[c];
  }
};

// Some runs of `depth` elements, `offset` bytes past each pointer, as float32 in `memory`, and pointers
// there.
inline void to_floats(const char* const* from, int64_t runs, int64_t offset, Dtype dtype, int64_t depth,
                      std::vector<float>& memory, const char** to) {
  memory.resize(runs * depth);
  for (int64_t i = 0; i < runs; ++i) {
    float* run = memory.data() + i * depth;
    kernels().to_float(from[i] + offset, dtype, depth, run);
    to[i] = bytes_of(run);
  }
}

struct Forward {
  Geometry g;
  int64_t in_channels, out_channels;
  int64_t rows = 0;
  Dtype dtype;
  const int32_t* index = nullptr;
  Source source;
  Affine affine;
  Activation activation;
  const char* weight = nullptr;
  const float* gate = nullptr;     // [rows] or null
  const char* residual = nullptr;  // [rows, O], [N, H, W, O] or null
  const char* base = nullptr;      // [N, H, W, O] or null
  char* out = nullptr;             // [N, H, W, O] or [rows, O]
  bool packed_out = false, residual_map = false;
  int64_t out_stride = 0;              // bytes from an output row to the next, 0: they are contiguous
  const PanelLayout* whole = nullptr;  // of a weight that has more channels and columns than are computed
  bool turned = false;                 // the taps meet the weight's in reverse: a gradient with stride 1
  bool near = false;                   // the input was written just now, and lies in the caches
  bool each = false;                   // depthwise, though of one channel

  const char* residual_of(int64_t row) const {
    return residual + (residual_map ? index[row] : row) * out_bytes();
  }
  bool depthwise() const { return each || is_depthwise(g, in_channels, out_channels); }
  bool dot() const { return multiplies_pairs(dtype) && !depthwise(); }
  bool converts() const { return dtype != Dtype::kFloat32 && !dot() && !depthwise(); }
  int64_t out_bytes() const { return out_stride ? out_stride : out_channels * size_of(dtype); }
  // Of the packed weight.
  int64_t weight_bytes() const { return in_channels / g.groups * out_channels * g.taps() * (dot() ? 2 : 4); }
};

// Fills those of `pixels` that are not in the ascending `index`: from `base`, or with zero where it is null,
// past the caches if `stream`. Nothing that is computed is written twice.
inline void fill_inactive(char* out, const char* base, int64_t bytes, const int32_t* index, int64_t rows,
                          Span pixels, bool stream) {
  if (base == out) return;  // in place: they are there
  const int32_t* next = std::lower_bound(index, index + rows, int32_t(pixels.begin));
  for (int64_t begin = pixels.begin; begin < pixels.end;) {
    const int64_t stop = next < index + rows ? std::min<int64_t>(*next++, pixels.end) : pixels.end;
    kernels().fill(out + begin * bytes, base ? base + begin * bytes : nullptr, (stop - begin) * bytes,
                   stream);
    begin = stop + 1;
  }
  if (stream) end_stream();
}

// A thread's share of the output that no row writes. Done once, in the parallel region of the first class, so
// that one core's stores overlap another's arithmetic.
inline void fill_share(const Forward& f, int64_t t, int64_t threads) {
  const int64_t pixels = f.g.out_pixels();
  fill_inactive(f.out, f.base, f.out_bytes(), f.index, f.rows, share_of(pixels, t, threads),
                pixels * f.out_bytes() >= kStreamBytes);
}

}  // namespace dynops::cpu
