// Weights in the order in which the GEMM reads them.
#pragma once

#include <vector>

#include "../../common/geometry.h"
#include "engine.h"

namespace dynops::cpu {

// The layout of a packed weight of `columns` outputs, each a sum over `segments` runs of `depth`.
// `dot`: bfloat16 pairs, so that a run is rounded up to an even depth.
PanelLayout panel_layout(int64_t columns, int64_t segments, int64_t depth, bool dot);

// The width of the panel that holds the first of the last `left` columns: a full panel's, or whole vectors.
int64_t stored_width(int64_t left);

// A contiguous weight of a convolution, [out, in, taps], or of a transposed one, [in, out, taps], as the
// matrices of its groups. Their columns are the outputs, or in the input gradient the inputs.
struct WeightView {
  int64_t columns, channels, taps;  // of a group; channels: what a column sums over, at each tap
  int64_t column_stride, channel_stride, group_stride;

  WeightView(int64_t outer, int64_t inner, int64_t taps_, bool transposed, bool input_grad) : taps(taps_) {
    const bool columns_outer = transposed == input_grad;
    columns = columns_outer ? outer : inner;
    channels = columns_outer ? inner : outer;
    column_stride = columns_outer ? inner * taps : taps;
    channel_stride = columns_outer ? taps : inner * taps;
    group_stride = outer * inner * taps;
  }
};

// Brings panels of a weight into the order in which the GEMM reads them: [panel][tap * channel][column].
class Packer {
 public:
  // `merged_taps`: of each segment, 1 where taps are not merged.
  Packer(const WeightView& view, int64_t merged_taps, bool dot);

  const PanelLayout& layout() const { return layout_; }
  int64_t panel_bytes() const;  // of a full panel

  // `weight`: of the group, any dtype; `scratch`: a panel as float32, for pairs only; `to`: where this
  // panel begins.
  void pack(const char* weight, Dtype dtype, int64_t panel, float* scratch, char* to) const;
  // Some of the panels of all groups, of a weight that is packed to `to`.
  void pack_groups(const char* weight, Dtype dtype, Span panels, float* scratch, char* to) const;

 private:
  WeightView view_;
  int64_t segments_, segment_depth_;
  bool dot_;
  PanelLayout layout_;
  std::vector<int32_t> row_;  // of the elements that lie side by side in a column
};

// A panel of the transformed weight of a float32 3x3 convolution [columns, depth, 9] for Winograd's F(2x2,
// 3x3): 16 of them, `position_bytes` apart. `layout` is that of one.
void pack_winograd(const float* weight, const PanelLayout& layout, int64_t panel, char* to,
                   int64_t position_bytes);

// A depthwise weight [C, taps] as float32 [taps, C].
void pack_depthwise(const char* weight, Dtype dtype, int64_t channels, int64_t taps, float* to);

}  // namespace dynops::cpu
