// Tensors as the ops on the CPU read them.
#pragma once

#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "../../common/tensors.h"
#include "engine.h"

namespace dynops::cpu {

// The type of an argument in an op's schema. A tensor that is passed by value is one that the op writes.
template <class T>
std::string schema_type(char alias) {
  using Value = std::remove_cvref_t<T>;
  const std::string written = std::is_reference_v<T> ? "" : std::string("(") + alias + "!)";
  if constexpr (std::is_same_v<Value, Tensor>) {
    return "Tensor" + written;
  } else if constexpr (std::is_same_v<Value, OptionalTensor>) {
    return "Tensor" + written + "?";
  } else if constexpr (std::is_same_v<Value, IntHeaderOnlyArrayRef>) {
    return "int[]";
  } else if constexpr (std::is_same_v<Value, bool>) {
    return "bool";
  } else {
    static_assert(std::is_same_v<Value, int64_t> || std::is_same_v<Value, double>);
    return std::is_same_v<Value, int64_t> ? "int" : "float";
  }
}

// "cpu_<name>(Tensor a, int b, Tensor(c!) c) -> ()", from a function's own signature.
template <class Return, class... Arguments>
std::string schema_of(const char* name, Return (*)(Arguments...)) {
  std::string text = std::string("cpu_") + name + "(", between;
  char letter = 'a';
  ((text += between + schema_type<Arguments>(letter) + " " + letter, between = ", ", ++letter), ...);
  if constexpr (std::is_void_v<Return>) {
    return text + ") -> ()";
  } else {
    return text + ") -> " + schema_type<const Return&>(letter);
  }
}

// Registers a function for CPU tensors, as torch.ops.dynops.cpu_<name>.
#define DYNOPS_CPU_OP_NAMED(name, function)                                                              \
  STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) { m.def(::dynops::cpu::schema_of(name, &function).c_str()); } \
  STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) { m.impl("cpu_" name, TORCH_BOX(&function)); }
#define DYNOPS_CPU_OP(function) DYNOPS_CPU_OP_NAMED(#function, function)

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

// A `const T` only reads: a lazy clone (copy on write) then is not copied.
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

// float32 memory as the kernels take memory of any dtype.
inline char* bytes_of(float* floats) { return reinterpret_cast<char*>(floats); }
inline const char* bytes_of(const float* floats) { return reinterpret_cast<const char*>(floats); }

inline void fill_zero(char* to, int64_t bytes) {
  if (bytes > 0) kernels().fill(to, nullptr, bytes, false);
}

// All elements of a contiguous tensor as float32; none of no tensor.
inline std::vector<float> floats_of(const OptionalTensor& t) {
  std::vector<float> out(t ? t->numel() : 0);
  if (t) kernels().to_float(data_of<const char>(*t), dtype_of(*t), t->numel(), out.data());
  return out;
}

// 0, 1, … count - 1.
inline std::vector<int32_t> ascending(int64_t count) {
  std::vector<int32_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  return numbers;
}

// True if the GEMM multiplies pairs of this dtype as they are.
inline bool multiplies_pairs(Dtype dtype) { return dtype == Dtype::kBFloat16 && kernels().bf16_dot; }

// An output as large as this is zeroed past the caches. 1x1, 8 x 64 -> 256 channels, 56 x 56, 10 %, then
// takes 0.46 ms instead of 0.80; 3x3, 64 channels, 400 x 700, 1 %, takes 1.4 instead of 2.5. At 6 MB it makes
// no difference.
constexpr int64_t kStreamBytes = 8 << 20;

// MACs below which a second thread costs more than it brings.
constexpr double kMacsPerThread = 200e3;

inline bool is_depthwise(const Geometry& g, int64_t in_channels, int64_t out_channels) {
  return g.groups > 1 && g.groups == in_channels && in_channels == out_channels;
}

}  // namespace dynops::cpu
