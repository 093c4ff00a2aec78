// Pixel-sparse convolution on the CPU: the gradients of the weight and the bias.
#include <cstring>
#include <memory>

#include "../engine/grad_rows.h"
#include "../engine/parallel.h"
#include "../engine/row_sums.h"

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

// dW[t] = sum_p dy[p] x[q(p, t)]^T, in blocks of rows. A block's gradients are packed as [group][o
// tile][row]. A task is a tap, a group, a panel of input channels and a share of the o tiles. It gathers its
// input columns and adds the outer products. Threads share the rows, each with sums of its own, where the
// weight is small; and the tasks where it is large.
class WeightGrad {
 public:
  WeightGrad(const ConvGrad& c, const Source& source, int64_t max_threads)
      : c_(c),
        g_(c.g),
        source_(source),
        group_in_(c.group_in()),
        group_out_(c.group_out()),
        line_(c.group_in() * c.g.taps()),
        panels_(ceil_div(group_in_, kernels().panel_width)),
        max_threads_(max_threads),
        split_(int32_t(group_out_)) {}

  // True if rows are so few that their inputs, and not the sums, are brought into the weight's order. Each
  // panel then has columns i * taps + t, and its sums over all rows go from registers to dW. With 20 rows of
  // 512 -> 512 channels 3x3 the sums, one by one to their places, took 600 us.
  bool few_rows() const {
    return c_.rows > 0 && c_.rows <= kFewRows && c_.rows <= group_out_ && !g_.transposed &&
           c_.rows * g_.groups * line_panels() * kernels().panel_width * 4 <= kFewBytes;
  }

  void run_few(char* out) {
    const int64_t threads = threads_of(double(c_.rows) * double(line_ * c_.out_channels));
    const int64_t width = kernels().panel_width, panels = g_.groups * line_panels();
    const std::unique_ptr<float[]> x(new float[panels * c_.rows * width]);
    parallel(threads, [&](int64_t t) { interleave_rows(share_of(c_.rows, t, threads), x.get()); });
    RowClass rows;
    rows.all = true;
    Work w(c_, c_.rows, 0);
    pack(rows, 0, c_.rows, w);
    shares_ = std::min<int64_t>(ceil_div(threads, panels), split_.tiles);
    parallel(threads, [&](int64_t t) {
      std::vector<float> sums(c_.dtype == Dtype::kFloat32 ? 0 : group_out_ * width);
      for (const int64_t i : each(share_of(panels * shares_, t, threads))) {
        run_few_panel(i / shares_, i % shares_, w.grad.data(), x.get() + i / shares_ * c_.rows * width, sums,
                      out);
      }
    });
  }

  // All sums in `dw`, [taps][O][I].
  void run(float* dw) {
    dw_ = dw;
    for (const RowClass& rows : row_classes(g_, c_.index, c_.rows)) {
      const int64_t total = rows.size(c_.rows), taps = int64_t(rows.taps.size());
      if (total == 0 || taps == 0) {
        for (int32_t tap : rows.taps) std::fill_n(tap_sums(dw_, tap), c_.out_channels * group_in_, 0.f);
        continue;
      }
      const int64_t threads = threads_of(double(total) * double(taps * group_in_ * c_.out_channels));
      const bool small = g_.taps() * c_.out_channels * group_in_ * 4 <= kSmallWeight;
      small&& total >= threads * 4 * kRows ? share_rows(rows, total, threads)
                                           : share_tasks(rows, total, threads);
    }
  }

 private:
  static constexpr int64_t kRows = 128;  // of a block: 16 KB of a panel of x and 6 KB of a tile of gradients
  static constexpr int64_t kSmallWeight = 1 << 20;  // bytes
  static constexpr int64_t kFewRows = 512, kFewBytes = 4 << 20;

  int64_t threads_of(double macs) const { return std::min(threads_for(macs, kMacsPerThread), max_threads_); }

  int64_t line_panels() const { return ceil_div(line_, kernels().panel_width); }

