// How plans read a mask, whatever its dtype.
#pragma once

#include "../../common/tensors.h"

namespace dynops::cpu {

// Calls f with a pointer to the mask's elements, as an unsigned type of their size, and the bits
// above which an element is NaN (all ones where the dtype has none). -0.0 is zero: the sign is cut.
template <class F>
auto visit_mask(const Tensor& mask, const F& f) {
  const void* data = mask.const_data_ptr();
  switch (mask.scalar_type()) {
    case ScalarType::Half:
      return f(static_cast<const uint16_t*>(data), uint16_t(0x7fff), uint16_t(0x7c00));
    case ScalarType::BFloat16:
      return f(static_cast<const uint16_t*>(data), uint16_t(0x7fff), uint16_t(0x7f80));
    case ScalarType::Float:
      return f(static_cast<const uint32_t*>(data), uint32_t(0x7fffffff), uint32_t(0x7f800000));
    case ScalarType::Double:
      return f(static_cast<const uint64_t*>(data), ~uint64_t(0) >> 1, uint64_t(0x7ff) << 52);
    default:
      break;
  }
  switch (mask.element_size()) {
    case 1:
      return f(static_cast<const uint8_t*>(data), uint8_t(0xff), uint8_t(0xff));
    case 2:
      return f(static_cast<const uint16_t*>(data), uint16_t(0xffff), uint16_t(0xffff));
    case 4:
      return f(static_cast<const uint32_t*>(data), ~uint32_t(0), ~uint32_t(0));
    default:
      return f(static_cast<const uint64_t*>(data), ~uint64_t(0), ~uint64_t(0));
  }
}

struct Count {
  int64_t active;
  bool nan;
};

// The nonzeros of n elements, and whether one is NaN.
template <class T>
Count count_active(const T* mask, T value_bits, T largest, int64_t n) {
  int64_t active = 0;
  T worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T value = mask[i] & value_bits;
    active += value != 0;
    worst = value > worst ? value : worst;
  }
  return {active, worst > largest};
}

// Writes up to `capacity` positions of nonzeros, without a branch an element; returns how many.
template <class T>
int64_t write_index(const T* mask, T value_bits, int64_t n, int32_t* index, int64_t capacity) {
  int64_t used = 0, i = 0;
  for (; i < n && used < capacity; ++i) {
    index[used] = int32_t(i);
    used += (mask[i] & value_bits) != 0;
  }
  return used;
}

// int32 [P]: the ascending flat positions of the nonzeros.
Tensor mask_to_index(const Tensor& mask);

}  // namespace dynops::cpu
