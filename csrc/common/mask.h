// Masks of any dtype as plans read them, on both devices.
#pragma once

#include "tensors.h"

namespace dynops {

// Calls f(elements, value, largest), all of an unsigned type of the elements' size. `value` masks an
// element's bits but for the sign. Above `largest` an element is NaN; it is all ones where the dtype has
// none. So -0.0 is zero.
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

}  // namespace dynops
