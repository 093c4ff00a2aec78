// A convolution on live channels: the call that all of its jobs share.
#pragma once

#include <memory>

#include "../engine/forward.h"
#include "lists.h"

namespace dynops::cpu {

// Memory that a thread keeps from call to call, up to 4 MB: a new allocation of 1 MB faults in for 100 us.
class Buffer {
 public:
  char* at_least(int64_t bytes) {
    if (bytes > size_) {
      data_.reset(new char[bytes + kLine]);
      size_ = bytes;
    }
    return data_.get() + (kLine - reinterpret_cast<uintptr_t>(data_.get()) % kLine) % kLine;
  }
  void shrink() {
    if (size_ > kKept) data_.reset(), size_ = 0;
  }

 private:
  static constexpr int64_t kLine = 64, kKept = 4 << 20;
  std::unique_ptr<char[]> data_;
  int64_t size_ = 0;
};

// Row q of a map lies at data + q * stride; `data` itself need not be memory of ours.
struct RowsAt {
  intptr_t data;
  int64_t stride;
  // Memory that holds the rows from `first` on.
  static RowsAt from(const char* rows, int64_t stride, int64_t first) {
    return {reinterpret_cast<intptr_t>(rows) - intptr_t(first * stride), stride};
  }
  char* row(int64_t q) const { return reinterpret_cast<char*>(data + intptr_t(q * stride)); }
};

// A map of the call, channels_last: rows of all channels, or of packed ones.
struct Map {
  char* data;
  int64_t stride;  // bytes of a row
  bool packed;
};

struct Call {
  Geometry g;       // of a job: groups 1, and the batch 1, or N where all samples have the same lists
  int64_t samples;  // N, or 1 where the batch is one job's
  int64_t slices;   // groups or heads: outputs of one slice read inputs of one slice
  ChannelLists in, out;
  Dtype dtype;
  Map x, y;
  const char* base = nullptr;
  const char* weight;       // packed, of each slice
  PanelLayout layout = {};  // of one slice
  int64_t segments;         // in which its depth falls
  bool merged = false, turned = false, winograd = false, dot = false, depthwise = false;
  std::vector<float> bias = {};  // [O] or empty; [N, O] where weights are mixed
  const float* scale = nullptr;  // [N, O] or null
  Activation activation;
  std::vector<RowClass> classes = {};
  std::vector<RowClass> tap_groups =
      {};  // a panel of a large weight is brought and multiplied by one at a time
  std::vector<int32_t> pixels = {}, quads = {}, run = {};  // run: the inputs of merged taps
  std::vector<char> compact = {};        // the weight, where all samples share it; else empty
  std::vector<int64_t> compact_of = {};  // [slices]: where a slice's begins
  const char* zero = nullptr;
  // A sample's weight is a mixture of `experts` ones, `expert_bytes` apart: mix is [N, experts], or null.
  const float* mix = nullptr;
  int64_t experts = 1, expert_bytes = 0;

  int64_t element() const { return size_of(dtype); }
  int64_t outputs() const { return out.channels(); }
  int64_t positions() const { return winograd ? 16 : 1; }
  float bias_of(int64_t sample, int64_t channel) const {
    if (bias.empty()) return 0.f;
    return bias[(int64_t(bias.size()) > outputs() ? sample * outputs() : 0) + channel];
  }
  // True if the output is written past the caches.
  bool streams() const { return !y.packed && samples * g.out_pixels() * y.stride >= kStreamBytes; }
  // Heads of the output each add to it.
  bool accumulates() const { return out.heads() > 1; }

  ListSlice in_slice(int64_t sample, int64_t i) const {
    if (merged) return {{run.data(), int32_t(run.size()), int32_t(run.size())}, 0, 0};
    return slice(in, sample, i);
  }
  ListSlice out_slice(int64_t sample, int64_t i) const { return slice(out, sample, i); }

