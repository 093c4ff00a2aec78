// Convolution with weights of their own for samples or regions on the CPU: the gradients.
#include <atomic>
#include <cstring>
#include <memory>

#include "../engine/grad_rows.h"
#include "../engine/pack.h"
#include "../engine/parallel.h"
#include "weight_jobs.h"

namespace dynops::cpu {
namespace {

// The gradient rows of jobs.
struct JobRows {
  GradRows grad;
  const int32_t* index;
  JobRows(const Tensor& gradient, const Jobs& jobs, const Job& job)
      : grad{data_of<const char>(gradient), gradient.size(1) * size_of(dtype_of(gradient)),
             jobs.index.data() + job.begin},
        index(grad.index) {}
};

// dw: contiguous [N or 1, R, O, C / groups, kh, kw]; db: contiguous [N or 1 as dw, R, O], or none. Threads
// take whole jobs, large ones first; the last ones, where fewer are left than threads, they share.
void weighted_weight_grad(const Tensor& grad, const Tensor& x, const OptionalTensor& region,
                          IntHeaderOnlyArrayRef geometry, Tensor dw, const OptionalTensor& db) {
  const Geometry g = geometry_of(geometry);
  const int64_t samples = dw.size(0), regions = dw.size(1), outputs = grad.size(1);
  const Dtype dtype = dtype_of(grad);
  check_region(region, g);
  Jobs jobs(g.batch, g.out_h * g.out_w, regions, samples == 1, data_of<const int32_t>(region));
  std::stable_sort(jobs.jobs.begin(), jobs.jobs.end(),
                   [](const Job& a, const Job& b) { return a.rows > b.rows; });
  const int64_t weights = samples * regions, count = int64_t(jobs.jobs.size());
  const int64_t line = outputs * size_of(dtype), row_bytes = x.size(1) * size_of(dtype);
  const int64_t weight_bytes = weights ? dw.numel() / weights * size_of(dtype) : 0;
  if (count < weights) {  // some weight met no pixel
    std::memset(data_of<char>(dw), 0, size_t(weights * weight_bytes));
    if (db) std::memset(data_of<char>(*db), 0, size_t(weights * line));
  }
  const ZeroRow zero(row_bytes);
  const Source source{g, data_of<const char>(x), row_bytes, nullptr, zero.data(), false};
  const auto run = [&](const Job& job, int64_t threads) {
    const JobRows rows(grad, jobs, job);
    conv_weight_grad({g, rows.grad, job.rows, rows.index, dtype, x.size(1), outputs}, source, threads,
                     data_of<char>(dw) + job.weight * weight_bytes,
                     db ? data_of<char>(*db) + job.weight * line : nullptr);
  };
  const double macs = double(jobs.index.size()) * double(x.size(1) / g.groups * g.taps() * outputs);
  const int64_t threads = threads_for(macs, kMacsPerThread), whole = count / threads * threads;
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int64_t) {
    for (int64_t i = next++; i < whole; i = next++) run(jobs.jobs[size_t(i)], 1);
  });
  for (int64_t i = whole; i < count; ++i) run(jobs.jobs[size_t(i)], threads);
}

// Every thread owns a range of input pixels, to which it adds the gradients of the
// jobs that reach it. dx: float32 zeros, channels_last; depthwise: of grad's dtype, every element written.
void weighted_input_grad(const Tensor& grad, const Tensor& weight, const OptionalTensor& region,
                         IntHeaderOnlyArrayRef geometry, Tensor dx) {
  const Geometry g = geometry_of(geometry);
  const int64_t regions = weight.size(1), channels = dx.size(1), outputs = grad.size(1), taps = g.taps();
  const bool shared = weight.size(0) == 1;
  const Dtype dtype = dtype_of(grad);
  check_region(region, g);
  STD_TORCH_CHECK(shared || weight.size(0) == g.batch, "weight: expected 1 or ", g.batch, " samples, got ",
                  weight.size(0));
  const Jobs jobs(g.batch, g.out_h * g.out_w, regions, false, data_of<const int32_t>(region));
  const char* weights = data_of<const char>(weight);
  if (is_depthwise(g, channels, outputs)) {
    std::vector<int32_t> all(jobs.index.size()), weight_of(jobs.index.size());
    std::iota(all.begin(), all.end(), 0);
    for (const Job& job : jobs.jobs) {
      for (int64_t i = job.begin; i < job.begin + job.rows; ++i)
        weight_of[size_t(jobs.index[size_t(i)])] = int32_t(shared ? job.weight % regions : job.weight);
    }
    std::vector<float> packed(size_t(weight.numel()));
    const int64_t one = taps * channels;
    for (int64_t w = 0; w < weight.size(0) * regions; ++w)
      pack_depthwise(weights + w * one * size_of(dtype), dtype, channels, taps, packed.data() + w * one);
    const GradRows rows{data_of<const char>(grad), channels * size_of(dtype), all.data()};
    return depthwise_input_grad({g, rows, int64_t(all.size()), all.data(), dtype, channels, outputs},
                                packed.data(), weight_of.data(), data_of<char>(dx));
  }
  const bool dot = dtype == Dtype::kBFloat16 && kernels().bf16_dot;
  const WeightView view(outputs / g.groups, channels / g.groups, taps, false, true);
  const Packer packer(view, 1, dot);
  const int64_t weight_bytes = view.group_stride * g.groups * size_of(dtype), image = g.in_h * g.in_w;
  const double macs = double(jobs.index.size()) * double(channels / g.groups * taps * outputs);
  const int64_t threads = threads_for(macs, kMacsPerThread);
  parallel(threads, [&](int64_t t) {
    const int64_t begin = part(g.in_pixels(), t, threads), end = part(g.in_pixels(), t + 1, threads);
    const std::unique_ptr<char[]> packed(new char[size_t(packer.layout().group_bytes * g.groups)]);
    const std::unique_ptr<float[]> scratch(dot ? new float[size_t(packer.panel_bytes() / 2)] : nullptr);
    for (const Job& job : jobs.jobs) {
      const int64_t n = job.weight / regions;
      const int64_t from = std::max(begin, n * image), to = std::min(end, (n + 1) * image);
      if (from >= to) continue;
      const char* at = weights + (shared ? job.weight % regions : job.weight) * weight_bytes;
      packer.pack_groups(at, dtype, g.groups, scratch.get(), packed.get());
      const JobRows rows(grad, jobs, job);
      add_input_grad({g, rows.grad, job.rows, rows.index, dtype, channels, outputs}, packed.get(),
                     int32_t(from), int32_t(to), data_of<float>(dx));
    }
  });
}

}  // namespace
}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) {
  m.def(
      "cpu_weighted_weight_grad(Tensor grad, Tensor x, Tensor? region, int[] geometry, Tensor(a!) dw, "
      "Tensor(b!)? db) -> ()");
  m.def(
      "cpu_weighted_input_grad(Tensor grad, Tensor weight, Tensor? region, int[] geometry, Tensor(a!) dx) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) {
  m.impl("cpu_weighted_weight_grad", TORCH_BOX(&dynops::cpu::weighted_weight_grad));
  m.impl("cpu_weighted_input_grad", TORCH_BOX(&dynops::cpu::weighted_input_grad));
}
