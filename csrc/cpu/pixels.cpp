// Pixel-sparse convolution on the CPU: forward, input gradient, weight gradient.
//
// All three walk the output rows of a plan in blocks of a few hundred, so that pointer tables stay in
// the L1 cache and a weight panel is reused from the L2 cache over the whole block.
#include <cstring>
#include <memory>

#include "../common/tensors.h"
#include "engine.h"
#include "pack.h"
#include "parallel.h"
#include "rows.h"
#include "taps.h"

namespace dynops::cpu {
namespace {

constexpr int32_t kMaxBlockRows = 64 * kTileRows;
constexpr int64_t kTableBytes = 48 * 1024;     // pointers of a block
constexpr int64_t kConvertBytes = 256 * 1024;  // float32 copies of half-precision rows of a block
constexpr double kMacsPerThread = 200e3;       // below this a second thread costs more than it brings

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Half, "expected float32, bfloat16 or float16");
      return Dtype::kFloat16;
  }
}

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data_of(const OptionalTensor& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

// A vector of channels as float32, padded so that full vectors may be read past its end.
std::vector<float> channel_vector(const OptionalTensor& t, int64_t channels, float otherwise) {
  std::vector<float> out(size_t(channels) + 64, otherwise);
  if (t) {
    const Tensor whole = torch::stable::contiguous(*t);
    kernels().to_float(data_of<const char>(whole), dtype_of(whole), channels, out.data());
  }
  return out;
}

// scale * (y + bias) + shift as one affine map.
struct Affine {
  std::vector<float> scale, shift;
  Affine(const OptionalTensor& bias, const OptionalTensor& scale_in, const OptionalTensor& shift_in,
         int64_t channels)
      : scale(channel_vector(scale_in, channels, 1.f)), shift(channel_vector(bias, channels, 0.f)) {
    const std::vector<float> add = channel_vector(shift_in, channels, 0.f);
    for (int64_t c = 0; c < channels; ++c)
      shift[size_t(c)] = shift[size_t(c)] * scale[size_t(c)] + add[size_t(c)];
  }
};

// ------------------------------------------------------------------------------------- forward

struct Forward {
  Geometry g;
  int64_t in_channels, out_channels, rows;
  Dtype dtype;
  const int32_t* index;
  Source source;
  Affine affine;
  Activation activation;
  const char* weight;
  const float* gate;     // [rows] or null
  const char* residual;  // [rows, O] or null
  const char* base;      // [N, H, W, O] or null
  char* out;             // [N, H, W, O] or [rows, O]
  bool packed_out;

  bool depthwise() const { return g.groups > 1 && g.groups == in_channels && in_channels == out_channels; }
  bool dot() const { return dtype == Dtype::kBFloat16 && kernels().bf16_dot && !depthwise(); }
  bool converts() const { return dtype != Dtype::kFloat32 && !dot() && !depthwise(); }
  int64_t out_bytes() const { return out_channels * size_of(dtype); }
};

// The working memory of one thread: the tables of one block of rows.
struct Block {
  std::vector<int32_t> at;  // output pixels, where they do not lie side by side in the index
  std::vector<const char*> in, residual;
  std::vector<char*> out;
  std::vector<float> gate, converted;
  std::vector<const char*> converted_in;
  std::unique_ptr<char[]> patches;
};

class ForwardPass {
 public:
  ForwardPass(const Forward& f, const RowClass& rows) : f_(f), class_(rows), table_(f.source, rows) {
    segments_ = f.source.merged ? f.g.kernel_h : int64_t(rows.taps.size());
    const int64_t segment_taps = f.source.merged ? f.g.kernel_w : 1;
    depth_ = segment_taps * f.in_channels / f.g.groups;
    const int64_t all_segments = f.g.taps() / segment_taps;
    layout_ = panel_layout(f.out_channels / f.g.groups, all_segments, depth_, f.dot());
    for (int64_t s = 0; s < segments_; ++s) {
      const int64_t segment = f.source.merged ? s : rows.taps[size_t(s)];
      weight_start_.push_back(segment * (layout_.depth / all_segments));
      taps_.push_back(segment);
    }
    total_ = class_.size(f.rows);
    block_rows_ = std::max<int64_t>(kTileRows, kTableBytes / (8 * std::max<int64_t>(segments_, 1)));
    if (f.converts()) {
      block_rows_ = std::min(block_rows_, kConvertBytes / (4 * std::max<int64_t>(segments_ * depth_, 1)));
    }
    block_rows_ = std::clamp<int64_t>(block_rows_ / kTileRows * kTileRows, kTileRows, kMaxBlockRows);
  }

  int64_t rows() const { return total_; }
  int64_t panels() const { return f_.depthwise() ? 1 : layout_.panels; }
  double macs() const { return double(total_) * double(segments_ * depth_) * double(f_.out_channels); }

  // Computes the rows [begin, end) of the class and the panels [panel_begin, panel_end) of each group.
  void run(int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end) const {
    if (begin >= end) return;
    // Blocks of equal size: a last block of a few rows would read every weight for little work.
    const int64_t blocks = (end - begin + block_rows_ - 1) / block_rows_;
    Block b;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t from = begin + part(end - begin, i, blocks, kTileRows);
      const int64_t to = begin + part(end - begin, i + 1, blocks, kTileRows);
      if (from < to) run_block(b, from, int32_t(to - from), panel_begin, panel_end);
    }
  }

 private:
  // The output pixels of rows [first, first + height).
  const int32_t* pixels_of(Block& b, int64_t first, int32_t height) const {
    if (class_.all) return f_.index + first;
    b.at.resize(size_t(height));
    for (int32_t i = 0; i < height; ++i) b.at[size_t(i)] = f_.index[class_.row(first + i)];
    return b.at.data();
  }

  void prepare(Block& b, int64_t first, int32_t height) const {
    const int32_t* at = pixels_of(b, first, height);
    b.out.resize(size_t(height));
    const int64_t bytes = f_.out_bytes();
    for (int32_t i = 0; i < height; ++i)
      b.out[size_t(i)] = f_.out + (f_.packed_out ? class_.row(first + i) : at[i]) * bytes;
    if (f_.residual) {
      b.residual.resize(size_t(height));
      for (int32_t i = 0; i < height; ++i)
        b.residual[size_t(i)] = f_.residual + class_.row(first + i) * bytes;
    }
    if (f_.gate) {
      b.gate.resize(size_t(height));
      for (int32_t i = 0; i < height; ++i) b.gate[size_t(i)] = f_.gate[class_.row(first + i)];
    }
    if (table_.patch_bytes() && !b.patches)
      b.patches.reset(new char[size_t(block_rows_ * table_.patch_bytes())]);
    b.in.resize(size_t(height * segments_));
    const char** table = b.in.data();
    const TileSplit split(height);
    for (int32_t tile = 0, i = 0; tile < split.tiles; i += split.height(tile), ++tile) {
      table_.fill(at + i, split.height(tile), table, b.patches.get() + i * table_.patch_bytes(),
                  f_.depthwise());
      table += split.height(tile) * segments_;
    }
  }

  // The group's channels of every row as float32, and a table of pointers to them.
  void convert(Block& b, int32_t height, int64_t in_offset) const {
    const int64_t runs = height * segments_;
    b.converted.resize(size_t(runs * depth_));
    b.converted_in.resize(size_t(runs));
    for (int64_t i = 0; i < runs; ++i) {
      float* to = b.converted.data() + i * depth_;
      kernels().to_float(b.in[size_t(i)] + in_offset, f_.dtype, depth_, to);
      b.converted_in[size_t(i)] = reinterpret_cast<const char*>(to);
    }
  }

  void run_block(Block& b, int64_t first, int32_t height, int64_t panel_begin, int64_t panel_end) const {
    prepare(b, first, height);
    RowBlock rows{height, b.in.data(), b.out.data(), f_.residual ? b.residual.data() : nullptr,
                  f_.gate ? b.gate.data() : nullptr};
    if (f_.depthwise()) {
      const Depthwise d{int32_t(segments_),
                        f_.out_channels,
                        taps_.data(),
                        reinterpret_cast<const float*>(f_.weight),
                        f_.dtype,
                        f_.dtype,
                        f_.affine.scale.data(),
                        f_.affine.shift.data(),
                        f_.activation};
      return kernels().depthwise(d, rows);
    }
    const int64_t element = size_of(f_.dtype);
    const int64_t group_in = f_.in_channels / f_.g.groups, group_out = f_.out_channels / f_.g.groups;
    for (int64_t group = 0; group < f_.g.groups; ++group) {
      Gemm gemm{int32_t(segments_),
                int32_t(depth_),
                weight_start_.data(),
                f_.weight + group * layout_.group_bytes,
                layout_,
                f_.dtype,
                f_.dtype,
                group * group_in * element,
                group * group_out * element,
                f_.affine.scale.data() + group * group_out,
                f_.affine.shift.data() + group * group_out,
                f_.activation};
      if (f_.converts()) {
        convert(b, height, gemm.in_offset);
        rows.in = b.converted_in.data();
        gemm.in = Dtype::kFloat32;
        gemm.in_offset = 0;
      }
      kernels().gemm(gemm, rows, panel_begin, panel_end);
    }
  }

  const Forward& f_;
  const RowClass& class_;
  TapTable table_;
  int64_t segments_, depth_, total_, block_rows_;
  PanelLayout layout_;
  std::vector<int64_t> weight_start_, taps_;
};

