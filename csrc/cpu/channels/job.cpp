// One job of a convolution on live channels: a sample, or some lines or channels of it.
//
// The live channels of the input are compacted, the live rows and columns of the packed weight make a packed
// weight of their own, the forward pass runs on them, and its rows are spread over the output. Prefixes of
// channels are read, multiplied and written where they lie.
#include <cstring>

#include "../engine/forward_pass.h"
#include "../engine/winograd_pass.h"
#include "call.h"
#include "live_weight.h"

namespace dynops::cpu {
namespace {

struct Scratch {
  Buffer x, y, weight, transformed;
  WinogradPass::Work work;
  static Scratch& mine(int slot) {
    static thread_local Scratch scratch[kSampleGroup];
    return scratch[slot];
  }
  void shrink() {
    for (Buffer* b : {&x, &y, &weight, &transformed}) b->shrink();
  }
};

class Job {
 public:
  // `slot`: of the thread's scratch memory.
  Job(const Call& c, const JobRange& range, int64_t sample, int slot);
  void run();

  // A direct convolution in steps, for samples that take a large weight in turn; only where `in_steps()`.
  bool in_steps() const { return by_panel_ && !c_.winograd; }
  int64_t panels() const { return parts_[0].live.layout.panels; }
  void start();
  void bring(int64_t panel, size_t taps);
  // The same for jobs of samples that lie one after another, where they mix it.
  static void mix(std::vector<Job>& jobs, int64_t panel, size_t taps);
  void multiply(int64_t panel, size_t taps);
  void finish();

 private:
  struct Part {
    ListPart in, out;
    LiveWeight live;
    Forward f;
    int64_t position_bytes;
  };

  void choose_outputs();
  Forward forward_of(const ListPart& in, const ListPart& out) const;
  void place_weights();
  void take_by_panel();
  char* panel_memory() const;
  int64_t chunk_units() const;
  void run_chunk(Range units);
  void read(Part& part, Range lines);
  void compute(Part& part, Range units, Range rows);
  void compute_direct(Part& part, Range rows);
  void compute_winograd(Part& part, Range units);
  RowsAt outputs_at(Range rows, int64_t most);
  void write(Range rows, const RowsAt& computed);

  // Memory of the sample in the output, and at the job's first channel.
  int64_t sample_rows(int64_t pixels) const { return c_.samples > 1 ? sample_ * pixels : 0; }

