// Convolution on the live channels of each sample, on the CPU: forward, and the gradient of the input.
#include <atomic>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "../engine/forward_pass.h"
#include "../engine/winograd_pass.h"
#include "call.h"

namespace dynops::cpu {

void write_rows(const Call& c, const ChannelList& live, int64_t first, int64_t rows, const char* computed,
                int64_t stride, int64_t channel, bool last) {
  const int64_t pitch = c.y.stride, offset = first * pitch + channel * c.element();
  char* const to = c.y.data + offset;
  const char* const base = c.base ? c.base + offset : nullptr;
  if (stride) {
    return kernels().expand(computed, stride, rows, live, c.dtype, base, pitch, to, pitch, c.streams());
  }
  const int64_t written = live.count * c.element();
  const int64_t wanted = !c.y.packed ? live.channels * c.element()
                         : last      ? pitch - channel * c.element()
                                     : written;
  for (int64_t i = 0; i < rows && written < wanted; ++i)
    kernels().fill(to + i * pitch + written, base ? base + i * pitch + written : nullptr, wanted - written,
                   false);
}

namespace {

// How a call falls into jobs.
struct Jobs {
  int64_t groups;  // of samples
  int64_t row_parts = 1, panel_parts = 1;
  int64_t size() const { return groups * row_parts * panel_parts; }
};

int64_t live_panels(const Call& c) {
  return (c.out.longest() + kernels().panel_width - 1) / kernels().panel_width;
}

double macs_of(const Call& c) {
  const double pairs = double(c.in.total()) * double(c.out.total()) / double(c.in.lists() * c.out.lists());
  return pairs * double(c.g.out_pixels() * c.samples * c.g.taps()) / double(c.parts);
}

// Whether samples take the weight in turn: they mix it from several, or it is large, and a map's rows are too
// few to hide how it comes from the L3 cache.
bool shares_weight(const Call& c) {
  constexpr int64_t kLargeWeight = 1 << 20, kFewRows = 128;
  return c.mix || (c.parts == 1 && !c.winograd && !c.depthwise && c.layout.group_bytes > kLargeWeight &&
                   c.g.out_pixels() <= kFewRows);
}

// A sample is one job where samples are many. Else it is cut by rows, each part compacting the weight for
// itself; by channels, each part compacting the input, where rows are few or the weight is large.
Jobs jobs_of(const Call& c, int64_t threads) {
  const bool split = c.mix && live_panels(c) >= threads;  // each thread reads its part of the kernels
  const int64_t share = split ? c.samples : c.samples / threads;
  const int64_t group = shares_weight(c) ? std::clamp<int64_t>(share, 1, kSampleGroup) : 1;
  Jobs jobs{(c.samples + group - 1) / group};
  if (split) {
    jobs.panel_parts = threads;
    return jobs;
  }
  if (jobs.groups % threads == 0 || jobs.groups >= 4 * threads) return jobs;
  const int64_t rows = c.g.out_pixels(), weight_bytes = c.positions() * c.layout.group_bytes / 2;
  const bool few_rows = rows < threads * 4 * kTileRows;
  const bool large_weight = weight_bytes > (1 << 20) && rows < threads * kMaxBlockRows;
  if (c.parts == 1 && (few_rows || large_weight) && live_panels(c) >= threads) {
    jobs.panel_parts = threads;
  } else {
    jobs.row_parts = std::min(threads, c.units());
  }
  return jobs;
}

void run_jobs(const Call& c, const Jobs& jobs, int64_t threads) {
  std::atomic<int64_t> next{0};
  const int64_t panels = live_panels(c);
  parallel(std::min(threads, jobs.size()), [&](int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < jobs.size();) {
      const int64_t p = i % jobs.panel_parts, r = i / jobs.panel_parts % jobs.row_parts;
      const auto range = [](int64_t size, int64_t at, int64_t parts) {
        return Range{part(size, at, parts), part(size, at + 1, parts)};
      };
      const int64_t group = i / (jobs.panel_parts * jobs.row_parts);
      const JobRange job{range(c.samples, group, jobs.groups), range(c.units(), r, jobs.row_parts),
                         range(panels, p, jobs.panel_parts)};
      c.depthwise ? run_depthwise_job(c, job) : run_channel_job(c, job);
    }
#if defined(__x86_64__)
    _mm_sfence();  // other threads may read what was written past the caches
#endif
  });
}

// Tables that depend on the geometry of a job.
void prepare(Call& c) {
  c.pixels.resize(size_t(c.g.out_pixels()));
  std::iota(c.pixels.begin(), c.pixels.end(), 0);
  c.classes = row_classes(c.g, c.pixels.data(), c.g.out_pixels());
  c.tap_groups = {c.classes[0]};
  if (c.dtype == Dtype::kFloat32 && shares_weight(c)) {
    c.tap_groups.clear();
    for (int32_t tap = 0; tap < c.g.taps(); ++tap) c.tap_groups.push_back({{tap}, {}, true});
  }
  if (c.winograd) c.quads = all_quads(c.g);
  if (c.merged) {
    c.run.resize(size_t(c.g.kernel_w * c.in.channels()));
    std::iota(c.run.begin(), c.run.end(), 0);
  }
}

// Everything that follows from the lists, then the jobs.
void run(Call& c) {
  const ZeroRow zero(std::max(c.x.stride, round_up(c.in.channels() * c.element(), 64)));
  c.zero = zero.data();
  prepare(c);
  const int64_t threads = threads_for(macs_of(c), kMacsPerThread);
  const Jobs jobs = jobs_of(c, threads);
  if (!c.depthwise && !c.mix && c.in.shared() && c.out.shared() && jobs.size() > 1) compact_weights(c);
  run_jobs(c, jobs, threads);
}

Map map_of(const Tensor& t, bool packed) {
  return {data_of<char>(t), t.size(1) * int64_t(t.element_size()), packed};
}

void check_maps(const Call& c, const Tensor& x, const Tensor& y, int64_t batch) {
  const auto wide = [](const Tensor& t, const ChannelLists& lists, bool packed) {
    return packed ? t.size(1) >= lists.longest() : t.size(1) == lists.channels();
  };
  STD_TORCH_CHECK(
      x.size(0) == batch && y.size(0) == batch && wide(x, c.in, c.x.packed) && wide(y, c.out, c.y.packed),
      "channel_conv: the maps' channels do not fit the lists");
}

// x, base, out: channels_last. weight: packed; of `heads` groups, if the lists have heads. With `turned` the
// taps meet it in reverse. heads_out: the heads are the output's, and are summed.
void channel_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& in_index, const OptionalTensor& in_count,
                  const OptionalTensor& out_index, const OptionalTensor& out_count,
                  IntHeaderOnlyArrayRef geometry, int64_t in_channels, int64_t out_channels, int64_t heads,
                  bool heads_out, int64_t activation, const OptionalTensor& scale, const OptionalTensor& base,
                  bool packed_in, bool packed_out, bool merged, bool turned, bool winograd, Tensor out) {
  Geometry g = geometry_of(geometry);
  const int64_t batch = g.batch, parts = std::max(g.groups, heads);
  const int64_t in_heads = heads_out ? 1 : heads, out_heads = heads_out ? heads : 1;
  const bool depthwise = is_depthwise(g, in_channels, out_channels);
  const int64_t groups = depthwise ? 1 : parts;
  Call c{g,
         batch,
         groups,
         ChannelLists(in_index, in_count, in_channels, in_heads > 1 ? 1 : groups, in_heads, batch),
         ChannelLists(out_index, out_count, out_channels, out_heads > 1 ? 1 : groups, out_heads, batch),
         dtype_of(x),
         map_of(x, packed_in),
         map_of(out, packed_out),
         data_of<const char>(base),
         data_of<const char>(weight),
         {},
         winograd ? 1
         : merged ? g.kernel_h
                  : g.taps(),
         merged,
         turned,
         winograd,
         dtype_of(x) == Dtype::kBFloat16 && kernels().bf16_dot,
         depthwise,
         {},
         data_of<const float>(scale),
         Activation(activation)};
  check_maps(c, x, out, batch);
  if (batch * g.out_h * g.out_w == 0) return;
  c.g.groups = 1;
  const bool one = c.in.shared() && c.out.shared() && !scale;  // one job for the whole batch
  c.samples = one ? 1 : batch;
  c.g.batch = one ? batch : 1;
  if (bias) {
    c.bias = channel_vector(bias, out_channels, 0.f);
    c.bias.resize(size_t(out_channels));
  }
  const int64_t depth = in_channels / (in_heads > 1 ? 1 : groups) * (merged ? g.kernel_w : 1);
  c.layout = panel_layout(out_channels / (out_heads > 1 ? 1 : groups), c.segments, depth, c.dot);
  STD_TORCH_CHECK(depthwise || weight.numel() == groups * c.positions() * c.layout.group_bytes,
                  "weight: expected it packed, ", groups * c.positions() * c.layout.group_bytes, " bytes");
  run(c);
}

