// Convolution on live channels on the CPU: the gradients of the weight and the bias.
#include <cstring>

#include "../engine/grad_rows.h"
#include "../engine/parallel.h"
#include "../engine/row_sums.h"
#include "../engine/taps.h"
#include "call.h"
#include "lists.h"

namespace dynops::cpu {
namespace {

// Where the live channels of a sample lie: in the rows of its map, and among the weight's channels.
struct Side {
  ChannelList in_row;      // compressed from a row of the map
  const int32_t* channel;  // [count], ascending

  int32_t count() const { return in_row.count; }
  // The part [first, second) of the list whose channels lie in [begin, end).
  std::pair<int32_t, int32_t> within(int64_t begin, int64_t end) const {
    const int32_t* last = channel + count();
    const int32_t* first = std::lower_bound(channel, last, int32_t(begin));
    return {int32_t(first - channel), int32_t(std::lower_bound(first, last, int32_t(end)) - channel)};
  }
};

// A map [N, H, W, C or width] and its lists.
class LiveMap {
 public:
  LiveMap(const Tensor& map, const ChannelLists& lists, int64_t channels, bool packed)
      : data_(data_of<const char>(map)),
        dtype_(dtype_of(map)),
        pixels_(map.size(2) * map.size(3)),
        row_channels_(map.size(1)),
        lists_(lists),
        packed_(packed) {
    STD_TORCH_CHECK(packed || row_channels_ == channels, "map: expected ", channels, " channels, got ",
                    row_channels_);
    if (!packed) return;
    positions_.resize(static_cast<size_t>(row_channels_));
    std::iota(positions_.begin(), positions_.end(), 0);
  }

  Side side(int64_t sample, int64_t head) const {
    ChannelList list = lists_.whole(sample, head);
    list.count = std::min(list.count, int32_t(row_channels_));
    const int32_t* in_row = packed_ ? positions_.data() : list.index;
    return {{in_row, list.count, int32_t(row_channels_)}, list.index};
  }

  // Rows [first, first + rows) of a sample's live channels as float32, `stride` floats apart.
  void compact(int64_t sample, const Side& side, int64_t first, int64_t rows, float* to,
               int64_t stride) const {
    const int64_t bytes = row_channels_ * size_of(dtype_), count = side.count();
    const char* from = data_ + (sample * pixels_ + first) * bytes;
    if (dtype_ == Dtype::kFloat32) {
      return kernels().compress(from, bytes, rows, side.in_row, dtype_, reinterpret_cast<char*>(to),
                                stride * 4);
    }
    std::vector<char> line(static_cast<size_t>(count * 2));
    for (int64_t i = 0; i < rows; ++i) {
      kernels().compress(from + i * bytes, bytes, 1, side.in_row, dtype_, line.data(), count * 2);
      kernels().to_float(line.data(), dtype_, count, to + i * stride);
    }
  }

  int64_t pixels() const { return pixels_; }
  int64_t row_channels() const { return row_channels_; }
  Dtype dtype() const { return dtype_; }
  const char* row(int64_t sample, int64_t pixel) const {
    return data_ + (sample * pixels_ + pixel) * row_channels_ * size_of(dtype_);
  }

