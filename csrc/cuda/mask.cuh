// Masks as bits: which elements are nonzero, which are NaN.
#pragma once

#include <cstdint>

namespace dynops::cuda {

// A mask's elements as unsigned integers of their size. `value` cuts the sign of a floating zero;
// above `largest` an element is NaN (nothing is, where the dtype has none).
template <class Word>
struct MaskView {
  const Word* data;
  Word value, largest;

  __host__ __device__ bool active(int64_t i) const { return (data[i] & value) != 0; }
  __host__ __device__ bool nan(int64_t i) const { return (data[i] & value) > largest; }
};

// Counts of a mask in one number: active elements below, NaN above.
template <class Word>
struct CountOf {
  MaskView<Word> mask;

  __host__ __device__ uint64_t operator()(int64_t i) const {
    return uint64_t(mask.active(i)) | uint64_t(mask.nan(i)) << 32;
  }
};

template <class Word>
struct IsActive {
  MaskView<Word> mask;

  __host__ __device__ bool operator()(int32_t i) const { return mask.active(i); }
};

}  // namespace dynops::cuda
