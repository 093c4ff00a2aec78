// Convolution of a map that lies channel by channel, where an output reads few channels or a channel few
// outputs: depthwise, a colour image, a single score. Vectors hold pixels of a line, so nothing is turned
// into rows. A vector without an active pixel is filled and not computed.
#include <cstring>
#include <vector>

#include "../engine/forward.h"

namespace dynops::cpu {
namespace {

constexpr int64_t kStripBytes = 192 << 10;  // input lines that a strip of output lines keeps, in the L2 cache
constexpr int64_t kVector = 16;             // the most lanes that a vector has

struct PlanesConv {
  Geometry g;
  int64_t in_channels, out_channels, rows;
  Dtype dtype;
  const int32_t* index;
  const char* x;
  int64_t n_bytes, c_bytes, y_bytes, x_bytes;  // of x
  const float* weight;                         // [O][I][kh][kw]
  const Affine& affine;
  Activation activation;
  const char* base;
  char* out;

  int64_t inputs() const { return in_channels / g.groups; }
  int64_t outputs() const { return out_channels / g.groups; }
  int64_t out_plane() const { return g.out_h * g.out_w; }
};

// The vectors of some output lines of one image that hold an active pixel, and the runs of pixels that none
// of them covers. The same for every channel.
class Vectors {
 public:
  // Lines of `width` pixels in [begin, end), positions in the batch; `in_step`: floats from what one line
  // reads to what the next one does.
  void find(const PlanesConv& c, int64_t begin, int64_t end, int64_t width, int64_t in_step) {
    const int64_t lanes = kernels().lanes, image = begin / c.out_plane() * c.out_plane();
    const int32_t* at = std::lower_bound(c.index, c.index + c.rows, begin);
    const int32_t* last = std::lower_bound(at, c.index + c.rows, end);
    for (std::vector<int64_t>* v : {&in_at, &out_at, &dead}) v->clear();
    keep.clear();
    int64_t filled = begin;  // all before is computed or dead
    for (int64_t line = begin; line < end; line += width) {
      const int64_t stop = std::min(width, end - line);
      for (int64_t x = 0; x < stop && at < last && *at < line + stop;) {
        x = (*at - line) / lanes * lanes;
        // the last vector is moved back on to its line: what two vectors share is the same in both
        if (x + lanes > stop && stop >= lanes) x = stop - lanes;
        const int64_t n = std::min(lanes, stop);
        in_at.push_back((line - begin) / width * in_step + x);
        out_at.push_back(line + x - image);
        keep.resize(keep.size() + lanes, 0.f);
        float* mark = &keep[keep.size() - lanes];
        const int32_t* here = at;
        while (here > c.index && here[-1] >= line + x) --here;  // those that the vector before has as well
        for (; here < last && *here < line + x + n; ++here) mark[*here - line - x] = 1.f;
        at = std::max(at, here);
        if (line + x > filled) dead.insert(dead.end(), {filled - image, line + x - image});
        filled = std::max(filled, line + x + n);
        x += n;
      }
    }
    if (end > filled) dead.insert(dead.end(), {filled - image, end - image});
  }

  std::vector<int64_t> in_at, out_at, dead;  // dead: first pixel and end of each run
  std::vector<float> keep;
};

// Computes the live vectors of one group's outputs and fills the dead runs. Pixel 0 of the image's first
// output of the group lies `place` bytes into the output.
void finish(const PlanesConv& c, const Vectors& v, const float* in, const std::vector<int64_t>& offset,
            int64_t width, int64_t group, int64_t place) {
  const int64_t outputs = c.outputs(), size = size_of(c.dtype), plane = c.out_plane() * size;
  for (int64_t o = 0; o < outputs; ++o) {
    for (size_t i = 0; i < v.dead.size(); i += 2) {
      const int64_t from = place + o * plane + v.dead[i] * size;
      kernels().fill(c.out + from, c.base ? c.base + from : nullptr, (v.dead[i + 1] - v.dead[i]) * size,
                     false);
    }
  }
  const int64_t taps = int64_t(offset.size()), first = group * outputs;
  kernels().plane_strip({.outputs = int32_t(outputs),
                         .taps = int32_t(taps),
                         .live = int32_t(v.in_at.size()),
                         .width = int32_t(std::min<int64_t>(width, kernels().lanes)),
                         .in = in,
                         .offset = offset.data(),
                         .in_at = v.in_at.data(),
                         .out_at = v.out_at.data(),
                         .keep = v.keep.data(),
                         .weight = c.weight + first * taps,
                         .scale = c.affine.scale.data() + first,
                         .shift = c.affine.shift.data() + first,
                         .activation = c.activation,
                         .dtype = c.dtype,
                         .base = c.base ? c.base + place : nullptr,
                         .out = c.out + place,
                         .plane_bytes = plane});
}

// Strips of output lines of one group of one image, with the working memory of one thread.
class Strip {
 public:
  Strip(const PlanesConv& c, int64_t lines) : c_(c), lines_(lines) {
    const Geometry& g = c.g;
    const int64_t reach = (g.kernel_w - 1) * g.dil_w;
    phases_ = g.stride_w;
    phase_width_ = g.out_w + reach / g.stride_w + 1 + kVector;
    in_lines_ = (lines - 1) * g.stride_h + (g.kernel_h - 1) * g.dil_h + 1;
    line_floats_ = phases_ * phase_width_;
    left_ = std::min(g.pad_w, line_floats_);
    width_ = std::min(g.in_w, line_floats_ - left_);
    buffer_.assign(c.inputs() * in_lines_ * line_floats_, 0.f);
    line_.resize(g.in_w);
    for (int64_t i = 0; i < c.inputs(); ++i) {
      for (int64_t r = 0; r < g.kernel_h; ++r) {
        for (int64_t s = 0; s < g.kernel_w; ++s) {
          const int64_t x = s * g.dil_w;
          offset_.push_back(line_of(i, r * g.dil_h) + x % phases_ * phase_width_ + x / phases_);
        }
      }
    }
  }