 private:
  const char* data_;
  Dtype dtype_;
  int64_t pixels_, row_channels_;
  const ChannelLists& lists_;
  bool packed_;
  std::vector<int32_t> positions_;  // of packed channels in their row: 0, 1, …
};

// The input pixel that each output pixel of one image reads through a tap, or -1.
std::vector<int32_t> inputs_of_tap(const Geometry& g, int64_t tap) {
  std::vector<int32_t> at(static_cast<size_t>(g.out_h * g.out_w));
  for (int32_t y = 0, i = 0; y < g.out_h; ++y) {
    for (int32_t x = 0; x < g.out_w; ++x, ++i)
      at[size_t(i)] = input_pixel(g, {0, y, x}, int32_t(tap / g.kernel_w), int32_t(tap % g.kernel_w));
  }
  return at;
}

constexpr int64_t kBlock = 128;  // rows: a panel of x is 16 KB, a tile of gradients 6 KB, both in L1

// dW[t][o][i] += sum_p dy[p, o] x[q(p, t), i] for the samples that have both, one sample after the other:
// each is a product of its compact maps, whose sums go to their places through both lists. A task is a tap, a
// group (or head) and a share of its outputs, for all samples, so that its part of dW stays in the L2 cache,
// nothing is written by two threads, and the sums do not depend on how many there are.
class ChannelWeightGrad {
 public:
  ChannelWeightGrad(const Geometry& g, const LiveMap& grad, const LiveMap& x, int64_t heads, int64_t outputs,
                    int64_t group_in, float* dw)
      : g_(g),
        grad_(grad),
        x_(x),
        heads_(heads),
        parts_(std::max(heads, g.groups)),
        outputs_(outputs),
        group_out_(outputs / parts_),
        group_in_(group_in),
        dw_(dw) {
    const int64_t units = g.taps() * parts_, all = threads_for(1e18, 1);
    // Halves where whole taps would leave a thread idle; and what fits half of an L2 cache.
    shares_ = units % all ? all : 1;
    shares_ = std::max(shares_, (group_out_ * group_in_ * 4 + kSlabBytes - 1) / kSlabBytes);
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

  int64_t x_width() const { return (x_.row_channels() + 15) / 16 * 16; }
  float* x_map(int64_t slot, int64_t head) const {
    return x_maps_ + (slot * heads_ + head) * x_.pixels() * x_width();
  }
  float* grad_map(int64_t slot) const { return grad_maps_ + slot * grad_.pixels() * outputs_; }

  // The live outputs of a share of a group (or head), as a part of the sample's list.
  std::pair<int32_t, int32_t> outputs_of(const Side& side, int64_t part_index, int64_t share) const {
    const int64_t first = part_index * group_out_;
    return side.within(first + part(group_out_, share, shares_),
                       first + part(group_out_, share + 1, shares_));
  }

  void run_batch(int64_t first, int64_t samples) {
    const int64_t blocks = (grad_.pixels() + kBlock - 1) / kBlock,
                  x_blocks = (x_.pixels() + kBlock - 1) / kBlock;
    const double bytes =
        double(samples) * double(x_.pixels() * x_.row_channels() + grad_.pixels() * outputs_) * 4;
    const int64_t packers = threads_for(bytes, 64e3), tasks = g_.taps() * parts_ * shares_;
    parallel(packers, [&](int64_t t) {
      const int64_t maps = samples * heads_ * x_blocks;
      for (int64_t i = part(maps, t, packers); i < part(maps, t + 1, packers); ++i)
        pack_x(first, i / x_blocks / heads_, i / x_blocks % heads_, i % x_blocks * kBlock);
      std::vector<float> rows(static_cast<size_t>(kBlock * outputs_));
      for (int64_t i = part(samples * blocks, t, packers); i < part(samples * blocks, t + 1, packers); ++i)
        pack_grad(first + i / blocks, i / blocks, i % blocks, rows.data());
    });
    const double macs =
        double(samples * grad_.pixels()) * double(g_.taps() * group_in_) * double(outputs_) / 4;
    const int64_t threads = threads_for(macs, kMacsPerThread);
    parallel(threads, [&](int64_t t) {
      run_tasks(first, samples, part(tasks, t, threads), part(tasks, t + 1, threads));
    });
  }

  void pack_x(int64_t first_sample, int64_t slot, int64_t head, int64_t row) const {
    const int64_t rows = std::min(kBlock, x_.pixels() - row), sample = first_sample + slot;
    x_.compact(sample, x_.side(sample, head), row, rows, x_map(slot, head) + row * x_width(), x_width());
  }

  // A block of a sample's gradient rows as [group][share][tile][row][height of the tile].
  void pack_grad(int64_t sample, int64_t slot, int64_t block, float* rows) const {
    const Side side = grad_.side(sample, 0);
    const int64_t count = side.count(), first = block * kBlock;
    const int64_t height = std::min(kBlock, grad_.pixels() - first);
    if (count == 0) return;
    grad_.compact(sample, side, first, height, rows, count);
    float* to = grad_map(slot) + first * count;
    for (int64_t unit = 0; unit < parts_ * shares_; ++unit) {
      const auto [begin, end] = outputs_of(side, unit / shares_, unit % shares_);
      const TileSplit split(end - begin);
      const float* from = rows + begin;
      for (int32_t tile = 0; tile < split.tiles; from += split.height(tile++)) {
        const size_t bytes = size_t(split.height(tile)) * 4;
        for (int64_t i = 0; i < height; ++i, to += split.height(tile))
          std::memcpy(to, from + i * count, bytes);
      }
    }
  }

  // What one thread works with.
  struct Work {
    std::vector<const char*> in;  // rows of the compact input
    std::vector<float> x, zero, sums;
    std::vector<float*> to;
  };

  void run_tasks(int64_t first, int64_t samples, int64_t begin, int64_t end) const {
    Work w;
    w.in.resize(size_t(grad_.pixels()));
    w.x.resize(size_t(kBlock * kernels().panel_width));
    w.zero.resize(size_t(x_width()));
    w.sums.resize(size_t(((group_out_ + shares_ - 1) / shares_ + 1) * kernels().panel_width));
    w.to.resize(size_t(group_out_));
    // As many tasks side by side as have their parts of dW in the L2 cache: then a sample is read once for
    // them.
    const int64_t task_bytes = std::max<int64_t>(group_out_ * group_in_ * 4 / shares_, 1);
    const int64_t step = std::max<int64_t>(kSlabBytes / task_bytes, 1);
    for (int64_t from = begin; from < end; from += step) {
      for (int64_t slot = 0; slot < samples; ++slot) {
        for (int64_t task = from; task < std::min(from + step, end); ++task) {
          const int64_t share = task % shares_, group = task / shares_ % parts_;
          run_sample(first + slot, slot, task / shares_ / parts_, group, share, w);
        }
      }
    }
  }

  void run_sample(int64_t sample, int64_t slot, int64_t tap, int64_t group, int64_t share, Work& w) const {
    const Side outs = grad_.side(sample, 0);
    const auto [out_begin, out_end] = outputs_of(outs, group, share);
    const int64_t head = heads_ > 1 ? group : 0, in_group = heads_ > 1 ? 0 : group;
    const Side ins = x_.side(sample, head);
    const auto [in_begin, in_end] = ins.within(in_group * group_in_, (in_group + 1) * group_in_);
    if (out_begin == out_end || in_begin == in_end) return;
    const float* map = x_map(slot, head) + in_begin;
    const std::vector<int32_t>& inputs = inputs_[size_t(tap)];
    for (size_t p = 0; p < inputs.size(); ++p) {
      const int32_t q = inputs[p];
      w.in[p] = reinterpret_cast<const char*>(q < 0 ? w.zero.data() : map + q * x_width());
    }
    float* dw = dw_ + tap * outputs_ * group_in_ - in_group * group_in_;
    for (int32_t o = out_begin; o < out_end; ++o)
      w.to[size_t(o - out_begin)] = dw + outs.channel[o] * group_in_;
    const int32_t panel_width = kernels().panel_width;
    for (int32_t i = in_begin; i < in_end; i += panel_width) {
      const int32_t columns = std::min(panel_width, in_end - i);
      run_panel(slot, outs.count(), out_begin, out_end, i - in_begin, columns, w);
      const ChannelList places{ins.channel + i, columns, g_.groups > 1 ? 0 : int32_t(group_in_)};
      kernels().expand_add(w.sums.data(), panel_width, out_end - out_begin, places, w.to.data());
    }
  }

  // The sums of one panel of inputs over all rows of a sample, compact: sums[output][panel width].
  void run_panel(int64_t slot, int32_t live_outputs, int32_t out_begin, int32_t out_end, int64_t column,
                 int32_t columns, Work& w) const {
    const TileSplit split(out_end - out_begin);
    for (int64_t first = 0; first < grad_.pixels(); first += kBlock) {
      const int32_t height = int32_t(std::min(kBlock, grad_.pixels() - first));
      kernels().gather_columns(w.in.data() + first, height, column * 4, Dtype::kFloat32, columns, w.x.data());
      const float* grad = grad_map(slot) + first * live_outputs + out_begin * height;
      kernels().outer_product({height, grad, w.x.data(), w.sums.data(), kernels().panel_width, split, 0,
                               split.tiles, columns, first > 0, outer_length(grad_.pixels() * g_.batch)});
    }
  }

  const Geometry& g_;
  const LiveMap &grad_, &x_;
  int64_t heads_, parts_, outputs_, group_out_, group_in_, shares_;  // parts_: groups, or heads
  float* dw_;                                                        // [taps][O][C / groups]
  std::vector<std::vector<int32_t>> inputs_;                         // [taps][output pixels of an image]
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
      w.zero.resize(size_t(channels_) + 64);
      for (int64_t n = 0; n < g_.batch; ++n)
        run_sample(n, part(channels_, t, threads, 16), part(channels_, t + 1, threads, 16), w);
    });
  }

