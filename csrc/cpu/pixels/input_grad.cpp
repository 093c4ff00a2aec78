// Pixel-sparse convolution on the CPU: the gradient of the input.
#include "../engine/grad_rows.h"
#include "../engine/operands.h"
#include "../engine/pack.h"
#include "../engine/parallel.h"
#include "../engine/taps.h"

namespace dynops::cpu {
namespace {

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

  int64_t panels() const { return layout_.panels; }

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

  // The gradient of the input pixels [begin, end) and of the channels of the panels, on this thread.
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

 private:
  static constexpr int64_t kBlockRows = 16 * kTileRows;

  struct Pairs {
    int32_t size;
    const char* from[kBlockRows];
    char* to[kBlockRows];
    std::vector<float> converted;
    const char* converted_from[kBlockRows];
  };

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

// ------------------------------------------------------------------------------------ depthwise

// dx of a depthwise convolution, an input line at a time: the pairs (row, tap) that read each pixel of the
// line are listed, then summed, so that every pixel is written once and none is zeroed first.
class DepthwiseInputGrad {
 public:
  DepthwiseInputGrad(const Geometry& g, const GradRows& grad, int64_t rows, const int32_t* index,
                     const int32_t* inverse, const float* weight, const int32_t* weight_of, Dtype dtype,
                     int64_t channels, char* dx)
      : g_(g),
        grad_(grad),
        rows_(rows),
        index_(index),
        inverse_(inverse),
        weight_(weight),
        weight_of_(weight_of),
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
      const int32_t first = (weight_of_ ? weight_of_[index_[row]] : 0) * int32_t(taps);
      for (int32_t s = 0; s < g_.kernel_w; ++s) {
        const int32_t x = input_coordinate(out_x, s, int32_t(g_.in_w), int32_t(g_.stride_w),
                                           int32_t(g_.pad_w), int32_t(g_.dil_w), g_.transposed);
        if (x < 0) continue;
        const size_t slot = size_t(x * taps + line.pairs[size_t(x)]++);
        line.in[slot] = from;
        line.tap[slot] = first + r * int32_t(g_.kernel_w) + s;
      }
    }
  }

  const Geometry& g_;
  const GradRows& grad_;
  int64_t rows_;
  const int32_t *index_, *inverse_;
  const float* weight_;
  const int32_t* weight_of_;  // [output pixels]: which weight, or null
  Dtype dtype_;
  int64_t channels_;
  char* dx_;
  std::vector<int64_t> line_start_;  // the first row of each output line
};

// ------------------------------------------------------------------------------------------- op

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
    return DepthwiseInputGrad(g, from, rows, at, inverse, data_of<const float>(weight), nullptr, dtype,
                              in_channels, data_of<char>(dx))
        .run();
  }
  InputGrad(g, from, rows, at, inverse, data_of<const char>(weight), dtype, in_channels, out_channels,
            data_of<float>(dx))
      .run();
}

}  // namespace

void add_input_grad(const GradJob& job, const char* weight, int32_t begin, int32_t end, float* dx) {
  const InputGrad grad(job.g, job.grad, job.rows, job.index, nullptr, weight, job.dtype, job.in_channels,
                       job.out_channels, dx);
  grad.run_part(begin, end, 0, grad.panels());
}

void depthwise_input_grad(const GradJob& job, const float* weight, const int32_t* weight_of, char* dx) {
  DepthwiseInputGrad(job.g, job.grad, job.rows, job.index, nullptr, weight, weight_of, job.dtype,
                     job.in_channels, dx)
      .run();
}

}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) {
  m.def(
      "cpu_conv_input_grad(Tensor grad, Tensor weight, Tensor index, Tensor? count, Tensor? source, "
      "int[] geometry, Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) {
  m.impl("cpu_conv_input_grad", TORCH_BOX(&dynops::cpu::conv_input_grad));
}
