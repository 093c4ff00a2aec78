// Grouped linear layers and the MLPs of experts on the CPU: forward.
#include "product.h"

namespace dynops::cpu {
namespace {

// The rows that an op reads and writes.
struct ExpertCall {
  const ExpertRows& rows;
  Dtype dtype;  // of x, as the products read it
  int64_t threads;

  ExpertCall(const ExpertRows& rows, const Tensor& x, double macs_a_row)
      : rows(rows),
        dtype(dtype_of(x)),
        threads(threads_for(double(rows.rows()) * macs_a_row, kMacsPerThread)) {
    STD_TORCH_CHECK(dtype == Dtype::kFloat32 || (dtype == Dtype::kBFloat16 && kernels().bf16_dot),
                    "x: expected float32, or bfloat16 where there is an instruction for its pairs");
  }
};

double macs_of(const ExpertWeight& w) { return double(w.outputs) * double(w.inputs); }

void check_fits(const ExpertWeight& w, const ExpertRows& rows, const char* name) {
  STD_TORCH_CHECK(w.experts == rows.experts, name, ": expected ", rows.experts, " experts, got ", w.experts);
}

void check_rows(const Tensor& t, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous(), name,
                  ": expected contiguous ", rows, " x ", columns);
}

// Points at the rows of x that one expert has.
void point_at_rows(ExpertWork& work, const ExpertRows& rows, int64_t expert, const char* x, int64_t row_bytes,
                   bool packed) {
  const int64_t first = rows.offsets[expert], count = rows.count(expert);
  work.x.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    work.x[i] = x + (packed ? first + i : rows.token(first + i)) * row_bytes;
  }
}

// y = activation(sums) of each row to its own place, or times its weight added to its token's.
struct Target {
  char* out;
  Dtype dtype;
  int64_t row_bytes;
  bool packed;
  Activation activation = Activation::kNone;
  const float* row_weight = nullptr;  // [pairs], by pair, or null
};

// Scale and bias of an expert's outputs from `channel` on.
FinishRows finish_of(const ExpertWeight& w, int64_t channel) {
  return {.scale = w.scale ? w.scale + channel : nullptr,
          .bias = w.bias ? w.bias + channel * size_of(w.bias_dtype) : nullptr,
          .bias_dtype = w.bias_dtype};
}

void finish(ExpertWork& work, const ExpertRows& rows, const ExpertWeight& w, const ExpertColumns& columns,
            int64_t stride, const Target& target, int64_t first, int64_t count) {
  work.out.resize(count);
  work.weight.resize(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = rows.offsets[columns.expert] + first + i;
    const int64_t to = target.packed ? row : rows.token(row);
    work.out[i] = target.out + to * target.row_bytes + columns.begin * size_of(target.dtype);
    if (target.row_weight) work.weight[i] = target.row_weight[rows.order[row]];
  }
  FinishRows f = finish_of(w, columns.expert * w.outputs + columns.begin);
  f.rows = int32_t(count);
  f.columns = int32_t(columns.count);
  f.sums = work.sums.data();
  f.sums_stride = stride;
  f.activation = target.activation;
  f.weight = target.row_weight ? work.weight.data() : nullptr;
  f.out = work.out.data();
  f.dtype = target.dtype;
  f.add = !target.packed;
  kernels().finish_rows(f);
}

// The columns of each task: tasks are numbered expert by expert, or chunk by chunk.
struct ColumnTasks {
  const ExpertRows& rows;
  int64_t columns, chunk, chunks;
  bool by_expert;

  int64_t count() const { return chunks * int64_t(rows.live.size()); }
  ExpertColumns at(int64_t task) const {
    const int64_t live = int64_t(rows.live.size());
    const int64_t e = by_expert ? task / chunks : task % live, c = by_expert ? task % chunks : task / live;
    return {rows.live[e], c * chunk, std::min(chunk, columns - c * chunk)};
  }
};

