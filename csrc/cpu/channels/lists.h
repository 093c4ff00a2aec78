// The live channels of a batch, as the ops on channels get them.
#pragma once

#include <vector>

#include "../engine/operands.h"

namespace dynops::cpu {

// The channels that two lists share, and where they stand in both.
struct Overlap {
  std::vector<int32_t> channel, in, out;

  Overlap(const ChannelList& inputs, const ChannelList& outputs) {
    for (int32_t i = 0, o = 0; i < inputs.count && o < outputs.count;) {
      if (inputs.index[i] == outputs.index[o]) {
        channel.push_back(inputs.index[i]);
        in.push_back(i);
        out.push_back(o);
      }
      const int32_t step = inputs.index[i] - outputs.index[o];
      i += step <= 0;
      o += step >= 0;
    }
  }
};

// The entries of a list that lie in one slice of its channels, counted from the slice's first.
struct ListSlice {
  ChannelList list;
  int64_t begin;  // entries before them
  int64_t first;  // the slice's first channel
};

// Lists int32 [S, L] with counts [S]: for each sample and head, or `heads` for all samples; or none, where
// every channel is live.
class ChannelLists {
 public:
  // Throws where a list is not strictly ascending in [0, channels). `groups`: equal slices of channels.
  ChannelLists(const OptionalTensor& index, const OptionalTensor& count, int64_t channels, int64_t groups,
               int64_t heads, int64_t batch)
      : channels_(int32_t(channels)), heads_(heads), width_(int32_t(channels / groups)) {
    if (index) {
      adopt(*index, *count, batch);
    } else {
      all_ = ascending(channels);
      index_ = all_.data();
      count_.assign(heads, channels_);
      stride_ = 0;
    }
    if (groups > 1) make_relative();
  }

  bool shared() const { return int64_t(count_.size()) == heads_; }
  int64_t heads() const { return heads_; }
  int64_t channels() const { return channels_; }
  int64_t lists() const { return int64_t(count_.size()); }
  int64_t total() const { return std::accumulate(count_.begin(), count_.end(), int64_t(0)); }
  int64_t longest() const { return count_.empty() ? 0 : *std::max_element(count_.begin(), count_.end()); }

  ChannelList whole(int64_t sample, int64_t head = 0) const {
    const int64_t s = row(sample, head);
    return {index_ + s * stride_, count_[s], channels_};
  }

  // The entries in the group's slice of channels.
  ListSlice group(int64_t sample, int64_t group) const {
    const int64_t s = row(sample, 0);
    const int32_t* list = index_ + s * stride_;
    const int32_t* end = list + count_[s];
    const int32_t* first = std::lower_bound(list, end, int32_t(group) * width_);
    const int32_t* last = std::lower_bound(first, end, int32_t(group + 1) * width_);
    const int32_t* relative = width_ == channels_ ? first : relative_.data() + (first - index_);
    return {{relative, int32_t(last - first), width_}, first - list, group * width_};
  }

 private:
  int64_t row(int64_t sample, int64_t head) const { return shared() ? head : sample * heads_ + head; }

  void adopt(const Tensor& index, const Tensor& count, int64_t batch) {
    STD_TORCH_CHECK(index.dim() == 2 && index.scalar_type() == ScalarType::Int && index.is_contiguous() &&
                        count.dim() == 1 && count.scalar_type() == ScalarType::Int && count.is_contiguous() &&
                        count.size(0) == index.size(0),
                    "index, count: expected contiguous int32 [S, L] and [S]");
    const int64_t lists = index.size(0);
    STD_TORCH_CHECK(lists == heads_ || lists == heads_ * batch, "index: expected ", heads_, " or ",
                    heads_ * batch, " lists, got ", lists);
    index_ = data_of<const int32_t>(index);
    stride_ = index.size(1);
    const int32_t* counts = data_of<const int32_t>(count);
    count_.assign(counts, counts + lists);
    for (int64_t s = 0; s < lists; ++s) {
      const int32_t* list = index_ + s * stride_;
      const int64_t live = count_[s];
      bool ascends = live >= 0 && live <= stride_;
      for (int64_t j = 1; ascends && j < live; ++j) ascends = list[j - 1] < list[j];
      STD_TORCH_CHECK(ascends && (live == 0 || (list[0] >= 0 && list[live - 1] < channels_)),
                      "index: expected ascending channels in [0, ", channels_, ") in list ", s);
    }
  }

  void make_relative() {
    relative_.resize(stride_ ? count_.size() * stride_ : all_.size());
    for (size_t i = 0; i < relative_.size(); ++i) relative_[i] = index_[i] % width_;
  }

  const int32_t* index_;
  int64_t stride_;
  std::vector<int32_t> count_, all_, relative_;
  int32_t channels_;
  int64_t heads_;
  int32_t width_;
};

}  // namespace dynops::cpu
