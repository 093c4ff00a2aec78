// Rows of tokens to rows of a plan of experts and back, on the CPU.
#include <vector>

#include "../engine/parallel.h"
#include "plan.h"

namespace dynops::cpu {
namespace {

// out = the sum of weight[j] * (in + in_at[j]), of float32, rounded once.
void weighted_sum(const char* in, const std::vector<int64_t>& in_at, const std::vector<float>& weight,
                  const std::vector<int64_t>& weight_at, int64_t columns, Dtype dtype, char* out) {
  kernels().local_filter({.pairs = int32_t(in_at.size()),
                          .in = in,
                          .in_at = in_at.data(),
                          .filter = weight.data(),
                          .filter_at = weight_at.data(),
                          .group = columns,
                          .dtype = dtype,
                          .out = out});
}

// rows[p] = weight[pair of p] * x[token of p], zero where the pair is dropped.
void gather_pairs(const Tensor& x_in, const OptionalTensor& weight_in, const Tensor& order,
                  const Tensor& offsets, const Tensor& position, Tensor out) {
  const ExpertPlan plan(order, offsets, position);
  const RowsOf x(x_in, plan.tokens, "x"), rows(out, plan.pairs, "out");
  const float* weight = row_weights(weight_in, plan);
  STD_TORCH_CHECK(rows.columns == x.columns && rows.dtype == x.dtype, "out: expected x's columns and dtype");
  const int64_t threads = threads_for(double(plan.pairs * x.bytes()), kCopyBytesPerThread);
  parallel(threads, [&](int64_t t) {
    const std::vector<int64_t> first(1, 0);
    std::vector<float> one(1);
    for (const int64_t p : each(share_of(plan.pairs, t, threads))) {
      const char* from = p < plan.rows() ? x[plan.token(p)] : nullptr;
      char* to = data_of<char>(out) + p * x.bytes();
      if (!from || !weight) {
        kernels().fill(to, from, x.bytes(), false);
      } else {
        one[0] = weight[plan.order[p]];
        weighted_sum(from, first, one, first, x.columns, x.dtype, to);
      }
    }
  });
}

// out[t] = sum_k weight[t, k] * rows[position[t, k]], in the order of the choices.
void combine_pairs(const Tensor& rows_in, const OptionalTensor& weight_in, const Tensor& order,
                   const Tensor& offsets, const Tensor& position, Tensor out) {
  const ExpertPlan plan(order, offsets, position);
  const RowsOf rows(rows_in, plan.pairs, "rows"), sums(out, plan.tokens, "out");
  const float* weight = row_weights(weight_in, plan);
  STD_TORCH_CHECK(sums.columns == rows.columns && sums.dtype == rows.dtype,
                  "out: expected the columns and dtype of rows");
  const int64_t threads = threads_for(double(plan.pairs * rows.bytes()), kCopyBytesPerThread);
  parallel(threads, [&](int64_t thread) {
    std::vector<int64_t> from, which;
    std::vector<float> share;
    for (const int64_t t : each(share_of(plan.tokens, thread, threads))) {
      from.clear(), which.clear(), share.clear();
      for (int64_t pair = t * plan.topk; pair < (t + 1) * plan.topk; ++pair) {
        if (plan.position[pair] < 0) continue;
        which.push_back(int64_t(from.size()));
        from.push_back(plan.position[pair] * rows.bytes());
        share.push_back(weight ? weight[pair] : 1.f);
      }
      weighted_sum(rows.data, from, share, which, rows.columns, rows.dtype,
                   data_of<char>(out) + t * rows.bytes());
    }
  });
}

// sums[t, k] = x[t] . rows[position[t, k]], x packed: x[position[t, k]]; zero where the pair is dropped.
void pair_dots(const Tensor& x_in, const Tensor& rows_in, bool packed, const Tensor& order,
               const Tensor& offsets, const Tensor& position, Tensor out) {
  const ExpertPlan plan(order, offsets, position);
  const RowsOf rows(rows_in, plan.pairs, "rows"), x(x_in, packed ? plan.pairs : plan.tokens, "x");
  STD_TORCH_CHECK(x.columns == rows.columns && x.dtype == rows.dtype && x.columns < (int64_t(1) << 31) &&
                      out.scalar_type() == ScalarType::Float && out.numel() == plan.pairs &&
                      out.is_contiguous(),
                  "x: expected the columns and dtype of rows, and float32 sums");
  const int64_t threads = threads_for(double(plan.pairs * rows.bytes()), kCopyBytesPerThread);
  parallel_shares(plan.pairs, threads, [&](int64_t pair) {
    const int64_t segment = 0;
    const int32_t row = plan.position[pair];
    float sums[1 + kDotsPadding] = {0};
    if (row >= 0) {
      const char* with = rows[row];
      kernels().dots({.rows = 1,
                      .segments = 1,
                      .depth = int32_t(x.columns),
                      .segment = &segment,
                      .x = &with,
                      .weight = x[packed ? row : pair / plan.topk],
                      .dtype = x.dtype,
                      .sums = sums});
    }
    data_of<float>(out)[pair] = sums[0];
  });
}

DYNOPS_CPU_OP(gather_pairs)
DYNOPS_CPU_OP(combine_pairs)
DYNOPS_CPU_OP(pair_dots)

}  // namespace
}  // namespace dynops::cpu
