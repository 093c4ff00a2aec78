// Maps of live channels as float32 rows, for the gradients of weights.
#pragma once

#include "../engine/operands.h"
#include "lists.h"

namespace dynops::cpu {

// The live channels of a sample, in the rows of its map and among the weight's channels.
struct Side {
  ChannelList in_row;      // compressed from a row of the map
  const int32_t* channel;  // [count], ascending

  int32_t count() const { return in_row.count; }
  ChannelList list() const { return {channel, count(), 0}; }
  // The entries of the list whose channels lie in [begin, end).
  Span within(int64_t begin, int64_t end) const {
    const int32_t* last = channel + count();
    const int32_t* first = std::lower_bound(channel, last, int32_t(begin));
    return {first - channel, std::lower_bound(first, last, int32_t(end)) - channel};
  }
  // The side of those channels alone that lie in the span.
  Side within(Span channels) const {
    const Span mine = within(channels.begin, channels.end);
    return {{in_row.index + mine.begin, int32_t(mine.size()), in_row.channels}, channel + mine.begin};
  }
};

// A map [N, H, W, C or width] and its lists.
class LiveMap {
 public:
  LiveMap(const Tensor& map, const ChannelLists& lists, int64_t channels, bool packed)
      : data_(data_of<const char>(map)),
        dtype_(dtype_of(map)),
        pixels_(map.size(2) * map.size(3)),
        row_channels_(map.size(1)),
        lists_(lists),
        packed_(packed) {
    STD_TORCH_CHECK(packed || row_channels_ == channels, "map: expected ", channels, " channels, got ",
                    row_channels_);
    if (packed) positions_ = ascending(row_channels_);
  }

  Side side(int64_t sample, int64_t head) const {
    ChannelList list = lists_.whole(sample, head);
    list.count = std::min(list.count, int32_t(row_channels_));
    const int32_t* in_row = packed_ ? positions_.data() : list.index;
    return {{in_row, list.count, int32_t(row_channels_)}, list.index};
  }

  // Rows [first, first + rows) of a sample's live channels as float32, `stride` floats apart.
  void compact(int64_t sample, const Side& side, int64_t first, int64_t rows, float* to,
               int64_t stride) const {
    const int64_t bytes = row_channels_ * size_of(dtype_), count = side.count();
    const char* from = data_ + (sample * pixels_ + first) * bytes;
    if (dtype_ == Dtype::kFloat32) {
      return kernels().compress(from, bytes, rows, side.in_row, dtype_, reinterpret_cast<char*>(to),
                                stride * 4);
    }
    std::vector<char> line(count * 2);
    for (int64_t i = 0; i < rows; ++i) {
      kernels().compress(from + i * bytes, bytes, 1, side.in_row, dtype_, line.data(), count * 2);
      kernels().to_float(line.data(), dtype_, count, to + i * stride);
    }
  }

  int64_t pixels() const { return pixels_; }
  int64_t row_channels() const { return row_channels_; }
  Dtype dtype() const { return dtype_; }
  const char* row(int64_t sample, int64_t pixel) const {
    return data_ + (sample * pixels_ + pixel) * row_channels_ * size_of(dtype_);
  }

 private:
  const char* data_;
  Dtype dtype_;
  int64_t pixels_, row_channels_;
  const ChannelLists& lists_;
  bool packed_;
  std::vector<int32_t> positions_;  // of packed channels in their row: 0, 1, …
};

}  // namespace dynops::cpu
