// Weights in the order in which the GEMM reads them: [group][panel][tap * channel][column].
#include <cstring>

#include "operands.h"
#include "pack.h"
#include "parallel.h"

namespace dynops::cpu {

PanelLayout panel_layout(int64_t columns, int64_t segments, int64_t depth, bool dot) {
  const Kernels& k = kernels();
  const int64_t step = dot ? 2 : 1, rounded = segments * ((depth + step - 1) / step * step);
  const int64_t panels = (columns + k.panel_width - 1) / k.panel_width;
  const int64_t last = columns - (panels - 1) * k.panel_width;
  const int64_t last_width = (last + k.lanes - 1) / k.lanes * k.lanes;
  const int64_t floats = rounded * ((panels - 1) * k.panel_width + last_width);
  return {columns, rounded, panels, columns ? floats * (dot ? 2 : 4) : 0};
}

namespace {

// Where the weight of (group, column, depth channel, tap) lies in a contiguous weight tensor.
struct WeightView {
  int64_t groups, columns, channels, taps;
  int64_t group_stride, column_stride, channel_stride;

  WeightView(const Tensor& w, int64_t groups_, bool transposed, bool input_grad) : groups(groups_) {
    taps = w.size(2) * w.size(3);
    const int64_t outer = w.size(0) / groups, inner = w.size(1);
    group_stride = outer * inner * taps;
    // A convolution's weight is [out, in, taps], a transposed one's [in, out, taps]; the columns of
    // the product are the outputs, or in the input gradient the inputs.
    const bool columns_outer = transposed == input_grad;
    columns = columns_outer ? outer : inner;
    channels = columns_outer ? inner : outer;
    column_stride = columns_outer ? inner * taps : taps;
    channel_stride = columns_outer ? taps : inner * taps;
  }
};

void pack_panel(const WeightView& view, const float* weight, const PanelLayout& layout, int64_t segment_taps,
                int64_t panel, bool dot, char* out) {
  const Kernels& k = kernels();
  const int64_t first = panel * k.panel_width, left = layout.columns - first;
  const int64_t width =
      left > k.panel_width - k.lanes ? k.panel_width : (left + k.lanes - 1) / k.lanes * k.lanes;
  const int64_t segments = view.taps / segment_taps, depth = layout.depth / segments;
  std::vector<float> line(static_cast<size_t>(width * 2));
  for (int64_t s = 0; s < segments; ++s) {
    for (int64_t d = 0; d < depth; ++d) {
      const int64_t tap = s * segment_taps + d / view.channels, channel = d % view.channels;
      const bool inside = d < segment_taps * view.channels;
      for (int64_t c = 0; c < width; ++c) {
        const bool live = inside && c < left;
        const float value =
            live ? weight[(first + c) * view.column_stride + channel * view.channel_stride + tap] : 0.f;
        line[size_t(dot ? c * 2 + d % 2 : c)] = value;
      }
      if (dot) {
        if (d % 2 == 0) continue;
        k.from_float(line.data(), width * 2, Dtype::kBFloat16, out);
      } else {
        std::memcpy(out, line.data(), size_t(width) * 4);
      }
      out += width * 4;
    }
  }
}

// Packs a weight for the forward product or for the input gradient. `merged`: the taps of a kernel row
// are one segment. `dot`: bfloat16 pairs. Returns bytes.
Tensor pack_weight(const Tensor& weight_in, int64_t groups, bool transposed, bool input_grad, bool merged,
                   bool dot) {
  const Tensor weight = torch::stable::contiguous(weight_in);
  const WeightView view(weight, groups, transposed, input_grad);
  const int64_t segment_taps = merged ? weight.size(3) : 1;
  const PanelLayout layout =
      panel_layout(view.columns, view.taps / segment_taps, segment_taps * view.channels, dot);
  std::vector<float> floats(static_cast<size_t>(weight.numel()));
  kernels().to_float(static_cast<const char*>(weight.data_ptr()), dtype_of(weight), weight.numel(),
                     floats.data());
  Tensor packed = empty({groups * layout.group_bytes}, ScalarType::Byte);
  char* out = static_cast<char*>(packed.data_ptr());
  parallel(groups * layout.panels, [&](int64_t i) {
    const int64_t group = i / layout.panels, panel = i % layout.panels;
    const int64_t before = panel * kernels().panel_width * layout.depth * (dot ? 2 : 4);
    pack_panel(view, floats.data() + group * view.group_stride, layout, segment_taps, panel, dot,
               out + group * layout.group_bytes + before);
  });
  return packed;
}

// G w of three values, `step` apart.
void winograd_weight(const float* w, int64_t step, float* out, int64_t out_step) {
  const float sum = (w[0] + w[2 * step]) * 0.5f, middle = w[step] * 0.5f;
  out[0] = w[0];
  out[out_step] = sum + middle;
  out[2 * out_step] = sum - middle;
  out[3 * out_step] = w[2 * step];
}

// A float32 weight [O, C, 3, 3] as G w G^T: 16 packed weights of a 1x1 convolution, one after another.
Tensor pack_winograd(const Tensor& weight_in) {
  const Tensor weight = torch::stable::contiguous(weight_in);
  const int64_t outputs = weight.size(0), channels = weight.size(1), pairs = outputs * channels;
  const float* w = static_cast<const float*>(weight.data_ptr());
  std::vector<float> transformed(size_t(16 * pairs));  // [position][O][C]
  const int64_t threads = threads_for(double(pairs), 4e3);
  parallel(threads, [&](int64_t t) {
    for (int64_t i = part(pairs, t, threads); i < part(pairs, t + 1, threads); ++i) {
      float rows[12];  // G w: [4][3]
      for (int64_t x = 0; x < 3; ++x) winograd_weight(w + i * 9 + x, 3, rows + x, 3);
      for (int64_t y = 0; y < 4; ++y) {
        winograd_weight(rows + y * 3, 1, transformed.data() + y * 4 * pairs + i, pairs);
      }
    }
  });
  WeightView view(weight, 1, false, false);
  view.taps = 1;
  view.column_stride = channels;
  view.channel_stride = 1;
  const PanelLayout layout = panel_layout(outputs, 1, channels, false);
  Tensor packed = empty({16 * layout.group_bytes}, ScalarType::Byte);
  char* out = static_cast<char*>(packed.data_ptr());
  parallel(16 * layout.panels, [&](int64_t i) {
    const int64_t position = i / layout.panels, panel = i % layout.panels;
    pack_panel(view, transformed.data() + position * pairs, layout, 1, panel, false,
               out + position * layout.group_bytes + panel * kernels().panel_width * layout.depth * 4);
  });
  return packed;
}

// A depthwise weight [C, 1, kh, kw] as float32 [taps, C].
Tensor pack_depthwise(const Tensor& weight_in) {
  const Tensor weight = torch::stable::contiguous(weight_in);
  const int64_t channels = weight.size(0), taps = weight.size(2) * weight.size(3);
  std::vector<float> floats(static_cast<size_t>(weight.numel()));
  kernels().to_float(static_cast<const char*>(weight.data_ptr()), dtype_of(weight), weight.numel(),
                     floats.data());
  Tensor packed = empty({taps, channels}, ScalarType::Float);
  float* out = static_cast<float*>(packed.data_ptr());
  for (int64_t t = 0; t < taps; ++t) {
    for (int64_t c = 0; c < channels; ++c) out[t * channels + c] = floats[size_t(c * taps + t)];
  }
  return packed;
}

}  // namespace
}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) {
  m.def(
      "cpu_pack_weight(Tensor weight, int groups, bool transposed, bool input_grad, bool merged, bool dot) "
      "-> Tensor");
  m.def("cpu_pack_winograd(Tensor weight) -> Tensor");
  m.def("cpu_pack_depthwise(Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) {
  m.impl("cpu_pack_weight", TORCH_BOX(&dynops::cpu::pack_weight));
  m.impl("cpu_pack_winograd", TORCH_BOX(&dynops::cpu::pack_winograd));
  m.impl("cpu_pack_depthwise", TORCH_BOX(&dynops::cpu::pack_depthwise));
}
