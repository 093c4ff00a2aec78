// Convolution on live channels on the CPU: the gradients of the weight and the bias.
#include <cstring>

#include "../engine/grad_rows.h"
#include "../engine/parallel.h"
#include "../engine/row_sums.h"
#include "../engine/taps.h"
#include "call.h"
#include "live_map.h"

namespace dynops::cpu {
namespace {

// The input pixel that each output pixel of one image reads through a tap, or -1.
std::vector<int32_t> inputs_of_tap(const Geometry& g, int64_t tap) {
  std::vector<int32_t> at(g.out_h * g.out_w);
  for (int32_t y = 0, i = 0; y < g.out_h; ++y) {
    for (int32_t x = 0; x < g.out_w; ++x, ++i)
      at[i] = g.in_pixel({0, y, x}, int32_t(tap / g.kernel_w), int32_t(tap % g.kernel_w));
  }
  return at;
}

constexpr int64_t kRows = 128;  // of a block: 16 KB of a panel of x and 6 KB of a tile of gradients

// dW[t][o][i] += sum_p dy[p, o] x[q(p, t), i] for the samples that have both, one sample after the other. A
// sample's product is of its compact maps, and its sums go to their places through both lists. A task is a
// tap, a group (or head) and a share of its outputs, for all samples. So its share of dW stays in the L2
// cache, and no two threads write the same. The sums do not depend on the number of threads.
class ChannelWeightGrad {
 public:
  ChannelWeightGrad(const Geometry& g, const LiveMap& grad, const LiveMap& x, int64_t heads, int64_t outputs,
                    int64_t group_in, float* dw)
      : g_(g),
        grad_(grad),
        x_(x),
        heads_(heads),
        slices_(std::max(heads, g.groups)),
        outputs_(outputs),
        group_out_(outputs / slices_),
        group_in_(group_in),
        dw_(dw) {
    const int64_t units = g.taps() * slices_, all = threads_for(1e18, 1);
    // Halves where whole taps would leave a thread idle; and what fits half of an L2 cache.
    shares_ = units % all ? all : 1;
    shares_ = std::max(shares_, ceil_div(group_out_ * group_in_ * 4, kSlabBytes));
    shares_ = std::clamp<int64_t>(shares_, 1, std::max<int64_t>(group_out_, 1));
    for (int64_t tap = 0; tap < g.taps(); ++tap) inputs_.push_back(inputs_of_tap(g, tap));
  }

  void run() {
    const int64_t sample_floats = heads_ * x_.pixels() * x_width() + grad_.pixels() * outputs_;
    const int64_t batch =
        std::clamp<int64_t>(kBatchBytes / (4 * std::max<int64_t>(sample_floats, 1)), 1, g_.batch);
    static thread_local Buffer maps;  // kept: fresh pages cost as much as what is compacted into them
    const int64_t x_floats = batch * heads_ * x_.pixels() * x_width();
    x_maps_ = reinterpret_cast<float*>(maps.at_least((x_floats + batch * grad_.pixels() * outputs_) * 4));
    grad_maps_ = x_maps_ + x_floats;
    for (int64_t first = 0; first < g_.batch; first += batch)
      run_batch(first, std::min(batch, g_.batch - first));
    maps.shrink();
  }

 private:
  static constexpr int64_t kSlabBytes = 256 * 1024;
  static constexpr int64_t kBatchBytes = 2 << 20;  // compact maps of a batch of samples: twice an L2 cache

  int64_t x_width() const { return round_up(x_.row_channels(), 16); }
  float* x_map(int64_t slot, int64_t head) const {
    return x_maps_ + (slot * heads_ + head) * x_.pixels() * x_width();
  }
  float* grad_map(int64_t slot) const { return grad_maps_ + slot * grad_.pixels() * outputs_; }

  // The live outputs of a share of a group (or head), in the sample's list.
  Span outputs_of(const Side& side, int64_t slice, int64_t share) const {
    const Span mine = share_of(group_out_, share, shares_);
    return side.within(slice * group_out_ + mine.begin, slice * group_out_ + mine.end);
  }

