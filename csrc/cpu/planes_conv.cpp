// Convolution of a map that lies channel by channel, where few channels meet in an output or few outputs in a
// channel: depthwise, a colour image, a single score. Vectors hold pixels of a line, so nothing is turned
// into rows. A vector without an active pixel is filled and not computed.
#include <cstring>
#include <memory>
#include <vector>

#include "forward.h"

namespace dynops::cpu {
namespace {

constexpr int64_t kStripBytes = 192 << 10;  // input lines that a strip of output lines keeps, in the L2 cache
constexpr int64_t kSegment = 1024;          // pixels of a whole plane that count as a line
constexpr int64_t kVector = 16;             // the most lanes that a vector has

struct PlanesJob {
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
  // Rows of the index whose pixels lie in [begin, end).
  std::pair<int64_t, int64_t> rows_in(int64_t begin, int64_t end) const {
    const int32_t* first = std::lower_bound(index, index + rows, begin);
    return {first - index, std::lower_bound(first, index + rows, end) - index};
  }
};

// What one thread works with: a strip of output lines of one group of one image.
class Strip {
 public:
  explicit Strip(const PlanesJob& job, int64_t lines) : job_(job), lines_(lines) {
    const Geometry& g = job.g;
    const int64_t reach = (g.kernel_w - 1) * g.dil_w;
    phases_ = g.stride_w;
    phase_width_ = g.out_w + reach / g.stride_w + 1 + kVector;
    in_lines_ = (lines - 1) * g.stride_h + (g.kernel_h - 1) * g.dil_h + 1;
    line_floats_ = phases_ * phase_width_;
    buffer_.reset(new float[size_t(job.inputs() * in_lines_ * line_floats_)]);
    line_.resize(size_t(g.in_w));
    wanted_.resize(size_t(in_lines_));
    keep_.resize(size_t(g.out_w + kVector));
    taps_.resize(size_t(job.inputs() * g.taps()));
  }

  void run(int64_t n, int64_t group, int64_t top) {
    const Geometry& g = job_.g;
    const int64_t bottom = std::min(g.out_h, top + lines_);
    const int64_t image = n * job_.out_plane();
    const auto [first, last] = job_.rows_in(image + top * g.out_w, image + bottom * g.out_w);
    if (first < last) bring(n, group, top, first, last);
    for (int64_t y = top, row = first; y < bottom; ++y) {
      const int64_t line = image + y * g.out_w, begin = row;
      while (row < last && job_.index[row] < line + g.out_w) ++row;
      const int64_t channel = n * job_.out_channels + group * job_.outputs();
      const int64_t place = (channel * job_.out_plane() + y * g.out_w) * size_of(job_.dtype);
      begin == row ? fill(place) : compute(group, y - top, line, begin, row, place);
    }
  }

 private:
  // The input lines that the strip's active output lines read, as float32 between zeros, each as `stride`
  // lines of every stride-th pixel, so that what a tap reads for adjacent outputs is adjacent.
  void bring(int64_t n, int64_t group, int64_t top, int64_t first, int64_t last) {
    const Geometry& g = job_.g;
    std::fill(wanted_.begin(), wanted_.end(), char(0));
    for (int64_t row = first, done = -1; row < last; ++row) {
      const int64_t y = job_.index[row] / g.out_w % g.out_h - top;
      if (y == done) continue;
      done = y;
      for (int64_t r = 0; r < g.kernel_h; ++r) wanted_[size_t(y * g.stride_h + r * g.dil_h)] = 1;
    }
    for (int64_t i = 0; i < job_.inputs(); ++i) {
      const char* plane = job_.x + n * job_.n_bytes + (group * job_.inputs() + i) * job_.c_bytes;
      for (int64_t l = 0; l < in_lines_; ++l) {
        if (!wanted_[size_t(l)]) continue;
        const int64_t y = top * g.stride_h - g.pad_h + l;
        bring_line(y >= 0 && y < g.in_h ? plane + y * job_.y_bytes : nullptr, line_of(i, l));
      }
    }
  }

  float* line_of(int64_t channel, int64_t line) const {
    return buffer_.get() + (channel * in_lines_ + line) * line_floats_;
  }

