// Masks as bits: which elements are nonzero, which are NaN.
#pragma once

#include <cstdint>

namespace dynops::cuda {

// A mask's elements as unsigned integers of their size. `value` cuts the sign of a floating zero;
// above `largest` an element is NaN (nothing is, where the dtype has none).
template <class Word>
struct MaskView {
  const Word* data;
  int64_t pixels;
  Word value, largest;

  __device__ __forceinline__ bool active(Word element) const { return (element & value) != 0; }
  __device__ __forceinline__ bool nan(Word element) const {
    return sizeof(Word) > 1 && Word(element & value) > largest;
  }
};

// The same mask in vectors of 16 bytes at multiples of 16, wherever its memory begins. Only the vectors at
// its two ends are read element by element.
template <class Word>
class MaskVectors {
 public:
  static constexpr int kElements = 16 / int(sizeof(Word));

  explicit MaskVectors(const MaskView<Word>& mask)
      : mask_(mask), begin_(int(reinterpret_cast<uintptr_t>(mask.data) % 16 / sizeof(Word))) {}

  int64_t count() const { return (begin_ + mask_.pixels + kElements - 1) / kElements; }

  // The pixel of the first element of a vector: below 0 where that lies before the mask.
  __device__ __forceinline__ int64_t pixel(int64_t vector) const { return vector * kElements - begin_; }

  // A bit for each active element of a vector. Beyond the ends of the mask nothing is active.
  __device__ __forceinline__ uint32_t active(int64_t vector) const {
    const Elements elements = load(vector);
    uint32_t bits = 0;
#pragma unroll
    for (int k = 0; k < kElements; ++k) bits |= uint32_t(mask_.active(elements[k])) << k;
    return bits;
  }

  // The active elements of a vector below, the NaN above.
  __device__ __forceinline__ uint64_t counts(int64_t vector) const {
    const Elements elements = load(vector);
    uint32_t active = 0, nan = 0;
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      active += mask_.active(elements[k]);
      nan += mask_.nan(elements[k]);
    }
    return active | uint64_t(nan) << 32;
  }

 private:
  struct Elements {
    uint64_t halves[2];

    __device__ __forceinline__ Word operator[](int k) const {
      return Word(halves[k / kHalf] >> (k % kHalf * kBits));
    }
    __device__ __forceinline__ void set(int k, Word element) {
      halves[k / kHalf] |= uint64_t(element) << (k % kHalf * kBits);
    }
    static constexpr int kHalf = kElements / 2, kBits = 8 * int(sizeof(Word));
  };

  __device__ __forceinline__ Elements load(int64_t vector) const {
    const int64_t first = pixel(vector);
    if (first >= 0 && first + kElements <= mask_.pixels) {
      const ulonglong2 both = *reinterpret_cast<const ulonglong2*>(mask_.data + first);
      return {{both.x, both.y}};
    }
    Elements elements{};
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      if (first + k >= 0 && first + k < mask_.pixels) elements.set(k, mask_.data[first + k]);
    }
    return elements;
  }

  MaskView<Word> mask_;
  int begin_;  // elements between the multiple of 16 bytes and the mask
};

}  // namespace dynops::cuda