  void run_batch(int64_t first, int64_t samples) {
    const int64_t blocks = ceil_div(grad_.pixels(), kRows), x_blocks = ceil_div(x_.pixels(), kRows);
    const double bytes =
        double(samples) * double(x_.pixels() * x_.row_channels() + grad_.pixels() * outputs_) * 4;
    const int64_t packers = threads_for(bytes, 64e3), tasks = g_.taps() * slices_ * shares_;
    parallel(packers, [&](int64_t t) {
      for (const int64_t i : each(share_of(samples * heads_ * x_blocks, t, packers)))
        pack_x(first, i / x_blocks / heads_, i / x_blocks % heads_, i % x_blocks * kRows);
      std::vector<float> rows(kRows * outputs_);
      for (const int64_t i : each(share_of(samples * blocks, t, packers)))
        pack_grad(first + i / blocks, i / blocks, i % blocks, rows.data());
    });
    const double macs =
        double(samples * grad_.pixels()) * double(g_.taps() * group_in_) * double(outputs_) / 4;
    const int64_t threads = threads_for(macs, kMacsPerThread);
    parallel(threads, [&](int64_t t) { run_tasks(first, samples, share_of(tasks, t, threads)); });
  }

  void pack_x(int64_t first_sample, int64_t slot, int64_t head, int64_t row) const {
    const int64_t rows = std::min(kRows, x_.pixels() - row), sample = first_sample + slot;
    x_.compact(sample, x_.side(sample, head), row, rows, x_map(slot, head) + row * x_width(), x_width());
  }

  // A block of a sample's gradient rows as [group][share][tile][row][height of the tile].
  void pack_grad(int64_t sample, int64_t slot, int64_t block, float* rows) const {
    const Side side = grad_.side(sample, 0);
    const int64_t count = side.count(), first = block * kRows;
    const int64_t height = std::min(kRows, grad_.pixels() - first);
    if (count == 0) return;
    grad_.compact(sample, side, first, height, rows, count);
    float* to = grad_map(slot) + first * count;
    for (int64_t unit = 0; unit < slices_ * shares_; ++unit) {
      const Span live = outputs_of(side, unit / shares_, unit % shares_);
      const TileSplit split(int32_t(live.size()));
      for (int64_t i = 0; i < height; ++i) pack_grad_row(rows + i * count + live.begin, split, i, height, to);
      to += live.size() * height;
    }
  }

  // The working memory of one thread.
  struct Work {
    std::vector<const char*> in;  // rows of the compact input
    std::vector<float> x, zero, sums;
    std::vector<float*> to;
  };

  void run_tasks(int64_t first, int64_t samples, Span tasks) const {
    Work w;
    w.in.resize(grad_.pixels());
    w.x.resize(kRows * kernels().panel_width);
    w.zero.resize(x_width());
    w.sums.resize((ceil_div(group_out_, shares_) + 1) * kernels().panel_width);
    w.to.resize(group_out_);
    // As many tasks side by side as have their share of dW in the L2 cache: a sample is then read once.
    const int64_t task_bytes = std::max<int64_t>(group_out_ * group_in_ * 4 / shares_, 1);
    const int64_t step = std::max<int64_t>(kSlabBytes / task_bytes, 1);
    for (int64_t from = tasks.begin; from < tasks.end; from += step) {
      for (int64_t slot = 0; slot < samples; ++slot) {
        for (int64_t task = from; task < std::min(from + step, tasks.end); ++task) {
          const int64_t share = task % shares_, group = task / shares_ % slices_;
          run_sample(first + slot, slot, task / shares_ / slices_, group, share, w);
        }
      }
    }
  }

  void run_sample(int64_t sample, int64_t slot, int64_t tap, int64_t group, int64_t share, Work& w) const {
    const Side outs = grad_.side(sample, 0);
    const Span out = outputs_of(outs, group, share);
    const int64_t head = heads_ > 1 ? group : 0, in_group = heads_ > 1 ? 0 : group;
    const Side ins = x_.side(sample, head);
    const Span in = ins.within(in_group * group_in_, (in_group + 1) * group_in_);
    if (out.size() == 0 || in.size() == 0) return;
    const float* map = x_map(slot, head) + in.begin;
    const std::vector<int32_t>& inputs = inputs_[tap];
    for (size_t p = 0; p < inputs.size(); ++p)
      w.in[p] = bytes_of(inputs[p] < 0 ? w.zero.data() : map + inputs[p] * x_width());
    float* dw = dw_ + tap * outputs_ * group_in_ - in_group * group_in_;
    for (int64_t o = out.begin; o < out.end; ++o) w.to[o - out.begin] = dw + outs.channel[o] * group_in_;
    const int64_t panel_width = kernels().panel_width;
    for (int64_t i = in.begin; i < in.end; i += panel_width) {
      const int32_t columns = int32_t(std::min(panel_width, in.end - i));
      run_panel(slot, outs.count(), out, i - in.begin, columns, w);
      const ChannelList places{ins.channel + i, columns, g_.groups > 1 ? 0 : int32_t(group_in_)};
      kernels().expand_add(w.sums.data(), panel_width, out.size(), places, w.to.data());
    }
  }

