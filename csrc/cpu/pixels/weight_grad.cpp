// Pixel-sparse convolution on the CPU: the gradients of the weight and the bias.
#include <cstring>
#include <memory>
#include <numeric>

#include "../engine/grad_rows.h"
#include "../engine/operands.h"
#include "../engine/parallel.h"
#include "../engine/row_sums.h"
#include "../engine/taps.h"

namespace dynops::cpu {
namespace {

// out[i * taps + t] = in[t][i]. The common 3x3 is unrolled: a quarter of the time of the general loop.
void interleave_taps(const float* const* in, int64_t taps, int64_t n, float* out) {
  if (taps == 9) {
    for (int64_t i = 0; i < n; ++i, out += 9) {
      for (int64_t t = 0; t < 9; ++t) out[t] = in[t][i];
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t t = 0; t < taps; ++t) *out++ = in[t][i];
  }
}

// dW[t] = sum_p dy[p] x[q(p, t)]^T, in blocks of rows: a block's gradients are packed [group][o tile][row],
// then each (tap, group, panel of input channels, share of the o tiles) is a task, which gathers its input
// columns and adds the outer products. Threads share the rows, each with sums of its own, where the weight
// is small; and the tasks where it is large.
class WeightGrad {
 public:
  WeightGrad(const Geometry& g, const GradRows& grad, int64_t rows, const int32_t* index,
             const Source& source, Dtype dtype, int64_t in_channels, int64_t out_channels,
             int64_t max_threads)
      : g_(g),
        grad_(grad),
        rows_(rows),
        index_(index),
        source_(source),
        dtype_(dtype),
        group_in_(in_channels / g.groups),
        group_out_(out_channels / g.groups),
        out_channels_(out_channels),
        line_(in_channels / g.groups * g.taps()),
        max_threads_(max_threads),
        split_(int32_t(out_channels / g.groups)) {
    panels_ = (group_in_ + kernels().panel_width - 1) / kernels().panel_width;
  }

  // Whether rows are so few that it is their inputs, not the sums, that are brought into the weight's order:
  // each then is one panel of columns i * taps + t, whose sums over all rows go from registers to dW. With 20
  // rows of 512 -> 512 channels 3x3 the sums, one by one to their places, took 600 us.
  bool few_rows() const {
    return rows_ > 0 && rows_ <= kFewRows && rows_ <= group_out_ && !g_.transposed &&
           rows_ * g_.groups * line_panels() * kernels().panel_width * 4 <= kFewBytes;
  }

  void run_few(char* out) {
    const int64_t threads = threads_of(double(rows_) * double(line_ * out_channels_));
    const int64_t width = kernels().panel_width, panels = g_.groups * line_panels();
    const std::unique_ptr<float[]> x(new float[size_t(panels * rows_ * width)]);
    parallel(threads, [&](int64_t t) {
      interleave_rows(part(rows_, t, threads), part(rows_, t + 1, threads), x.get());
    });
    RowClass rows;
    rows.all = true;
    Work w;
    w.grad.resize(size_t(rows_ * out_channels_));
    w.line.resize(size_t(out_channels_));
    w.at.resize(size_t(rows_));
    pack(rows, 0, rows_, w);
    shares_ = std::min<int64_t>((threads + panels - 1) / panels, split_.tiles);
    parallel(threads, [&](int64_t t) {
      std::vector<float> sums(dtype_ == Dtype::kFloat32 ? 0 : size_t(group_out_ * width));
      for (int64_t i = part(panels * shares_, t, threads); i < part(panels * shares_, t + 1, threads); ++i) {
        run_few_panel(i / shares_, i % shares_, w.grad.data(), x.get() + i / shares_ * rows_ * width, sums,
                      out);
      }
    });
  }