// How threads share rows x panels. Rows are cut where every thread gets whole tiles; output channels
// where rows are few, so that every thread still works, or where half of the weight fits a core's L2
// cache and the whole does not.
struct Partition {
  int64_t row_parts, panel_parts;
  Partition(int64_t threads, int64_t rows, int64_t panels, int64_t weight_bytes)
      : row_parts(threads), panel_parts(1) {
    const bool few_rows = rows < threads * 4 * kTileRows;
    const bool large_weight = weight_bytes > (1 << 20) && rows < threads * kMaxBlockRows;
    if ((few_rows || large_weight) && panels >= threads) {
      panel_parts = threads;
      row_parts = 1;
    }
  }
};

// The part of the output that no row writes: once, in the same parallel region as the first class, so
// that one core's stores overlap another's arithmetic.
void fill_part(const Forward& f, int64_t t, int64_t threads) {
  const int64_t pixels = f.g.out_pixels();
  fill_inactive(f.out, f.base, f.out_bytes(), f.index, f.rows, part(pixels, t, threads),
                part(pixels, t + 1, threads));
}

void run_forward(const Forward& f) {
  bool fills = !f.packed_out;
  const double fill_macs = fills ? double(f.g.out_pixels() - f.rows) * f.out_channels : 0;
  for (const RowClass& rows : row_classes(f.g, f.index, f.rows)) {
    const ForwardPass pass(f, rows);
    const int64_t threads = threads_for(pass.macs() + fill_macs, kMacsPerThread);
    const int64_t weight_bytes = f.in_channels / f.g.groups * f.out_channels * f.g.taps() * (f.dot() ? 2 : 4);
    const Partition split(threads, pass.rows(), pass.panels(), weight_bytes);
    parallel(threads, [&](int64_t t) {
      if (fills) fill_part(f, t, threads);
      const int64_t r = t % split.row_parts, p = t / split.row_parts;
      pass.run(part(pass.rows(), r, split.row_parts, kTileRows),
               part(pass.rows(), r + 1, split.row_parts, kTileRows),
               part(pass.panels(), p, split.panel_parts), part(pass.panels(), p + 1, split.panel_parts));
    });
    fills = false;
  }
}

void conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& index,
          const OptionalTensor& count, const OptionalTensor& source, IntHeaderOnlyArrayRef geometry,
          int64_t activation, const OptionalTensor& scale, const OptionalTensor& shift,
          const OptionalTensor& gate, const OptionalTensor& residual, const OptionalTensor& base, bool merged,
          Tensor out) {
  const Geometry g = geometry_of(geometry);
  const int64_t rows = active_rows(index, count), in_channels = x.size(1), out_channels = out.size(1);
  const Dtype dtype = dtype_of(x);
  const int64_t row_bytes = in_channels * size_of(dtype);
  const ZeroRow zero(row_bytes);
  const int32_t* at = checked_index(index, rows, g.out_pixels());
  const bool packed_out = out.dim() == 2;
  const Forward f{g,
                  in_channels,
                  out_channels,
                  rows,
                  dtype,
                  at,
                  {g, data_of<const char>(x), row_bytes, data_of<const int32_t>(source), zero.data(), merged},
                  Affine(bias, scale, shift, out_channels),
                  Activation(activation),
                  data_of<const char>(weight),
                  data_of<const float>(gate),
                  data_of<const char>(residual),
                  data_of<const char>(base),
                  data_of<char>(out),
                  packed_out};
  run_forward(f);
  const int64_t unused = packed_out ? out.size(0) - rows : 0;  // rows past a capacity plan's count
  if (unused) std::memset(f.out + rows * f.out_bytes(), 0, size_t(unused * f.out_bytes()));
}

