// Plans of experts on a GPU: the pairs split by expert, or where they are too many, sorted with CUB.
//
// Everything runs on the current stream, and nothing reads back from the device. An index outside [0, E] is
// dropped: looking for one would synchronise.
#include "experts.cuh"

#include <cub/device/device_radix_sort.cuh>
#include <tuple>

#include "launch.h"

namespace dynops::cuda {
namespace {

// Only the bits that tell experts apart are sorted by: one pass over the pairs for each 8 of them.
int bits_of(int64_t largest) {
  int bits = 1;
  while (largest >> bits) ++bits;
  return bits;
}

std::tuple<Tensor, Tensor, Tensor> expert_index(const Tensor& given, int64_t experts, int64_t capacity) {
  STD_TORCH_CHECK(given.dim() == 2, "index: expected [T, K], got ", given.dim(), " dimensions");
  STD_TORCH_CHECK(given.numel() <= INT32_MAX, "index: expected fewer than 2**31 pairs, got ", given.numel());
  STD_TORCH_CHECK(experts >= 1 && experts < INT32_MAX, "experts: expected 1 to 2**31 - 2, got ", experts);
  const Launch launch(given);
  const int64_t tokens = given.size(0), topk = given.size(1), rows = tokens * topk;
  const Tensor order = empty_on(given, {rows}, ScalarType::Int);
  const Tensor offsets = empty_on(given, {experts + 1}, ScalarType::Int);
  const Tensor position = empty_on(given, {tokens, topk}, ScalarType::Int);
  if (rows == 0) {
    launch.zero(offsets);
    return {order, offsets, position};
  }
  const Tensor index = torch::stable::contiguous(given);
  const Tensor scratch = empty_on(index, {expert_plan_scratch(rows, experts)}, ScalarType::Int);
  const ExpertPlanMemory memory{numbers(order), numbers(offsets), numbers(position)};
  const auto sort = [&](const int32_t* from, int32_t* sorted, const int32_t* pairs, int32_t* out) {
    with_temporary(launch, index, "sort", [&](void* temporary, size_t& bytes) {
      return cub::DeviceRadixSort::SortPairs(temporary, bytes, from, sorted, pairs, out, rows, 0,
                                             bits_of(experts), launch.stream());
    });
  };
  visit_integers(index, "index", [&](const auto* choices) {
    const Choices<std::decay_t<decltype(*choices)>> pairs{choices, uint32_t(tokens), uint32_t(topk),
                                                          int32_t(experts), false};
    plan_experts(launch, sort, pairs, capacity, memory, numbers(scratch));
  });
  return {order, offsets, position};
}

}  // namespace
}  // namespace dynops::cuda

STABLE_TORCH_LIBRARY_IMPL(dynops, CUDA, m) { m.impl("expert_index", TORCH_BOX(&dynops::cuda::expert_index)); }
