// The gradients of the weights and biases of experts on the CPU.
#include <atomic>
#include <memory>
#include <vector>

#include "../engine/grad_rows.h"
#include "../engine/pages.h"
#include "../engine/parallel.h"
#include "../engine/row_sums.h"
#include "plan.h"

namespace dynops::cpu {
namespace {

// Rows of a plan as a GEMM reads them: packed, or rows of the tokens.
struct PlanRows {
  const ExpertPlan& plan;
  RowsOf rows;
  bool packed;

  PlanRows(const ExpertPlan& plan, const Tensor& t, bool packed, const char* name)
      : plan(plan), rows(t, packed ? plan.pairs : plan.tokens, name), packed(packed) {}
  const char* operator[](int64_t row) const { return rows[packed ? row : plan.token(row)]; }
};

// dW[e] = sum_p (w[p] left[p]) right[p]^T over the rows p of expert e, [left columns][right columns]. `left`
// is dy, or x where the weight is transposed. A task is an expert and a share of the left columns. It
// computes its share of dW from first row to last, so the sums do not depend on the number of threads.
class ExpertWeightGrad {
 public:
  ExpertWeightGrad(const ExpertPlan& plan, const PlanRows& left, const PlanRows& right, const float* weight,
                   char* dw)
      : plan_(plan),
        left_(left),
        right_(right),
        weight_(weight),
        dw_(dw),
        dtype_(left.rows.dtype),
        lines_(left.rows.columns),
        width_(right.rows.columns) {
    threads_ = threads_for(double(plan.rows()) * double(lines_) * double(width_), kMacsPerThread);
    const int64_t tasks = 4 * threads_;  // so that experts of unequal rows end together
    shares_ = std::max(ceil_div(lines_, kLines), ceil_div(tasks, plan.experts));
    shares_ = std::min(shares_, ceil_div(lines_, kTileRows));
  }

  void run() const {
    if (lines_ == 0 || width_ == 0) return;
    std::atomic<int64_t> next{0};
    parallel(threads_, [&](int64_t) {
      Work w;
      for (int64_t task = next++; task < plan_.experts * shares_; task = next++)
        run_task(task / shares_, task % shares_, w);
    });
  }

 private:
  static constexpr int64_t kRows = 192;   // of a block: 24 KB of a panel of `right`, 9 KB of a tile of `left`
  static constexpr int64_t kLines = 512;  // of dW, columns of `left`: 384 KB a block, of an L2 cache of 1 MB

  // The working memory of one thread.
  struct Work {
    std::vector<float> left, line, right, sums;
    std::vector<const char*> in;
  };

  void run_task(int64_t expert, int64_t share, Work& w) const {
    const Span mine = share_of(lines_, share, shares_, kTileRows);
    const int64_t begin = mine.begin, lines = mine.size();
    const int64_t first = plan_.offsets[expert], rows = plan_.offsets[expert + 1] - first;
    char* to = dw_ + (expert * lines_ + begin) * width_ * size_of(dtype_);
    if (rows == 0) return fill_zero(to, lines * width_ * size_of(dtype_));
    const bool direct = dtype_ == Dtype::kFloat32;
    if (!direct) w.sums.resize(lines * width_);
    float* sums = direct ? reinterpret_cast<float*>(to) : w.sums.data();
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t height = std::min(kRows, rows - row);
      pack_left(first + row, height, begin, lines, w);
      add_block(first + row, height, lines, row > 0, outer_length(rows), sums, w);
    }
    if (!direct) kernels().from_float(sums, lines * width_, dtype_, to);
  }

  // `lines` columns of `left` from `begin` on times their rows' weights, as [tile][row][height of the tile].
  void pack_left(int64_t first, int64_t height, int64_t begin, int64_t lines, Work& w) const {
    const TileSplit split{int32_t(lines)};
    w.left.resize(kRows * lines);
    w.line.resize(lines);
    for (int64_t i = 0; i < height; ++i) {
      kernels().to_float(left_[first + i] + begin * size_of(dtype_), dtype_, lines, w.line.data());
      if (weight_) {
        const float weight = weight_[plan_.order[first + i]];
        for (float& value : w.line) value *= weight;
      }
      pack_grad_row(w.line.data(), split, i, height, w.left.data());
    }
  }

