// Convolution with weights of their own for samples or regions, or mixed from a few, on the CPU: forward.
//
// A weight is packed, or mixed from packed ones, a few panels at a time. They are still in the L2 cache when
// the weight's rows meet them.
#include "../engine/forward_pass.h"
#include "own_weights.h"

namespace dynops::cpu {
namespace {

constexpr int64_t kChunkBytes = 512 * 1024;     // of packed weight, half an L2 cache
constexpr int64_t kLeastShare = 8 * kTileRows;  // rows for which a second thread packs the same weight

// Some pieces of a weight and all of its rows. The work is rows * pieces.
struct Unit {
  const WeightRows* one;
  Span pieces;
  int64_t start;  // where it lies on the line of all work

  int64_t end() const { return start + one->rows * pieces.size(); }

  // The first row after `at` on the line of work. A share of a few rows is not worth a weight packed twice.
  int64_t row_at(int64_t at) const {
    if (at <= start) return 0;
    if (at >= end()) return one->rows;
    const int64_t row = (at - start) / pieces.size() / kTileRows * kTileRows;
    if (row >= kLeastShare && one->rows - row >= kLeastShare) return row;
    return 2 * row < one->rows ? 0 : one->rows;
  }
};

// The pieces of a packed weight: its panels, or the whole where there are groups.
struct PackedPieces {
  int64_t bytes, count, piece_bytes;

  PackedPieces(const Forward& f, const PanelLayout& layout) : bytes(layout.group_bytes * f.g.groups) {
    if (f.depthwise()) bytes = f.g.taps() * f.out_channels * 4;
    const bool cut = f.g.groups == 1;
    count = cut ? layout.panels : 1;
    piece_bytes = cut ? kernels().panel_width * layout.depth * (f.dot() ? 2 : 4) : bytes;
  }

  int64_t begin_of(int64_t piece) const { return piece * piece_bytes; }
  int64_t end_of(int64_t piece) const { return std::min(bytes, piece * piece_bytes); }
};

// Makes some pieces of a weight at `to`; `scratch` is of one panel, as float32.
using MakeWeight = std::function<void(int64_t weight, Span pieces, float* scratch, char* to)>;

class WeightedPass {
 public:
  WeightedPass(const Forward& shared, const PixelsByWeight& pixels, const PackedPieces& pieces,
               const MakeWeight& make, const std::vector<float>& bias, bool pieces_outermost)
      : shared_(shared), pixels_(pixels), pieces_(pieces), make_(make), bias_(bias) {
    const double macs = double(pixels.index.size()) * double(shared.in_channels / shared.g.groups) *
                        double(shared.g.taps() * shared.out_channels);
    threads_ = threads_for(macs, kMacsPerThread);
    const int64_t count = int64_t(pixels.weights.size());
    const int64_t fit = std::max<int64_t>(kChunkBytes / std::max<int64_t>(pieces.piece_bytes, 1), 1);
    const int64_t even = std::max<int64_t>(count * pieces.count / (2 * threads_), 1);  // two units a thread
    const int64_t chunk = std::min(fit, even), chunks = ceil_div(pieces.count, chunk);
    for (int64_t i = 0; i < count * chunks; ++i) {
      const int64_t w = pieces_outermost ? i % count : i / chunks;
      const int64_t c = pieces_outermost ? i / count : i % chunks;
      const Unit unit{&pixels.weights[w], share_of(pieces.count, c, chunks), work_};
      work_ = unit.end();
      longest_ = std::max(longest_, pieces.end_of(unit.pieces.end) - pieces.begin_of(unit.pieces.begin));
      units_.push_back(unit);
    }
  }

  // Threads take equal shares of the line of all work.
  void run() const {
    parallel(threads_, [&](int64_t t) {
      const Span mine = share_of(work_, t, threads_);
      const std::unique_ptr<char[]> packed(new char[longest_]);
      const std::unique_ptr<float[]> scratch(shared_.dot() ? new float[pieces_.piece_bytes / 2] : nullptr);
      for (const Unit& unit : units_) {
        const Span rows{unit.row_at(mine.begin), unit.row_at(mine.end)};
        if (rows.begin >= rows.end) continue;
        make_(unit.one->weight, unit.pieces, scratch.get(), packed.get());
        run_rows(unit, rows, packed.get());
      }
    });
  }

 private:
  void run_rows(const Unit& unit, Span some, const char* packed) const {
    Forward f{shared_};
    f.index = pixels_.index.data() + unit.one->begin + some.begin;
    f.rows = some.size();
    f.weight = packed - pieces_.begin_of(unit.pieces.begin);
    if (!bias_.empty()) f.affine = Affine(f.out_channels, bias_of(unit.one->weight));
    const std::vector<RowClass> rows = row_classes(f.g, f.index, f.rows);  // one: it is no transposed one
    const ForwardPass pass(f, rows[0]);
    RowTables tables;
    pass.run(tables, {0, f.rows}, pieces_.count == 1 ? Span{0, pass.panels()} : unit.pieces);
  }

