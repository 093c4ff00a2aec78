// Convolution with weights of their own for samples or regions, or mixed from a few, on the CPU: forward.
//
// The pixels of one weight are a job: its weight is packed (or mixed from packed ones) a few panels at a
// time, so that they are still in the L2 cache when the job's rows meet them.
#include "sample_conv.h"

#include "../engine/forward_pass.h"
#include "weight_jobs.h"

namespace dynops::cpu {
namespace {

constexpr int64_t kChunkBytes = 512 * 1024;     // of packed weight, half an L2 cache
constexpr int64_t kLeastShare = 8 * kTileRows;  // rows for which a second thread packs the same weight

// A part of a job: some pieces of its weight. Its work is rows * pieces.
struct Unit {
  const Job* job;
  int64_t piece_begin, piece_end, start;  // start: where it lies on the line of all work

  int64_t pieces() const { return piece_end - piece_begin; }
  int64_t end() const { return start + job->rows * pieces(); }

  // The first row after `at` on the line of work. A share of a few rows is not worth a weight packed twice.
  int64_t row_at(int64_t at) const {
    if (at <= start) return 0;
    if (at >= end()) return job->rows;
    const int64_t row = (at - start) / pieces() / kTileRows * kTileRows;
    if (row >= kLeastShare && job->rows - row >= kLeastShare) return row;
    return 2 * row < job->rows ? 0 : job->rows;
  }
};

// How a packed weight is cut: at its panels, or not at all where there are groups.
struct Pieces {
  int64_t bytes, count, piece_bytes;

  Pieces(const Forward& f, const PanelLayout& layout) : bytes(layout.group_bytes * f.g.groups) {
    if (f.depthwise()) bytes = f.g.taps() * f.out_channels * 4;
    const bool cut = f.g.groups == 1;
    count = cut ? layout.panels : 1;
    piece_bytes = cut ? kernels().panel_width * layout.depth * (f.dot() ? 2 : 4) : bytes;
  }

  int64_t begin_of(int64_t piece) const { return piece * piece_bytes; }
  int64_t end_of(int64_t piece) const { return std::min(bytes, piece * piece_bytes); }
};

// Makes the pieces [begin, end) of a weight at `to`; `scratch` is of one panel, as float32.
using MakeWeight = std::function<void(int64_t weight, int64_t begin, int64_t end, float* scratch, char* to)>;

class WeightedPass {
 public:
  WeightedPass(const Forward& shared, const Jobs& jobs, const Pieces& pieces, const MakeWeight& make,
               const std::vector<float>& bias, bool pieces_outermost)
      : shared_(shared), jobs_(jobs), pieces_(pieces), make_(make), bias_(bias) {
    const double macs = double(jobs.index.size()) * double(shared.in_channels / shared.g.groups) *
                        double(shared.g.taps() * shared.out_channels);
    threads_ = threads_for(macs, kMacsPerThread);
    const int64_t count = int64_t(jobs.jobs.size());
    const int64_t fit = std::max<int64_t>(kChunkBytes / std::max<int64_t>(pieces.piece_bytes, 1), 1);
    const int64_t even = std::max<int64_t>(count * pieces.count / (2 * threads_), 1);  // two units a thread
    const int64_t chunk = std::min(fit, even), chunks = (pieces.count + chunk - 1) / chunk;
    for (int64_t i = 0; i < count * chunks; ++i) {
      const int64_t job = pieces_outermost ? i % count : i / chunks;
      const int64_t c = pieces_outermost ? i / count : i % chunks;
      const Unit unit{&jobs.jobs[size_t(job)], part(pieces.count, c, chunks),
                      part(pieces.count, c + 1, chunks), work_};
      work_ = unit.end();
      longest_ = std::max(longest_, pieces.end_of(unit.piece_end) - pieces.begin_of(unit.piece_begin));
      units_.push_back(unit);
    }
  }

  // Threads take equal shares of the line of all work.
  void run() const {
    parallel(threads_, [&](int64_t t) {
      const int64_t begin = part(work_, t, threads_), end = part(work_, t + 1, threads_);
      const std::unique_ptr<char[]> packed(new char[size_t(longest_)]);
      const std::unique_ptr<float[]> scratch(shared_.dot() ? new float[size_t(pieces_.piece_bytes / 2)]
                                                           : nullptr);
      for (const Unit& unit : units_) {
        const int64_t from = unit.row_at(begin), to = unit.row_at(end);
        if (from >= to) continue;
        make_(unit.job->weight, unit.piece_begin, unit.piece_end, scratch.get(), packed.get());
        run_rows(unit, from, to, packed.get());
      }
    });
  }