// A convolution of every channel with weights mixed from a few, float32. x, out: channels_last. weight: [E,
// bytes], each packed; mix: [N, E]; bias: [N or 1, O].
void mixed_in_steps(const Tensor& x, const Tensor& weight, const Tensor& mix, const OptionalTensor& bias,
                    IntHeaderOnlyArrayRef geometry, int64_t activation, Tensor out) {
  const Geometry g = geometry_of(geometry);
  const OptionalTensor all;
  const int64_t in_channels = x.size(1), outputs = out.size(1), experts = weight.size(0);
  Call c{g,
         g.batch,
         1,
         ChannelLists(all, all, in_channels, 1, 1, g.batch),
         ChannelLists(all, all, outputs, 1, 1, g.batch),
         dtype_of(x),
         map_of(x, false),
         map_of(out, false),
         nullptr,
         data_of<const char>(weight),
         panel_layout(outputs, g.taps(), in_channels, false),
         g.taps(),
         false,
         false,
         false,
         false,
         false,
         {},
         nullptr,
         Activation(activation)};
  STD_TORCH_CHECK(c.dtype == Dtype::kFloat32 && g.groups == 1 && !g.transposed,
                  "mixed_in_steps: expected float32 and one group");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == c.layout.group_bytes, "weight: expected ",
                  c.layout.group_bytes, " bytes each, got ", weight.size(1));
  STD_TORCH_CHECK(mix.scalar_type() == ScalarType::Float && mix.numel() == g.batch * experts,
                  "mix: expected float32 ", g.batch, " x ", experts, ", got ", mix.numel());
  if (g.out_pixels() == 0) return;
  c.g.batch = 1;
  c.mix = data_of<const float>(mix);
  c.experts = experts;
  c.expert_bytes = c.layout.group_bytes;
  if (bias) {
    c.bias.resize(size_t(bias->numel()));
    kernels().to_float(data_of<const char>(*bias), dtype_of(*bias), bias->numel(), c.bias.data());
  }
  run(c);
}

}  // namespace
}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) {
  m.def(
      "cpu_channel_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? in_index, Tensor? in_count, "
      "Tensor? out_index, Tensor? out_count, int[] geometry, int in_channels, int out_channels, int heads, "
      "bool heads_out, int activation, Tensor? scale, Tensor? base, bool packed_in, bool packed_out, "
      "bool merged, bool turned, bool winograd, Tensor(a!) out) -> ()");
  m.def(
      "cpu_mixed_in_steps(Tensor x, Tensor weight, Tensor mix, Tensor? bias, int[] geometry, int activation, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) {
  m.impl("cpu_channel_conv", TORCH_BOX(&dynops::cpu::channel_conv));
  m.impl("cpu_mixed_in_steps", TORCH_BOX(&dynops::cpu::mixed_in_steps));
}
