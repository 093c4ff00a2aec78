// Sums over the threads of a block, in their order.
#pragma once

#include <cstdint>

namespace dynops::cuda {

constexpr int kLanes = 32;  // of a warp

// The sum over the threads before this one, and over all threads.
template <class T>
struct Prefix {
  T before, total;
};

// For blocks of `Threads` threads, all of which must call it. Between its calls lies a barrier.
template <int Threads, class T>
__device__ __forceinline__ Prefix<T> block_prefix(T value) {
  __shared__ T sums[Threads / kLanes];
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes;
  T so_far = value;
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const T other = __shfl_up_sync(~0u, so_far, step);
    if (lane >= step) so_far += other;
  }
  __syncthreads();  // the sums of the call before have been read
  if (lane == kLanes - 1) sums[warp] = so_far;
  __syncthreads();
  Prefix<T> prefix{T(so_far - value), 0};
#pragma unroll
  for (int w = 0; w < Threads / kLanes; ++w) {
    if (w < warp) prefix.before += sums[w];
    prefix.total += sums[w];
  }
  return prefix;
}

}  // namespace dynops::cuda
