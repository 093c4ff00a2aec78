// One sample of a job on live channels: its weight, and where its rows are read and written.
#pragma once

#include "../engine/forward_pass.h"
#include "../engine/winograd_pass.h"
#include "call.h"

namespace dynops::cpu {

// True if the live columns and rows of the packed weight lie as a packed weight does.
inline bool lies_packed(const PanelLayout& layout, const ChannelList& rows, const ChannelList& columns) {
  if (columns.count == 0) return true;
  const int64_t width = kernels().panel_width;
  const int64_t first = columns.index[0], last = columns.index[columns.count - 1];
  if (!rows.prefix() || first % width || last - first != columns.count - 1) return false;
  const int64_t home = last / width * width;
  return stored_width(layout.columns - home) == stored_width(last + 1 - home);
}

// The live rows and columns of one slice's packed weight.
struct LiveWeight {
  PanelPick pick;
  int64_t positions;
  PanelLayout layout;

  LiveWeight(const Call& c, int64_t i, const ChannelList& rows, const ChannelList& columns)
      : pick{.from = c.weight + i * c.layout.group_bytes,
             .layout = c.layout,
             .segments = c.segments,
             .rows = rows,
             .columns = columns,
             .dot = c.dot},
        positions(c.positions()),
        layout(panel_layout(columns.count, c.segments, rows.count, c.dot)) {}

  int64_t bytes() const { return positions * layout.group_bytes; }
  int64_t panel_bytes() const { return kernels().panel_width * layout.depth * (pick.dot ? 2 : 4); }
  int64_t segment_bytes(int64_t panel) const {
    const int64_t width = stored_width(pick.columns.count - panel * kernels().panel_width);
    return layout.depth / pick.segments * width * (pick.dot ? 2 : 4);
  }
  // One panel of every position, `position_bytes` apart.
  void bring(int64_t panel, char* to, int64_t position_bytes) const {
    LiveWeight one = *this;
    for (int64_t i = 0; i < positions; ++i, one.pick.from += pick.layout.group_bytes, to += position_bytes)
      for (int64_t segment = 0; segment < pick.segments; ++segment)
        kernels().pick_panel(one.pick, panel, segment, to + segment * segment_bytes(panel));
  }
};

// Memory that a thread keeps for each sample that it works on at a time.
struct Scratch {
  Buffer x, y, weight, transformed;
  WinogradPass::Work work;
  static Scratch& mine(int slot);
  void shrink() {
    for (Buffer* b : {&x, &y, &weight, &transformed}) b->shrink();
  }
};

// A group of channels, or a head: its inputs, its outputs, and the convolution between them.
struct LiveSlice {
  ListSlice in, out;
  LiveWeight live;
  Forward f;
  int64_t position_bytes = 0;
};

// The live channels of the input are compacted. The live rows and columns of the packed weight make a packed
// weight of their own. The forward pass runs on both, and its rows are spread over the output. Prefixes of
// channels are read, multiplied and written where they lie.
class LiveSample {
 public:
  // `slot`: of the thread's scratch memory.
  LiveSample(const Call& c, const Job& job, int64_t sample, int slot);

  // True if the job's panels lie past the sample's list.
  bool empty() const { return slices.empty(); }
  // True if the weight comes panel by panel to a direct convolution.
  bool in_steps() const { return by_panel && !call.winograd; }
  char* panel_memory() const;

  // Points a slice at its live channels of the input, side by side; compacts them if they are not.
  void read(LiveSlice& slice, Span lines);
  // Memory in which the rows' outputs are computed, up to `most` of a row.
  RowsAt outputs_at(Span rows, int64_t most);
  void write(Span rows, const RowsAt& computed);

  const Call& call;
  const Job job;
  const int64_t sample;
  Scratch& scratch;
  std::vector<LiveSlice> slices;
  ChannelList out{};      // the job's live outputs, counted from its first channel
  int64_t before = 0;     // live outputs before the job's
  bool by_panel = false;  // the weight comes panel by panel, to panel_memory()
  bool in_place = false;  // outputs are computed where they lie
  int64_t chunk_units() const;

 private:
  bool choose_outputs();
  Forward forward_of(const ListSlice& in, const ListSlice& out) const;
  void place_weights();
  void take_by_panel();

  std::vector<int32_t> relative_;  // the index of `out`, where first_ > 0
  int64_t first_ = 0;              // the job's first channel
  bool last_ = true;               // true if no job writes channels after this one's
};

// Samples that take their panels out of the same lines of a large weight, in turn.
void run_in_steps(std::vector<LiveSample>& samples);

}  // namespace dynops::cpu