 private:
  static constexpr int64_t kRows = 64;  // their taps and gradients stay in the L2 cache

  struct Work {
    std::vector<int32_t> channel, in_x, in_grad;
    std::vector<float> x, grad, sums, zero;
    std::vector<const char*> x_rows, grad_rows;
  };

  // The channels of [begin, end) that are live on both sides.
  static void meet(const Side& x, const Side& grad, int64_t begin, int64_t end, Work& w) {
    w.channel.clear(), w.in_x.clear(), w.in_grad.clear();
    auto [i, i_end] = x.within(begin, end);
    auto [o, o_end] = grad.within(begin, end);
    while (i < i_end && o < o_end) {
      const int32_t a = x.channel[i], b = grad.channel[o];
      if (a == b) {
        w.channel.push_back(a);
        w.in_x.push_back(x.in_row.index[i]);
        w.in_grad.push_back(grad.in_row.index[o]);
      }
      i += a <= b;
      o += b <= a;
    }
  }

  void run_sample(int64_t n, int64_t begin, int64_t end, Work& w) const {
    const Side x = x_.side(n, 0), grad = grad_.side(n, 0);
    meet(x, grad, begin, end, w);
    const int64_t live = int64_t(w.channel.size()), taps = g_.taps(), pixels = grad_.pixels();
    if (live == 0) return;
    w.x.resize(size_t(x_.pixels() * live));
    w.grad.resize(size_t(kRows * live));
    w.sums.assign(size_t(taps * live), 0.f);
    x_.compact(n, {{w.in_x.data(), int32_t(live), x.in_row.channels}, w.channel.data()}, 0, x_.pixels(),
               w.x.data(), live);
    const Side compact_grad{{w.in_grad.data(), int32_t(live), grad.in_row.channels}, w.channel.data()};
    w.x_rows.resize(size_t(kRows * taps));
    w.grad_rows.resize(size_t(kRows));
    for (int64_t first = 0; first < pixels; first += kRows) {
      const int64_t rows = std::min(kRows, pixels - first);
      grad_.compact(n, compact_grad, first, rows, w.grad.data(), live);
      for (int64_t k = 0; k < rows; ++k) {
        w.grad_rows[size_t(k)] = reinterpret_cast<const char*>(w.grad.data() + k * live);
        for (int64_t t = 0; t < taps; ++t) {
          const int32_t q = inputs_[size_t(t)][size_t(first + k)];
          w.x_rows[size_t(k * taps + t)] =
              reinterpret_cast<const char*>(q < 0 ? w.zero.data() : w.x.data() + q * live);
        }
      }
      kernels().depthwise_weight_grad(int32_t(rows), int32_t(taps), w.x_rows.data(), w.grad_rows.data(),
                                      Dtype::kFloat32, live, w.sums.data());
    }
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t j = 0; j < live; ++j)
        dw_[t * channels_ + w.channel[size_t(j)]] += w.sums[size_t(t * live + j)];
    }
  }

  const Geometry& g_;
  const LiveMap &grad_, &x_;
  int64_t channels_;
  float* dw_;                                 // [taps][C]
  std::vector<std::vector<int32_t>> inputs_;  // [taps][output pixels of an image]
};