  void run(int64_t n, int64_t group, int64_t top) {
    const Geometry& g = c_.g;
    if (n != n_ || top != top_) {
      const int64_t image = n * c_.out_plane(), bottom = std::min(g.out_h, top + lines_);
      vectors_.find(c_, image + top * g.out_w, image + bottom * g.out_w, g.out_w, g.stride_h * line_floats_);
      want(top);
      n_ = n;
      top_ = top;
    }
    for (int64_t i = 0; i < c_.inputs(); ++i) {
      const char* plane = c_.x + n * c_.n_bytes + (group * c_.inputs() + i) * c_.c_bytes;
      for (int64_t l : wanted_) {
        const int64_t y = top * g.stride_h - g.pad_h + l;
        bring(y >= 0 && y < g.in_h ? plane + y * c_.y_bytes : nullptr, buffer_.data() + line_of(i, l));
      }
    }
    const int64_t place = (n * c_.out_channels + group * c_.outputs()) * c_.out_plane() * size_of(c_.dtype);
    finish(c_, vectors_, buffer_.data(), offset_, g.out_w, group, place);
  }

 private:
  int64_t line_of(int64_t channel, int64_t line) const { return (channel * in_lines_ + line) * line_floats_; }

  // The input lines that the strip's active output lines read.
  void want(int64_t top) {
    const Geometry& g = c_.g;
    std::vector<char> reads(in_lines_, 0);
    for (int64_t at : vectors_.out_at) {
      const int64_t y = at / g.out_w - top;
      for (int64_t r = 0; r < g.kernel_h; ++r) reads[y * g.stride_h + r * g.dil_h] = 1;
    }
    wanted_.clear();
    for (int64_t l = 0; l < in_lines_; ++l) {
      if (reads[l]) wanted_.push_back(l);
    }
  }

  // An input line as float32, as `stride` lines of every stride-th pixel, so that what a tap reads for
  // adjacent outputs is adjacent. The zeros around it stay from the beginning.
  void bring(const char* from, float* to) {
    if (!from) return std::fill_n(to, line_floats_, 0.f), void();
    const int64_t size = size_of(c_.dtype);
    const float* pixels = line_.data();
    if (c_.x_bytes != size) {
      for (int64_t x = 0; x < width_; ++x) kernels().to_float(from + x * c_.x_bytes, c_.dtype, 1, &line_[x]);
    } else if (c_.dtype == Dtype::kFloat32) {
      pixels = reinterpret_cast<const float*>(from);
    } else if (phases_ == 1) {
      return kernels().to_float(from, c_.dtype, width_, to + left_);
    } else {
      kernels().to_float(from, c_.dtype, width_, line_.data());
    }
    const auto place = [&](int64_t x) {
      return to + (left_ + x) % phases_ * phase_width_ + (left_ + x) / phases_;
    };
    if (phases_ == 1) {
      std::memcpy(to + left_, pixels, width_ * 4);
    } else if (phases_ == 2) {
      kernels().split_pairs(pixels, width_, place(0), place(1));
    } else {
      for (int64_t x = 0; x < width_; ++x) *place(x) = pixels[x];
    }
  }