  // sums (+)= the outer products of a block of rows, panel by panel of `right`.
  void add_block(int64_t first, int64_t height, int64_t lines, bool add, int32_t length, float* sums,
                 Work& w) const {
    const TileSplit split{int32_t(lines)};
    const int64_t width = kernels().panel_width;
    w.in.resize(kRows);
    w.right.resize(kRows * width);
    for (int64_t i = 0; i < height; ++i) w.in[i] = right_[first + i];
    for (int64_t column = 0; column < width_; column += width) {
      const int32_t columns = int32_t(std::min(width, width_ - column));
      kernels().gather_columns(w.in.data(), int32_t(height), column * size_of(dtype_), dtype_, columns,
                               w.right.data());
      kernels().outer_product({.rows = int32_t(height),
                               .grad = w.left.data(),
                               .x = w.right.data(),
                               .dw = sums + column,
                               .dw_stride = width_,
                               .outputs = split,
                               .columns = columns,
                               .add = add,
                               .length = length});
    }
  }

  const ExpertPlan& plan_;
  const PlanRows &left_, &right_;
  const float* weight_;  // [pairs] or null
  char* dw_;
  Dtype dtype_;
  int64_t lines_, width_;  // of dW of an expert: columns of `left` and of `right`
  int64_t threads_, shares_;
};

// db[e] = sum_p w[p] dy[p]. An expert is one thread's, so that the result does not depend on their number.
void expert_bias_grad(const ExpertPlan& plan, const PlanRows& grad, const float* weight, char* db) {
  const int64_t columns = grad.rows.columns;
  const int64_t threads = threads_for(double(plan.rows() * columns), 256e3);
  parallel_shares(plan.experts, threads, [&](int64_t e) {
    std::vector<float> row(columns);
    std::vector<double> total(columns, 0.);
    {
      RowSums sum(columns, total.data());
      for (int64_t p = plan.offsets[e]; p < plan.offsets[e + 1]; ++p) {
        if (!weight) {
          sum.add(grad[p], grad.rows.dtype);
          continue;
        }
        kernels().to_float(grad[p], grad.rows.dtype, columns, row.data());
        for (float& value : row) value *= weight[plan.order[p]];
        sum.add(bytes_of(row.data()), Dtype::kFloat32);
      }
    }
    round_sums(total, grad.rows.dtype, db + e * columns * size_of(grad.rows.dtype));
  });
}

// dw: [E, O, I], transposed [E, I, O]; db: [E, O], or none where nobody asks.
void expert_weight_grad(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& weight_in,
                        const Tensor& order, const Tensor& offsets, const Tensor& position, bool packed_grad,
                        bool packed_x, bool transposed, Tensor dw, OptionalTensor db) {
  const ExpertPlan plan(order, offsets, position);
  const PlanRows grad(plan, grad_in, packed_grad, "grad"), x(plan, x_in, packed_x, "x");
  const float* weight = row_weights(weight_in, plan);
  const int64_t outputs = grad.rows.columns, inputs = x.rows.columns;
  STD_TORCH_CHECK(x.rows.dtype == grad.rows.dtype && dtype_of(dw) == grad.rows.dtype && dw.is_contiguous() &&
                      dw.numel() == plan.experts * outputs * inputs &&
                      (!db || (db->numel() == plan.experts * outputs && dtype_of(*db) == grad.rows.dtype)),
                  "dw, db: expected ", plan.experts, " experts of ", outputs, " outputs and ", inputs,
                  " inputs, of the dtype of grad and x");
  STD_TORCH_CHECK(std::max(outputs, inputs) < (int64_t(1) << 31), "dw: expected fewer columns than 2**31");
  const PlanRows &left = transposed ? x : grad, &right = transposed ? grad : x;
  advise_huge_pages(dw.data_ptr(), dw.numel() * int64_t(dw.element_size()));
  ExpertWeightGrad(plan, left, right, weight, data_of<char>(dw)).run();
  if (db) expert_bias_grad(plan, grad, weight, data_of<char>(*db));
}

DYNOPS_CPU_OP(expert_weight_grad)

}  // namespace
}  // namespace dynops::cpu
