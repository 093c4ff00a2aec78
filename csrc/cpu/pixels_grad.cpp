// Pixel-sparse convolution on the CPU: the gradients of the input, the weight and the bias.
#include <cstring>
#include <memory>
#include <numeric>

#include "operands.h"
#include "pack.h"
#include "parallel.h"
#include "taps.h"

namespace dynops::cpu {
namespace {

// The gradient rows of a plan: [rows, O] packed, or read from a channels_last map.
struct GradRows {
  const char* data;
  int64_t bytes;
  const int32_t* index;  // null where packed
  const char* operator[](int64_t row) const { return data + (index ? index[row] : row) * bytes; }
};

// ------------------------------------------------------------------------------- input gradient

// The input pixels that the rows of a block read, tap by tap.
class Reach {
 public:
  Reach(const Geometry& g, const int32_t* at, int64_t rows) : g_(g), rows_(rows) {
    for (std::vector<int32_t>* v : {&y_, &x_, &first_, &q_}) v->resize(size_t(rows));
    if (g.transposed) pixel_.resize(size_t(rows));
    for (int64_t i = 0; i < rows; ++i) {
      const Pixel p = pixel_at(at[i], int32_t(g.out_h), int32_t(g.out_w));
      if (g.transposed) pixel_[size_t(i)] = p;
      y_[size_t(i)] = int32_t(p.y * g.stride_h - g.pad_h);
      x_[size_t(i)] = int32_t(p.x * g.stride_w - g.pad_w);
      first_[size_t(i)] = int32_t((p.n * g.in_h + y_[size_t(i)]) * g.in_w + x_[size_t(i)]);
    }
  }

  // The pixel that each row reads at this tap, or -1; valid until the next call.
  const int32_t* at_tap(int32_t tap) {
    const int32_t r = tap / int32_t(g_.kernel_w), s = tap % int32_t(g_.kernel_w);
    if (g_.transposed) {
      for (int64_t i = 0; i < rows_; ++i) q_[size_t(i)] = input_pixel(g_, pixel_[size_t(i)], r, s);
      return q_.data();
    }
    const int32_t down = r * int32_t(g_.dil_h), across = s * int32_t(g_.dil_w);
    const int32_t step = down * int32_t(g_.in_w) + across;
    const uint32_t height = uint32_t(g_.in_h), width = uint32_t(g_.in_w);
    const int32_t *y = y_.data(), *x = x_.data(), *first = first_.data();
    int32_t* q = q_.data();
    for (int64_t i = 0; i < rows_; ++i) {  // no branch and no product: the compiler makes vectors of it
      const bool inside = (uint32_t(y[i] + down) < height) & (uint32_t(x[i] + across) < width);
      q[i] = inside ? first[i] + step : -1;
    }
    return q;
  }

 private:
  const Geometry& g_;
  int64_t rows_;
  std::vector<Pixel> pixel_;
  std::vector<int32_t> y_, x_, first_, q_;
};

// dx[q] += W[t]^T dy[p] for every pair (p, t) that reads q. For one tap no two rows read the same q, and
// each thread owns a range of q or of channels, so that nothing is written by two.
class InputGrad {
 public:
  InputGrad(const Geometry& g, const GradRows& grad, int64_t rows, const int32_t* index,
            const int32_t* inverse, const char* weight, Dtype dtype, int64_t in_channels,
            int64_t out_channels, float* dx)
      : g_(g),
        grad_(grad),
        rows_(rows),
        index_(index),
        inverse_(inverse),
        weight_(weight),
        dtype_(dtype),
        in_channels_(in_channels),
        out_channels_(out_channels),
        dx_(dx) {
    dot_ = dtype == Dtype::kBFloat16 && kernels().bf16_dot;
    layout_ = panel_layout(in_channels / g.groups, g.taps(), out_channels / g.groups, dot_);
    zeros_.assign(size_t(in_channels / g.groups) + 64, 0.f);
    ones_.assign(size_t(in_channels / g.groups) + 64, 1.f);
  }