  const Call& c_;
  const JobRange range_;
  const int64_t sample_;
  Scratch& s_;
  Block block_;
  // of the steps: a pass and a table of rows for each group of taps
  std::vector<ForwardPass> passes_;
  std::vector<Block> tap_blocks_;
  std::vector<float> no_shift_;
  Range rows_{0, 0};
  RowsAt computed_{0, 0};
  std::vector<Part> parts_;
  ChannelList out_{};              // the job's live outputs, counted from channel first_
  std::vector<int32_t> relative_;  // its index, where first_ > 0
  int64_t first_ = 0, before_ = 0;
  bool empty_ = false;     // its list ends before the job's panels
  bool last_ = true;       // whether no job writes channels after this one's
  bool in_place_ = false;  // outputs are computed where they lie
  bool by_panel_ = false;  // the weight comes panel by panel, to panel_memory()
  RowsAt weight_{0, 0};  // of the steps: where segment 0 would lie
};

Job::Job(const Call& c, const JobRange& range, int64_t sample, int slot)
    : c_(c), range_(range), sample_(sample), s_(Scratch::mine(slot)) {
  choose_outputs();
  if (empty_) return;
  parts_.reserve(size_t(c.parts));
  for (int64_t p = 0; p < c.parts; ++p) {
    const ListPart in = c.in_part(sample, p);
    ListPart out = c.out_part(sample, p);
    if (c.parts == 1) {
      out.list.index += before_;
      out.list.count = out_.count;
    }
    parts_.push_back({in, out, LiveWeight(c, p, in.list, out.list), forward_of(in, out), 0});
  }
  place_weights();
}

void Job::choose_outputs() {
  out_ = c_.out.whole(sample_);
  const int64_t width = kernels().panel_width, all = out_.count, channels = out_.channels;
  if (c_.parts == 1) {
    empty_ = range_.panels.begin > 0 && range_.panels.begin * width >= all;
    if (empty_) return;
    const int64_t stop = std::min(range_.panels.end * width, all);
    before_ = std::min(range_.panels.begin * width, stop);
    last_ = stop == all;
    first_ = before_ ? out_.index[before_] : 0;
    relative_.assign(out_.index + before_, out_.index + stop);
    for (int32_t& channel : relative_) channel -= int32_t(first_);
    out_ = {relative_.data(), int32_t(stop - before_),
            int32_t((last_ ? channels : out_.index[stop]) - first_)};
  }
  // whole lines past the caches, zeros and all, are the quicker where the output is large
  const bool prefix = c_.parts == 1 && out_.prefix() && !c_.streams();
  in_place_ = !c_.accumulates() && (c_.y.packed || out_.full() || prefix);
}

Forward Job::forward_of(const ListPart& in, const ListPart& out) const {
  // whole vectors where there is room for them: the weight's columns past the last live one are zero
  const bool rounds = !in_place_ && (c_.parts == 1 || c_.accumulates());
  const int64_t columns = rounds ? round_up(out.list.count, kernels().lanes) : out.list.count;
  Affine affine;
  affine.scale.assign(size_t(columns) + 64, 1.f);
  affine.shift.assign(size_t(columns) + 64, 0.f);
  for (int32_t j = 0; j < out.list.count; ++j) {
    const int64_t channel = out.first + out.list.index[j];
    const float scale = c_.scale ? c_.scale[sample_ * c_.outputs() + channel] : 1.f;
    affine.scale[size_t(j)] = scale;
    affine.shift[size_t(j)] = scale * c_.bias_of(sample_, channel);
  }
  Forward f{c_.g,
            in.list.count / (c_.merged ? c_.g.kernel_w : 1),
            columns,
            c_.g.out_pixels(),
            c_.dtype,
            c_.pixels.data(),
            {c_.g, nullptr, 0, nullptr, c_.zero, c_.merged},
            std::move(affine),
            c_.activation,
            nullptr,
            nullptr,
            nullptr,
            nullptr,
            nullptr,
            true,
            false};
  f.turned = c_.turned;
  return f;
}

// Each part's weight: where it lies, compacted for all jobs, or compacted here, whole or panel by panel.
void Job::place_weights() {
  if (c_.mix) return take_by_panel();
  int64_t bytes = 0;
  for (size_t p = 0; p < parts_.size(); ++p) {
    Part& part = parts_[p];
    const ChannelList& columns = part.out.list;
    part.position_bytes = part.live.layout.group_bytes;
    if (lies_packed(c_.layout, part.in.list, columns)) {
      const int64_t first = columns.count ? columns.index[0] : 0;
      part.f.weight = part.live.pick.from + first * c_.layout.depth * (c_.dot ? 2 : 4);
      part.f.whole = &c_.layout;
      part.position_bytes = c_.layout.group_bytes;
    } else if (!c_.compact.empty()) {
      const ListPart all = c_.out_part(sample_, int64_t(p));
      part.position_bytes = LiveWeight(c_, int64_t(p), part.in.list, all.list).layout.group_bytes;
      part.f.weight =
          c_.compact.data() + c_.compact_of[p] + before_ / kernels().panel_width * part.live.panel_bytes();
    } else {
      bytes += round_up(part.live.bytes(), 64);
    }
  }
  if (!bytes) return;
  const bool fits = c_.parts == 1 && chunk_units() >= range_.units.size();
  if (fits && c_.classes.size() == 1 && !parts_[0].f.converts() && !c_.merged) return take_by_panel();
  char* at = s_.weight.at_least(bytes);
  for (Part& part : parts_) {
    if (part.f.weight) continue;
    for (int64_t panel = 0; panel < part.live.layout.panels; ++panel)
      part.live.bring(panel, at + panel * part.live.panel_bytes(), part.position_bytes);
    part.f.weight = at;
    at += round_up(part.live.bytes(), 64);
  }
}

// The weight comes panel by panel. Samples that mix get theirs at once, others one after another at one
// place.
void Job::take_by_panel() {
  by_panel_ = true;
  parts_[0].position_bytes = parts_[0].live.panel_bytes();
}

// Asked for at each use: the sample before may have had smaller panels, and its memory has moved since.
char* Job::panel_memory() const {
  Scratch& s = c_.mix ? s_ : Scratch::mine(0);
  return s.weight.at_least(parts_[0].live.panel_bytes() * c_.positions());
}

// Units whose compact input, transformed input and outputs stay in the L2 cache.
int64_t Job::chunk_units() const {
  constexpr int64_t kChunkBytes = 512 << 10;
  int64_t in = 0;
  for (const Part& part : parts_) in = std::max<int64_t>(in, part.in.list.count);
  const int64_t pixels = c_.unit_lines() * c_.g.out_w;
  const int64_t bytes = pixels * (in + (in_place_ ? 0 : out_.count)) * c_.element() +
                        (c_.winograd ? c_.unit_tiles() * kPositions * in * 4 : 0);
  return std::max<int64_t>(kChunkBytes / std::max<int64_t>(bytes, 1), 1);
}

void Job::run() {
  if (empty_) return;
  if (in_steps()) {
    start();
    for (int64_t panel = 0; panel < panels(); ++panel) {
      for (size_t taps = 0; taps < c_.tap_groups.size(); ++taps) {
        bring(panel, taps);
        multiply(panel, taps);
      }
    }
    return finish();
  }
  const int64_t first = range_.units.begin, units = range_.units.size();
  const int64_t chunks = (units + chunk_units() - 1) / chunk_units();
  for (int64_t i = 0; i < chunks; ++i)
    run_chunk({first + part(units, i, chunks), first + part(units, i + 1, chunks)});
  s_.shrink();
}

void Job::run_chunk(Range units) {
  const Range lines{c_.line_of(units.begin), c_.line_of(units.end)};
  const Range rows{lines.begin * c_.g.out_w, lines.end * c_.g.out_w}, in = input_lines(c_.g, lines);
  if (rows.size() <= 0) return;
  int64_t most = out_.count;
  if (c_.accumulates())
    for (const Part& part : parts_) most = std::max<int64_t>(most, part.out.list.count);
  char* const y = c_.y.data + sample_rows(c_.g.out_pixels()) * c_.y.stride;
  const RowsAt computed = outputs_at(rows, most);
  const int64_t stride = computed.stride;
  for (Part& part : parts_) {
    const bool adds = c_.accumulates() && &part != parts_.data();
    if (c_.accumulates()) out_ = part.out.list;
    if (adds)
      kernels().compress(y + rows.begin * c_.y.stride, c_.y.stride, rows.size(), out_, c_.dtype,
                         computed.row(rows.begin), stride);
    const int64_t offset = c_.parts == 1 || c_.accumulates() ? 0 : part.out.begin * c_.element();
    part.f.out_stride = computed.stride;
    part.f.out = computed.row(0) + offset;
    part.f.residual = adds ? part.f.out : nullptr;
    if (part.out.list.count) {
      read(part, in);
      compute(part, units, rows);
    }
    if (c_.accumulates())
      kernels().expand(computed.row(rows.begin), stride, rows.size(), out_, c_.dtype,
                       adds ? y + rows.begin * c_.y.stride : nullptr, c_.y.stride,
                       y + rows.begin * c_.y.stride, c_.y.stride, false);
  }
  if (!c_.accumulates()) write(rows, computed);
}

// Where the rows' outputs are computed, up to `most` of a row.
RowsAt Job::outputs_at(Range rows, int64_t most) {
  if (in_place_) {
    char* const y = c_.y.data + sample_rows(c_.g.out_pixels()) * c_.y.stride;
    return RowsAt::from(y + (c_.y.packed ? before_ : first_) * c_.element(), c_.y.stride, 0);
  }
  const int64_t stride = round_up(round_up(most, kernels().lanes) * c_.element(), 64);
  return RowsAt::from(s_.y.at_least(rows.size() * stride), stride, rows.begin);
}

void Job::write(Range rows, const RowsAt& computed) {
  write_rows(c_, out_, sample_rows(c_.g.out_pixels()) + rows.begin, rows.size(), computed.row(rows.begin),
             in_place_ ? 0 : computed.stride, c_.y.packed ? before_ : first_, last_);
}

void Job::start() {
  Part& part = parts_[0];
  const Range lines{c_.line_of(range_.units.begin), c_.line_of(range_.units.end)};
  rows_ = {lines.begin * c_.g.out_w, lines.end * c_.g.out_w};
  read(part, input_lines(c_.g, lines));
  computed_ = outputs_at(rows_, out_.count);
  part.f.out_stride = computed_.stride;
  part.f.out = computed_.row(0);
  no_shift_.assign(part.f.affine.shift.size(), 0.f);
  tap_blocks_.resize(c_.tap_groups.size());
  passes_.reserve(c_.tap_groups.size());
  for (size_t i = 0; i < c_.tap_groups.size(); ++i) {
    passes_.emplace_back(part.f, c_.tap_groups[i]);
    part.f.residual = i ? part.f.out : nullptr;
    passes_[i].prepare(tap_blocks_[i], rows_.begin, int32_t(rows_.size()));
  }
}

// The weight of a group of taps, to the place of the first of its segments.
void Job::bring(int64_t panel, size_t taps) {
  const LiveWeight& live = parts_[0].live;
  const auto segment_of = [&](int32_t tap) { return c_.turned ? c_.g.taps() - 1 - tap : int64_t(tap); };
  int64_t first = c_.g.taps();
  for (int32_t tap : c_.tap_groups[taps].taps) first = std::min(first, segment_of(tap));
  const int64_t bytes = live.segment_bytes(panel);
  weight_ = RowsAt::from(panel_memory(), bytes, first);
  for (int32_t tap : c_.tap_groups[taps].taps) {
    const int64_t segment = segment_of(tap);
    kernels().pick_panel(live.pick, panel, segment, weight_.row(segment));
  }
}

void Job::mix(std::vector<Job>& jobs, int64_t panel, size_t taps) {
  const Job& one = jobs[0];
  const Call& c = one.c_;
  const LiveWeight& live = one.parts_[0].live;
  const int64_t segment = c.tap_groups[taps].taps[0], bytes = live.segment_bytes(panel);
  const int64_t before = (one.before_ / kernels().panel_width + panel) * live.panel_bytes();
  char* to[kSampleGroup];
  for (size_t i = 0; i < jobs.size(); ++i) {
    to[i] = jobs[i].panel_memory();
    jobs[i].weight_ = RowsAt::from(to[i], bytes, segment);
  }
  kernels().mix({c.weight + before + segment * bytes, c.expert_bytes, c.experts,
                 c.mix + one.sample_ * c.experts, int64_t(jobs.size()), c.dtype, bytes / 4, to});
}

// Adds the products of a group of taps; the first brings the bias, the last the activation.
void Job::multiply(int64_t panel, size_t taps) {
  Forward& f = parts_[0].f;
  const bool first = taps == 0, last = taps + 1 == c_.tap_groups.size();
  if (!first) std::swap(f.affine.shift, no_shift_);
  f.activation = last ? c_.activation : Activation::kNone;
  f.residual = first ? nullptr : f.out;
  f.weight = RowsAt::from(weight_.row(0), parts_[0].live.panel_bytes(), panel).row(0);
  passes_[taps].multiply(tap_blocks_[taps], int32_t(rows_.size()), panel, panel + 1);
  if (!first) std::swap(f.affine.shift, no_shift_);
}

void Job::finish() {
  write(rows_, computed_);
  s_.shrink();
}

// Sets where the part's live channels of the input lie side by side; compacts them if they do not.
void Job::read(Part& part, Range lines) {
  const char* map = c_.x.data + sample_rows(c_.g.in_pixels()) * c_.x.stride;
  Source& source = part.f.source;
  source.row_bytes = c_.x.stride;
  part.f.near = c_.mix != nullptr;  // for all panels but the first
  if (c_.x.packed || part.in.list.prefix()) {
    source.x = map + (c_.x.packed ? part.in.begin : part.in.first) * c_.element();
    return;
  }
  const int64_t first = lines.begin * c_.g.in_w, pixels = std::max<int64_t>(lines.size(), 0) * c_.g.in_w;
  const int64_t stride = round_up(part.in.list.count * c_.element(), 64);
  char* to = s_.x.at_least(pixels * stride);
  kernels().compress(map + first * c_.x.stride + part.in.first * c_.element(), c_.x.stride, pixels,
                     part.in.list, c_.dtype, to, stride);
  source.x = RowsAt::from(to, stride, first).row(0);
  source.row_bytes = stride;
  part.f.near = true;
}

void Job::compute(Part& part, Range units, Range rows) {
  c_.winograd ? compute_winograd(part, units) : compute_direct(part, rows);
}

void Job::compute_direct(Part& part, Range rows) {
  for (const RowClass& rows_of : c_.classes) {
    const Range range = c_.of_class(rows_of, rows);
    const ForwardPass pass(part.f, rows_of);
    pass.run(block_, range.begin, range.end, 0, pass.panels());
  }
}

void Job::compute_winograd(Part& part, Range units) {
  const int64_t begin = units.begin * c_.unit_tiles(), end = units.end * c_.unit_tiles();
  const int64_t channels = part.f.in_channels;
  const WinogradPass pass(part.f, c_.quads.data(), int64_t(c_.quads.size()) / 5, part.position_bytes);
  float* v = reinterpret_cast<float*>(s_.transformed.at_least((end - begin) * kPositions * channels * 4));
  pass.transform(begin, end, v, (end - begin) * channels);
  for (int64_t panel = 0; panel < part.live.layout.panels; ++panel) {
    if (by_panel_) {
      char* const memory = panel_memory();
      part.live.bring(panel, memory, part.position_bytes);
      part.f.weight = RowsAt::from(memory, part.live.panel_bytes(), panel).row(0);
    }
    pass.multiply(begin, end, v, panel, panel + 1, s_.work);
  }
}

}  // namespace

void run_channel_job(const Call& c, const JobRange& range) {
  if (range.samples.size() == 1 && !c.mix) return Job(c, range, range.samples.begin, 0).run();
  std::vector<Job> jobs;
  jobs.reserve(size_t(range.samples.size()));
  int64_t panels = 0;
  for (int64_t sample = range.samples.begin; sample < range.samples.end; ++sample) {
    jobs.emplace_back(c, range, sample, int(jobs.size()));
    if (!jobs.back().in_steps()) {
      jobs.back().run();
      jobs.pop_back();
      continue;
    }
    jobs.back().start();
    panels = std::max(panels, jobs.back().panels());
  }
  // The samples take their panels out of the same lines of the weight, a group of taps at a time, while these
  // are in the L2 cache, and multiply by what they took while it is in the L1 cache.
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (size_t taps = 0; taps < c.tap_groups.size(); ++taps) {
      if (c.mix) Job::mix(jobs, panel, taps);
      for (Job& job : jobs) {
        if (panel >= job.panels()) continue;
        if (!c.mix) job.bring(panel, taps);
        job.multiply(panel, taps);
      }
    }
  }
  for (Job& job : jobs) job.finish();
}

void compact_weights(Call& c) {
  std::vector<LiveWeight> parts;
  std::vector<std::pair<size_t, int64_t>> panels;
  int64_t bytes = 0;
  for (int64_t p = 0; p < c.parts; ++p) {
    const ChannelList rows = c.in_part(0, p).list, columns = c.out_part(0, p).list;
    parts.emplace_back(c, p, rows, columns);
    c.compact_of.push_back(bytes);
    if (lies_packed(c.layout, rows, columns)) continue;
    for (int64_t i = 0; i < parts.back().layout.panels; ++i) panels.emplace_back(size_t(p), i);
    bytes += parts.back().bytes();
  }
  c.compact.resize(size_t(bytes));
  const int64_t threads = threads_for(double(bytes), 64 << 10);
  parallel(threads, [&](int64_t t) {
    const int64_t all = int64_t(panels.size());
    for (int64_t i = part(all, t, threads); i < part(all, t + 1, threads); ++i) {
      const auto& [p, panel] = panels[size_t(i)];
      parts[p].bring(panel, c.compact.data() + c.compact_of[p] + panel * parts[p].panel_bytes(),
                     parts[p].layout.group_bytes);
    }
  });
}

}  // namespace dynops::cpu