  // The sums of one panel of inputs over all rows of a sample, compact: sums[output][panel width].
  void run_panel(int64_t slot, int32_t live_outputs, Span out, int64_t column, int32_t columns,
                 Work& w) const {
    const TileSplit split(int32_t(out.size()));
    for (int64_t first = 0; first < grad_.pixels(); first += kRows) {
      const int32_t height = int32_t(std::min(kRows, grad_.pixels() - first));
      kernels().gather_columns(w.in.data() + first, height, column * 4, Dtype::kFloat32, columns, w.x.data());
      kernels().outer_product({.rows = height,
                               .grad = grad_map(slot) + first * live_outputs + out.begin * height,
                               .x = w.x.data(),
                               .dw = w.sums.data(),
                               .dw_stride = kernels().panel_width,
                               .outputs = split,
                               .columns = columns,
                               .add = first > 0,
                               .length = outer_length(grad_.pixels() * g_.batch)});
    }
  }

  const Geometry& g_;
  const LiveMap &grad_, &x_;
  int64_t heads_, slices_, outputs_, group_out_, group_in_, shares_;  // slices_: groups, or heads
  float* dw_;                                                         // [taps][O][C / groups]
  std::vector<std::vector<int32_t>> inputs_;                          // [taps][output pixels of an image]
  float *x_maps_ = nullptr, *grad_maps_ = nullptr;
};

// ------------------------------------------------------------------------------------ depthwise

// dW[t][c] += sum_p dy[p, c] x[q(p, t), c] over the samples that have channel c in both lists. Threads share
// the channels.
class DepthwiseWeightGrad {
 public:
  DepthwiseWeightGrad(const Geometry& g, const LiveMap& grad, const LiveMap& x, int64_t channels, float* dw)
      : g_(g), grad_(grad), x_(x), channels_(channels), dw_(dw) {
    for (int64_t tap = 0; tap < g.taps(); ++tap) inputs_.push_back(inputs_of_tap(g, tap));
  }

  void run() const {
    const double work = double(g_.out_pixels()) * double(g_.taps() * channels_);
    const int64_t threads = threads_for(work, kMacsPerThread / 8);
    parallel(threads, [&](int64_t t) {
      Work w;
      w.zero.resize(channels_ + 64);
      for (int64_t n = 0; n < g_.batch; ++n) run_sample(n, share_of(channels_, t, threads, 16), w);
    });
  }

 private:
  static constexpr int64_t kFewRows = 64;  // their taps and gradients stay in the L2 cache

  struct Work {
    std::vector<float> x, grad, sums, zero;
    std::vector<const char*> x_rows, grad_rows;
  };

  void run_sample(int64_t n, Span channels, Work& w) const {
    const Side x = x_.side(n, 0).within(channels), grad = grad_.side(n, 0).within(channels);
    Overlap both(x.list(), grad.list());
    const int64_t live = int64_t(both.channel.size()), taps = g_.taps(), pixels = grad_.pixels();
    if (live == 0) return;
    for (int32_t& i : both.in) i = x.in_row.index[i];
    for (int32_t& i : both.out) i = grad.in_row.index[i];
    w.x.resize(x_.pixels() * live);
    w.grad.resize(kFewRows * live);
    w.sums.assign(taps * live, 0.f);
    x_.compact(n, {{both.in.data(), int32_t(live), x.in_row.channels}, both.channel.data()}, 0, x_.pixels(),
               w.x.data(), live);
    const Side compact_grad{{both.out.data(), int32_t(live), grad.in_row.channels}, both.channel.data()};
    w.x_rows.resize(kFewRows * taps);
    w.grad_rows.resize(kFewRows);
    for (int64_t first = 0; first < pixels; first += kFewRows) {
      const int64_t rows = std::min(kFewRows, pixels - first);
      grad_.compact(n, compact_grad, first, rows, w.grad.data(), live);
      for (int64_t k = 0; k < rows; ++k) {
        w.grad_rows[k] = bytes_of(w.grad.data() + k * live);
        for (int64_t t = 0; t < taps; ++t) {
          const int32_t q = inputs_[t][first + k];
          w.x_rows[k * taps + t] = bytes_of(q < 0 ? w.zero.data() : w.x.data() + q * live);
        }
      }
      kernels().depthwise_weight_grad(int32_t(rows), int32_t(taps), w.x_rows.data(), w.grad_rows.data(),
                                      Dtype::kFloat32, live, w.sums.data());
    }
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t j = 0; j < live; ++j) dw_[t * channels_ + both.channel[j]] += w.sums[t * live + j];
    }
  }

