// What the CPU op files read from tensors.
#pragma once

#include <type_traits>

#include "../../common/tensors.h"
#include "engine.h"

namespace dynops::cpu {

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Half, "expected float32, bfloat16 or float16");
      return Dtype::kFloat16;
  }
}

// As `const T` the memory is read only: a lazy clone (copy on write) then is not copied.
template <class T>
T* data_of(const Tensor& t) {
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(t.const_data_ptr());
  } else {
    return static_cast<T*>(t.mutable_data_ptr());
  }
}

template <class T>
T* data_of(const OptionalTensor& t) {
  return t ? data_of<T>(*t) : nullptr;
}

// An output as large as this is zeroed past the caches: 1x1, 8 x 64 -> 256 channels, 56 x 56, 10 %: 0.46 ms
// instead of 0.80; 3x3, 64 channels, 400 x 700, 1 %: 1.4 instead of 2.5. At 6 MB it makes no difference.
constexpr int64_t kStreamBytes = 8 << 20;

// MACs below which a second thread costs more than it brings.
constexpr double kMacsPerThread = 200e3;

inline bool is_depthwise(const Geometry& g, int64_t in_channels, int64_t out_channels) {
  return g.groups > 1 && g.groups == in_channels && in_channels == out_channels;
}

}  // namespace dynops::cpu