  // All sums in `dw`, [taps][O][I].
  void run(float* dw) {
    dw_ = dw;
    for (const RowClass& rows : row_classes(g_, index_, rows_)) {
      const int64_t total = rows.size(rows_), taps = int64_t(rows.taps.size());
      if (total == 0 || taps == 0) {
        for (int32_t tap : rows.taps) std::fill_n(tap_sums(dw_, tap), out_channels_ * group_in_, 0.f);
        continue;
      }
      const double macs = double(total) * double(taps * group_in_ * out_channels_);
      const int64_t threads = threads_of(macs);
      if (g_.taps() * out_channels_ * group_in_ * 4 <= kSmallWeight && total >= threads * 4 * kBlock) {
        share_rows(rows, total, threads);
      } else {
        share_tasks(rows, total, threads);
      }
    }
  }

 private:
  static constexpr int64_t kBlock = 128;  // rows: a panel of x is 16 KB, a tile of gradients 6 KB, both in L1
  static constexpr int64_t kSmallWeight = 1 << 20;  // bytes
  static constexpr int64_t kFewRows = 512, kFewBytes = 4 << 20;

  int64_t threads_of(double macs) const { return std::min(threads_for(macs, kMacsPerThread), max_threads_); }

  int64_t line_panels() const { return (line_ + kernels().panel_width - 1) / kernels().panel_width; }

  // x[panel][row][width]: the inputs of each row in the order of a line of the weight, i * taps + t.
  void interleave_rows(int64_t begin, int64_t end, float* x) const {
    const int64_t taps = g_.taps(), width = kernels().panel_width, channels = group_in_ * g_.groups;
    std::vector<int32_t> all(static_cast<size_t>(taps));
    std::iota(all.begin(), all.end(), 0);
    const TapTable table(source_, all);
    std::vector<const char*> in(static_cast<size_t>(taps));
    std::vector<const float*> from(static_cast<size_t>(taps));
    std::vector<float> converted(size_t(taps * channels)), line(size_t(line_panels() * width));
    for (int64_t row = begin; row < end; ++row) {
      table.fill(index_ + row, 1, in.data(), nullptr, true);
      for (int64_t t = 0; t < taps; ++t) {
        kernels().to_float(in[size_t(t)], dtype_, channels, converted.data() + t * channels);
      }
      for (int64_t group = 0; group < g_.groups; ++group) {
        for (int64_t t = 0; t < taps; ++t)
          from[size_t(t)] = converted.data() + t * channels + group * group_in_;
        interleave_taps(from.data(), taps, group_in_, line.data());
        for (int64_t p = 0; p < line_panels(); ++p) {
          float* to = x + ((group * line_panels() + p) * rows_ + row) * width;
          std::memcpy(to, line.data() + p * width, size_t(width) * 4);
        }
      }
    }
  }

  // A share of the output tiles of one panel of a group's columns.
  void run_few_panel(int64_t task, int64_t share, const float* grad, const float* x, std::vector<float>& sums,
                     char* out) const {
    const int64_t width = kernels().panel_width, group = task / line_panels();
    const int64_t column = task % line_panels() * width;
    const int32_t columns = int32_t(std::min<int64_t>(width, line_ - column));
    const int32_t begin = int32_t(part(split_.tiles, share, shares_));
    const int32_t end = int32_t(part(split_.tiles, share + 1, shares_));
    char* to = out + (group * group_out_ * line_ + column) * size_of(dtype_);
    const bool direct = dtype_ == Dtype::kFloat32;
    kernels().outer_product({int32_t(rows_), grad + group * group_out_ * rows_, x,
                             direct ? reinterpret_cast<float*>(to) : sums.data(), direct ? line_ : width,
                             split_, begin, end, columns, false, outer_length(rows_)});
    if (direct) return;
    int64_t row = 0;
    for (int32_t tile = 0; tile < end; row += split_.height(tile++)) {
      for (int64_t i = row; tile >= begin && i < row + split_.height(tile); ++i) {
        kernels().from_float(sums.data() + i * width, columns, dtype_, to + i * line_ * size_of(dtype_));
      }
    }
  }

  float* tap_sums(float* dw, int64_t tap) const { return dw + tap * out_channels_ * group_in_; }