  void run() const {
    const double macs = double(rows_) * double(g_.taps() * in_channels_ / g_.groups * out_channels_);
    const int64_t threads = threads_for(macs, kMacsPerThread);
    // Channels are shared where there are many, so that each thread reads its part of the weight only.
    const bool by_panel = layout_.panels >= 4 * threads;
    const int64_t panel_parts = by_panel ? threads : 1, range_parts = threads / panel_parts;
    parallel(threads, [&](int64_t t) {
      const int64_t r = t % range_parts, p = t / range_parts;
      run_part(int32_t(part(g_.in_pixels(), r, range_parts)),
               int32_t(part(g_.in_pixels(), r + 1, range_parts)), part(layout_.panels, p, panel_parts),
               part(layout_.panels, p + 1, panel_parts));
    });
  }

 private:
  static constexpr int64_t kBlockRows = 16 * kTileRows;

  struct Pairs {
    int32_t size;
    const char* from[kBlockRows];
    char* to[kBlockRows];
    std::vector<float> converted;
    const char* converted_from[kBlockRows];
  };

  void run_part(int32_t begin, int32_t end, int64_t panel_begin, int64_t panel_end) const {
    Pairs pairs;
    if (begin >= end) return;
    const auto [from, last] = readers(begin, end);
    for (int64_t first = from; first < last; first += kBlockRows) {
      const int64_t height = std::min(kBlockRows, last - first);
      Reach reach(g_, index_ + first, height);
      for (int32_t tap = 0; tap < g_.taps(); ++tap) {
        collect(reach.at_tap(tap), first, height, begin, end, pairs);
        if (pairs.size) multiply(pairs, tap, panel_begin, panel_end);
      }
    }
  }

  // Rows of the index in which every row that reads an input pixel of [begin, end) lies: those whose lines
  // y * stride - pad + [0, reach] may meet the lines of the range.
  std::pair<int64_t, int64_t> readers(int64_t begin, int64_t end) const {
    if (g_.transposed || (begin == 0 && end == g_.in_pixels())) return {0, rows_};
    const int64_t reach = (g_.kernel_h - 1) * g_.dil_h, image = g_.in_h * g_.in_w;
    const int64_t top = std::max<int64_t>(begin % image / g_.in_w + g_.pad_h - reach, 0);
    const int64_t bottom = (end - 1) % image / g_.in_w + g_.pad_h;
    const int64_t from = std::min((top + g_.stride_h - 1) / g_.stride_h, g_.out_h);
    const int64_t to = std::min(bottom / g_.stride_h + 1, g_.out_h);
    const int64_t first = (begin / image * g_.out_h + from) * g_.out_w;
    const int64_t last = ((end - 1) / image * g_.out_h + to) * g_.out_w;
    return {std::lower_bound(index_, index_ + rows_, first) - index_,
            std::lower_bound(index_, index_ + rows_, last) - index_};
  }

  // The pairs of one tap with an input pixel in [begin, end): where they are read and written.
  void collect(const int32_t* at, int64_t first, int64_t height, int32_t begin, int32_t end,
               Pairs& pairs) const {
    pairs.size = 0;
    for (int64_t i = 0; i < height; ++i) {
      int64_t q = at[i];
      if (q < begin || q >= end) continue;
      if (inverse_ && (q = inverse_[q]) < 0) continue;
      pairs.from[pairs.size] = grad_[first + i];
      pairs.to[pairs.size++] = reinterpret_cast<char*>(dx_ + q * in_channels_);
    }
  }

