// One job of a convolution on live channels: a sample, or some lines or channels of it.
#include "job.h"

namespace dynops::cpu {

Scratch& Scratch::mine(int slot) {
  static thread_local Scratch scratch[kSampleGroup];
  return scratch[slot];
}

LiveSample::LiveSample(const Call& c, const Job& job, int64_t sample, int slot)
    : call(c), job(job), sample(sample), scratch(Scratch::mine(slot)) {
  if (!choose_outputs()) return;
  slices.reserve(c.slices);
  for (int64_t i = 0; i < c.slices; ++i) {
    const ListSlice from = c.in_slice(sample, i);
    ListSlice to = c.out_slice(sample, i);
    if (c.slices == 1) {
      to.list.index += before;
      to.list.count = out.count;
    }
    slices.push_back({from, to, LiveWeight(c, i, from.list, to.list), forward_of(from, to)});
  }
  place_weights();
}

// The live outputs of the job's panels. Returns whether there are any panels.
bool LiveSample::choose_outputs() {
  out = call.out.whole(sample);
  const int64_t width = kernels().panel_width, all = out.count, channels = out.channels;
  if (call.slices == 1) {
    if (job.panels.begin > 0 && job.panels.begin * width >= all) return false;
    const int64_t stop = std::min(job.panels.end * width, all);
    before = std::min(job.panels.begin * width, stop);
    last_ = stop == all;
    first_ = before ? out.index[before] : 0;
    relative_.assign(out.index + before, out.index + stop);
    for (int32_t& channel : relative_) channel -= int32_t(first_);
    out = {relative_.data(), int32_t(stop - before), int32_t((last_ ? channels : out.index[stop]) - first_)};
  }
  // whole lines past the caches, zeros and all, are the quicker where the output is large
  const bool prefix = call.slices == 1 && out.prefix() && !call.streams();
  in_place = !call.accumulates() && (call.y.packed || out.full() || prefix);
  return true;
}

Forward LiveSample::forward_of(const ListSlice& from, const ListSlice& to) const {
  // whole vectors where there is room for them: the weight's columns past the last live one are zero
  const bool rounds = !in_place && (call.slices == 1 || call.accumulates());
  const int64_t columns = rounds ? round_up(to.list.count, kernels().lanes) : to.list.count;
  return {.g = call.g,
          .in_channels = from.list.count / (call.merged ? call.g.kernel_w : 1),
          .out_channels = columns,
          .rows = call.g.out_pixels(),
          .dtype = call.dtype,
          .index = call.pixels.data(),
          .source = {.g = call.g, .zero = call.zero, .merged = call.merged},
          .affine = call.affine_of(sample, to.list, to.first, columns),
          .activation = call.activation,
          .packed_out = true,
          .turned = call.turned};
}

// Finds each slice's weight: where it lies, compacted for all jobs, or compacted here, whole or by panels.
void LiveSample::place_weights() {
  if (call.mix) return take_by_panel();
  int64_t bytes = 0;
  for (size_t i = 0; i < slices.size(); ++i) {
    LiveSlice& slice = slices[i];
    const ChannelList& columns = slice.out.list;
    slice.position_bytes = slice.live.layout.group_bytes;
    if (lies_packed(call.layout, slice.in.list, columns)) {
      const int64_t first = columns.count ? columns.index[0] : 0;
      slice.f.weight = slice.live.pick.from + first * call.layout.depth * (call.dot ? 2 : 4);
      slice.f.whole = &call.layout;
      slice.position_bytes = call.layout.group_bytes;
    } else if (!call.compact.empty()) {
      const ListSlice all = call.out_slice(sample, int64_t(i));
      slice.position_bytes = LiveWeight(call, int64_t(i), slice.in.list, all.list).layout.group_bytes;
      slice.f.weight = call.compact.data() + call.compact_of[i] +
                       before / kernels().panel_width * slice.live.panel_bytes();
    } else {
      bytes += round_up(slice.live.bytes(), 64);
    }
  }
  if (!bytes) return;
  const bool fits = call.slices == 1 && chunk_units() >= job.units.size();
  if (fits && call.classes.size() == 1 && !slices[0].f.converts() && !call.merged) return take_by_panel();
  char* at = scratch.weight.at_least(bytes);
  for (LiveSlice& slice : slices) {
    if (slice.f.weight) continue;
    for (int64_t panel = 0; panel < slice.live.layout.panels; ++panel)
      slice.live.bring(panel, at + panel * slice.live.panel_bytes(), slice.position_bytes);
    slice.f.weight = at;
    at += round_up(slice.live.bytes(), 64);
  }
}

// Samples that mix get their panels at once, others one after another at one place.
void LiveSample::take_by_panel() {
  by_panel = true;
  slices[0].position_bytes = slices[0].live.panel_bytes();
}

// Asked for at each use: the sample before may have had smaller panels, and its memory has moved since.
char* LiveSample::panel_memory() const {
  Scratch& s = call.mix ? scratch : Scratch::mine(0);
  return s.weight.at_least(slices[0].live.panel_bytes() * call.positions());
}

// Units whose compact input, transformed input and outputs stay in the L2 cache.
int64_t LiveSample::chunk_units() const {
  constexpr int64_t kChunkBytes = 512 << 10;
  int64_t in = 0;
  for (const LiveSlice& slice : slices) in = std::max<int64_t>(in, slice.in.list.count);
  const int64_t pixels = call.unit_lines() * call.g.out_w;
  const int64_t bytes = pixels * (in + (in_place ? 0 : out.count)) * call.element() +
                        (call.winograd ? call.unit_tiles() * kPositions * in * 4 : 0);
  return std::max<int64_t>(kChunkBytes / std::max<int64_t>(bytes, 1), 1);
}

void LiveSample::read(LiveSlice& slice, Span lines) {
  const char* map = call.x_of(sample);
  Source& source = slice.f.source;
  source.row_bytes = call.x.stride;
  slice.f.near = call.mix != nullptr;  // for all panels but the first
  if (call.x.packed || slice.in.list.prefix()) {
    source.x = map + (call.x.packed ? slice.in.begin : slice.in.first) * call.element();
    return;
  }
  const int64_t first = lines.begin * call.g.in_w, pixels = std::max<int64_t>(lines.size(), 0) * call.g.in_w;
  const int64_t stride = round_up(slice.in.list.count * call.element(), 64);
  char* to = scratch.x.at_least(pixels * stride);
  kernels().compress(map + first * call.x.stride + slice.in.first * call.element(), call.x.stride, pixels,
                     slice.in.list, call.dtype, to, stride);
  source.x = RowsAt::from(to, stride, first).row(0);
  source.row_bytes = stride;
  slice.f.near = true;
}

RowsAt LiveSample::outputs_at(Span rows, int64_t most) {
  if (in_place) {
    const int64_t channel = call.y.packed ? before : first_;
    return RowsAt::from(call.y_of(sample) + channel * call.element(), call.y.stride, 0);
  }
  const int64_t stride = round_up(round_up(most, kernels().lanes) * call.element(), 64);
  return RowsAt::from(scratch.y.at_least(rows.size() * stride), stride, rows.begin);
}

void LiveSample::write(Span rows, const RowsAt& computed) {
  write_rows(call, out, call.first_row(sample, call.g.out_pixels()) + rows.begin, rows.size(),
             computed.row(rows.begin), in_place ? 0 : computed.stride, call.y.packed ? before : first_,
             last_);
}

namespace {

// A sample whose weight is at hand, or comes panel by panel to Winograd's algorithm: chunk by chunk of lines.
class ChunkedSample {
 public:
  explicit ChunkedSample(LiveSample& sample) : one_(sample), c_(sample.call) {}