  void share_rows(const RowClass& rows, int64_t total, int64_t threads) {
    const int64_t weights = g_.taps() * out_channels_ * group_in_;
    const std::unique_ptr<float[]> others(new float[size_t((threads - 1) * weights)]);
    shares_ = 1;
    parallel(threads, [&](int64_t t) {
      float* dw = t ? others.get() + (t - 1) * weights : dw_;
      run_tasks(rows, part(total, t, threads), part(total, t + 1, threads), 0,
                int64_t(rows.taps.size()) * g_.groups * panels_, dw);
    });
    for (int32_t tap : rows.taps) {
      for (int64_t t = 1; t < threads; ++t) {
        const float* from = tap_sums(others.get() + (t - 1) * weights, tap);
        kernels().add_to(reinterpret_cast<const char*>(from), Dtype::kFloat32, out_channels_ * group_in_,
                         tap_sums(dw_, tap));
      }
    }
  }

  void share_tasks(const RowClass& rows, int64_t total, int64_t threads) {
    const int64_t coarse = int64_t(rows.taps.size()) * g_.groups * panels_;
    shares_ = std::min<int64_t>((threads + coarse - 1) / coarse, split_.tiles);
    parallel(threads, [&](int64_t t) {
      run_tasks(rows, 0, total, part(coarse * shares_, t, threads), part(coarse * shares_, t + 1, threads),
                dw_);
    });
  }

  // What one thread works with.
  struct Work {
    std::vector<int32_t> at;
    std::vector<const char*> in;
    std::vector<float> grad, line, x;
  };

  void pack(const RowClass& rows, int64_t first, int64_t height, Work& w) const {
    for (int64_t i = 0; i < height; ++i) {
      w.at[size_t(i)] = index_[rows.row(first + i)];
      kernels().to_float(grad_[rows.row(first + i)], dtype_, out_channels_, w.line.data());
      for (int64_t group = 0; group < g_.groups; ++group) {
        float* out = w.grad.data() + group * group_out_ * height;
        const float* line = w.line.data() + group * group_out_;
        for (int32_t tile = 0; tile < split_.tiles; ++tile) {
          const int64_t outputs = split_.height(tile);
          std::memcpy(out + i * outputs, line, size_t(outputs) * 4);
          line += outputs;
          out += outputs * height;
        }
      }
    }
  }

  void run_tasks(const RowClass& rows, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end,
                 float* dw) const {
    if (begin >= end) return;
    const int64_t per_tap = g_.groups * panels_ * shares_;
    // This thread's taps only.
    const std::vector<int32_t> taps(rows.taps.begin() + begin / per_tap,
                                    rows.taps.begin() + (end - 1) / per_tap + 1);
    const TapTable table(source_, taps);
    Work w{std::vector<int32_t>(kBlock), std::vector<const char*>(taps.size() * size_t(kBlock)),
           std::vector<float>(size_t(kBlock * out_channels_)), std::vector<float>(size_t(out_channels_)),
           std::vector<float>(size_t(kBlock * kernels().panel_width))};
    for (int64_t first = row_begin; first < row_end; first += kBlock) {
      const int64_t height = std::min(kBlock, row_end - first);
      pack(rows, first, height, w);
      table.fill(w.at.data(), int32_t(height), w.in.data(), nullptr, false);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t tap = task / per_tap - begin / per_tap;
        const bool gather = task == begin || task % shares_ == 0;  // else the previous task's columns
        run_task(task, tap_sums(dw, taps[size_t(tap)]), w.in.data() + tap * height, height, w, gather,
                 first > row_begin);
      }
    }
  }

