// Products of experts' rows with the columns of their weights.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "../engine/parallel.h"
#include "plan.h"

namespace dynops::cpu {

// A plan, and the experts that have rows.
struct ExpertRows : ExpertPlan {
  std::vector<int32_t> live;

  ExpertRows(const Tensor& order, const Tensor& offsets, const Tensor& position)
      : ExpertPlan(order, offsets, position) {
    for (int64_t e = 0; e < experts; ++e) {
      if (count(e) > 0) live.push_back(int32_t(e));
    }
  }
  int64_t count(int64_t expert) const { return offsets[expert + 1] - offsets[expert]; }
};

// The weights of all experts, [E, O, I] or transposed [E, I, O]; the last dimension is contiguous.
struct ExpertWeight {
  const char* data;
  Dtype dtype;
  bool transposed;
  int64_t experts, outputs, inputs;
  int64_t expert_stride, row_stride;  // bytes
  const float* scale;                 // [E, O] or null
  const char* bias;                   // [E, O] or null
  Dtype bias_dtype;

  ExpertWeight(const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias,
               bool transposed);
  const char* column(int64_t expert, int64_t c) const {
    return data + expert * expert_stride + c * (transposed ? size_of(dtype) : row_stride);
  }
};

// The columns of an expert's weight that are multiplied at once: one run, or two alike (gate and up).
struct ExpertColumns {
  int64_t expert, begin, count;
  int64_t second = -1;  // where the other run begins

  int runs() const { return second < 0 ? 1 : 2; }
  int64_t begin_of(int run) const { return run ? second : begin; }
};

// Memory that grows, from the start of a cache line: a vector over two lines loads at half the rate.
template <class T>
class Lines {
 public:
  T* reserve(int64_t n) {
    constexpr int64_t kLine = 64;
    if (n > size_) {
      memory_.reset(new char[size_t(n) * sizeof(T) + kLine]);
      const auto at = reinterpret_cast<uintptr_t>(memory_.get());
      data_ = reinterpret_cast<T*>((at + kLine - 1) / kLine * kLine);
      size_ = n;
    }
    return data_;
  }
  T* data() const { return data_; }

 private:
  std::unique_ptr<char[]> memory_;
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// The working memory of a thread.
struct ExpertWork {
  std::vector<const char*> x;       // [rows of the expert]
  std::vector<char*> out;           // [rows of a block]
  std::vector<float> weight;        // [rows of a block]
  std::vector<char*> sums_out;      // [rows of a block]: the rows of sums
  std::vector<int32_t> turned_row;  // [rows]: where pack_columns puts them in sums
  std::vector<const char*> table;   // [tile][segment][rows of the tile]: what the GEMM's rows read
  Lines<float> sums, turned_sums, floats;
  Lines<char> packed, gathered;
  // The product and the expert whose rows lie packed, so that the expert's next columns find them.
  const void* packed_by = nullptr;
  int64_t packed_expert = -1;
};

// The vectors that hold the rows of x, in panels of nearly equal width. None has one vector only, where there
// are more: its tiles would load 13 times for 12 products, and run at 60 % of the rate.
struct WidePanels {
  int32_t vectors, panels;
  explicit WidePanels(int64_t rows)
      : vectors(int32_t(ceil_div(rows, kernels().lanes))),
        panels(int32_t(ceil_div(vectors, kernels().wide_vectors))) {}
  int32_t begin(int32_t panel) const { return panels ? vectors * panel / panels : 0; }
  int32_t width(int32_t panel) const { return begin(panel + 1) - begin(panel); }
};

// Products of an expert's rows with columns of its weight, as float32 sums in the thread's memory.
//
// Few rows: dot products straight on the weight's rows, which are read once, at the speed of memory. Up to
// some 200: the GEMM with its operands exchanged, packed panels of x meet the weight's rows as they lie.
// Many, or a weight that is transposed or of another dtype: panels of the weight are packed. They stay in the
// L2 cache while the rows meet them. Each asks for the part of the weight that comes next while it
// multiplies. Which it is depends on the rows alone, and so does the order of every sum.
class ExpertProduct {
 public:
  ExpertProduct(const ExpertWeight& weight, Dtype rows);