  void bring_line(const char* from, float* to) {
    const Geometry& g = job_.g;
    if (!from) return std::fill_n(to, line_floats_, 0.f), void();
    const int64_t size = size_of(job_.dtype), room = phase_width_ * phases_;
    const int64_t left = std::min(g.pad_w, room), width = std::min(g.in_w, room - left);
    const float* pixels = line_.data();
    if (job_.x_bytes == size && job_.dtype == Dtype::kFloat32) {
      pixels = reinterpret_cast<const float*>(from);
    } else if (job_.x_bytes == size) {
      kernels().to_float(from, job_.dtype, width, line_.data());
    } else {
      for (int64_t x = 0; x < width; ++x)
        kernels().to_float(from + x * job_.x_bytes, job_.dtype, 1, &line_[size_t(x)]);
    }
    if (phases_ == 1) {
      std::fill_n(to, left, 0.f);
      std::memcpy(to + left, pixels, size_t(width) * 4);
      std::fill_n(to + left + width, room - left - width, 0.f);
      return;
    }
    for (int64_t phase = 0; phase < phases_; ++phase, to += phase_width_) {
      // positions i with i * phases + phase - pad in [0, width)
      const int64_t before =
          std::min(phase_width_, std::max<int64_t>(0, (g.pad_w - phase + phases_ - 1) / phases_));
      const int64_t end = std::clamp((width + g.pad_w - phase + phases_ - 1) / phases_, before, phase_width_);
      std::fill_n(to, before, 0.f);
      const float* source = pixels + phase - g.pad_w;
      for (int64_t i = before; i < end; ++i) to[i] = source[i * phases_];
      std::fill_n(to + end, phase_width_ - end, 0.f);
    }
  }

  void compute(int64_t group, int64_t y, int64_t line, int64_t begin, int64_t end, int64_t place) {
    const Geometry& g = job_.g;
    std::fill(keep_.begin(), keep_.end(), 0.f);
    for (int64_t row = begin; row < end; ++row) keep_[size_t(job_.index[row] - line)] = 1.f;
    const float** tap = taps_.data();
    for (int64_t i = 0; i < job_.inputs(); ++i) {
      for (int64_t r = 0; r < g.kernel_h; ++r) {
        const float* from = line_of(i, y * g.stride_h + r * g.dil_h);
        for (int64_t s = 0; s < g.kernel_w; ++s) {
          const int64_t x = s * g.dil_w;
          *tap++ = from + x % phases_ * phase_width_ + x / phases_;
        }
      }
    }
    const int64_t outputs = job_.outputs(), taps = int64_t(taps_.size());
    kernels().plane_line({int32_t(outputs), int32_t(taps), g.out_w, taps_.data(),
                          job_.weight + group * outputs * taps, job_.affine.scale.data() + group * outputs,
                          job_.affine.shift.data() + group * outputs, job_.activation, keep_.data(),
                          job_.dtype, job_.base ? job_.base + place : nullptr, job_.out + place,
                          job_.out_plane() * size_of(job_.dtype)});
  }

  void fill(int64_t place) const {
    const int64_t size = size_of(job_.dtype), plane = job_.out_plane() * size;
    for (int64_t o = 0; o < job_.outputs(); ++o, place += plane) {
      kernels().fill(job_.out + place, job_.base ? job_.base + place : nullptr, job_.g.out_w * size, false);
    }
  }