  void run_task(int64_t task, float* dw, const char* const* in, int64_t height, Work& w, bool gather,
                bool add) const {
    const int64_t share = task % shares_, panel = task / shares_ % panels_;
    const int64_t group = task / shares_ / panels_ % g_.groups;
    const int64_t column = panel * kernels().panel_width;
    const int32_t columns = int32_t(std::min<int64_t>(kernels().panel_width, group_in_ - column));
    if (gather) {
      kernels().gather_columns(in, int32_t(height), (group * group_in_ + column) * size_of(dtype_), dtype_,
                               columns, w.x.data());
    }
    kernels().outer_product({int32_t(height), w.grad.data() + group * group_out_ * height, w.x.data(),
                             dw + group * group_out_ * group_in_ + column, group_in_, split_,
                             int32_t(part(split_.tiles, share, shares_)),
                             int32_t(part(split_.tiles, share + 1, shares_)), columns, add,
                             outer_length(rows_)});
  }

  const Geometry& g_;
  const GradRows& grad_;
  int64_t rows_;
  const int32_t* index_;
  const Source& source_;
  Dtype dtype_;
  int64_t group_in_, group_out_, out_channels_, line_, panels_, shares_ = 1;  // line_: weights of one output
  int64_t max_threads_;
  TileSplit split_;      // of the group's outputs
  float* dw_ = nullptr;  // [taps][O][C / groups]
};

}  // namespace

void reorder_weight_grad(const float* dw, const Geometry& g, int64_t outputs, int64_t inputs, Dtype dtype,
                         int64_t max_threads, char* out) {
  const int64_t taps = g.taps(), group_out = outputs / g.groups, element = size_of(dtype);
  const int64_t lines = g.transposed ? g.groups * inputs : outputs;  // first dimension of the weight
  const int64_t inner = g.transposed ? group_out : inputs;           // second
  const int64_t threads = std::min(threads_for(double(taps * outputs * inputs), 64e3), max_threads);
  parallel(threads, [&](int64_t t) {
    std::vector<float> line(static_cast<size_t>(inner * taps)), column(static_cast<size_t>(inner * taps));
    std::vector<const float*> in(static_cast<size_t>(taps));
    for (int64_t l = part(lines, t, threads); l < part(lines, t + 1, threads); ++l) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const float* from = dw + tap * outputs * inputs;
        in[size_t(tap)] = from + l * inputs;
        if (!g.transposed) continue;
        for (int64_t i = 0; i < inner; ++i) {
          column[size_t(tap * inner + i)] = from[(l / inputs * group_out + i) * inputs + l % inputs];
        }
        in[size_t(tap)] = column.data() + tap * inner;
      }
      interleave_taps(in.data(), taps, inner, line.data());
      kernels().from_float(line.data(), inner * taps, dtype, out + l * inner * taps * element);
    }
  });
}

namespace {

// The sum of the gradient rows, in blocks that do not depend on the number of threads, so that neither does
// the result.
void bias_grad(const GradRows& grad, int64_t rows, int64_t channels, Dtype dtype, int64_t max_threads,
               char* out) {
  constexpr int64_t kBlock = 512;
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  std::vector<double> sums(size_t(blocks * channels), 0.);
  const int64_t threads = std::min(threads_for(double(rows * channels), 256e3), max_threads);
  parallel(threads, [&](int64_t t) {
    for (int64_t block = part(blocks, t, threads); block < part(blocks, t + 1, threads); ++block) {
      RowSums sum(channels, sums.data() + block * channels);
      for (int64_t i = block * kBlock; i < std::min(rows, (block + 1) * kBlock); ++i) sum.add(grad[i], dtype);
    }
  });
  std::vector<float> total(static_cast<size_t>(channels));
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += sums[size_t(block * channels + c)];
    total[size_t(c)] = float(sum);
  }
  kernels().from_float(total.data(), channels, dtype, out);
}

// ------------------------------------------------------------------------------------ depthwise