// ------------------------------------------------------------------------------------ gradients

// The gradient rows of a plan: [rows, O] packed, or read from a channels_last map.
struct GradRows {
  const char* data;
  int64_t bytes;
  const int32_t* index;  // null where packed
  const char* operator[](int64_t row) const { return data + (index ? index[row] : row) * bytes; }
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
    const double macs = double(rows_) * g_.taps() * double(in_channels_ / g_.groups) * double(out_channels_);
    const int64_t threads = threads_for(macs, kMacsPerThread);
    const int64_t panel_parts = layout_.panels % threads == 0 || layout_.panels >= 4 * threads ? threads : 1;
    const int64_t range_parts = threads / panel_parts;
    parallel(threads, [&](int64_t t) {
      const int64_t r = t % range_parts, p = t / range_parts;
      run_part(int32_t(part(g_.in_pixels(), r, range_parts)),
               int32_t(part(g_.in_pixels(), r + 1, range_parts)), part(layout_.panels, p, panel_parts),
               part(layout_.panels, p + 1, panel_parts));
    });
  }

 private:
  static constexpr int32_t kBlockRows = 16 * kTileRows;

  void run_part(int32_t begin, int32_t end, int64_t panel_begin, int64_t panel_end) const {
    Block b;
    b.in.resize(kBlockRows);
    b.out.resize(kBlockRows);
    for (int64_t first = 0; first < rows_; first += kBlockRows) {
      const int64_t last = std::min(rows_, first + kBlockRows);
      for (int32_t tap = 0; tap < g_.taps(); ++tap) {
        const int32_t pairs = collect(first, last, tap, begin, end, b);
        if (pairs) multiply(b, pairs, tap, panel_begin, panel_end);
      }
    }
  }

  // The pairs of this tap with an input pixel in [begin, end): where they are read and written.
  int32_t collect(int64_t first, int64_t last, int32_t tap, int32_t begin, int32_t end, Block& b) const {
    int32_t pairs = 0;
    for (int64_t row = first; row < last; ++row) {
      const Pixel p = pixel_at(index_[row], int32_t(g_.out_h), int32_t(g_.out_w));
      const int32_t q = input_pixel(g_, p, tap / int32_t(g_.kernel_w), tap % int32_t(g_.kernel_w));
      if (q < begin || q >= end) continue;
      const int64_t to = inverse_ ? inverse_[q] : q;
      if (to < 0) continue;
      b.in[size_t(pairs)] = grad_[row];
      b.out[size_t(pairs)] = reinterpret_cast<char*>(dx_ + to * in_channels_);
      ++pairs;
    }
    return pairs;
  }

  void multiply(Block& b, int32_t pairs, int32_t tap, int64_t panel_begin, int64_t panel_end) const {
    const int64_t group_in = in_channels_ / g_.groups, group_out = out_channels_ / g_.groups;
    const int64_t start = tap * (layout_.depth / g_.taps());
    const bool converts = dtype_ != Dtype::kFloat32 && !dot_;
    for (int64_t group = 0; group < g_.groups; ++group) {
      const char* const* in = b.in.data();
      int64_t in_offset = group * group_out * size_of(dtype_);
      if (converts) {
        in = convert(b, pairs, in_offset);
        in_offset = 0;
      }
      const Gemm gemm{1,
                      int32_t(group_out),
                      &start,
                      weight_ + group * layout_.group_bytes,
                      layout_,
                      converts ? Dtype::kFloat32 : dtype_,
                      Dtype::kFloat32,
                      in_offset,
                      group * group_in * 4,
                      ones_.data(),
                      zeros_.data(),
                      Activation::kNone};
      const RowBlock rows{pairs, in, b.out.data(), b.out.data(), nullptr};
      kernels().gemm(gemm, rows, panel_begin, panel_end);
    }
  }

  const char* const* convert(Block& b, int32_t pairs, int64_t in_offset) const {
    const int64_t depth = out_channels_ / g_.groups;
    b.converted.resize(size_t(pairs * depth));
    b.converted_in.resize(size_t(pairs));
    for (int32_t i = 0; i < pairs; ++i) {
      float* to = b.converted.data() + i * depth;
      kernels().to_float(b.in[size_t(i)] + in_offset, dtype_, depth, to);
      b.converted_in[size_t(i)] = reinterpret_cast<const char*>(to);
    }
    return b.converted_in.data();
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

bool is_depthwise(const Geometry& g, int64_t in_channels, int64_t out_channels) {
  return g.groups > 1 && g.groups == in_channels && in_channels == out_channels;
}

constexpr int64_t kDepthwiseBlock = 64;  // rows: their taps and gradients stay in the L2 cache

// Calls f(first, height, channel_begin, channel_end) for blocks of rows, each thread on its own channels.
template <class F>
void depthwise_blocks(int64_t rows, int64_t channels, double macs, const F& f) {
  const int64_t vectors = (channels + kernels().lanes - 1) / kernels().lanes;
  const int64_t threads = std::min(threads_for(macs, kMacsPerThread / 8), std::max<int64_t>(vectors, 1));
  parallel(threads, [&](int64_t t) {
    const int64_t begin = part(channels, t, threads, kernels().lanes),
                  end = part(channels, t + 1, threads, kernels().lanes);
    for (int64_t first = 0; first < rows && begin < end; first += kDepthwiseBlock) {
      f(first, std::min(kDepthwiseBlock, rows - first), begin, end);
    }
  });
}

void depthwise_input_grad(const Geometry& g, const GradRows& grad, int64_t rows, const int32_t* index,
                          const int32_t* inverse, const float* weight, Dtype dtype, int64_t channels,
                          float* dx) {
  const int64_t taps = g.taps();
  depthwise_blocks(rows, channels, double(rows) * taps * channels,
                   [&](int64_t first, int64_t height, int64_t begin, int64_t end) {
                     std::vector<const char*> from(static_cast<size_t>(height));
                     std::vector<float*> to(static_cast<size_t>(height * taps));
                     for (int64_t i = 0; i < height; ++i) {
                       from[size_t(i)] = grad[first + i];
                       const Pixel p = pixel_at(index[first + i], int32_t(g.out_h), int32_t(g.out_w));
                       for (int64_t t = 0; t < taps; ++t) {
                         int64_t q = input_pixel(g, p, int32_t(t / g.kernel_w), int32_t(t % g.kernel_w));
                         if (q >= 0 && inverse) q = inverse[q];
                         to[size_t(i * taps + t)] = q < 0 ? nullptr : dx + q * channels;
                       }
                     }
                     kernels().depthwise_input_grad(int32_t(height), int32_t(taps), from.data(), dtype,
                                                    weight, channels, to.data(), begin, end);
                   });
}

// grad: [rows, O] or channels_last [N, O, H, W]. dx: float32 zeros, [R, C] or channels_last.
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
    return depthwise_input_grad(g, from, rows, at, inverse, data_of<const float>(weight), dtype, in_channels,
                                data_of<float>(dx));
  }
  InputGrad(g, from, rows, at, inverse, data_of<const char>(weight), dtype, in_channels, out_channels,
            data_of<float>(dx))
      .run();
}