  const PlanesJob& job_;
  int64_t lines_, phases_, phase_width_, in_lines_, line_floats_;
  std::unique_ptr<float[]> buffer_;  // [inputs][in_lines][phases][phase_width]
  std::vector<float> line_, keep_;
  std::vector<char> wanted_;
  std::vector<const float*> taps_;
};

// A 1x1 convolution of float32 planes without gaps reads them where they lie, a plane as one line.
void run_pointwise(const PlanesJob& job, int64_t threads) {
  const int64_t plane = job.out_plane();
  const int64_t segments = std::max<int64_t>((plane + kSegment / 2) / kSegment, 1);
  const int64_t units = job.g.batch * job.g.groups * segments;
  parallel(std::min(threads, units), [&](int64_t t) {
    const int64_t parts = std::min(threads, units), inputs = job.inputs(), outputs = job.outputs();
    std::vector<const float*> taps(static_cast<size_t>(inputs));
    std::vector<float> keep;
    for (int64_t u = part(units, t, parts); u < part(units, t + 1, parts); ++u) {
      const int64_t n = u / segments / job.g.groups, group = u / segments % job.g.groups;
      const int64_t begin = part(plane, u % segments, segments, kVector);
      const int64_t end = part(plane, u % segments + 1, segments, kVector);
      const auto [first, last] = job.rows_in(n * plane + begin, n * plane + end);
      keep.assign(size_t(end - begin + kVector), 0.f);
      for (int64_t row = first; row < last; ++row) keep[size_t(job.index[row] - n * plane - begin)] = 1.f;
      for (int64_t i = 0; i < inputs; ++i) {
        const char* from = job.x + n * job.n_bytes + (group * inputs + i) * job.c_bytes;
        taps[size_t(i)] = reinterpret_cast<const float*>(from) + begin;
      }
      const int64_t place = (n * job.out_channels + group * outputs) * plane + begin;
      kernels().plane_line({int32_t(outputs), int32_t(inputs), end - begin, taps.data(),
                            job.weight + group * outputs * inputs, job.affine.scale.data() + group * outputs,
                            job.affine.shift.data() + group * outputs, job.activation, keep.data(), job.dtype,
                            job.base ? job.base + place * 4 : nullptr, job.out + place * 4, plane * 4});
    }
  });
}

void run_strips(const PlanesJob& job, int64_t threads) {
  const Geometry& g = job.g;
  const int64_t line_bytes = job.inputs() * (g.in_w + 2 * kVector) * 4;
  const int64_t fitting = (kStripBytes / line_bytes - (g.kernel_h - 1) * g.dil_h - 1) / g.stride_h + 1;
  const int64_t heads = g.batch * g.groups;  // strips are short where there would be none for a thread
  const int64_t shared = heads >= 4 * threads ? g.out_h : (g.out_h * heads + 4 * threads - 1) / (4 * threads);
  const int64_t lines = std::clamp<int64_t>(std::min(fitting, shared), 1, g.out_h);
  const int64_t strips = (g.out_h + lines - 1) / lines, units = heads * strips;
  parallel(std::min(threads, units), [&](int64_t t) {
    const int64_t parts = std::min(threads, units);
    Strip strip(job, lines);
    for (int64_t u = part(units, t, parts); u < part(units, t + 1, parts); ++u) {
      strip.run(u / strips / g.groups, u / strips % g.groups, u % strips * lines);
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
  std::vector<float> converted;
  const float* taps = data_of<const float>(weight);
  if (dtype_of(weight) != Dtype::kFloat32) {
    converted.resize(size_t(weights));
    kernels().to_float(data_of<const char>(weight), dtype_of(weight), weights, converted.data());
    taps = converted.data();
  }
  const Affine affine(bias, scale, shift, out_channels);
  const PlanesJob job{g,
                      in_channels,
                      out_channels,
                      rows,
                      dtype,
                      at,
                      data_of<const char>(x),
                      x.stride(0) * size,
                      x.stride(1) * size,
                      x.stride(2) * size,
                      x.stride(3) * size,
                      taps,
                      affine,
                      Activation(activation),
                      data_of<const char>(base),
                      data_of<char>(out)};
  // a few active pixels cost a vector each
  const double computed = std::min(double(rows) * kVector, double(g.out_pixels()));
  const double work = computed * double(weights) + double(out.numel()) + double(x.numel());
  const int64_t threads = threads_for(work, kMacsPerThread);
  const bool whole = (job.x_bytes == size || g.in_w == 1) && (job.y_bytes == g.in_w * size || g.in_h == 1);
  if (g.pointwise() && dtype == Dtype::kFloat32 && whole && job.out_plane() >= kVector) {
    run_pointwise(job, threads);
  } else {
    run_strips(job, threads);
  }
}

}  // namespace
}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) {
  m.def(
      "cpu_planes_conv(Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor? count, int[] geometry, "
      "int activation, Tensor? scale, Tensor? shift, Tensor? base, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) { m.impl("cpu_planes_conv", TORCH_BOX(&dynops::cpu::planes_conv)); }