  const PlanesConv& c_;
  int64_t lines_, phases_, phase_width_, in_lines_, line_floats_, left_, width_, n_ = -1, top_ = -1;
  std::vector<float> buffer_, line_;  // buffer: [inputs][in_lines][phases][phase_width]
  std::vector<int64_t> offset_, wanted_;
  Vectors vectors_;
};

// A 1x1 convolution of float32 planes without gaps reads them where they lie, a plane as one line.
void run_pointwise(const PlanesConv& c, int64_t threads) {
  const int64_t plane = c.out_plane(), inputs = c.inputs(), groups = c.g.groups;
  // shares of a plane, so that there are some for every thread
  const int64_t shares =
      std::clamp<int64_t>(ceil_div(4 * threads, c.g.batch * groups), 1, std::max<int64_t>(plane / 256, 1));
  const int64_t units = c.g.batch * groups * shares, tasks = std::min(threads, units);
  std::vector<int64_t> offset(inputs);
  for (int64_t i = 0; i < inputs; ++i) offset[i] = i * (c.c_bytes / 4);
  parallel(tasks, [&](int64_t t) {
    Vectors vectors;
    int64_t found = -1;
    for (const int64_t u : each(share_of(units, t, tasks))) {
      const int64_t group = u % groups, n = u / groups / shares;
      const Span pixels = share_of(plane, u / groups % shares, shares, kVector);
      if (found != u / groups) {
        vectors.find(c, n * plane + pixels.begin, n * plane + pixels.end, pixels.size(), 0);
        found = u / groups;
      }
      const char* in = c.x + n * c.n_bytes + group * inputs * c.c_bytes + pixels.begin * 4;
      const int64_t place = (n * c.out_channels + group * c.outputs()) * plane * 4;
      finish(c, vectors, reinterpret_cast<const float*>(in), offset, pixels.size(), group, place);
    }
  });
}

void run_strips(const PlanesConv& c, int64_t threads) {
  const Geometry& g = c.g;
  const int64_t line_bytes = c.inputs() * (g.in_w + 2 * kVector) * 4;
  const int64_t fitting = (kStripBytes / line_bytes - (g.kernel_h - 1) * g.dil_h - 1) / g.stride_h + 1;
  const int64_t heads = g.batch * g.groups;  // strips are short where there would be none for a thread
  const int64_t shared = heads >= 4 * threads ? g.out_h : ceil_div(g.out_h * heads, 4 * threads);
  const int64_t lines = std::clamp<int64_t>(std::min(fitting, shared), 1, g.out_h);
  const int64_t strips = ceil_div(g.out_h, lines), units = heads * strips, tasks = std::min(threads, units);
  parallel(tasks, [&](int64_t t) {
    Strip strip(c, lines);
    for (const int64_t u : each(share_of(units, t, tasks))) {
      strip.run(u / g.groups / strips, u % g.groups, u / g.groups % strips * lines);
    }
  });
}

// x [N, C, H, W] of any strides; base and out [N, O, H, W], NCHW without gaps.
void planes_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& index,
                 const OptionalTensor& count, IntHeaderOnlyArrayRef geometry, int64_t activation,
                 const OptionalTensor& scale, const OptionalTensor& shift, const OptionalTensor& base,
                 Tensor out) {
  const Geometry g = geometry_of(geometry);
  const int64_t rows = active_rows(index, count), in_channels = x.size(1), out_channels = out.size(1);
  const Dtype dtype = dtype_of(out);
  const int32_t* at = checked_index(index, rows, g.out_pixels());
  STD_TORCH_CHECK(
      !g.transposed && weight.is_contiguous() && out.is_contiguous() && (!base || base->is_contiguous()) &&
          dtype_of(x) == dtype && weight.numel() == out_channels * (in_channels / g.groups) * g.taps() &&
          out.numel() == g.out_pixels() * out_channels && x.numel() == g.in_pixels() * in_channels,
      "planes_conv: expected a convolution of these sizes, NCHW, got ", x.numel(), ", ", weight.numel(),
      " and ", out.numel(), " elements");
  if (out.numel() == 0) return;
  const int64_t weights = weight.numel(), size = size_of(dtype);
  const bool converts = dtype_of(weight) != Dtype::kFloat32;
  const std::vector<float> converted = converts ? floats_of(weight) : std::vector<float>();
  const Affine affine(bias, scale, shift, out_channels);
  const PlanesConv c{.g = g,
                     .in_channels = in_channels,
                     .out_channels = out_channels,
                     .rows = rows,
                     .dtype = dtype,
                     .index = at,
                     .x = data_of<const char>(x),
                     .n_bytes = x.stride(0) * size,
                     .c_bytes = x.stride(1) * size,
                     .y_bytes = x.stride(2) * size,
                     .x_bytes = x.stride(3) * size,
                     .weight = converts ? converted.data() : data_of<const float>(weight),
                     .affine = affine,
                     .activation = Activation(activation),
                     .base = data_of<const char>(base),
                     .out = data_of<char>(out)};
  // a few active pixels cost a vector each
  const double computed = std::min(double(rows) * kVector, double(g.out_pixels()));
  const double work = computed * double(weights) + double(out.numel()) + double(x.numel());
  const int64_t threads = threads_for(work, kMacsPerThread);
  const bool whole = (c.x_bytes == size || g.in_w == 1) && (c.y_bytes == g.in_w * size || g.in_h == 1);
  if (g.pointwise() && dtype == Dtype::kFloat32 && whole && c.out_plane() >= kVector) {
    run_pointwise(c, threads);
  } else {
    run_strips(c, threads);
  }
}

DYNOPS_CPU_OP(planes_conv)

}  // namespace
}  // namespace dynops::cpu