  // The rows' sums lie [rows][sums_stride]: the first run's columns, then at `run_width` the second's.
  int64_t run_width(int64_t columns) const { return round_up(columns, kernels().panel_width); }
  // Floats from one row of sums to the next. It is a vector more than they need: no power of two then brings
  // all rows to one set of the L1 cache.
  int64_t sums_stride(const ExpertColumns& columns) const {
    return run_width(columns.count) * columns.runs() + kernels().lanes;
  }

  // Calls finish(first row, rows) for each block of rows in turn; `next`: what the thread does next, or null.
  template <class Finish>
  void run(ExpertWork& work, const ExpertColumns& columns, int64_t rows, const ExpertColumns* next,
           const Finish& finish) const {
    if (streams(rows) || turns(rows)) {
      streams(rows) ? dots(work, columns, rows, next) : turned(work, columns, rows, next);
      return finish(int64_t(0), rows);
    }
    const int64_t blocks = ceil_div(rows, block_rows_);
    for (int64_t i = 0; i < blocks; ++i) {
      const Span block = share_of(rows, i, blocks, kTileRows);
      if (block.size() == 0) continue;
      multiply(work, columns, block, block.end == rows, next);
      finish(block.begin, block.size());
    }
  }

 private:
  bool streams(int64_t rows) const;
  bool turns(int64_t rows) const;
  int64_t beside(int64_t rows) const;
  void dots(ExpertWork& work, const ExpertColumns& columns, int64_t rows, const ExpertColumns* next) const;
  // The GEMM with its operands exchanged: rows of the weight, as they lie, meet packed panels of x.
  void turned(ExpertWork& work, const ExpertColumns& columns, int64_t rows, const ExpertColumns* next) const;
  Ahead rows_after(const ExpertColumns& columns, int run, int64_t end, const ExpertColumns* next) const;
  // A part of the depth, in segments of equal depth. Each has sums of its own, which are added up.
  struct DepthBlock {
    int32_t segments, depth;
    size_t first;  // of segment_
  };
  const char* const* in_segments(ExpertWork& work, const DepthBlock& block, const char* const* rows,
                                 int64_t count, int32_t most = kTileRows) const;
  Gemm gemm_of(const DepthBlock& block, const char* weight, int64_t columns, int64_t out_offset) const;
  const char* together(ExpertWork& work, int64_t first, int64_t count, int64_t row_bytes) const;
  void pack_x(ExpertWork& work, int64_t expert, int64_t rows) const;
  // A block of an expert's rows in the GEMM; each panel is packed before the first block meets it.
  void multiply(ExpertWork& work, const ExpertColumns& columns, Span block, bool last,
                const ExpertColumns* next) const;
  // `count` columns of a weight, or rows of x, `step` elements apart, as a panel of `width`.
  void pack_panel(ExpertWork& work, const char* from, Dtype dtype, int64_t step, int64_t count, int64_t width,
                  char* to) const;
  void pack(ExpertWork& work, const ExpertColumns& columns, int run, int64_t panel, char* to) const;
  Ahead ahead(const ExpertColumns& columns, int run, int64_t panel) const;

  const ExpertWeight& weight_;
  Dtype rows_;
  bool dot_;
  int64_t depth_, panel_bytes_, block_rows_;
  std::vector<DepthBlock> blocks_;
  std::vector<int64_t> segment_;  // where each segment of the depth begins; the GEMM asks ahead at each
  std::vector<int32_t> row_;      // the rows of a packed panel in order
};

// Columns of a task: enough of the weight for a stream, fewer where some threads would have none.
int64_t columns_a_task(int64_t columns, int64_t column_bytes, int64_t tasks_beside, int64_t threads);

// Runs run(work, task, guess) for each task; guess: which one this thread may get next, or -1.
template <class Run>
void for_each_task(int64_t threads, int64_t tasks, const Run& run) {
  std::atomic<int64_t> counter{0};
  parallel(std::min(threads, tasks), [&](int64_t) {
    ExpertWork work;
    for (int64_t task = counter++; task < tasks; task = counter++) {
      const int64_t guess = counter.load(std::memory_order_relaxed);
      run(work, task, guess < tasks ? guess : int64_t(-1));
    }
  });
}

}  // namespace dynops::cpu