  void multiply(Pairs& pairs, int32_t tap, int64_t panel_begin, int64_t panel_end) const {
    const int64_t group_in = in_channels_ / g_.groups, group_out = out_channels_ / g_.groups;
    const int64_t start = tap * (layout_.depth / g_.taps());
    const bool converts = dtype_ != Dtype::kFloat32 && !dot_;
    for (int64_t group = 0; group < g_.groups; ++group) {
      const int64_t in_offset = group * group_out * size_of(dtype_);
      if (converts) convert(pairs, in_offset, group_out);
      const Gemm gemm{1,
                      int32_t(group_out),
                      &start,
                      weight_ + group * layout_.group_bytes,
                      layout_,
                      converts ? Dtype::kFloat32 : dtype_,
                      Dtype::kFloat32,
                      converts ? 0 : in_offset,
                      group * group_in * 4,
                      ones_.data(),
                      zeros_.data(),
                      Activation::kNone};
      // A single tap writes each pixel once, and needs no sum.
      const RowBlock rows{pairs.size, converts ? pairs.converted_from : pairs.from, pairs.to,
                          g_.taps() == 1 ? nullptr : pairs.to, nullptr};
      kernels().gemm(gemm, rows, panel_begin, panel_end);
    }
  }

  void convert(Pairs& pairs, int64_t in_offset, int64_t depth) const {
    pairs.converted.resize(size_t(kBlockRows * depth));
    for (int32_t i = 0; i < pairs.size; ++i) {
      float* to = pairs.converted.data() + i * depth;
      kernels().to_float(pairs.from[i] + in_offset, dtype_, depth, to);
      pairs.converted_from[i] = reinterpret_cast<const char*>(to);
    }
  }

  const Geometry& g_;
  const GradRows& grad_;
  int64_t rows_;
  const int32_t *index_, *inverse_;
  const char* weight_;
  Dtype dtype_;
  int64_t in_channels_, out_channels_;
  float* dx_;
  bool dot_;
  PanelLayout layout_;
  std::vector<float> zeros_, ones_;
};

// ------------------------------------------------------------------------------ weight gradient

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
             const Source& source, Dtype dtype, int64_t in_channels, int64_t out_channels)
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
    const int64_t threads = threads_for(double(rows_) * double(line_ * out_channels_), kMacsPerThread);
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
      const int64_t threads = threads_for(macs, kMacsPerThread);
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
                             split_, begin, end, columns, false});
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
                             int32_t(part(split_.tiles, share + 1, shares_)), columns, add});
  }

  const Geometry& g_;
  const GradRows& grad_;
  int64_t rows_;
  const int32_t* index_;
  const Source& source_;
  Dtype dtype_;
  int64_t group_in_, group_out_, out_channels_, line_, panels_, shares_ = 1;  // line_: weights of one output
  TileSplit split_;                                                           // of the group's outputs
  float* dw_ = nullptr;                                                       // [taps][O][C / groups]
};