  const Geometry& g_;
  const LiveMap &grad_, &x_;
  int64_t channels_;
  float* dw_;                                 // [taps][C]
  std::vector<std::vector<int32_t>> inputs_;  // [taps][output pixels of an image]
};

// ----------------------------------------------------------------------------------------- bias

// The sums of the live gradients, sample after sample: the number of threads does not change the result.
void channel_bias_grad(const LiveMap& grad, int64_t batch, int64_t outputs, char* out) {
  const int64_t channels = grad.row_channels(), pixels = grad.pixels();
  std::vector<double> sums(batch * channels, 0.);
  const int64_t threads = threads_for(double(batch * pixels * channels), 256e3);
  parallel_shares(batch, threads, [&](int64_t n) {
    RowSums sum(channels, sums.data() + n * channels);
    for (int64_t p = 0; p < pixels; ++p) sum.add(grad.row(n, p), grad.dtype());
  });
  std::vector<double> total(outputs, 0.);
  for (int64_t n = 0; n < batch; ++n) {
    const Side side = grad.side(n, 0);
    for (int32_t j = 0; j < side.count(); ++j)
      total[side.channel[j]] += sums[n * channels + side.in_row.index[j]];
  }
  round_sums(total, grad.dtype(), out);
}

// ------------------------------------------------------------------------------------------- op

// Sums up to this size stay: 512 -> 512 channels 3x3, 8 maps of 7 x 7, 6.2 ms, with fresh pages 10.6.
constexpr int64_t kKeptSums = 16 << 20;

// grad and x channels_last, dense or packed; dw: the weight's shape, contiguous; db: [O], or none.
void channel_weight_grad(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& in_index,
                         const OptionalTensor& in_count, const OptionalTensor& out_index,
                         const OptionalTensor& out_count, IntHeaderOnlyArrayRef geometry, int64_t heads,
                         bool packed_in, bool packed_out, Tensor dw, OptionalTensor db) {
  const Geometry g = geometry_of(geometry);
  const int64_t outputs = dw.size(0), channels = dw.size(1) * g.groups;
  STD_TORCH_CHECK(grad_in.size(0) == g.batch && grad_in.size(2) == g.out_h && grad_in.size(3) == g.out_w &&
                      x_in.size(0) == g.batch && x_in.size(2) == g.in_h && x_in.size(3) == g.in_w,
                  "grad, x: expected maps of the geometry, got ", grad_in.numel(), " and ", x_in.numel(),
                  " elements");
  STD_TORCH_CHECK(outputs % heads == 0 && (heads == 1 || (g.groups == 1 && !packed_in)),
                  "heads: expected a divisor of ", outputs, " without groups and packed inputs, got ", heads);
  const ChannelLists in_lists(in_index, in_count, channels, 1, heads, g.batch);
  const ChannelLists out_lists(out_index, out_count, outputs, 1, 1, g.batch);
  const LiveMap grad(grad_in, out_lists, outputs, packed_out && out_index);
  const LiveMap x(x_in, in_lists, channels, packed_in && in_index);
  if (db) channel_bias_grad(grad, g.batch, outputs, data_of<char>(*db));
  if (dw.numel() == 0) return;
  static thread_local Buffer memory;
  float* sums = reinterpret_cast<float*>(memory.at_least(dw.numel() * 4));
  std::fill_n(sums, dw.numel(), 0.f);
  if (is_depthwise(g, channels, outputs)) {
    DepthwiseWeightGrad(g, grad, x, channels, sums).run();
  } else if (g.batch) {
    ChannelWeightGrad(g, grad, x, heads, outputs, dw.size(1), sums).run();
  }
  reorder_weight_grad(sums, g, outputs, dw.size(1), grad.dtype(), int64_t(torch::stable::get_num_threads()),
                      data_of<char>(dw));
  if (dw.numel() * 4 > kKeptSums) memory.shrink();
}

DYNOPS_CPU_OP(channel_weight_grad)

}  // namespace
}  // namespace dynops::cpu