  // A bias for each weight, or one for all samples: [regions, O].
  const float* bias_of(int64_t weight) const {
    const int64_t biases = int64_t(bias_.size()) / shared_.out_channels;
    return bias_.data() + weight % biases * shared_.out_channels;
  }

  const Forward& shared_;
  const PixelsByWeight& pixels_;
  const PackedPieces& pieces_;
  const MakeWeight& make_;
  const std::vector<float>& bias_;
  std::vector<Unit> units_;
  int64_t threads_, work_ = 0, longest_ = 0;
};

// The call with neither rows nor weight, which all weights share.
Forward forward_of(const Geometry& g, const Tensor& x, int64_t activation, bool merged, const char* zero,
                   const Tensor& out) {
  const Dtype dtype = dtype_of(x);
  return {.g = g,
          .in_channels = x.size(1),
          .out_channels = out.size(1),
          .dtype = dtype,
          .source = {.g = g,
                     .x = data_of<const char>(x),
                     .row_bytes = x.size(1) * size_of(dtype),
                     .zero = zero,
                     .merged = merged},
          .affine = Affine(out.size(1)),
          .activation = Activation(activation),
          .out = data_of<char>(out)};
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
  const PixelsByWeight pixels(g.batch, g.out_h * g.out_w, regions, shared, data_of<const int32_t>(region));
  const WeightView view(weight.size(2) / g.groups, weight.size(3), taps, false, false);
  const Packer packer(view, merged ? g.kernel_w : 1, f.dot());
  const int64_t weight_bytes = view.group_stride * g.groups * size_of(f.dtype);
  const char* weights = data_of<const char>(weight);
  const PackedPieces pieces(f, packer.layout());
  const MakeWeight pack = [&](int64_t w, Span some, float* scratch, char* to) {
    const char* from = weights + w * weight_bytes;
    if (f.depthwise()) {
      return pack_depthwise(from, f.dtype, f.out_channels, taps, reinterpret_cast<float*>(to));
    }
    for (int64_t p = some.begin; g.groups == 1 && p < some.end; ++p) {
      packer.pack(from, f.dtype, p, scratch, to + (p - some.begin) * pieces.piece_bytes);
    }
    if (g.groups > 1) packer.pack_groups(from, f.dtype, {0, g.groups * packer.layout().panels}, scratch, to);
  };
  WeightedPass(f, pixels, pieces, pack, floats_of(bias), false).run();
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
  // The sum of a sample's weights from byte `first` on.
  const auto mix_part = [&](int64_t n, int64_t first, int64_t bytes, Dtype element, char* to) {
    kernels().mix({.from = from + first,
                   .stride = stride,
                   .terms = experts,
                   .share = share + n * experts,
                   .outputs = 1,
                   .dtype = element,
                   .n = bytes / size_of(element),
                   .to = &to});
  };
  if (winograd) {
    STD_TORCH_CHECK(takes_winograd(f), "winograd: expected a float32 3x3 convolution with stride 1 for it");
    const PanelLayout panels = panel_layout(f.out_channels, 1, f.in_channels, false);
    STD_TORCH_CHECK(stride == 16 * panels.group_bytes, "weight: expected ", 16 * panels.group_bytes,
                    " bytes each, got ", stride);
    const MakeWinograd make = [&](int64_t n, int64_t panel, char* to, int64_t position_bytes) {
      const int64_t first = panel * kernels().panel_width * panels.depth * 4;
      const int64_t bytes = std::min(kernels().panel_width * panels.depth * 4, panels.group_bytes - first);
      for (int64_t position = 0; position < 16; ++position) {
        mix_part(n, position * panels.group_bytes + first, bytes, Dtype::kFloat32,
                 to + position * position_bytes);
      }
    };
    return run_winograd_samples(f, floats_of(bias), make);
  }
  const PixelsByWeight pixels(g.batch, g.out_h * g.out_w, 1, false, nullptr);
  const int64_t merged_taps = merged ? g.kernel_w : 1, depth = f.in_channels / g.groups * merged_taps;
  const PanelLayout layout = panel_layout(f.out_channels / g.groups, g.taps() / merged_taps, depth, f.dot());
  const PackedPieces pieces(f, layout);
  STD_TORCH_CHECK(pieces.bytes == stride, "weight: expected ", pieces.bytes, " bytes each, got ", stride);
  const Dtype element = f.dot() ? Dtype::kBFloat16 : Dtype::kFloat32;
  const MakeWeight make = [&](int64_t n, Span some, float*, char* to) {
    const int64_t first = pieces.begin_of(some.begin);
    mix_part(n, first, pieces.end_of(some.end) - first, element, to);
  };
  WeightedPass(f, pixels, pieces, make, floats_of(bias), true).run();
}

DYNOPS_CPU_OP(weighted_conv)
DYNOPS_CPU_OP(mixed_conv)

}  // namespace
}  // namespace dynops::cpu