  // x[panel][row][width]: the inputs of each row in the order of a line of the weight, i * taps + t.
  void interleave_rows(Span rows, float* x) const {
    const int64_t taps = g_.taps(), width = kernels().panel_width, channels = c_.in_channels;
    const std::vector<int32_t> all = ascending(taps);
    const TapTable table(source_, all);
    std::vector<const char*> in(taps);
    std::vector<const float*> from(taps);
    std::vector<float> converted(taps * channels), line(line_panels() * width);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      table.fill(c_.index + row, 1, in.data(), nullptr, true);
      for (int64_t t = 0; t < taps; ++t) {
        kernels().to_float(in[t], c_.dtype, channels, converted.data() + t * channels);
      }
      for (int64_t group = 0; group < g_.groups; ++group) {
        for (int64_t t = 0; t < taps; ++t) from[t] = converted.data() + t * channels + group * group_in_;
        interleave_taps(from.data(), taps, group_in_, line.data());
        for (int64_t p = 0; p < line_panels(); ++p) {
          float* to = x + ((group * line_panels() + p) * c_.rows + row) * width;
          std::copy_n(line.data() + p * width, width, to);
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
    const Span tiles = share_of(split_.tiles, share, shares_);
    char* to = out + (group * group_out_ * line_ + column) * size_of(c_.dtype);
    const bool direct = c_.dtype == Dtype::kFloat32;
    kernels().outer_product({.rows = int32_t(c_.rows),
                             .grad = grad + group * group_out_ * c_.rows,
                             .x = x,
                             .dw = direct ? reinterpret_cast<float*>(to) : sums.data(),
                             .dw_stride = direct ? line_ : width,
                             .outputs = split_,
                             .tile_begin = int32_t(tiles.begin),
                             .tile_end = int32_t(tiles.end),
                             .columns = columns,
                             .add = false,
                             .length = outer_length(c_.rows)});
    if (direct) return;
    int64_t row = 0;
    for (int32_t tile = 0; tile < tiles.end; row += split_.height(tile++)) {
      for (int64_t i = row; tile >= tiles.begin && i < row + split_.height(tile); ++i) {
        kernels().from_float(sums.data() + i * width, columns, c_.dtype, to + i * line_ * size_of(c_.dtype));
      }
    }
  }

  float* tap_sums(float* dw, int64_t tap) const { return dw + tap * c_.out_channels * group_in_; }

  void share_rows(const RowClass& rows, int64_t total, int64_t threads) {
    const int64_t weights = g_.taps() * c_.out_channels * group_in_;
    const std::unique_ptr<float[]> others(new float[(threads - 1) * weights]);
    shares_ = 1;
    parallel(threads, [&](int64_t t) {
      float* dw = t ? others.get() + (t - 1) * weights : dw_;
      run_tasks(rows, share_of(total, t, threads), {0, int64_t(rows.taps.size()) * g_.groups * panels_}, dw);
    });
    for (int32_t tap : rows.taps) {
      for (int64_t t = 1; t < threads; ++t) {
        const float* from = tap_sums(others.get() + (t - 1) * weights, tap);
        kernels().add_to(bytes_of(from), Dtype::kFloat32, c_.out_channels * group_in_, tap_sums(dw_, tap));
      }
    }
  }

  void share_tasks(const RowClass& rows, int64_t total, int64_t threads) {
    const int64_t coarse = int64_t(rows.taps.size()) * g_.groups * panels_;
    shares_ = std::min<int64_t>(ceil_div(threads, coarse), split_.tiles);
    parallel(threads,
             [&](int64_t t) { run_tasks(rows, {0, total}, share_of(coarse * shares_, t, threads), dw_); });
  }

  // The working memory of one thread, for blocks of `rows` rows.
  struct Work {
    std::vector<int32_t> at;
    std::vector<const char*> in;
    std::vector<float> grad, line, x;

    Work(const ConvGrad& c, int64_t rows, int64_t taps)
        : at(rows),
          in(rows * taps),
          grad(rows * c.out_channels),
          line(c.out_channels),
          x(taps ? rows * kernels().panel_width : 0) {}
  };

  void pack(const RowClass& rows, int64_t first, int64_t height, Work& w) const {
    for (int64_t i = 0; i < height; ++i) {
      w.at[i] = c_.index[rows.row(first + i)];
      kernels().to_float(c_.grad[rows.row(first + i)], c_.dtype, c_.out_channels, w.line.data());
      for (int64_t group = 0; group < g_.groups; ++group) {
        pack_grad_row(w.line.data() + group * group_out_, split_, i, height,
                      w.grad.data() + group * group_out_ * height);
      }
    }
  }

  void run_tasks(const RowClass& rows, Span some, Span tasks, float* dw) const {
    if (tasks.begin >= tasks.end) return;
    const int64_t per_tap = g_.groups * panels_ * shares_;
    // This thread's taps only.
    const std::vector<int32_t> taps(rows.taps.begin() + tasks.begin / per_tap,
                                    rows.taps.begin() + (tasks.end - 1) / per_tap + 1);
    const TapTable table(source_, taps);
    Work w(c_, kRows, int64_t(taps.size()));
    for (int64_t first = some.begin; first < some.end; first += kRows) {
      const int64_t height = std::min(kRows, some.end - first);
      pack(rows, first, height, w);
      table.fill(w.at.data(), int32_t(height), w.in.data(), nullptr, false);
      for (int64_t task = tasks.begin; task < tasks.end; ++task) {
        const int64_t tap = task / per_tap - tasks.begin / per_tap;
        const bool gather = task == tasks.begin || task % shares_ == 0;  // else the previous task's columns
        run_task(task, tap_sums(dw, taps[tap]), w.in.data() + tap * height, height, w, gather,
                 first > some.begin);
      }
    }
  }

  void run_task(int64_t task, float* dw, const char* const* in, int64_t height, Work& w, bool gather,
                bool add) const {
    const int64_t panel = task / shares_ % panels_, group = task / shares_ / panels_ % g_.groups;
    const int64_t column = panel * kernels().panel_width;
    const int32_t columns = int32_t(std::min<int64_t>(kernels().panel_width, group_in_ - column));
    const Span tiles = share_of(split_.tiles, task % shares_, shares_);
    if (gather) {
      kernels().gather_columns(in, int32_t(height), (group * group_in_ + column) * size_of(c_.dtype),
                               c_.dtype, columns, w.x.data());
    }
    kernels().outer_product({.rows = int32_t(height),
                             .grad = w.grad.data() + group * group_out_ * height,
                             .x = w.x.data(),
                             .dw = dw + group * group_out_ * group_in_ + column,
                             .dw_stride = group_in_,
                             .outputs = split_,
                             .tile_begin = int32_t(tiles.begin),
                             .tile_end = int32_t(tiles.end),
                             .columns = columns,
                             .add = add,
                             .length = outer_length(c_.rows)});
  }

  const ConvGrad& c_;
  const Geometry& g_;
  const Source& source_;
  int64_t group_in_, group_out_, line_, panels_, shares_ = 1;  // line_: weights of one output
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
    std::vector<float> line(inner * taps), column(inner * taps);
    std::vector<const float*> in(taps);
    for (const int64_t l : each(share_of(lines, t, threads))) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const float* from = dw + tap * outputs * inputs;
        in[tap] = from + l * inputs;
        if (!g.transposed) continue;
        for (int64_t i = 0; i < inner; ++i) {
          column[tap * inner + i] = from[(l / inputs * group_out + i) * inputs + l % inputs];
        }
        in[tap] = column.data() + tap * inner;
      }
      interleave_taps(in.data(), taps, inner, line.data());
      kernels().from_float(line.data(), inner * taps, dtype, out + l * inner * taps * element);
    }
  });
}