// out[row] = …, or out[token] += … over the experts in their order. An element belongs to one task.
void linear_rows(const ExpertCall& call, const char* x, bool packed_in, const ExpertWeight& w,
                 const Target& target) {
  const ExpertRows& rows = call.rows;
  const ExpertProduct product(w, call.dtype);
  const int64_t live = int64_t(rows.live.size()), column_bytes = w.inputs * size_of(w.dtype);
  const int64_t chunk = columns_a_task(w.outputs, column_bytes, target.packed ? live : 1, call.threads);
  const ColumnTasks tasks{rows, w.outputs, chunk, ceil_div(w.outputs, chunk), target.packed};
  const int64_t each = target.packed ? 1 : live, row_bytes = w.inputs * size_of(call.dtype);
  const auto run = [&](ExpertWork& work, int64_t task, int64_t guess) {
    for (int64_t i = 0; i < each; ++i) {
      const ExpertColumns columns = tasks.at(task * each + i);
      if (i == 0 && !target.packed) {
        for (int64_t t = 0; t < rows.tokens; ++t) {
          fill_zero(target.out + t * target.row_bytes + columns.begin * 4, columns.count * 4);
        }
      }
      const int64_t after = i + 1 < each ? task * each + i + 1 : guess * each;
      const ExpertColumns next = after < 0 ? columns : tasks.at(after);
      const int64_t stride = product.sums_stride(columns);
      point_at_rows(work, rows, columns.expert, x, row_bytes, packed_in);
      product.run(work, columns, rows.count(columns.expert), after < 0 ? nullptr : &next,
                  [&](int64_t first, int64_t count) {
                    finish(work, rows, w, columns, stride, target, first, count);
                  });
    }
  };
  for_each_task(call.threads, each ? tasks.count() / each : 0, run);
}

// Rows that no expert computes become zero.
void fill_dropped(const ExpertRows& rows, const Tensor& out) {
  const int64_t row_bytes = out.size(1) * size_of(dtype_of(out));
  fill_zero(data_of<char>(out) + rows.rows() * row_bytes, (rows.pairs - rows.rows()) * row_bytes);
}

// x: contiguous float32, or bfloat16 where there is an instruction for its pairs. out: packed, of any dtype;
// else float32.
void grouped_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                    const OptionalTensor& bias, const OptionalTensor& row_weight, const Tensor& order,
                    const Tensor& offsets, const Tensor& position, bool packed_in, bool packed_out,
                    bool transposed, int64_t activation, Tensor out) {
  const ExpertRows rows(order, offsets, position);
  const ExpertWeight w(weight, scale, bias, transposed);
  check_fits(w, rows, "weight");
  check_rows(x, packed_in ? rows.pairs : rows.tokens, w.inputs, "x");
  check_rows(out, packed_out ? rows.pairs : rows.tokens, w.outputs, "out");
  STD_TORCH_CHECK(packed_out || dtype_of(out) == Dtype::kFloat32, "out: expected float32 sums");
  const ExpertCall call(rows, x, macs_of(w));
  const Target target{.out = data_of<char>(out),
                      .dtype = dtype_of(out),
                      .row_bytes = w.outputs * size_of(dtype_of(out)),
                      .packed = packed_out,
                      .activation = Activation(activation),
                      .row_weight = row_weights(row_weight, rows)};
  if (packed_out) fill_dropped(rows, out);
  if (!packed_out && rows.live.empty()) {
    return fill_zero(data_of<char>(out), rows.tokens * target.row_bytes);
  }
  linear_rows(call, data_of<const char>(x), packed_in, w, target);
}

struct Between {  // the two products of an MLP
  Activation activation;
  bool gated, interleaved;
  float alpha, limit;
};

// h = activation(up x) for columns of h: a task has those of the gate and of up.
class UpPass {
 public:
  UpPass(const ExpertCall& call, const char* x, const ExpertWeight& up, const Between& between, char* h,
         Dtype h_dtype)
      : call_(call), x_(x), up_(up), between_(between), product_(up, call.dtype), h_(h), h_dtype_(h_dtype) {
    inner_ = between.gated ? up.outputs / 2 : up.outputs;
    const int64_t live = int64_t(call.rows.live.size());
    const int64_t column_bytes = up.inputs * size_of(up.dtype) * (between.gated ? 2 : 1);
    chunk_ = columns_a_task(inner_, column_bytes, live, call.threads);
    chunks_ = ceil_div(inner_, chunk_);
  }

  void run() const {
    const ExpertRows& rows = call_.rows;
    const int64_t tasks = chunks_ * int64_t(rows.live.size()), row_bytes = up_.inputs * size_of(call_.dtype);
    for_each_task(call_.threads, tasks, [&](ExpertWork& work, int64_t task, int64_t guess) {
      const ExpertColumns columns = columns_of(task), next = columns_of(std::max<int64_t>(guess, 0));
      point_at_rows(work, rows, columns.expert, x_, row_bytes, false);
      product_.run(work, columns, rows.count(columns.expert), guess < 0 ? nullptr : &next,
                   [&](int64_t first, int64_t count) { finish_block(work, columns, first, count); });
    });
  }

 private:
  ExpertColumns columns_of(int64_t task) const {
    const int64_t expert = call_.rows.live[task / chunks_], begin = task % chunks_ * chunk_;
    const int64_t count = std::min(chunk_, inner_ - begin);
    if (!between_.gated) return {expert, begin, count};
    if (between_.interleaved) return {expert, 2 * begin, 2 * count};
    return {expert, begin, count, inner_ + begin};
  }