  // The sample's rows of the maps.
  int64_t first_row(int64_t sample, int64_t pixels_a_sample) const {
    return samples > 1 ? sample * pixels_a_sample : 0;
  }
  const char* x_of(int64_t sample) const { return x.data + first_row(sample, g.in_pixels()) * x.stride; }
  char* y_of(int64_t sample) const { return y.data + first_row(sample, g.out_pixels()) * y.stride; }

  // The scale and shift after the sums of a sample's live channels, from `first` on, in `columns` columns.
  Affine affine_of(int64_t sample, const ChannelList& live, int64_t first, int64_t columns) const {
    Affine affine(columns);
    for (int32_t j = 0; j < live.count; ++j) {
      const int64_t channel = first + live.index[j];
      affine.scale[j] = scale ? scale[sample * outputs() + channel] : 1.f;
      affine.shift[j] = affine.scale[j] * bias_of(sample, channel);
    }
    return affine;
  }

  // The output is walked in units of one line, or of two for winograd, which do not cross samples.
  int64_t unit_lines() const { return winograd ? 2 : 1; }
  int64_t sample_units() const { return ceil_div(g.out_h, unit_lines()); }
  int64_t units() const { return g.batch * sample_units(); }
  int64_t line_of(int64_t unit) const {
    return unit / sample_units() * g.out_h + std::min(unit % sample_units() * unit_lines(), g.out_h);
  }
  Span lines_of(Span units) const { return {line_of(units.begin), line_of(units.end)}; }
  Span rows_of(Span lines) const { return {lines.begin * g.out_w, lines.end * g.out_w}; }
  // The rows of a class among `rows` of the output.
  Span of_class(const RowClass& one, Span rows) const {
    if (one.all) return rows;
    const auto at = [&](int64_t row) {
      return std::lower_bound(one.rows.begin(), one.rows.end(), int32_t(row)) - one.rows.begin();
    };
    return {at(rows.begin), at(rows.end)};
  }
  int64_t unit_tiles() const { return (g.out_w + 1) / 2; }

 private:
  static ListSlice slice(const ChannelLists& lists, int64_t sample, int64_t i) {
    return lists.heads() > 1 ? ListSlice{lists.whole(sample, i), 0, 0} : lists.group(sample, i);
  }
};

// Samples that take a large weight in turn.
inline constexpr int64_t kSampleGroup = 4;

// The work of some samples, or a share of it: units of the output, and panels of live channels (one slice).
struct Job {
  Span samples, units, panels;
};

// The lines of the input that these lines of the output read.
inline Span input_lines(const Geometry& g, Span lines) {
  const auto line = [&](int64_t out_line, int64_t y) {
    return out_line / g.out_h * g.in_h + std::clamp<int64_t>(y, 0, g.in_h);
  };
  const int64_t reach = (g.kernel_h - 1) * g.dil_h, first = lines.begin, last = lines.end - 1;
  const int64_t a = first % g.out_h, b = last % g.out_h;
  const Span read = g.transposed ? Span{line(first, std::max<int64_t>(a + g.pad_h - reach, 0) / g.stride_h),
                                        line(last, (b + g.pad_h) / g.stride_h + 1)}
                                 : Span{line(first, a * g.stride_h - g.pad_h),
                                        line(last, b * g.stride_h - g.pad_h + reach + 1)};
  return {read.begin, std::max(read.begin, read.end)};
}

// Brings `rows` computed rows of live channels, `stride` bytes apart, to the output's rows from `first` and
// channels from `channel` on. Fills the channels that are not live. stride 0: they lie there already. `last`:
// no other job fills what follows the live channels of a packed row.
void write_rows(const Call& c, const ChannelList& live, int64_t first, int64_t rows, const char* computed,
                int64_t stride, int64_t channel, bool last);

void run_channel_job(const Call& c, const Job& job);
void run_depthwise_job(const Call& c, const Job& job);
// Compacts the weight of every slice, on all threads.
void compact_weights(Call& c);

}  // namespace dynops::cpu
