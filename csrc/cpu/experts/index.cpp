// The pairs of a router's choices, sorted by expert, on the CPU: a counting sort.
#include <vector>

#include "../engine/operands.h"

namespace dynops::cpu {
namespace {

// The expert of each pair as int32; an unsigned comparison sees what is negative too.
std::vector<int32_t> keys_of(const Tensor& index, int64_t experts) {
  const int64_t n = index.numel();
  std::vector<int32_t> key(n);
  visit_integers(index, "index", [&](const auto* from) {
    bool inside = true;
    for (int64_t i = 0; i < n; ++i) {
      inside &= uint64_t(int64_t(from[i])) <= uint64_t(experts);
      key[i] = int32_t(from[i]);
    }
    if (inside) return;
    const auto [low, high] = std::minmax_element(from, from + n);
    STD_TORCH_CHECK(false, "index: expected values in [0, ", experts, "], got ", int64_t(*low), " to ",
                    int64_t(*high));
  });
  return key;
}

// First choices take their places before second ones, each in the order of the tokens; the rest is dropped.
void drop_past_capacity(std::vector<int32_t>& key, int64_t tokens, int64_t topk, int64_t experts,
                        int64_t capacity) {
  std::vector<int64_t> left(experts, capacity);
  for (int64_t k = 0; k < topk; ++k) {
    for (int64_t t = 0; t < tokens; ++t) {
      int32_t& e = key[t * topk + k];
      if (e < experts && left[e]-- <= 0) e = int32_t(experts);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> expert_index(const Tensor& index_in, int64_t experts, int64_t capacity) {
  STD_TORCH_CHECK(index_in.dim() == 2, "index: expected [T, K], got ", index_in.dim(), " dimensions");
  const Tensor index = torch::stable::contiguous(index_in);
  const int64_t tokens = index.size(0), topk = index.size(1), pairs = index.numel();
  constexpr int64_t kMost = int64_t(1) << 31;
  STD_TORCH_CHECK(experts >= 1 && experts < kMost - 1 && pairs < kMost,
                  "index: expected fewer than 2**31 pairs and experts, got ", pairs, " and ", experts);
  std::vector<int32_t> key = keys_of(index, experts);
  if (capacity >= 0) drop_past_capacity(key, tokens, topk, experts, capacity);

  Tensor order = empty({pairs}, ScalarType::Int), offsets = empty({experts + 1}, ScalarType::Int);
  Tensor position = empty({tokens, topk}, ScalarType::Int);
  std::vector<int32_t> next(experts + 2, 0);  // of expert e: rows so far
  for (int32_t e : key) ++next[e + 1];
  for (size_t e = 1; e < next.size(); ++e) next[e] += next[e - 1];
  std::copy_n(next.begin(), experts + 1, data_of<int32_t>(offsets));
  for (int64_t i = 0; i < pairs; ++i) {
    const int32_t e = key[i], row = next[e]++;
    data_of<int32_t>(order)[row] = int32_t(i);
    data_of<int32_t>(position)[i] = e < experts ? row : -1;
  }
  return {order, offsets, position};
}

}  // namespace
}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) { m.impl("expert_index", TORCH_BOX(&dynops::cpu::expert_index)); }
