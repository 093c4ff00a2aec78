// Samples on live channels that take a large weight in turn, or mix theirs from several. In each step a
// sample brings a group of taps of one panel, and multiplies its rows by them.
#include "job.h"

namespace dynops::cpu {
namespace {

class SteppedSample {
 public:
  // The sample must stay where it is.
  explicit SteppedSample(LiveSample& sample) : one_(sample), c_(sample.call), slice_(sample.slices[0]) {
    const Span lines = c_.lines_of(one_.job.units);
    rows_ = c_.rows_of(lines);
    one_.read(slice_, input_lines(c_.g, lines));
    computed_ = one_.outputs_at(rows_, one_.out.count);
    slice_.f.out_stride = computed_.stride;
    slice_.f.out = computed_.row(0);
    no_shift_.assign(slice_.f.affine.shift.size(), 0.f);
    tables_.resize(c_.tap_groups.size());
    passes_.reserve(c_.tap_groups.size());
    for (size_t i = 0; i < c_.tap_groups.size(); ++i) {
      passes_.emplace_back(slice_.f, c_.tap_groups[i]);
      slice_.f.residual = i ? slice_.f.out : nullptr;
      passes_[i].prepare(tables_[i], rows_.begin, int32_t(rows_.size()));
    }
  }

  int64_t panels() const { return slice_.live.layout.panels; }
  void bring(int64_t panel, size_t taps);
  // The same for samples that lie one after another, where they mix it.
  static void mix(std::vector<SteppedSample>& samples, int64_t panel, size_t taps);
  void multiply(int64_t panel, size_t taps);
  void finish() {
    one_.write(rows_, computed_);
    one_.scratch.shrink();
  }

 private:
  LiveSample& one_;
  const Call& c_;
  LiveSlice& slice_;
  // a pass and a table of rows for each group of taps
  std::vector<ForwardPass> passes_;
  std::vector<RowTables> tables_;
  std::vector<float> no_shift_;
  Span rows_{0, 0};
  RowsAt computed_{0, 0};
  RowsAt weight_{0, 0};  // where segment 0 would lie
};

// The weight of a group of taps, to the place of the first of its segments.
void SteppedSample::bring(int64_t panel, size_t taps) {
  const LiveWeight& live = slice_.live;
  const auto segment_of = [&](int32_t tap) { return c_.turned ? c_.g.taps() - 1 - tap : int64_t(tap); };
  int64_t first = c_.g.taps();
  for (int32_t tap : c_.tap_groups[taps].taps) first = std::min(first, segment_of(tap));
  weight_ = RowsAt::from(one_.panel_memory(), live.segment_bytes(panel), first);
  for (int32_t tap : c_.tap_groups[taps].taps) {
    const int64_t segment = segment_of(tap);
    kernels().pick_panel(live.pick, panel, segment, weight_.row(segment));
  }
}

void SteppedSample::mix(std::vector<SteppedSample>& samples, int64_t panel, size_t taps) {
  const LiveSample& one = samples[0].one_;
  const Call& c = one.call;
  const LiveWeight& live = samples[0].slice_.live;
  const int64_t segment = c.tap_groups[taps].taps[0], bytes = live.segment_bytes(panel);
  const int64_t before = (one.before / kernels().panel_width + panel) * live.panel_bytes();
  char* to[kSampleGroup];
  for (size_t i = 0; i < samples.size(); ++i) {
    to[i] = samples[i].one_.panel_memory();
    samples[i].weight_ = RowsAt::from(to[i], bytes, segment);
  }
  kernels().mix({.from = c.weight + before + segment * bytes,
                 .stride = c.expert_bytes,
                 .terms = c.experts,
                 .share = c.mix + one.sample * c.experts,
                 .outputs = int64_t(samples.size()),
                 .dtype = c.dtype,
                 .n = bytes / 4,
                 .to = to});
}

// Adds the products of a group of taps; the first brings the bias, the last the activation.
void SteppedSample::multiply(int64_t panel, size_t taps) {
  Forward& f = slice_.f;
  const bool first = taps == 0, last = taps + 1 == c_.tap_groups.size();
  if (!first) std::swap(f.affine.shift, no_shift_);
  f.activation = last ? c_.activation : Activation::kNone;
  f.residual = first ? nullptr : f.out;
  f.weight = RowsAt::from(weight_.row(0), slice_.live.panel_bytes(), panel).row(0);
  passes_[taps].multiply(tables_[taps], int32_t(rows_.size()), {panel, panel + 1});
  if (!first) std::swap(f.affine.shift, no_shift_);
}

}  // namespace

// All samples take a group of taps while its lines are in the L2 cache. Each multiplies by what it took while
// that is in the L1 cache.
void run_in_steps(std::vector<LiveSample>& samples) {
  std::vector<SteppedSample> stepped;
  stepped.reserve(samples.size());
  int64_t panels = 0;
  for (LiveSample& one : samples) {
    stepped.emplace_back(one);
    panels = std::max(panels, stepped.back().panels());
  }
  const Call& c = samples[0].call;
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (size_t taps = 0; taps < c.tap_groups.size(); ++taps) {
      if (c.mix) SteppedSample::mix(stepped, panel, taps);
      for (SteppedSample& one : stepped) {
        if (panel >= one.panels()) continue;
        if (!c.mix) one.bring(panel, taps);
        one.multiply(panel, taps);
      }
    }
  }
  for (SteppedSample& one : stepped) one.finish();
}

}  // namespace dynops::cpu