// dW[t] = sum_p dy[p] x[q(p, t)]^T. The gradient rows are packed once, [block][o tile][row][kTileRows];
// then each (tap, group, panel of input channels) is a task: it gathers its input columns and adds the
// outer products.
class WeightGrad {
 public:
  WeightGrad(const Geometry& g, const GradRows& grad, int64_t rows, const int32_t* index,
             const Source& source, Dtype dtype, int64_t in_channels, int64_t out_channels, float* dw)
      : g_(g),
        grad_(grad),
        rows_(rows),
        index_(index),
        source_(source),
        dtype_(dtype),
        group_in_(in_channels / g.groups),
        group_out_(out_channels / g.groups),
        dw_(dw) {
    tiles_ = (group_out_ + kTileRows - 1) / kTileRows;
    panels_ = (group_in_ + kernels().panel_width - 1) / kernels().panel_width;
  }

  void run() {
    const double macs = double(rows_) * g_.taps() * double(group_in_ * group_out_ * g_.groups);
    for (const RowClass& rows : row_classes(g_, index_, rows_)) {
      const int64_t total = rows.size(rows_);
      const int64_t taps = int64_t(rows.taps.size());
      if (total == 0 || taps == 0) continue;
      const int64_t threads = threads_for(macs, kMacsPerThread);
      pack(rows, total, threads);
      const int64_t tasks = taps * g_.groups * panels_;
      parallel(std::min(threads, tasks), [&](int64_t t) {
        const int64_t parts = std::min(threads, tasks);
        std::vector<float> x(size_t(kBlock * kernels().panel_width));
        for (int64_t i = part(tasks, t, parts); i < part(tasks, t + 1, parts); ++i) {
          run_task(rows, total, rows.taps[size_t(i / (g_.groups * panels_))], i / panels_ % g_.groups,
                   i % panels_, x.data());
        }
      });
    }
  }

