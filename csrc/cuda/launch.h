// What every CUDA file needs of a launch: the device, its current stream, a grid, the error check.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "../common/tensors.h"

// Declared by torch only where USE_CUDA is defined. Weak, so that a binary with CUDA kernels loads into
// a torch without CUDA, where nothing calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace dynops::cuda {

inline void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

// Makes the tensor's device current for a scope, and knows that device's current stream.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

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
  cudaStream_t stream_ = nullptr;
};

constexpr int kThreads = 256;

// Blocks for kernels that stride over the grid.
inline int grid_for(int64_t items, int64_t per_block = kThreads) {
  return int(std::min<int64_t>((items + per_block - 1) / per_block, int64_t(1) << 20));
}

inline Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype, std::nullopt,
                              like.device());
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// Runs a kernel with a thread for each item, up to the largest grid.
class Threads {
 public:
  explicit Threads(const Launch& launch) : launch_(launch) {}

  // Below it 32 bits hold every number and one stride of the largest grid more.
  int64_t narrow() const { return int64_t(1) << 30; }

  template <class Kernel, class... Arguments>
  void operator()(const char* name, int64_t items, Kernel kernel, const Arguments&... arguments) const {
    kernel<<<grid_for(items), kThreads, 0, launch_.stream()>>>(arguments...);
    check_launch(name);
  }

 private:
  const Launch& launch_;
};

// Calls a CUB function twice, as CUB wants it: for the size of its temporary memory, then to run.
template <class F>
void with_temporary(const Launch& launch, const Tensor& like, const char* what, const F& f) {
  size_t bytes = 0;
  check(f(nullptr, bytes), what);
  const Tensor memory = launch.bytes(like, int64_t(bytes));
  check(f(memory.data_ptr(), bytes), what);
}

}  // namespace dynops::cuda