 private:
  void run_rows(const Unit& unit, int64_t from, int64_t to, const char* packed) const {
    Forward f{shared_};
    f.index = jobs_.index.data() + unit.job->begin + from;
    f.rows = to - from;
    f.weight = packed - pieces_.begin_of(unit.piece_begin);
    if (!bias_.empty()) f.affine = Affine(bias_of(unit.job->weight), f.out_channels);
    const std::vector<RowClass> rows = row_classes(f.g, f.index, f.rows);  // one: it is no transposed one
    const ForwardPass pass(f, rows[0]);
    const bool all = pieces_.count == 1;
    pass.run(0, f.rows, all ? 0 : unit.piece_begin, all ? pass.panels() : unit.piece_end);
  }

  // A bias for each weight, or one for all samples: [regions, O].
  const float* bias_of(int64_t weight) const {
    const int64_t biases = int64_t(bias_.size()) / shared_.out_channels;
    return bias_.data() + weight % biases * shared_.out_channels;
  }

  const Forward& shared_;
  const Jobs& jobs_;
  const Pieces& pieces_;
  const MakeWeight& make_;
  const std::vector<float>& bias_;
  std::vector<Unit> units_;
  int64_t threads_, work_ = 0, longest_ = 0;
};

std::vector<float> floats_of(const OptionalTensor& t) {
  std::vector<float> out(t ? size_t(t->numel()) : 0);
  if (t) kernels().to_float(data_of<const char>(*t), dtype_of(*t), t->numel(), out.data());
  return out;
}

// What all jobs share.
Forward forward_of(const Geometry& g, const Tensor& x, int64_t activation, bool merged, const char* zero,
                   const Tensor& out) {
  const Dtype dtype = dtype_of(x);
  return {g,
          x.size(1),
          out.size(1),
          0,
          dtype,
          nullptr,
          {g, data_of<const char>(x), x.size(1) * size_of(dtype), nullptr, zero, merged},
          Affine(nullptr, out.size(1)),
          Activation(activation),
          nullptr,
          nullptr,
          nullptr,
          nullptr,
          data_of<char>(out),
          false,
          false};
}

// weight: contiguous [N or 1, R, O, C / groups, kh, kw]; bias: contiguous [N or 1, R, O].
void weighted_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& region, IntHeaderOnlyArrayRef geometry, int64_t activation,
                   bool merged, Tensor out) {
  const Geometry g = geometry_of(geometry);
  const int64_t regions = weight.size(1), taps = g.taps();
  STD_TORCH_CHECK(weight.size(0) == 1 || weight.size(0) == g.batch, "weight: expected 1 or ", g.batch,
                  " samples, got ", weight.size(0));
  check_region(region, g);
  const ZeroRow zero(x.size(1) * size_of(dtype_of(x)));
  const Forward f = forward_of(g, x, activation, merged, zero.data(), out);
  const bool shared = weight.size(0) == 1;
  STD_TORCH_CHECK(!bias || !shared || bias->size(0) == 1,
                  "bias: expected one for all samples, as the weight");
  const PanelLayout panels = panel_layout(f.out_channels, 1, f.in_channels, false);
  if (!region && !shared && takes_winograd(f)) {
    const float* from = data_of<const float>(weight);
    const MakeWinograd make = [&](int64_t n, int64_t panel, char* to, int64_t position_bytes) {
      pack_winograd(from + n * f.out_channels * f.in_channels * taps, panels, panel, to, position_bytes);
    };
    return run_winograd_samples(f, floats_of(bias), make);
  }
  const Jobs jobs(g.batch, g.out_h * g.out_w, regions, shared, data_of<const int32_t>(region));
  const WeightView view(weight.size(2) / g.groups, weight.size(3), taps, false, false);
  const Packer packer(view, merged ? g.kernel_w : 1, f.dot());
  const int64_t weight_bytes = view.group_stride * g.groups * size_of(f.dtype);
  const char* weights = data_of<const char>(weight);
  const Pieces pieces(f, packer.layout());
  const MakeWeight pack = [&](int64_t w, int64_t begin, int64_t end, float* scratch, char* to) {
    const char* from = weights + w * weight_bytes;
    if (f.depthwise()) {
      return pack_depthwise(from, f.dtype, f.out_channels, taps, reinterpret_cast<float*>(to));
    }
    for (int64_t p = begin; g.groups == 1 && p < end; ++p) {
      packer.pack(from, f.dtype, p, scratch, to + (p - begin) * pieces.piece_bytes);
    }
    if (g.groups > 1) packer.pack_groups(from, f.dtype, g.groups, scratch, to);
  };
  WeightedPass(f, jobs, pieces, pack, floats_of(bias), false).run();
}

// weight: [E, bytes], each as pack_weight or pack_depthwise makes it, or pack_winograd (`winograd`); mix:
// contiguous float32 [N, E].
void mixed_conv(const Tensor& x, const Tensor& weight, const Tensor& mix, const OptionalTensor& bias,
                IntHeaderOnlyArrayRef geometry, int64_t activation, bool merged, bool winograd, Tensor out) {
  const Geometry g = geometry_of(geometry);
  const int64_t experts = weight.size(0), stride = weight.numel() / experts * int64_t(weight.element_size());
  const ZeroRow zero(x.size(1) * size_of(dtype_of(x)));
  const Forward f = forward_of(g, x, activation, merged, zero.data(), out);
  STD_TORCH_CHECK(mix.numel() == g.batch * experts, "mix: expected ", g.batch, " x ", experts, ", got ",
                  mix.numel());
  const char* from = data_of<const char>(weight);
  const float* share = data_of<const float>(mix);
  if (winograd) {
    STD_TORCH_CHECK(takes_winograd(f), "winograd: expected a float32 3x3 convolution with stride 1 for it");
    const PanelLayout panels = panel_layout(f.out_channels, 1, f.in_channels, false);
    STD_TORCH_CHECK(stride == 16 * panels.group_bytes, "weight: expected ", 16 * panels.group_bytes,
                    " bytes each, got ", stride);
    const MakeWinograd make = [&](int64_t n, int64_t panel, char* to, int64_t position_bytes) {
      const int64_t first = panel * kernels().panel_width * panels.depth * 4;
      const int64_t bytes = std::min(kernels().panel_width * panels.depth * 4, panels.group_bytes - first);
      for (int64_t position = 0; position < 16; ++position) {
        char* const at = to + position * position_bytes;
        kernels().mix({from + position * panels.group_bytes + first, stride, experts, share + n * experts, 1,
                       Dtype::kFloat32, bytes / 4, &at});
      }
    };
    return run_winograd_samples(f, floats_of(bias), make);
  }
  const Jobs jobs(g.batch, g.out_h * g.out_w, 1, false, nullptr);
  const int64_t merged_taps = merged ? g.kernel_w : 1, depth = f.in_channels / g.groups * merged_taps;
  const PanelLayout layout = panel_layout(f.out_channels / g.groups, g.taps() / merged_taps, depth, f.dot());
  const Pieces pieces(f, layout);
  STD_TORCH_CHECK(pieces.bytes == stride, "weight: expected ", pieces.bytes, " bytes each, got ", stride);
  const Dtype element = f.dot() ? Dtype::kBFloat16 : Dtype::kFloat32;
  const MakeWeight make = [&](int64_t n, int64_t begin, int64_t end, float*, char* to) {
    const int64_t first = pieces.begin_of(begin), bytes = pieces.end_of(end) - first;
    kernels().mix(
        {from + first, stride, experts, share + n * experts, 1, element, bytes / size_of(element), &to});
  };
  WeightedPass(f, jobs, pieces, make, floats_of(bias), true).run();
}

}  // namespace
}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) {
  m.def(
      "cpu_weighted_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? region, int[] geometry, int "
      "activation, "
      "bool merged, Tensor(a!) out) -> ()");
  m.def(
      "cpu_mixed_conv(Tensor x, Tensor weight, Tensor mix, Tensor? bias, int[] geometry, int activation, "
      "bool merged, bool winograd, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) {
  m.impl("cpu_weighted_conv", TORCH_BOX(&dynops::cpu::weighted_conv));
  m.impl("cpu_mixed_conv", TORCH_BOX(&dynops::cpu::mixed_conv));
}
