// Pixel-sparse convolution on the CPU: the gradient of the input.
#include "../engine/forward.h"
#include "../engine/grad_rows.h"
#include "../engine/pack.h"

namespace dynops::cpu {
namespace {

// The input pixels that a block of rows reads, tap by tap.
class Reach {
 public:
  Reach(const Geometry& g, const int32_t* at, int64_t rows) : g_(g), rows_(rows) {
    for (std::vector<int32_t>* v : {&y_, &x_, &first_, &q_}) v->resize(rows);
    if (g.transposed) pixel_.resize(rows);
    for (int64_t i = 0; i < rows; ++i) {
      const Pixel p = g.out_pixel(at[i]);
      if (g.transposed) pixel_[i] = p;
      y_[i] = int32_t(p.y * g.stride_h - g.pad_h);
      x_[i] = int32_t(p.x * g.stride_w - g.pad_w);
      first_[i] = int32_t((p.n * g.in_h + y_[i]) * g.in_w + x_[i]);
    }
  }

  // The pixel that each row reads at this tap, or -1; valid until the next call.
  const int32_t* at_tap(int32_t tap) {
    const int32_t r = tap / int32_t(g_.kernel_w), s = tap % int32_t(g_.kernel_w);
    if (g_.transposed) {
      for (int64_t i = 0; i < rows_; ++i) q_[i] = g_.in_pixel(pixel_[i], r, s);
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

// dx[q] += W[t]^T dy[p] for every pair (p, t) that reads q. For one tap no two rows read the same q. Each
// thread owns a range of q or of channels, so no two threads write the same.
class InputGrad {
 public:
  InputGrad(const ConvGrad& c, const int32_t* inverse, const char* weight, float* dx)
      : c_(c),
        g_(c.g),
        inverse_(inverse),
        weight_(weight),
        dx_(dx),
        dot_(multiplies_pairs(c.dtype)),
        layout_(panel_layout(c.group_in(), c.g.taps(), c.group_out(), dot_)),
        none_(c.group_in()) {}

  int64_t panels() const { return layout_.panels; }

  void run() const {
    const double macs = double(c_.rows) * double(g_.taps() * c_.group_in() * c_.out_channels);
    const int64_t threads = threads_for(macs, kMacsPerThread);
    // Channels are shared where there are many, so that each thread reads its share of the weight only.
    const bool by_panel = layout_.panels >= 4 * threads;
    parallel(threads, [&](int64_t t) {
      const Span all{0, layout_.panels}, pixels{0, g_.in_pixels()};
      run_share(by_panel ? pixels : share_of(pixels.end, t, threads),
                by_panel ? share_of(all.end, t, threads) : all);
    });
  }

  // The gradient of some input pixels and of the channels of some panels, on this thread.
  void run_share(Span pixels, Span panels) const {
    Pairs pairs;
    if (pixels.begin >= pixels.end) return;
    const Span readers = readers_of(pixels);
    for (int64_t first = readers.begin; first < readers.end; first += kBlockRows) {
      const int64_t height = std::min(kBlockRows, readers.end - first);
      Reach reach(g_, c_.index + first, height);
      for (int32_t tap = 0; tap < g_.taps(); ++tap) {
        collect(reach.at_tap(tap), first, height, pixels, pairs);
        if (pairs.size) multiply(pairs, tap, panels);
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

  // Rows of the index that may read one of the input pixels: their lines y * stride - pad + [0, reach] meet
  // the lines of the pixels.
  Span readers_of(Span pixels) const {
    if (g_.transposed || pixels.size() == g_.in_pixels()) return {0, c_.rows};
    const int64_t reach = (g_.kernel_h - 1) * g_.dil_h, image = g_.in_h * g_.in_w, last = pixels.end - 1;
    const int64_t top = std::max<int64_t>(pixels.begin % image / g_.in_w + g_.pad_h - reach, 0);
    const int64_t bottom = last % image / g_.in_w + g_.pad_h;
    const int64_t from = std::min(ceil_div(top, g_.stride_h), g_.out_h);
    const int64_t to = std::min(bottom / g_.stride_h + 1, g_.out_h);
    const auto row_at = [&](int64_t n, int64_t y) {
      return std::lower_bound(c_.index, c_.index + c_.rows, (n * g_.out_h + y) * g_.out_w) - c_.index;
    };
    return {row_at(pixels.begin / image, from), row_at(last / image, to)};
  }

  // The pairs of one tap with one of the input pixels: where they are read and written.
  void collect(const int32_t* at, int64_t first, int64_t height, Span pixels, Pairs& pairs) const {
    pairs.size = 0;
    for (int64_t i = 0; i < height; ++i) {
      int64_t q = at[i];
      if (!pixels.holds(q)) continue;
      if (inverse_ && (q = inverse_[q]) < 0) continue;
      pairs.from[pairs.size] = c_.grad[first + i];
      pairs.to[pairs.size++] = bytes_of(dx_ + q * c_.in_channels);
    }
  }

  void multiply(Pairs& pairs, int32_t tap, Span panels) const {
    const int64_t start = tap * (layout_.depth / g_.taps());
    const bool converts = c_.dtype != Dtype::kFloat32 && !dot_;
    for (int64_t group = 0; group < g_.groups; ++group) {
      const int64_t in_offset = group * c_.group_out() * size_of(c_.dtype);
      if (converts) {
        to_floats(pairs.from, pairs.size, in_offset, c_.dtype, c_.group_out(), pairs.converted,
                  pairs.converted_from);
      }
      const Gemm gemm{.segments = 1,
                      .depth = int32_t(c_.group_out()),
                      .weight_start = &start,
                      .weight = weight_ + group * layout_.group_bytes,
                      .layout = layout_,
                      .in = converts ? Dtype::kFloat32 : c_.dtype,
                      .out = Dtype::kFloat32,
                      .in_offset = converts ? 0 : in_offset,
                      .out_offset = group * c_.group_in() * 4,
                      .scale = none_.scale.data(),
                      .shift = none_.shift.data()};
      // A single tap writes each pixel once, and needs no sum.
      const RowBlock rows{.rows = pairs.size,
                          .in = converts ? pairs.converted_from : pairs.from,
                          .out = pairs.to,
                          .residual = g_.taps() == 1 ? nullptr : pairs.to};
      kernels().gemm(gemm, rows, panels.begin, panels.end);
    }
  }

  const ConvGrad& c_;
  const Geometry& g_;
  const int32_t* inverse_;
  const char* weight_;
  float* dx_;
  bool dot_;
  PanelLayout layout_;
  Affine none_;
};

// ------------------------------------------------------------------------------------ depthwise

// dx of a depthwise convolution, an input line at a time. The pairs (row, tap) that read each pixel of the
// line are listed, then summed. So every pixel is written once, and none is zeroed first.
class DepthwiseInputGrad {
 public:
  DepthwiseInputGrad(const ConvGrad& c, const int32_t* inverse, const float* weight, const int32_t* weight_of,
                     char* dx)
      : c_(c),
        g_(c.g),
        inverse_(inverse),
        weight_(weight),
        weight_of_(weight_of),
        dx_(dx),
        line_start_(g_.batch * g_.out_h + 1) {
    int64_t row = 0;
    for (int64_t line = 0; line < g_.batch * g_.out_h; ++line) {
      while (row < c.rows && c.index[row] < line * g_.out_w) ++row;
      line_start_[line] = row;
    }
    line_start_.back() = c.rows;
  }

  void run() const {
    const int64_t lines = g_.batch * g_.in_h;
    const double work = double(c_.rows * g_.taps() + g_.in_pixels()) * double(c_.in_channels);
    const int64_t threads = threads_for(work, kMacsPerThread / 8);
    parallel(threads, [&](int64_t t) {
      Line line(g_.in_w, g_.taps());
      for (const int64_t l : each(share_of(lines, t, threads))) run_line(l, line);
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
      const int32_t out_y = g_.out_line(y, r);
      if (out_y >= 0) collect(n * g_.out_h + out_y, r, line);
    }
    const int64_t bytes = c_.in_channels * size_of(c_.dtype);
    for (int64_t x = 0; x < g_.in_w; ++x) {
      const int64_t q = l * g_.in_w + x, row = inverse_ ? inverse_[q] : q;
      line.out[x] = row < 0 ? nullptr : dx_ + row * bytes;
    }
    kernels().depthwise_pairs({.rows = int32_t(g_.in_w),
                               .taps = int32_t(g_.taps()),
                               .pairs = line.pairs.data(),
                               .in = line.in.data(),
                               .tap = line.tap.data(),
                               .out = line.out.data(),
                               .channels = c_.in_channels,
                               .weight = weight_,
                               .dtype = c_.dtype});
  }

  // The pairs of one output line at kernel row r.
  void collect(int64_t out_line, int32_t r, Line& line) const {
    const int64_t taps = g_.taps();
    for (int64_t row = line_start_[out_line]; row < line_start_[out_line + 1]; ++row) {
      const int32_t out_x = int32_t(c_.index[row] - out_line * g_.out_w);
      const char* from = c_.grad[row];
      const int32_t first = (weight_of_ ? weight_of_[c_.index[row]] : 0) * int32_t(taps);
      for (int32_t s = 0; s < g_.kernel_w; ++s) {
        const int32_t x = g_.in_column(out_x, s);
        if (x < 0) continue;
        const int64_t slot = x * taps + line.pairs[x]++;
        line.in[slot] = from;
        line.tap[slot] = first + r * int32_t(g_.kernel_w) + s;
      }
    }
  }

  const ConvGrad& c_;
  const Geometry& g_;
  const int32_t* inverse_;
  const float* weight_;
  const int32_t* weight_of_;  // [output pixels]: which weight, or null
  char* dx_;
  std::vector<int64_t> line_start_;  // the first row of each output line
};

// ------------------------------------------------------------------------------------------- op

// grad: [rows, O] or channels_last [N, O, H, W]. dx: float32 zeros, [R, C] or channels_last; depthwise: of
// the gradient's dtype, and every element is written.
void conv_input_grad(const Tensor& grad, const Tensor& weight, const Tensor& index,
                     const OptionalTensor& count, const OptionalTensor& source,
                     IntHeaderOnlyArrayRef geometry, Tensor dx) {
  const ConvGrad c = conv_grad_of(grad, index, count, geometry, dx.size(1));
  const int32_t* inverse = data_of<const int32_t>(source);
  if (c.depthwise()) {
    return DepthwiseInputGrad(c, inverse, data_of<const float>(weight), nullptr, data_of<char>(dx)).run();
  }
  InputGrad(c, inverse, data_of<const char>(weight), data_of<float>(dx)).run();
}

}  // namespace

void add_input_grad(const ConvGrad& c, const char* weight, Span pixels, float* dx) {
  const InputGrad grad(c, nullptr, weight, dx);
  grad.run_share(pixels, {0, grad.panels()});
}

void depthwise_input_grad(const ConvGrad& c, const float* weight, const int32_t* weight_of, char* dx) {
  DepthwiseInputGrad(c, nullptr, weight, weight_of, dx).run();
}

DYNOPS_CPU_OP(conv_input_grad)

}  // namespace dynops::cpu