  // Scales and biases the sums where they lie, unless the activation is one that does so as it writes.
  void affine(ExpertWork& work, const ExpertColumns& columns, int64_t stride, int64_t count) const {
    if (!up_.scale && !up_.bias) return;
    const int64_t width = product_.run_width(columns.count);
    for (int run = 0; run < columns.runs(); ++run) {
      const int64_t channel = columns.expert * up_.outputs + columns.begin_of(run);
      float* sums = work.sums.data() + run * width;
      for (int64_t i = 0; i < count; ++i) work.out[i] = bytes_of(sums + i * stride);
      FinishRows f = finish_of(up_, channel);
      f.rows = int32_t(count);
      f.columns = int32_t(columns.count);
      f.sums = sums;
      f.sums_stride = stride;
      f.out = work.out.data();
      kernels().finish_rows(f);
    }
  }

  void finish_block(ExpertWork& work, const ExpertColumns& columns, int64_t first, int64_t count) const {
    const int64_t width = product_.run_width(columns.count), stride = product_.sums_stride(columns);
    if (!between_.gated) {
      const Target target{.out = h_,
                          .dtype = h_dtype_,
                          .row_bytes = inner_ * size_of(h_dtype_),
                          .packed = true,
                          .activation = between_.activation};
      return finish(work, call_.rows, up_, columns, stride, target, first, count);
    }
    work.out.resize(count);
    affine(work, columns, stride, count);
    const int64_t begin = between_.interleaved ? columns.begin / 2 : columns.begin;
    const int64_t inner = between_.interleaved ? columns.count / 2 : columns.count;
    const int64_t row = call_.rows.offsets[columns.expert] + first;
    const Glu glu{.activation = between_.activation,
                  .gated = true,
                  .interleaved = between_.interleaved,
                  .alpha = between_.alpha,
                  .limit = between_.limit,
                  .n = inner,
                  .up = width,
                  .in = Dtype::kFloat32,
                  .out = h_dtype_};
    for (int64_t i = 0; i < count; ++i) {
      kernels().glu(glu, bytes_of(work.sums.data() + i * stride),
                    h_ + ((row + i) * inner_ + begin) * size_of(h_dtype_));
    }
  }

  const ExpertCall& call_;
  const char* x_;
  const ExpertWeight& up_;
  const Between& between_;
  const ExpertProduct product_;
  char* h_;
  Dtype h_dtype_;
  int64_t inner_, chunk_, chunks_;
};

// h: [pairs, inner], dtype of x; out: float32 [tokens, hidden].
void experts_mlp(const Tensor& x, const Tensor& up_in, const Tensor& down_in, const OptionalTensor& up_scale,
                 const OptionalTensor& down_scale, const OptionalTensor& up_bias,
                 const OptionalTensor& down_bias, const OptionalTensor& row_weight, const Tensor& order,
                 const Tensor& offsets, const Tensor& position, int64_t activation, bool gated,
                 bool interleaved, bool up_transposed, bool down_transposed, double alpha, double limit,
                 Tensor h, Tensor out) {
  const ExpertRows rows(order, offsets, position);
  const ExpertWeight up(up_in, up_scale, up_bias, up_transposed);
  const ExpertWeight down(down_in, down_scale, down_bias, down_transposed);
  check_fits(up, rows, "up");
  check_fits(down, rows, "down");
  STD_TORCH_CHECK(up.outputs == (gated ? 2 : 1) * down.inputs, "up: expected ", (gated ? 2 : 1) * down.inputs,
                  " outputs, got ", up.outputs);
  check_rows(x, rows.tokens, up.inputs, "x");
  check_rows(h, rows.pairs, down.inputs, "h");
  check_rows(out, rows.tokens, down.outputs, "out");
  STD_TORCH_CHECK(dtype_of(out) == Dtype::kFloat32 && dtype_of(h) == dtype_of(x),
                  "h, out: expected x's dtype and float32");
  const Target target{.out = data_of<char>(out),
                      .dtype = Dtype::kFloat32,
                      .row_bytes = down.outputs * 4,
                      .packed = false,
                      .row_weight = row_weights(row_weight, rows)};
  if (rows.live.empty()) {
    return fill_zero(target.out, rows.tokens * target.row_bytes);
  }
  const Between between{Activation(activation), gated, interleaved, float(alpha), float(limit)};
  const ExpertCall call(rows, x, macs_of(up) + macs_of(down));
  UpPass(call, data_of<const char>(x), up, between, data_of<char>(h), dtype_of(h)).run();
  linear_rows(call, data_of<const char>(h), true, down, target);
}

DYNOPS_CPU_OP(grouped_linear)
DYNOPS_CPU_OP(experts_mlp)

}  // namespace
}  // namespace dynops::cpu