// Threads share the rows, each with sums of its own: a depthwise weight is small.
void depthwise_weight_grad(const Geometry& g, const GradRows& grad, int64_t rows, const int32_t* index,
                           const Source& source, Dtype dtype, int64_t channels, int64_t max_threads,
                           float* dw) {
  constexpr int64_t kBlock = 64;  // rows: their taps and gradients stay in the L2 cache
  const int64_t taps = g.taps(), weights = taps * channels;
  const int64_t threads =
      std::min(threads_for(double(rows) * double(weights), kMacsPerThread / 8), max_threads);
  std::vector<int32_t> all(static_cast<size_t>(taps));
  std::iota(all.begin(), all.end(), 0);
  const TapTable table(source, all);
  std::vector<float> others(size_t((threads - 1) * weights), 0.f);
  std::fill_n(dw, weights, 0.f);
  parallel(threads, [&](int64_t t) {
    std::vector<const char*> x(size_t(kBlock * taps)), from(static_cast<size_t>(kBlock));
    const int64_t end = part(rows, t + 1, threads);
    for (int64_t first = part(rows, t, threads); first < end; first += kBlock) {
      const int64_t height = std::min(kBlock, end - first);
      for (int64_t i = 0; i < height; ++i) from[size_t(i)] = grad[first + i];
      table.fill(index + first, int32_t(height), x.data(), nullptr, true);
      kernels().depthwise_weight_grad(int32_t(height), int32_t(taps), x.data(), from.data(), dtype, channels,
                                      t ? others.data() + (t - 1) * weights : dw);
    }
  });
  for (int64_t t = 1; t < threads; ++t) {
    const char* from = reinterpret_cast<const char*>(others.data() + (t - 1) * weights);
    kernels().add_to(from, Dtype::kFloat32, weights, dw);
  }
}

// ------------------------------------------------------------------------------------------- op

// dw: the weight's shape, contiguous; db: [O], or none where nobody asks; of the gradient's dtype.
void weight_grad(const Tensor& grad, const Tensor& x, const Tensor& index, const OptionalTensor& count,
                 const OptionalTensor& source_in, IntHeaderOnlyArrayRef geometry, Tensor dw,
                 const OptionalTensor& db) {
  const Geometry g = geometry_of(geometry);
  const int64_t rows = active_rows(index, count), in_channels = x.size(1), out_channels = grad.size(1);
  const Dtype dtype = dtype_of(grad);
  const int32_t* at = checked_index(index, rows, g.out_pixels());
  const int64_t row_bytes = in_channels * size_of(dtype);
  const ZeroRow zero(row_bytes);
  const GradRows from{data_of<const char>(grad), out_channels * size_of(dtype),
                      grad.dim() == 2 ? nullptr : at};
  const Source source{g,    data_of<const char>(x), row_bytes, data_of<const int32_t>(source_in), zero.data(),
                      false};
  conv_weight_grad({g, from, rows, at, dtype, in_channels, out_channels}, source,
                   int64_t(torch::stable::get_num_threads()), data_of<char>(dw), data_of<char>(db));
}

}  // namespace

void conv_weight_grad(const GradJob& job, const Source& source, int64_t threads, char* dw, char* db) {
  const Geometry& g = job.g;
  const int64_t inputs = job.in_channels / g.groups;
  WeightGrad weight_grad(g, job.grad, job.rows, job.index, source, job.dtype, job.in_channels,
                         job.out_channels, threads);
  if (!job.depthwise() && weight_grad.few_rows()) {
    weight_grad.run_few(dw);
  } else {
    const std::unique_ptr<float[]> sums(new float[size_t(g.taps() * job.out_channels * inputs)]);
    if (job.depthwise()) {
      depthwise_weight_grad(g, job.grad, job.rows, job.index, source, job.dtype, job.in_channels, threads,
                            sums.get());
    } else {
      weight_grad.run(sums.get());
    }
    reorder_weight_grad(sums.get(), g, job.out_channels, inputs, job.dtype, threads, dw);
  }
  if (db) bias_grad(job.grad, job.rows, job.out_channels, job.dtype, threads, db);
}

}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) {
  m.def(
      "cpu_conv_weight_grad(Tensor grad, Tensor x, Tensor index, Tensor? count, Tensor? source, "
      "int[] geometry, Tensor(a!) dw, Tensor(b!)? db) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) {
  m.impl("cpu_conv_weight_grad", TORCH_BOX(&dynops::cpu::weight_grad));
}
