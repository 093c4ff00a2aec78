// The index arithmetic of a convolution, for host and device. dynops/geometry.py defines the same.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DYNOPS_HD __host__ __device__ __forceinline__
#else
#define DYNOPS_HD inline __attribute__((always_inline))
#endif

namespace dynops {

DYNOPS_HD constexpr int64_t ceil_div(int64_t size, int64_t step) { return (size + step - 1) / step; }
DYNOPS_HD constexpr int64_t round_up(int64_t size, int64_t step) { return ceil_div(size, step) * step; }

struct Pixel {
  int32_t n, y, x;
};

// The pixel at flat position n*h*w + y*w + x.
DYNOPS_HD Pixel pixel_at(int32_t flat, int32_t h, int32_t w) {
  const int32_t line = flat / w;
  const int32_t n = line / h;
  return {n, line - n * h, flat - line * w};
}

// The input coordinate that tap `tap` of output coordinate `out` reads, or -1 outside [0, size).
DYNOPS_HD int32_t input_coordinate(int32_t out, int32_t tap, int32_t size, int32_t stride, int32_t pad,
                                   int32_t dilation, bool transposed) {
  if (transposed) {
    const int32_t shifted = out + pad - tap * dilation;
    const int32_t in = shifted / stride;
    return shifted >= 0 && in * stride == shifted && in < size ? in : -1;
  }
  const int32_t in = out * stride - pad + tap * dilation;
  return in >= 0 && in < size ? in : -1;
}

// As dynops.geometry.ConvGeometry, in the same order; an op's schema passes it as int[15].
struct Geometry {
  int64_t batch, in_h, in_w, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
      groups, transposed;

  DYNOPS_HD int64_t taps() const { return kernel_h * kernel_w; }
  DYNOPS_HD int64_t in_pixels() const { return batch * in_h * in_w; }
  DYNOPS_HD int64_t out_pixels() const { return batch * out_h * out_w; }
  DYNOPS_HD bool pointwise() const {
    return kernel_h * kernel_w == 1 && stride_h * stride_w == 1 && pad_h == 0 && pad_w == 0 &&
           in_h == out_h && in_w == out_w;
  }
  DYNOPS_HD Pixel out_pixel(int32_t flat) const { return pixel_at(flat, int32_t(out_h), int32_t(out_w)); }

  // The input line, column and flat position that an output reads through tap (r, s), or -1 outside.
  DYNOPS_HD int32_t in_line(int32_t y, int32_t r) const {
    return input_coordinate(y, r, int32_t(in_h), int32_t(stride_h), int32_t(pad_h), int32_t(dil_h),
                            transposed != 0);
  }
  DYNOPS_HD int32_t in_column(int32_t x, int32_t s) const {
    return input_coordinate(x, s, int32_t(in_w), int32_t(stride_w), int32_t(pad_w), int32_t(dil_w),
                            transposed != 0);
  }
  DYNOPS_HD int32_t in_pixel(Pixel p, int32_t r, int32_t s) const {
    const int32_t y = in_line(p.y, r), x = in_column(p.x, s);
    return y < 0 || x < 0 ? -1 : (p.n * int32_t(in_h) + y) * int32_t(in_w) + x;
  }

  // The output line and column that read an input through tap (r, s), or -1: backward is the transpose.
  DYNOPS_HD int32_t out_line(int32_t y, int32_t r) const {
    return input_coordinate(y, r, int32_t(out_h), int32_t(stride_h), int32_t(pad_h), int32_t(dil_h),
                            transposed == 0);
  }
  DYNOPS_HD int32_t out_column(int32_t x, int32_t s) const {
    return input_coordinate(x, s, int32_t(out_w), int32_t(stride_w), int32_t(pad_w), int32_t(dil_w),
                            transposed == 0);
  }
};

// As dynops.geometry.BlockGeometry, in the same order; an op's schema passes it as int[11].
struct BlockGeometry {
  int64_t batch, height, width, grid_h, grid_w, step_h, step_w, first_h, first_w, tile_h, tile_w;

  DYNOPS_HD int64_t pixels() const { return batch * height * width; }
  DYNOPS_HD int64_t blocks() const { return batch * grid_h * grid_w; }
  // True if a pixel may lie in more than one tile.
  DYNOPS_HD bool overlaps() const {
    return (tile_h > step_h && grid_h > 1) || (tile_w > step_w && grid_w > 1);
  }
};

struct Span {
  int64_t begin, end;
  DYNOPS_HD int64_t size() const { return end - begin; }
  DYNOPS_HD bool holds(int64_t at) const { return at >= begin && at < end; }
};

// The part of [first, first + size) that lies in [0, limit); where none does, an empty one inside the former.
DYNOPS_HD Span clipped(int64_t first, int64_t size, int64_t limit) {
  const int64_t last = first + size;
  const int64_t begin = first >= 0 ? first : last < 0 ? last : 0;
  const int64_t end = last <= limit ? last : limit;
  return {begin, end > begin ? end : begin};
}

// The outputs of one axis whose taps all lie inside the input.
DYNOPS_HD Span interior(int64_t out, int64_t in, int64_t kernel, int64_t stride, int64_t pad,
                        int64_t dilation) {
  const int64_t last = in - 1 - (kernel - 1) * dilation + pad, end = last / stride + 1;
  return {ceil_div(pad, stride), last < 0 ? 0 : end < out ? end : out};
}

}  // namespace dynops
