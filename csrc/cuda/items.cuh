// Kernels whose threads stride over items: the first of a thread, and how far the next is.
#pragma once

namespace dynops::cuda {

template <class Int>
__device__ __forceinline__ Int first_item() {
  return Int(blockIdx.x) * Int(blockDim.x) + Int(threadIdx.x);
}

template <class Int>
__device__ __forceinline__ Int item_stride() {
  return Int(gridDim.x) * Int(blockDim.x);
}

}  // namespace dynops::cuda
