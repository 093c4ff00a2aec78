// The live rows and columns of a packed weight.
#pragma once

#include "../engine/pack.h"
#include "call.h"

namespace dynops::cpu {

// Whether the live columns and rows of the packed weight lie as a packed weight does.
inline bool lies_packed(const PanelLayout& layout, const ChannelList& rows, const ChannelList& columns) {
  if (columns.count == 0) return true;
  const int64_t width = kernels().panel_width, lanes = kernels().lanes;
  const int64_t first = columns.index[0], last = columns.index[columns.count - 1];
  if (!rows.prefix() || first % width || last - first != columns.count - 1) return false;
  const int64_t home = last / width * width;
  const auto stored = [&](int64_t left) { return left > width - lanes ? width : round_up(left, lanes); };
  return stored(layout.columns - home) == stored(last + 1 - home);
}

// The live rows and columns of one part's packed weight.
struct LiveWeight {
  PanelPick pick;
  int64_t positions;
  PanelLayout layout;

  LiveWeight(const Call& c, int64_t p, const ChannelList& rows, const ChannelList& columns)
      : pick{c.weight + p * c.layout.group_bytes, c.layout, c.segments, rows, columns, c.dot},
        positions(c.positions()),
        layout(panel_layout(columns.count, c.segments, rows.count, c.dot)) {}

  int64_t bytes() const { return positions * layout.group_bytes; }
  int64_t panel_bytes() const { return kernels().panel_width * layout.depth * (pick.dot ? 2 : 4); }

  int64_t width(int64_t panel) const {
    const int64_t left = pick.columns.count - panel * kernels().panel_width;
    return left > kernels().panel_width - kernels().lanes ? kernels().panel_width
                                                          : round_up(left, kernels().lanes);
  }

  int64_t segment_bytes(int64_t panel) const {
    return layout.depth / pick.segments * width(panel) * (pick.dot ? 2 : 4);
  }
  // One panel of every position, `position_bytes` apart.
  void bring(int64_t panel, char* to, int64_t position_bytes) const {
    LiveWeight one = *this;
    for (int64_t i = 0; i < positions; ++i, one.pick.from += pick.layout.group_bytes, to += position_bytes)
      for (int64_t segment = 0; segment < pick.segments; ++segment)
        kernels().pick_panel(one.pick, panel, segment, to + segment * segment_bytes(panel));
  }
};

}  // namespace dynops::cpu