  void run() {
    const Span units = one_.job.units;
    const int64_t chunks = ceil_div(units.size(), one_.chunk_units());
    for (int64_t i = 0; i < chunks; ++i) {
      const Span chunk = share_of(units.size(), i, chunks);
      run_chunk({units.begin + chunk.begin, units.begin + chunk.end});
    }
    one_.scratch.shrink();
  }

 private:
  void run_chunk(Span units);
  void compute_direct(LiveSlice& slice, Span rows);
  void compute_winograd(LiveSlice& slice, Span units);

  LiveSample& one_;
  const Call& c_;
  RowTables tables_;
};

void ChunkedSample::run_chunk(Span units) {
  const Span lines = c_.lines_of(units), rows = c_.rows_of(lines), in = input_lines(c_.g, lines);
  if (rows.size() <= 0) return;
  int64_t most = one_.out.count;
  if (c_.accumulates())
    for (const LiveSlice& slice : one_.slices) most = std::max<int64_t>(most, slice.out.list.count);
  const int64_t pitch = c_.y.stride;
  char* const y = c_.y_of(one_.sample) + rows.begin * pitch;
  const RowsAt computed = one_.outputs_at(rows, most);
  char* const sums = computed.row(rows.begin);
  for (LiveSlice& slice : one_.slices) {
    const bool adds = c_.accumulates() && &slice != one_.slices.data();
    const ChannelList& out = slice.out.list;
    if (adds) kernels().compress(y, pitch, rows.size(), out, c_.dtype, sums, computed.stride);
    const int64_t offset = c_.slices == 1 || c_.accumulates() ? 0 : slice.out.begin * c_.element();
    slice.f.out_stride = computed.stride;
    slice.f.out = computed.row(0) + offset;
    slice.f.residual = adds ? slice.f.out : nullptr;
    if (out.count) {
      one_.read(slice, in);
      c_.winograd ? compute_winograd(slice, units) : compute_direct(slice, rows);
    }
    if (c_.accumulates())
      kernels().expand(sums, computed.stride, rows.size(), out, c_.dtype, adds ? y : nullptr, pitch, y, pitch,
                       false);
  }
  if (!c_.accumulates()) one_.write(rows, computed);
}

void ChunkedSample::compute_direct(LiveSlice& slice, Span rows) {
  for (const RowClass& one : c_.classes) {
    const ForwardPass pass(slice.f, one);
    pass.run(tables_, c_.of_class(one, rows), {0, pass.panels()});
  }
}

void ChunkedSample::compute_winograd(LiveSlice& slice, Span units) {
  const Span tiles{units.begin * c_.unit_tiles(), units.end * c_.unit_tiles()};
  const int64_t channels = slice.f.in_channels;
  const WinogradPass pass(slice.f, c_.quads.data(), int64_t(c_.quads.size()) / 5, slice.position_bytes);
  float* v =
      reinterpret_cast<float*>(one_.scratch.transformed.at_least(tiles.size() * kPositions * channels * 4));
  pass.transform(tiles, v, tiles.size() * channels);
  for (int64_t panel = 0; panel < slice.live.layout.panels; ++panel) {
    if (one_.by_panel) {
      char* const memory = one_.panel_memory();
      slice.live.bring(panel, memory, slice.position_bytes);
      slice.f.weight = RowsAt::from(memory, slice.live.panel_bytes(), panel).row(0);
    }
    pass.multiply(tiles, v, {panel, panel + 1}, one_.scratch.work);
  }
}

}  // namespace

void run_channel_job(const Call& c, const Job& job) {
  std::vector<LiveSample> in_steps;
  in_steps.reserve(job.samples.size());
  for (int64_t sample = job.samples.begin; sample < job.samples.end; ++sample) {
    LiveSample one(c, job, sample, int(in_steps.size()));
    if (one.empty()) continue;
    one.in_steps() ? in_steps.push_back(std::move(one)) : ChunkedSample(one).run();
  }
  if (!in_steps.empty()) run_in_steps(in_steps);
}

void compact_weights(Call& c) {
  std::vector<LiveWeight> weights;
  std::vector<std::pair<int64_t, int64_t>> panels;
  int64_t bytes = 0;
  for (int64_t i = 0; i < c.slices; ++i) {
    const ChannelList rows = c.in_slice(0, i).list, columns = c.out_slice(0, i).list;
    weights.emplace_back(c, i, rows, columns);
    c.compact_of.push_back(bytes);
    if (lies_packed(c.layout, rows, columns)) continue;
    for (int64_t panel = 0; panel < weights[i].layout.panels; ++panel) panels.emplace_back(i, panel);
    bytes += weights[i].bytes();
  }
  c.compact.resize(bytes);
  parallel_shares(int64_t(panels.size()), threads_for(double(bytes), 64 << 10), [&](int64_t at) {
    const auto [i, panel] = panels[at];
    weights[i].bring(panel, c.compact.data() + c.compact_of[i] + panel * weights[i].panel_bytes(),
                     weights[i].layout.group_bytes);
  });
}

}  // namespace dynops::cpu
