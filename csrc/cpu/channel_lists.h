// The lists of a ChannelPlan, checked: what every channel op on the CPU reads.
#pragma once

#include <numeric>
#include <vector>

#include "operands.h"

namespace dynops::cpu {

// One list for each sample and head, or one for each head that all samples share, or (without an index) all
// channels everywhere.
class ChannelLists {
 public:
  ChannelLists(const OptionalTensor& index, const OptionalTensor& count, int64_t batch, int64_t heads,
               int64_t channels)
      : channels_(int32_t(channels)), heads_(heads) {
    if (!index) {
      all_.resize(static_cast<size_t>(channels));
      std::iota(all_.begin(), all_.end(), 0);
      return;
    }
    STD_TORCH_CHECK(index->scalar_type() == ScalarType::Int && index->dim() == 2 && count &&
                        count->scalar_type() == ScalarType::Int && count->dim() == 1 &&
                        count->size(0) == index->size(0),
                    "index, count: expected int32 [S, L] and [S], got ", index->dim(), " dimensions, ",
                    count ? count->numel() : 0, " counts");
    index_ = torch::stable::contiguous(*index);
    count_ = torch::stable::contiguous(*count);
    length_ = index->size(1);
    shared_ = index->size(0) == heads;
    STD_TORCH_CHECK(shared_ || index->size(0) == batch * heads, "index: expected ", batch, " x ", heads,
                    " lists, got ", index->size(0));
    for (int64_t s = 0; s < index->size(0); ++s) check(s);
  }

  ChannelList of(int64_t sample, int64_t head = 0) const {
    if (!index_) return {all_.data(), channels_, channels_};
    return list(shared_ ? head : sample * heads_ + head);
  }
  bool shared() const { return !index_ || shared_; }

 private:
  ChannelList list(int64_t s) const {
    return {data_of<const int32_t>(*index_) + s * length_, data_of<const int32_t>(*count_)[s], channels_};
  }

  // A kernel that met another list would read and write outside of its rows.
  void check(int64_t s) const {
    const ChannelList l = list(s);
    STD_TORCH_CHECK(l.count >= 0 && l.count <= length_, "count: expected 0 to ", length_, ", got ", l.count);
    bool ascends = true;
    for (int32_t j = 1; j < l.count; ++j) ascends &= l.index[j - 1] < l.index[j];
    STD_TORCH_CHECK(ascends && (l.count == 0 || (l.index[0] >= 0 && l.index[l.count - 1] < channels_)),
                    "index: expected strictly ascending channels in [0, ", channels_,
                    "), got others in list ", s);
  }

  int32_t channels_;
  int64_t heads_, length_ = 0;
  bool shared_ = false;
  OptionalTensor index_, count_;
  std::vector<int32_t> all_;
};

}  // namespace dynops::cpu
