// Convolution with weights of their own for samples or regions on the CPU: the gradients.
#include <atomic>
#include <cstring>
#include <memory>

#include "../engine/grad_rows.h"
#include "../engine/pack.h"
#include "own_weights.h"

namespace dynops::cpu {
namespace {

// The gradients of the rows of one weight.
ConvGrad grad_of(const Geometry& g, const Tensor& grad, int64_t in_channels, const PixelsByWeight& pixels,
                 const WeightRows& one) {
  const Dtype dtype = dtype_of(grad);
  const int32_t* index = pixels.index.data() + one.begin;
  const GradRows rows{data_of<const char>(grad), grad.size(1) * size_of(dtype), index};
  return {g, rows, one.rows, index, dtype, in_channels, grad.size(1)};
}

// dw: contiguous [N or 1, R, O, C / groups, kh, kw]; db: contiguous [N or 1 as dw, R, O], or none. Threads
// take whole weights, those of many rows first; the last ones, where fewer are left than threads, they share.
void weighted_weight_grad(const Tensor& grad, const Tensor& x, const OptionalTensor& region,
                          IntHeaderOnlyArrayRef geometry, Tensor dw, OptionalTensor db) {
  const Geometry g = geometry_of(geometry);
  const int64_t samples = dw.size(0), regions = dw.size(1), outputs = grad.size(1);
  const Dtype dtype = dtype_of(grad);
  check_region(region, g);
  PixelsByWeight pixels(g.batch, g.out_h * g.out_w, regions, samples == 1, data_of<const int32_t>(region));
  std::stable_sort(pixels.weights.begin(), pixels.weights.end(),
                   [](const WeightRows& a, const WeightRows& b) { return a.rows > b.rows; });
  const int64_t weights = samples * regions, count = int64_t(pixels.weights.size());
  const int64_t line = outputs * size_of(dtype), row_bytes = x.size(1) * size_of(dtype);
  const int64_t weight_bytes = weights ? dw.numel() / weights * size_of(dtype) : 0;
  if (count < weights) {  // some weight met no pixel
    std::memset(data_of<char>(dw), 0, weights * weight_bytes);
    if (db) std::memset(data_of<char>(*db), 0, weights * line);
  }
  const ZeroRow zero(row_bytes);
  const Source source{.g = g, .x = data_of<const char>(x), .row_bytes = row_bytes, .zero = zero.data()};
  const auto run = [&](const WeightRows& one, int64_t threads) {
    conv_weight_grad(grad_of(g, grad, x.size(1), pixels, one), source, threads,
                     data_of<char>(dw) + one.weight * weight_bytes,
                     db ? data_of<char>(*db) + one.weight * line : nullptr);
  };
  const double macs = double(pixels.index.size()) * double(x.size(1) / g.groups * g.taps() * outputs);
  const int64_t threads = threads_for(macs, kMacsPerThread), whole = count / threads * threads;
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int64_t) {
    for (int64_t i = next++; i < whole; i = next++) run(pixels.weights[i], 1);
  });
  for (int64_t i = whole; i < count; ++i) run(pixels.weights[i], threads);
}

// Every thread owns some input pixels, to which it adds the gradients of the rows that read them. dx: float32
// zeros, channels_last; depthwise: of grad's dtype, every element written.
void weighted_input_grad(const Tensor& grad, const Tensor& weight, const OptionalTensor& region,
                         IntHeaderOnlyArrayRef geometry, Tensor dx) {
  const Geometry g = geometry_of(geometry);
  const int64_t regions = weight.size(1), channels = dx.size(1), outputs = grad.size(1), taps = g.taps();
  const bool shared = weight.size(0) == 1;
  const Dtype dtype = dtype_of(grad);
  check_region(region, g);
  STD_TORCH_CHECK(shared || weight.size(0) == g.batch, "weight: expected 1 or ", g.batch, " samples, got ",
                  weight.size(0));
  const PixelsByWeight pixels(g.batch, g.out_h * g.out_w, regions, false, data_of<const int32_t>(region));
  const char* weights = data_of<const char>(weight);
  if (is_depthwise(g, channels, outputs)) {
    std::vector<int32_t> all = ascending(int64_t(pixels.index.size())), weight_of(all.size());
    for (const WeightRows& one : pixels.weights) {
      for (int64_t i = one.begin; i < one.begin + one.rows; ++i)
        weight_of[pixels.index[i]] = int32_t(shared ? one.weight % regions : one.weight);
    }
    std::vector<float> packed(weight.numel());
    const int64_t one = taps * channels;
    for (int64_t w = 0; w < weight.size(0) * regions; ++w)
      pack_depthwise(weights + w * one * size_of(dtype), dtype, channels, taps, packed.data() + w * one);
    const GradRows rows{data_of<const char>(grad), channels * size_of(dtype), all.data()};
    return depthwise_input_grad({g, rows, int64_t(all.size()), all.data(), dtype, channels, outputs},
                                packed.data(), weight_of.data(), data_of<char>(dx));
  }
  const bool dot = multiplies_pairs(dtype);
  const WeightView view(outputs / g.groups, channels / g.groups, taps, false, true);
  const Packer packer(view, 1, dot);
  const int64_t weight_bytes = view.group_stride * g.groups * size_of(dtype), image = g.in_h * g.in_w;
  const double macs = double(pixels.index.size()) * double(channels / g.groups * taps * outputs);
  const int64_t threads = threads_for(macs, kMacsPerThread);
  parallel(threads, [&](int64_t t) {
    const Span mine = share_of(g.in_pixels(), t, threads);
    const std::unique_ptr<char[]> packed(new char[packer.layout().group_bytes * g.groups]);
    const std::unique_ptr<float[]> scratch(dot ? new float[packer.panel_bytes() / 2] : nullptr);
    for (const WeightRows& one : pixels.weights) {
      const int64_t n = one.weight / regions;
      const Span read{std::max(mine.begin, n * image), std::min(mine.end, (n + 1) * image)};
      if (read.begin >= read.end) continue;
      const char* at = weights + (shared ? one.weight % regions : one.weight) * weight_bytes;
      packer.pack_groups(at, dtype, {0, g.groups * packer.layout().panels}, scratch.get(), packed.get());
      add_input_grad(grad_of(g, grad, channels, pixels, one), packed.get(), read, data_of<float>(dx));
    }
  });
}

DYNOPS_CPU_OP(weighted_weight_grad)
DYNOPS_CPU_OP(weighted_input_grad)

}  // namespace
}  // namespace dynops::cpu