// [taps][O][I] to the weight's own order: [O][I][taps], or transposed (O the inputs) [I][O][taps].
void reorder(const float* dw, const Geometry& g, int64_t outputs, int64_t inputs, Dtype dtype, char* out) {
  const int64_t taps = g.taps(), group_out = outputs / g.groups, element = size_of(dtype);
  const int64_t lines = g.transposed ? g.groups * inputs : outputs;  // first dimension of the weight
  const int64_t inner = g.transposed ? group_out : inputs;           // second
  const int64_t threads = threads_for(double(taps * outputs * inputs), 64e3);
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

// The sum of the gradient rows: float32 over 16 rows, then float64, as exact as a tree of sums. In blocks
// that do not depend on the number of threads, so that neither does the result.
void bias_grad(const GradRows& grad, int64_t rows, int64_t channels, Dtype dtype, char* out) {
  constexpr int64_t kBlock = 512;
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  std::vector<double> sums(size_t(blocks * channels), 0.);
  const int64_t threads = threads_for(double(rows * channels), 256e3);
  parallel(threads, [&](int64_t t) {
    std::vector<float> few(static_cast<size_t>(channels));
    for (int64_t first = part(blocks, t, threads) * kBlock; first < part(blocks, t + 1, threads) * kBlock;
         first += 16) {
      if (first >= rows) break;
      std::fill(few.begin(), few.end(), 0.f);
      for (int64_t i = first; i < std::min(rows, first + 16); ++i) {
        kernels().add_to(grad[i], dtype, channels, few.data());
      }
      double* sum = sums.data() + first / kBlock * channels;
      for (int64_t c = 0; c < channels; ++c) sum[c] += few[size_t(c)];
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

// dx of a depthwise convolution, an input line at a time: the pairs (row, tap) that read each pixel of the
// line are listed, then summed, so that every pixel is written once and none is zeroed first.
class DepthwiseInputGrad {
 public:
  DepthwiseInputGrad(const Geometry& g, const GradRows& grad, int64_t rows, const int32_t* index,
                     const int32_t* inverse, const float* weight, Dtype dtype, int64_t channels, char* dx)
      : g_(g),
        grad_(grad),
        rows_(rows),
        index_(index),
        inverse_(inverse),
        weight_(weight),
        dtype_(dtype),
        channels_(channels),
        dx_(dx),
        line_start_(size_t(g.batch * g.out_h + 1)) {
    int64_t row = 0;
    for (int64_t line = 0; line < g.batch * g.out_h; ++line) {
      while (row < rows && index[row] < line * g.out_w) ++row;
      line_start_[size_t(line)] = row;
    }
    line_start_.back() = rows;
  }

  void run() const {
    const int64_t lines = g_.batch * g_.in_h;
    const double work = double(rows_ * g_.taps() + g_.in_pixels()) * double(channels_);
    const int64_t threads = threads_for(work, kMacsPerThread / 8);
    parallel(threads, [&](int64_t t) {
      Line line(size_t(g_.in_w), size_t(g_.taps()));
      for (int64_t l = part(lines, t, threads); l < part(lines, t + 1, threads); ++l) run_line(l, line);
    });
  }

 private:
  struct Line {
    std::vector<int32_t> pairs, tap;
    std::vector<const char*> in;
    std::vector<char*> out;
    Line(size_t width, size_t taps) : pairs(width), tap(width * taps), in(width * taps), out(width) {}
  };

  void run_line(int64_t l, Line& line) const {
    std::fill(line.pairs.begin(), line.pairs.end(), 0);
    const int32_t n = int32_t(l / g_.in_h), y = int32_t(l % g_.in_h);
    for (int32_t r = 0; r < g_.kernel_h; ++r) {
      // the output line that reads this one at kernel row r: a convolution backward is its transpose
      const int32_t out_y = input_coordinate(y, r, int32_t(g_.out_h), int32_t(g_.stride_h), int32_t(g_.pad_h),
                                             int32_t(g_.dil_h), !g_.transposed);
      if (out_y >= 0) collect(n * g_.out_h + out_y, r, line);
    }
    const int64_t bytes = channels_ * size_of(dtype_);
    for (int64_t x = 0; x < g_.in_w; ++x) {
      const int64_t q = l * g_.in_w + x, row = inverse_ ? inverse_[q] : q;
      line.out[size_t(x)] = row < 0 ? nullptr : dx_ + row * bytes;
    }
    kernels().depthwise_pairs({int32_t(g_.in_w), int32_t(g_.taps()), line.pairs.data(), line.in.data(),
                               line.tap.data(), line.out.data(), channels_, weight_, dtype_});
  }

  // The pairs of one output line at kernel row r.
  void collect(int64_t out_line, int32_t r, Line& line) const {
    const int64_t taps = g_.taps();
    for (int64_t row = line_start_[size_t(out_line)]; row < line_start_[size_t(out_line + 1)]; ++row) {
      const int32_t out_x = int32_t(index_[row] - out_line * g_.out_w);
      const char* from = grad_[row];
      for (int32_t s = 0; s < g_.kernel_w; ++s) {
        const int32_t x = input_coordinate(out_x, s, int32_t(g_.in_w), int32_t(g_.stride_w),
                                           int32_t(g_.pad_w), int32_t(g_.dil_w), g_.transposed);
        if (x < 0) continue;
        const size_t slot = size_t(x * taps + line.pairs[size_t(x)]++);
        line.in[slot] = from;
        line.tap[slot] = r * int32_t(g_.kernel_w) + s;
      }
    }
  }

  const Geometry& g_;
  const GradRows& grad_;
  int64_t rows_;
  const int32_t *index_, *inverse_;
  const float* weight_;
  Dtype dtype_;
  int64_t channels_;
  char* dx_;
  std::vector<int64_t> line_start_;  // the first row of each output line
};

// Threads share the rows, each with sums of its own: a depthwise weight is small.
void depthwise_weight_grad(const Geometry& g, const GradRows& grad, int64_t rows, const int32_t* index,
                           const Source& source, Dtype dtype, int64_t channels, float* dw) {
  constexpr int64_t kBlock = 64;  // rows: their taps and gradients stay in the L2 cache
  const int64_t taps = g.taps(), weights = taps * channels;
  const int64_t threads = threads_for(double(rows) * double(weights), kMacsPerThread / 8);
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

// ------------------------------------------------------------------------------------------ ops

// grad: [rows, O] or channels_last [N, O, H, W]. dx: float32 zeros, [R, C] or channels_last; depthwise: of
// the gradient's dtype, and every element is written.
void conv_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& index,
                     const OptionalTensor& count, const OptionalTensor& source,
                     IntHeaderOnlyArrayRef geometry, Tensor dx) {
  const Geometry g = geometry_of(geometry);
  const int64_t rows = active_rows(index, count), in_channels = dx.size(1), out_channels = grad.size(1);
  const Dtype dtype = dtype_of(grad);
  const int32_t* at = checked_index(index, rows, g.out_pixels());
  const GradRows from{data_of<const char>(grad), out_channels * size_of(dtype),
                      grad.dim() == 2 ? nullptr : at};
  const int32_t* inverse = data_of<const int32_t>(source);
  if (is_depthwise(g, in_channels, out_channels)) {
    return DepthwiseInputGrad(g, from, rows, at, inverse, data_of<const float>(weight), dtype, in_channels,
                              data_of<char>(dx))
        .run();
  }
  InputGrad(g, from, rows, at, inverse, data_of<const char>(weight), dtype, in_channels, out_channels,
            data_of<float>(dx))
      .run();
}

// dw: the weight's shape, contiguous; db: [O], or none where nobody asks; of the gradient's dtype.
void conv_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& index, const OptionalTensor& count,
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
  WeightGrad weight_grad(g, from, rows, at, source, dtype, in_channels, out_channels);
  const bool depthwise = is_depthwise(g, in_channels, out_channels);
  if (!depthwise && weight_grad.few_rows()) {
    weight_grad.run_few(data_of<char>(dw));
  } else {
    const std::unique_ptr<float[]> sums(new float[size_t(dw.numel())]);
    if (depthwise) {
      depthwise_weight_grad(g, from, rows, at, source, dtype, in_channels, sums.get());
    } else {
      weight_grad.run(sums.get());
    }
    reorder(sums.get(), g, out_channels, in_channels / g.groups, dtype, data_of<char>(dw));
  }
  if (db) bias_grad(from, rows, out_channels, dtype, data_of<char>(db));
}

}  // namespace
}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) {
  m.def(
      "cpu_conv_input_grad(Tensor grad, Tensor weight, Tensor index, Tensor? count, Tensor? source, "
      "int[] geometry, Tensor(a!) dx) -> ()");
  m.def(
      "cpu_conv_weight_grad(Tensor grad, Tensor x, Tensor index, Tensor? count, Tensor? source, "
      "int[] geometry, Tensor(a!) dw, Tensor(b!)? db) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) {
  m.impl("cpu_conv_input_grad", TORCH_BOX(&dynops::cpu::conv_input_grad));
  m.impl("cpu_conv_weight_grad", TORCH_BOX(&dynops::cpu::conv_weight_grad));
}