namespace {

// The sum of the gradient rows in blocks: the number of threads does not change the result.
void bias_grad(const ConvGrad& c, int64_t max_threads, char* out) {
  constexpr int64_t kRows = 512;
  const int64_t blocks = ceil_div(c.rows, kRows), channels = c.out_channels;
  std::vector<double> sums(blocks * channels, 0.);
  const int64_t threads = std::min(threads_for(double(c.rows * channels), 256e3), max_threads);
  parallel_shares(blocks, threads, [&](int64_t block) {
    RowSums sum(channels, sums.data() + block * channels);
    for (int64_t i = block * kRows; i < std::min(c.rows, (block + 1) * kRows); ++i)
      sum.add(c.grad[i], c.dtype);
  });
  std::vector<double> total(channels, 0.);
  for (int64_t i = 0; i < blocks * channels; ++i) total[i % channels] += sums[i];
  round_sums(total, c.dtype, out);
}

// ------------------------------------------------------------------------------------ depthwise

// Threads share the rows, each with sums of its own: a depthwise weight is small.
void depthwise_weight_grad(const ConvGrad& c, const Source& source, int64_t max_threads, float* dw) {
  constexpr int64_t kRows = 64;  // their taps and gradients stay in the L2 cache
  const int64_t taps = c.g.taps(), weights = taps * c.in_channels;
  const int64_t threads =
      std::min(threads_for(double(c.rows) * double(weights), kMacsPerThread / 8), max_threads);
  const std::vector<int32_t> all = ascending(taps);
  const TapTable table(source, all);
  std::vector<float> others((threads - 1) * weights, 0.f);
  std::fill_n(dw, weights, 0.f);
  parallel(threads, [&](int64_t t) {
    std::vector<const char*> x(kRows * taps), from(kRows);
    const Span mine = share_of(c.rows, t, threads);
    for (int64_t first = mine.begin; first < mine.end; first += kRows) {
      const int64_t height = std::min(kRows, mine.end - first);
      for (int64_t i = 0; i < height; ++i) from[i] = c.grad[first + i];
      table.fill(c.index + first, int32_t(height), x.data(), nullptr, true);
      kernels().depthwise_weight_grad(int32_t(height), int32_t(taps), x.data(), from.data(), c.dtype,
                                      c.in_channels, t ? others.data() + (t - 1) * weights : dw);
    }
  });
  for (int64_t t = 1; t < threads; ++t)
    kernels().add_to(bytes_of(others.data() + (t - 1) * weights), Dtype::kFloat32, weights, dw);
}

// ------------------------------------------------------------------------------------------- op

// dw: the weight's shape, contiguous; db: [O], or none where nobody asks; of the gradient's dtype.
void weight_grad(const Tensor& grad, const Tensor& x, const Tensor& index, const OptionalTensor& count,
                 const OptionalTensor& source_in, IntHeaderOnlyArrayRef geometry, Tensor dw,
                 OptionalTensor db) {
  const ConvGrad c = conv_grad_of(grad, index, count, geometry, x.size(1));
  const int64_t row_bytes = c.in_channels * size_of(c.dtype);
  const ZeroRow zero(row_bytes);
  const Source source{.g = c.g,
                      .x = data_of<const char>(x),
                      .row_bytes = row_bytes,
                      .inverse = data_of<const int32_t>(source_in),
                      .zero = zero.data()};
  conv_weight_grad(c, source, int64_t(torch::stable::get_num_threads()), data_of<char>(dw),
                   data_of<char>(db));
}

}  // namespace

void conv_weight_grad(const ConvGrad& c, const Source& source, int64_t threads, char* dw, char* db) {
  WeightGrad weight_grad(c, source, threads);
  if (!c.depthwise() && weight_grad.few_rows()) {
    weight_grad.run_few(dw);
  } else {
    const std::unique_ptr<float[]> sums(new float[c.g.taps() * c.out_channels * c.group_in()]);
    c.depthwise() ? depthwise_weight_grad(c, source, threads, sums.get()) : weight_grad.run(sums.get());
    reorder_weight_grad(sums.get(), c.g, c.out_channels, c.group_in(), c.dtype, threads, dw);
  }
  if (db) bias_grad(c, threads, db);
}

DYNOPS_CPU_OP_NAMED("conv_weight_grad", weight_grad)

}  // namespace dynops::cpu
