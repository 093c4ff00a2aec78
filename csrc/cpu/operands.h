// What the CPU op files read from tensors.
#pragma once

#include "../common/tensors.h"
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

template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data_of(const OptionalTensor& t) {
  return t ? static_cast<T*>(t->data_ptr()) : nullptr;
}

// MACs below which a second thread costs more than it brings.
constexpr double kMacsPerThread = 200e3;

inline bool is_depthwise(const Geometry& g, int64_t in_channels, int64_t out_channels) {
  return g.groups > 1 && g.groups == in_channels && in_channels == out_channels;
}

}  // namespace dynops::cpu
