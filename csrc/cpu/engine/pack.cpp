// Weights in the order in which the GEMM reads them: [group][panel][tap * channel][column].
#include <algorithm>
#include <memory>

#include "operands.h"
#include "pack.h"
#include "parallel.h"

namespace dynops::cpu {

PanelLayout panel_layout(int64_t columns, int64_t segments, int64_t depth, bool dot) {
  const Kernels& k = kernels();
  const int64_t rounded = segments * round_up(depth, dot ? 2 : 1), panels = ceil_div(columns, k.panel_width);
  const int64_t last_width = round_up(columns - (panels - 1) * k.panel_width, k.lanes);
  const int64_t floats = rounded * ((panels - 1) * k.panel_width + last_width);
  return {columns, rounded, panels, columns ? floats * (dot ? 2 : 4) : 0};
}

int64_t stored_width(int64_t left) {
  const Kernels& k = kernels();
  return left > k.panel_width - k.lanes ? k.panel_width : round_up(left, k.lanes);
}

Packer::Packer(const WeightView& view, int64_t merged_taps, bool dot)
    : view_(view),
      segments_(view.taps / merged_taps),
      dot_(dot),
      layout_(panel_layout(view.columns, segments_, merged_taps * view.channels, dot)) {
  segment_depth_ = layout_.depth / segments_;
  const bool whole = view.channel_stride == view.taps;  // a column's channels follow each other
  for (int64_t d = 0; d < (whole ? view.channels : 1) * view.taps; ++d) {
    const int64_t tap = d % view.taps, channel = d / view.taps;
    row_.push_back(int32_t(tap / merged_taps * segment_depth_ + tap % merged_taps * view.channels + channel));
  }
}

int64_t Packer::panel_bytes() const { return kernels().panel_width * layout_.depth * (dot_ ? 2 : 4); }

void Packer::pack(const char* weight, Dtype dtype, int64_t panel, float* scratch, char* to) const {
  const Kernels& k = kernels();
  const int64_t first = panel * k.panel_width, left = layout_.columns - first, width = stored_width(left);
  float* out = dot_ ? scratch : reinterpret_cast<float*>(to);
  const int64_t filled = view_.taps / segments_ * view_.channels;
  for (int64_t s = 0; filled < segment_depth_ && s < segments_; ++s) {  // the odd one of the last pair
    std::fill_n(out + (s * segment_depth_ + filled) * width, width, 0.f);
  }
  const char* from = weight + first * view_.column_stride * size_of(dtype);
  const int64_t runs = view_.channel_stride == view_.taps ? 1 : view_.channels;
  for (int64_t i = 0; i < runs; ++i) {
    k.pack_columns({.from = from + i * view_.channel_stride * size_of(dtype),
                    .dtype = dtype,
                    .step = view_.column_stride,
                    .columns = int32_t(std::min(left, width)),
                    .width = int32_t(width),
                    .count = int32_t(row_.size()),
                    .row = row_.data(),
                    .to = out + i * width});
  }
  if (dot_) k.pack_pairs(out, layout_.depth / 2, width, to);
}

void Packer::pack_groups(const char* weight, Dtype dtype, Span panels, float* scratch, char* to) const {
  for (const int64_t i : each(panels)) {
    const int64_t group = i / layout_.panels, panel = i % layout_.panels;
    pack(weight + group * view_.group_stride * size_of(dtype), dtype, panel, scratch,
         to + group * layout_.group_bytes + panel * panel_bytes());
  }
}

void pack_depthwise(const char* weight, Dtype dtype, int64_t channels, int64_t taps, float* to) {
  std::vector<float> floats(channels * taps);
  kernels().to_float(weight, dtype, channels * taps, floats.data());
  for (int64_t t = 0; t < taps; ++t) {
    for (int64_t c = 0; c < channels; ++c) to[t * channels + c] = floats[c * taps + t];
  }
}

void pack_winograd(const float* weight, const PanelLayout& layout, int64_t panel, char* to,
                   int64_t position_bytes) {
  const int64_t first = panel * kernels().panel_width, left = layout.columns - first;
  kernels().pack_winograd({.from = weight + first * layout.depth * 9,
                           .channels = layout.depth,
                           .columns = int32_t(std::min<int64_t>(left, kernels().panel_width)),
                           .width = int32_t(stored_width(left)),
                           .to = reinterpret_cast<float*>(to),
                           .position_stride = position_bytes / 4});
}

namespace {

// Packs a weight for the forward product or for the input gradient. `merged`: the taps of a kernel row
// are one segment. `dot`: bfloat16 pairs. Returns bytes.
Tensor pack_weight(const Tensor& weight_in, int64_t groups, bool transposed, bool input_grad, bool merged,
                   bool dot) {
  const Tensor weight = torch::stable::contiguous(weight_in);
  const WeightView view(weight.size(0) / groups, weight.size(1), weight.size(2) * weight.size(3), transposed,
                        input_grad);
  const Packer packer(view, merged ? weight.size(3) : 1, dot);
  const PanelLayout& layout = packer.layout();
  const Dtype dtype = dtype_of(weight);
  Tensor packed = empty({groups * layout.group_bytes}, ScalarType::Byte);
  const char* from = data_of<const char>(weight);
  char* out = data_of<char>(packed);
  parallel(groups * layout.panels, [&](int64_t i) {
    const std::unique_ptr<float[]> scratch(dot ? new float[packer.panel_bytes() / 2] : nullptr);
    packer.pack_groups(from, dtype, {i, i + 1}, scratch.get(), out);
  });
  return packed;
}

// A float32 weight [O, C, 3, 3] as G w G^T: 16 packed weights of a 1x1 convolution, one after another.
Tensor packed_winograd(const Tensor& weight_in) {
  const Tensor weight = torch::stable::contiguous(weight_in);
  const PanelLayout layout = panel_layout(weight.size(0), 1, weight.size(1), false);
  Tensor packed = empty({16 * layout.group_bytes}, ScalarType::Byte);
  parallel(layout.panels, [&](int64_t panel) {
    char* to = data_of<char>(packed) + panel * kernels().panel_width * layout.depth * 4;
    pack_winograd(data_of<const float>(weight), layout, panel, to, layout.group_bytes);
  });
  return packed;
}

// A depthwise weight [C, 1, kh, kw] as float32 [taps, C].
Tensor packed_depthwise(const Tensor& weight_in) {
  const Tensor weight = torch::stable::contiguous(weight_in);
  const int64_t channels = weight.size(0), taps = weight.size(2) * weight.size(3);
  Tensor packed = empty({taps, channels}, ScalarType::Float);
  pack_depthwise(data_of<const char>(weight), dtype_of(weight), channels, taps, data_of<float>(packed));
  return packed;
}

DYNOPS_CPU_OP(pack_weight)
DYNOPS_CPU_OP_NAMED("pack_winograd", packed_winograd)
DYNOPS_CPU_OP_NAMED("pack_depthwise", packed_depthwise)

}  // namespace
}  // namespace dynops::cpu
