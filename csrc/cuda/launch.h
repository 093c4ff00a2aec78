// Launches, as every CUDA file does them: the device, its current stream, a grid, the error check.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "../common/tensors.h"

namespace dynops::cuda {

inline void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

// torch's current stream of a device. The function lies in libtorch_cuda, which this binary must not need: it
// also loads beside a torch without CUDA. Python loads libtorch_cuda for itself alone, so a weak symbol would
// not find it either. Here it is asked for by the name under which it is loaded.
inline cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t device, void** stream);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream")
                                              : nullptr);
  }();
  STD_TORCH_CHECK(function, "the current stream: expected libtorch_cuda.so to be loaded");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

constexpr int kThreads = 256;

// The largest grid; its blocks stride over the items.
constexpr int64_t kMostBlocks = int64_t(1) << 20;

// Makes the tensor's device current for a scope, and launches kernels on that device's current stream.
class Launch {
 public:
  explicit Launch(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}

  cudaStream_t stream() const { return stream_; }

  // A thread for each item, up to the largest grid.
  template <class Kernel, class... Arguments>
  void operator()(const char* name, int64_t items, Kernel kernel, const Arguments&... arguments) const {
    blocks(name, (items + kThreads - 1) / kThreads, kThreads, kernel, arguments...);
  }

  template <class Kernel, class... Arguments>
  void blocks(const char* name, int64_t blocks, int threads, Kernel kernel,
              const Arguments&... arguments) const {
    kernel<<<unsigned(std::min(blocks, kMostBlocks)), threads, 0, stream_>>>(arguments...);
    check(cudaGetLastError(), name);
  }

  // Below it 32 bits hold every number and one stride of the largest grid more.
  int64_t narrow() const { return int64_t(1) << 30; }

  // True if a CUDA graph records the stream.
  bool captured() const {
    cudaStreamCaptureStatus status;
    check(cudaStreamIsCapturing(stream_, &status), "capture");
    return status != cudaStreamCaptureStatusNone;
  }

  // Memory is freed in stream order by torch's allocator, as a tensor's is.
  Tensor bytes(const Tensor& like, int64_t count) const {
    const int64_t shape[] = {std::max<int64_t>(count, 1)};
    return torch::stable::empty(IntHeaderOnlyArrayRef(shape, 1), ScalarType::Byte, std::nullopt,
                                like.device());
  }

  void zero(const Tensor& tensor) const { fill(tensor, 0); }

  // Every byte of a dense tensor.
  void fill(const Tensor& tensor, int byte) const {
    const size_t size = size_t(tensor.numel()) * tensor.element_size();
    if (size) check(cudaMemsetAsync(tensor.data_ptr(), byte, size, stream_), "memset");
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype, std::nullopt,
                              like.device());
}

inline int32_t* numbers(const Tensor& tensor) { return static_cast<int32_t*>(tensor.data_ptr()); }

// Calls a CUB function twice, as CUB wants it: for the size of its temporary memory, then to run.
template <class F>
void with_temporary(const Launch& launch, const Tensor& like, const char* what, const F& f) {
  size_t bytes = 0;
  check(f(nullptr, bytes), what);
  const Tensor memory = launch.bytes(like, int64_t(bytes));
  check(f(memory.data_ptr(), bytes), what);
}

}  // namespace dynops::cuda
