// The maximum over windows, from rows to rows.
#include <bit>
#include <limits>
#include <vector>

#include "../engine/operands.h"
#include "../engine/parallel.h"

namespace dynops::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
  operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

// to[c] = the larger of the two, or the NaN of either.
template <class T>
void keep_larger(const T* __restrict from, int64_t channels, T* __restrict to) {
  for (int64_t c = 0; c < channels; ++c) {
    const float a = to[c], b = from[c];
    to[c] = (b > a) | (b != b) ? from[c] : to[c];
  }
}

template <class T>
void max_of_windows(const Geometry& g, const T* x, const int32_t* index, int64_t rows, const int32_t* source,
                    bool zeros, T lowest, int64_t channels, T* out) {
  const std::vector<T> zero(channels, T{});
  const double bytes = double(rows * g.taps() * channels * int64_t(sizeof(T)));
  parallel_shares(rows, threads_for(bytes, kCopyBytesPerThread), [&](int64_t i) {
    const Pixel p = g.out_pixel(index[i]);
    T* to = out + i * channels;
    std::fill(to, to + channels, lowest);
    bool empty = false;
    for (int32_t r = 0; r < g.kernel_h; ++r) {
      for (int32_t s = 0; s < g.kernel_w; ++s) {
        const int32_t q = g.in_pixel(p, r, s);
        if (q < 0) continue;
        if (source[q] >= 0) {
          keep_larger(x + source[q] * channels, channels, to);
        } else {
          empty = true;
        }
      }
    }
    if (empty && zeros) keep_larger(zero.data(), channels, to);
  });
}

// x [R, C] and out [P, C], float32 or bfloat16; source int32 [N, in_h, in_w], the row of each pixel or -1.
// With `zeros` a pixel of the map without a row is 0; else a window does not see it.
void max_rows(const Tensor& x, const Tensor& index, const Tensor& source, IntHeaderOnlyArrayRef geometry,
              bool zeros, Tensor out) {
  const Geometry g = geometry_of(geometry);
  const int64_t rows = active_rows(index, {}), channels = out.size(1);
  const int32_t *at = checked_index(index, rows, g.out_pixels()), *row_of = data_of<const int32_t>(source);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == channels && out.size(0) == rows && x.is_contiguous() &&
                      source.numel() == g.in_pixels() && x.scalar_type() == out.scalar_type(),
                  "x, source, out: expected rows of ", channels, " channels, ", g.in_pixels(), " pixels and ",
                  rows, " rows, got ", x.numel(), " elements, ", source.numel(), " pixels and ", out.size(0),
                  " rows");
  if (dtype_of(x) == Dtype::kFloat32) {
    max_of_windows(g, data_of<const float>(x), at, rows, row_of, zeros,
                   -std::numeric_limits<float>::infinity(), channels, data_of<float>(out));
  } else {
    STD_TORCH_CHECK(dtype_of(x) == Dtype::kBFloat16, "x: expected float32 or bfloat16");
    max_of_windows(g, data_of<const BFloat16>(x), at, rows, row_of, zeros, BFloat16{0xff80}, channels,
                   data_of<BFloat16>(out));
  }
}

}  // namespace

DYNOPS_CPU_OP(max_rows)

}  // namespace dynops::cpu
