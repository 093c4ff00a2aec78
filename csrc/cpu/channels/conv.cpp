// Convolution on the live channels of each sample, on the CPU: forward, and the gradient of the input.
#include <atomic>

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

// The jobs that a call falls into: groups of samples, and shares of their rows or panels.
struct JobGrid {
  int64_t groups;  // of samples
  int64_t row_shares = 1, panel_shares = 1;
  int64_t size() const { return groups * row_shares * panel_shares; }
};

int64_t live_panels(const Call& c) { return ceil_div(c.out.longest(), kernels().panel_width); }

double macs_of(const Call& c) {
  const double pairs = double(c.in.total()) * double(c.out.total()) / double(c.in.lists() * c.out.lists());
  return pairs * double(c.g.out_pixels() * c.samples * c.g.taps()) / double(c.slices);
}

// Samples take the weight in turn if they mix it from several, or if it is large and a map has too few rows
// to hide the time that it takes from the L3 cache.
bool shares_weight(const Call& c) {
  constexpr int64_t kLargeWeight = 1 << 20, kFewRows = 128;
  return c.mix || (c.slices == 1 && !c.winograd && !c.depthwise && c.layout.group_bytes > kLargeWeight &&
                   c.g.out_pixels() <= kFewRows);
}

// A sample is one job where samples are many. Where rows are few or the weight is large it is cut by
// channels, and each job compacts the input. Else it is cut by rows, and each job compacts the weight.
JobGrid jobs_of(const Call& c, int64_t threads) {
  const bool split = c.mix && live_panels(c) >= threads;  // each thread reads its part of the kernels
  const int64_t share = split ? c.samples : c.samples / threads;
  const int64_t group = shares_weight(c) ? std::clamp<int64_t>(share, 1, kSampleGroup) : 1;
  JobGrid jobs{ceil_div(c.samples, group)};
  if (split) {
    jobs.panel_shares = threads;
    return jobs;
  }
  if (jobs.groups % threads == 0 || jobs.groups >= 4 * threads) return jobs;
  const int64_t weight_bytes = c.positions() * c.layout.group_bytes / 2;
  if (c.slices == 1 && shares_panels(threads, c.g.out_pixels(), live_panels(c), weight_bytes)) {
    jobs.panel_shares = threads;
  } else {
    jobs.row_shares = std::min(threads, c.units());
  }
  return jobs;
}

void run_jobs(const Call& c, const JobGrid& jobs, int64_t threads) {
  std::atomic<int64_t> next{0};
  parallel(std::min(threads, jobs.size()), [&](int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < jobs.size();) {
      const int64_t p = i % jobs.panel_shares, r = i / jobs.panel_shares % jobs.row_shares;
      const Job job{.samples = share_of(c.samples, i / (jobs.panel_shares * jobs.row_shares), jobs.groups),
                    .units = share_of(c.units(), r, jobs.row_shares),
                    .panels = share_of(live_panels(c), p, jobs.panel_shares)};
      c.depthwise ? run_depthwise_job(c, job) : run_channel_job(c, job);
    }
    end_stream();
  });
}

// Tables that depend on the geometry of a job.
void prepare(Call& c) {
  c.pixels = ascending(c.g.out_pixels());
  c.classes = row_classes(c.g, c.pixels.data(), c.g.out_pixels());
  c.tap_groups = {c.classes[0]};
  if (c.dtype == Dtype::kFloat32 && shares_weight(c)) {
    c.tap_groups.clear();
    for (int32_t tap = 0; tap < c.g.taps(); ++tap) c.tap_groups.push_back({{tap}, {}, true});
  }
  if (c.winograd) c.quads = all_quads(c.g);
  if (c.merged) c.run = ascending(c.g.kernel_w * c.in.channels());
}

// Everything that follows from the lists, then the jobs.
void run(Call& c) {
  const ZeroRow zero(std::max(c.x.stride, round_up(c.in.channels() * c.element(), 64)));
  c.zero = zero.data();
  prepare(c);
  const int64_t threads = threads_for(macs_of(c), kMacsPerThread);
  const JobGrid jobs = jobs_of(c, threads);
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
  const int64_t batch = g.batch;
  const int64_t in_heads = heads_out ? 1 : heads, out_heads = heads_out ? heads : 1;
  const bool depthwise = is_depthwise(g, in_channels, out_channels);
  const int64_t slices = depthwise ? 1 : std::max(g.groups, heads);
  Call c{
      .g = g,
      .samples = batch,
      .slices = slices,
      .in = ChannelLists(in_index, in_count, in_channels, in_heads > 1 ? 1 : slices, in_heads, batch),
      .out = ChannelLists(out_index, out_count, out_channels, out_heads > 1 ? 1 : slices, out_heads, batch),
      .dtype = dtype_of(x),
      .x = map_of(x, packed_in),
      .y = map_of(out, packed_out),
      .base = data_of<const char>(base),
      .weight = data_of<const char>(weight),
      .segments = winograd ? 1 : g.taps() / (merged ? g.kernel_w : 1),
      .merged = merged,
      .turned = turned,
      .winograd = winograd,
      .dot = multiplies_pairs(dtype_of(x)),
      .depthwise = depthwise,
      .scale = data_of<const float>(scale),
      .activation = Activation(activation)};
  check_maps(c, x, out, batch);
  if (batch * g.out_h * g.out_w == 0) return;
  c.g.groups = 1;
  const bool one = c.in.shared() && c.out.shared() && !scale;  // one job for the whole batch
  c.samples = one ? 1 : batch;
  c.g.batch = one ? batch : 1;
  if (bias) {
    c.bias = channel_vector(bias, out_channels, 0.f);
    c.bias.resize(out_channels);
  }
  const int64_t depth = in_channels / (in_heads > 1 ? 1 : slices) * (merged ? g.kernel_w : 1);
  c.layout = panel_layout(out_channels / (out_heads > 1 ? 1 : slices), c.segments, depth, c.dot);
  STD_TORCH_CHECK(depthwise || weight.numel() == slices * c.positions() * c.layout.group_bytes,
                  "weight: expected it packed, ", slices * c.positions() * c.layout.group_bytes, " bytes");
  run(c);
}

// A convolution of every channel with weights mixed from a few, float32. x, out: channels_last. weight: [E,
// bytes], each packed; mix: [N, E]; bias: [N or 1, O].
void mixed_in_steps(const Tensor& x, const Tensor& weight, const Tensor& mix, const OptionalTensor& bias,
                    IntHeaderOnlyArrayRef geometry, int64_t activation, Tensor out) {
  const Geometry g = geometry_of(geometry);
  const OptionalTensor all;
  const int64_t in_channels = x.size(1), outputs = out.size(1), experts = weight.size(0);
  Call c{.g = g,
         .samples = g.batch,
         .slices = 1,
         .in = ChannelLists(all, all, in_channels, 1, 1, g.batch),
         .out = ChannelLists(all, all, outputs, 1, 1, g.batch),
         .dtype = dtype_of(x),
         .x = map_of(x, false),
         .y = map_of(out, false),
         .weight = data_of<const char>(weight),
         .layout = panel_layout(outputs, g.taps(), in_channels, false),
         .segments = g.taps(),
         .activation = Activation(activation)};
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
  c.bias = floats_of(bias);
  run(c);
}

DYNOPS_CPU_OP(channel_conv)
DYNOPS_CPU_OP(mixed_in_steps)

}  // namespace
}  // namespace dynops::cpu
