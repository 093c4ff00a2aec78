// The rows of experts, as the ops of the experts noun get them.
#pragma once

#include "../engine/operands.h"

namespace dynops::cpu {

// An ExpertPlan (dynops/plans/experts.py) whose indices were looked at: a kernel that met one out of range
// would read or write outside its tensors. The pass over them costs 0.3 ns a pair.
struct ExpertPlan {
  const int32_t *order, *offsets, *position;
  int64_t experts, tokens, topk, pairs;

  ExpertPlan(const Tensor& order_in, const Tensor& offsets_in, const Tensor& position_in)
      : order(data_of<const int32_t>(order_in)),
        offsets(data_of<const int32_t>(offsets_in)),
        position(data_of<const int32_t>(position_in)),
        experts(offsets_in.numel() - 1),
        tokens(position_in.dim() == 2 ? position_in.size(0) : 0),
        topk(position_in.dim() == 2 ? position_in.size(1) : 0),
        pairs(order_in.numel()) {
    for (const Tensor* t : {&order_in, &offsets_in, &position_in}) {
      STD_TORCH_CHECK(t->scalar_type() == ScalarType::Int && t->is_contiguous(),
                      "order, offsets, position: expected contiguous int32");
    }
    STD_TORCH_CHECK(experts >= 1 && position_in.dim() == 2 && pairs == tokens * topk,
                    "order, offsets, position: expected [T * K], [E + 1] and [T, K], got ", pairs, ", ",
                    offsets_in.numel(), " and ", position_in.numel(), " elements");
    bool inside = true, ascends = offsets[0] == 0 && offsets[experts] <= pairs;
    for (int64_t e = 0; e < experts; ++e) ascends &= offsets[e] <= offsets[e + 1];
    for (int64_t p = 0; p < pairs; ++p) {
      // a row past the last expert's is not written by any product, and holds what the allocator gave
      inside &= order[p] >= 0 && order[p] < pairs && position[p] >= -1 && position[p] < offsets[experts];
    }
    STD_TORCH_CHECK(ascends, "offsets: expected them to ascend from 0 to at most ", pairs, ", got ",
                    offsets[0], " to ", offsets[experts]);
    STD_TORCH_CHECK(inside, "order, position: expected pairs below ", pairs, " and rows below ",
                    offsets[experts], ", got others");
  }

  int64_t rows() const { return offsets[experts]; }  // that are not dropped
  int64_t token(int64_t row) const { return order[row] / topk; }
};

// float32 [T, K], or null: all are 1.
inline const float* row_weights(const OptionalTensor& weight, const ExpertPlan& plan) {
  STD_TORCH_CHECK(!weight || (weight->scalar_type() == ScalarType::Float && weight->is_contiguous() &&
                              weight->numel() == plan.pairs),
                  "weight: expected contiguous float32 of ", plan.pairs, " elements");
  return data_of<const float>(weight);
}

// Rows [R, C] of a dtype.
struct RowsOf {
  const char* data;
  int64_t columns;
  Dtype dtype;

  RowsOf(const Tensor& t, int64_t rows, const char* name)
      : data(data_of<const char>(t)), columns(t.dim() == 2 ? t.size(1) : 0), dtype(dtype_of(t)) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.is_contiguous(), name, ": expected contiguous [",
                    rows, ", C], got ", t.dim(), " dimensions and ", t.numel(), " elements");
  }
  int64_t bytes() const { return columns * size_of(dtype); }
  const char* operator[](int64_t row) const { return data + row * bytes(); }
};

}  // namespace dynops::cpu