// ----------------------------------------------------------------------------------------- bias

// The sums of the live gradients, sample after sample, so that the result does not depend on the number of
// threads.
void channel_bias_grad(const LiveMap& grad, int64_t batch, int64_t outputs, char* out) {
  const int64_t channels = grad.row_channels(), pixels = grad.pixels();
  std::vector<double> sums(size_t(batch * channels), 0.);
  const int64_t threads = threads_for(double(batch * pixels * channels), 256e3);
  parallel(threads, [&](int64_t t) {
    for (int64_t n = part(batch, t, threads); n < part(batch, t + 1, threads); ++n) {
      RowSums sum(channels, sums.data() + n * channels);
      for (int64_t p = 0; p < pixels; ++p) sum.add(grad.row(n, p), grad.dtype());
    }
  });
  std::vector<double> total(size_t(outputs), 0.);
  for (int64_t n = 0; n < batch; ++n) {
    const Side side = grad.side(n, 0);
    for (int32_t j = 0; j < side.count(); ++j)
      total[size_t(side.channel[j])] += sums[size_t(n * channels + side.in_row.index[j])];
  }
  const std::vector<float> rounded(total.begin(), total.end());
  kernels().from_float(rounded.data(), outputs, grad.dtype(), out);
}

// ------------------------------------------------------------------------------------------- op

// Sums up to this size stay: 512 -> 512 channels 3x3, 8 maps of 7 x 7, 6.2 ms instead of 10.6 with fresh
// pages.
constexpr int64_t kKeptSums = 16 << 20;

// grad and x channels_last, dense or packed; dw: the weight's shape, contiguous; db: [O], or none where
// nobody asks.
void channel_weight_grad(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& in_index,
                         const OptionalTensor& in_count, const OptionalTensor& out_index,
                         const OptionalTensor& out_count, IntHeaderOnlyArrayRef geometry, int64_t heads,
                         bool packed_in, bool packed_out, Tensor dw, const OptionalTensor& db) {
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

}  // namespace
}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) {
  m.def(
      "cpu_channel_weight_grad(Tensor grad, Tensor x, Tensor? in_index, Tensor? in_count, Tensor? out_index, "
      "Tensor? out_count, int[] geometry, int heads, bool packed_in, bool packed_out, Tensor(a!) dw, "
      "Tensor(b!)? db) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) {
  m.impl("cpu_channel_weight_grad", TORCH_BOX(&dynops::cpu::channel_weight_grad));
}