 private:
  static constexpr int64_t kBlock = 256;  // rows: a panel of x is 32 KB, a tile of gradients 12 KB

  float* packed(int64_t first, int64_t group) {
    return packed_.data() +
           (first * g_.groups + group * std::min(kBlock, total_ - first)) * tiles_ * kTileRows;
  }

  void pack(const RowClass& rows, int64_t total, int64_t threads) {
    total_ = total;
    packed_.assign(size_t(total * g_.groups * tiles_ * kTileRows), 0.f);
    const int64_t blocks = (total + kBlock - 1) / kBlock;
    parallel(std::min(threads, blocks), [&](int64_t t) {
      const int64_t parts = std::min(threads, blocks);
      std::vector<float> line(static_cast<size_t>(group_out_ + 64));
      for (int64_t block = part(blocks, t, parts); block < part(blocks, t + 1, parts); ++block) {
        for (int64_t group = 0; group < g_.groups; ++group)
          pack_block(rows, block * kBlock, group, line.data());
      }
    });
  }

  void pack_block(const RowClass& rows, int64_t first, int64_t group, float* line) {
    const int64_t height = std::min(kBlock, total_ - first);
    float* out = packed(first, group);
    for (int64_t i = 0; i < height; ++i) {
      kernels().to_float(grad_[rows.row(first + i)] + group * group_out_ * size_of(dtype_), dtype_,
                         group_out_, line);
      for (int64_t tile = 0; tile < tiles_; ++tile) {
        const int64_t live = std::min<int64_t>(kTileRows, group_out_ - tile * kTileRows);
        std::memcpy(out + (tile * height + i) * kTileRows, line + tile * kTileRows, size_t(live) * 4);
      }
    }
  }

  void run_task(const RowClass& rows, int64_t total, int32_t tap, int64_t group, int64_t panel, float* x) {
    const int64_t width = kernels().panel_width, column = panel * width;
    const int64_t columns = std::min(width, group_in_ - column);
    const int64_t offset = (group * group_in_ + column) * size_of(dtype_);
    for (int64_t first = 0; first < total; first += kBlock) {
      const int64_t height = std::min(kBlock, total - first);
      for (int64_t i = 0; i < height; ++i) {
        const Pixel p = pixel_at(index_[rows.row(first + i)], int32_t(g_.out_h), int32_t(g_.out_w));
        const int32_t q = input_pixel(g_, p, tap / int32_t(g_.kernel_w), tap % int32_t(g_.kernel_w));
        kernels().to_float(source_.row(q) + offset, dtype_, columns, x + i * width);
      }
      float* dw = dw_ + ((tap * g_.groups + group) * group_out_) * group_in_ + column;
      kernels().outer_product(
          {int32_t(height), packed(first, group), x, dw, group_in_, group_out_, int32_t(columns)});
    }
  }

  const Geometry& g_;
  const GradRows& grad_;
  int64_t rows_;
  const int32_t* index_;
  const Source& source_;
  Dtype dtype_;
  int64_t group_in_, group_out_, tiles_, panels_, total_ = 0;
  float* dw_;  // [taps][O][C / groups]
  std::vector<float> packed_;
};

void depthwise_weight_grad(const Geometry& g, const GradRows& grad, int64_t rows, const int32_t* index,
                           const Source& source, Dtype dtype, int64_t channels, float* dw) {
  const int64_t taps = g.taps();
  depthwise_blocks(rows, channels, double(rows) * taps * channels,
                   [&](int64_t first, int64_t height, int64_t begin, int64_t end) {
                     std::vector<const char*> from(static_cast<size_t>(height)),
                         x(static_cast<size_t>(height * taps));
                     for (int64_t i = 0; i < height; ++i) {
                       from[size_t(i)] = grad[first + i];
                       const Pixel p = pixel_at(index[first + i], int32_t(g.out_h), int32_t(g.out_w));
                       for (int64_t t = 0; t < taps; ++t) {
                         x[size_t(i * taps + t)] =
                             source.row(input_pixel(g, p, int32_t(t / g.kernel_w), int32_t(t % g.kernel_w)));
                       }
                     }
                     kernels().depthwise_weight_grad(int32_t(height), int32_t(taps), x.data(), from.data(),
                                                     dtype, begin, end, dw, channels);
                   });
}

// [taps][O][I] to the weight's own order: [O][I][taps], or transposed (O the inputs) [I][O][taps].
void reorder(const std::vector<float>& dw, const Geometry& g, int64_t outputs, int64_t inputs, Dtype dtype,
             char* out) {
  const int64_t taps = g.taps(), group_out = outputs / g.groups, element = size_of(dtype);
  const int64_t lines = g.transposed ? g.groups * inputs : outputs;  // first dimension of the weight
  const int64_t inner = g.transposed ? group_out : inputs;           // second
  parallel(threads_for(double(dw.size()), 64e3), [&](int64_t t) {
    const int64_t threads = threads_for(double(dw.size()), 64e3);
    std::vector<float> line(static_cast<size_t>(inner * taps));
    for (int64_t l = part(lines, t, threads); l < part(lines, t + 1, threads); ++l) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const float* from = dw.data() + tap * outputs * inputs;
        for (int64_t i = 0; i < inner; ++i) {
          const int64_t at =
              g.transposed ? (l / inputs * group_out + i) * inputs + l % inputs : l * inputs + i;
          line[size_t(i * taps + tap)] = from[at];
        }
      }
      kernels().from_float(line.data(), inner * taps, dtype, out + l * inner * taps * element);
    }
  });
}

// The sum of the gradient rows: float32 over 16 rows, then float64, so that it is as exact as a tree of sums.
void bias_grad(const GradRows& grad, int64_t rows, int64_t channels, Dtype dtype, char* out) {
  std::vector<double> sum(size_t(channels), 0.);
  std::vector<float> few(static_cast<size_t>(channels));
  for (int64_t first = 0; first < rows; first += 16) {
    std::fill(few.begin(), few.end(), 0.f);
    for (int64_t i = first; i < std::min(rows, first + 16); ++i)
      kernels().add_to(grad[i], dtype, channels, few.data());
    for (int64_t c = 0; c < channels; ++c) sum[size_t(c)] += few[size_t(c)];
  }
  for (int64_t c = 0; c < channels; ++c) few[size_t(c)] = float(sum[size_t(c)]);
  kernels().from_float(few.data(), channels, dtype, out);
}

// dw: the weight's shape, contiguous; db: [O]; both of the gradient's dtype.
void conv_weight_grad(const Tensor& grad, const Tensor& x, const Tensor& index, const OptionalTensor& count,
                      const OptionalTensor& source_in, IntHeaderOnlyArrayRef geometry, Tensor dw, Tensor db) {
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
  std::vector<float> sums(size_t(g.taps() * out_channels * (in_channels / g.groups)), 0.f);
  if (is_depthwise(g, in_channels, out_channels)) {
    depthwise_weight_grad(g, from, rows, at, source, dtype, in_channels, sums.data());
  } else {
    WeightGrad(g, from, rows, at, source, dtype, in_channels, out_channels, sums.data()).run();
  }
  reorder(sums, g, out_channels, in_channels / g.groups, dtype, data_of<char>(dw));
  bias_grad(from, rows, out_channels, dtype, data_of<char>(db));
}

}  // namespace
}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) {
  m.def(
      "cpu_conv(Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor? count, Tensor? source, int[] "
      "geometry, "
      "int activation, Tensor? scale, Tensor? shift, Tensor? gate, Tensor? residual, Tensor? base, bool "
      "merged, "
      "Tensor(a!) out) "
      "-> ()");
  m.def(
      "cpu_conv_input_grad(Tensor grad, Tensor weight, Tensor index, Tensor? count, Tensor? source, int[] "
      "geometry, "
      "Tensor(a!) dx) -> ()");
  m.def(
      "cpu_conv_weight_grad(Tensor grad, Tensor x, Tensor index, Tensor? count, Tensor? source, int[] "
      "geometry, "
      "Tensor(a!) dw, Tensor(b!) db) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) {
  m.impl("cpu_conv", TORCH_BOX(&dynops::cpu::conv));
  m.impl("cpu_conv_input_grad", TORCH_BOX(&dynops::cpu::conv_input_grad));
  m.impl("cpu_conv_weight_grad", TORCH_BOX(&dynops::cpu::conv_weight_grad));
}
