// Products of experts' rows with columns of their weights, in three ways; see ExpertProduct.
#include <array>

#include "product.h"

namespace dynops::cpu {
namespace {

constexpr int64_t kStreamRows = 26;      // up to here dot products are faster
constexpr int64_t kTurnedRows = 192;     // up to here packing x is cheaper than packing the weight
constexpr int64_t kTurnedColumns = 48;   // that meet all panels of x in turn: whole tiles of 12, 8 and 6
constexpr int64_t kBesideRows = 10;      // of an unfilled vector, which dot products take
constexpr double kTurnedShare = 0.8;     // of the lanes at work, below which dot products are faster
constexpr int64_t kSegmentDepth = 128;   // between two requests for what lies ahead
constexpr int64_t kDepthBlock = 2048;    // of the depth, which falls into equal segments
constexpr int64_t kTaskBytes = 4 << 20;  // of weight: x is packed anew for each task
constexpr int64_t kTaskColumns = 16;     // the fewest, and the step
constexpr int64_t kTasksPerThread = 2;
constexpr int64_t kBlockBytes = 384 * 1024;  // of rows, which share the L2 cache with the panels

// The affine map of sums that stay what they are.
constexpr int64_t kAffine = 64;
constexpr std::array<float, kAffine> constants(float value) {
  std::array<float, kAffine> all{};
  for (int64_t i = 0; i < kAffine; ++i) all[i] = value;
  return all;
}
constexpr std::array<float, kAffine> kOnes = constants(1), kZeros = constants(0);

// Equal segments of whole pairs, of kSegmentDepth or somewhat less; one where there are none such.
int64_t segments_of(int64_t depth) {
  for (int64_t n = std::max<int64_t>(depth / kSegmentDepth, 1); n * kSegmentDepth < 4 * depth; ++n) {
    if (depth % (2 * n) == 0) return n;
  }
  return 1;
}

Dtype weight_dtype(const Tensor& weight) {
  return weight.scalar_type() == ScalarType::Char ? Dtype::kInt8 : dtype_of(weight);
}

}  // namespace

ExpertWeight::ExpertWeight(const Tensor& weight, const OptionalTensor& scale_in,
                           const OptionalTensor& bias_in, bool transposed_in)
    : data(data_of<const char>(weight)),
      dtype(weight_dtype(weight)),
      transposed(transposed_in),
      experts(weight.size(0)),
      outputs(weight.size(transposed ? 2 : 1)),
      inputs(weight.size(transposed ? 1 : 2)),
      expert_stride(weight.stride(0) * size_of(dtype)),
      row_stride(weight.stride(1) * size_of(dtype)),
      scale(data_of<const float>(scale_in)),
      bias(data_of<const char>(bias_in)),
      bias_dtype(bias_in ? dtype_of(*bias_in) : Dtype::kFloat32) {
  STD_TORCH_CHECK(weight.size(2) <= 1 || weight.stride(2) == 1,
                  "weight: expected a contiguous last dimension, got stride ", weight.stride(2));
  STD_TORCH_CHECK(!scale_in || scale_in->numel() == experts * outputs, "scale: expected ", experts, " x ",
                  outputs);
  STD_TORCH_CHECK(!bias_in || bias_in->numel() == experts * outputs, "bias: expected ", experts, " x ",
                  outputs);
}

int64_t columns_a_task(int64_t columns, int64_t column_bytes, int64_t tasks_beside, int64_t threads) {
  const int64_t wide = round_up(kTaskBytes / std::max<int64_t>(column_bytes, 1), kTaskColumns);
  const int64_t even = columns * tasks_beside / (kTasksPerThread * threads) / kTaskColumns * kTaskColumns;
  return std::max(kTaskColumns, std::min({wide, even, round_up(columns, kTaskColumns)}));
}

ExpertProduct::ExpertProduct(const ExpertWeight& weight, Dtype rows)
    : weight_(weight), rows_(rows), dot_(rows == Dtype::kBFloat16), row_(ascending(weight.inputs)) {
  depth_ = round_up(weight.inputs, dot_ ? 2 : 1);
  panel_bytes_ = kernels().panel_width * depth_ * size_of(rows);
  const int64_t row_bytes = std::max<int64_t>(depth_ * size_of(rows), 1);
  block_rows_ = std::clamp<int64_t>(kBlockBytes / row_bytes / kTileRows, 4, 64) * kTileRows;
  for (int64_t begin = 0; begin == 0 || begin < weight.inputs; begin += kDepthBlock) {
    const int64_t depth = std::min(weight.inputs - begin, kDepthBlock), segments = segments_of(depth);
    blocks_.push_back({int32_t(segments), int32_t(depth / segments), segment_.size()});
    for (int64_t s = 0; s < segments; ++s) segment_.push_back(begin + s * (depth / segments));
  }
}

const char* const* ExpertProduct::in_segments(ExpertWork& work, const DepthBlock& block,
                                              const char* const* rows, int64_t count, int32_t most) const {
  work.table.resize(count * block.segments);
  const TileSplit split(int32_t(count), most);
  const char** to = work.table.data();
  for (int32_t tile = 0; tile < split.tiles; rows += split.height(tile++)) {
    for (int32_t s = 0; s < block.segments; ++s) {
      const int64_t byte = segment_[block.first + s] * size_of(rows_);
      for (int32_t i = 0; i < split.height(tile); ++i) *to++ = rows[i] + byte;
    }
  }
  return work.table.data();
}

// Sums of a part of the depth, of a packed panel of so many columns.
Gemm ExpertProduct::gemm_of(const DepthBlock& block, const char* panel, int64_t columns,
                            int64_t out_offset) const {
  return {.segments = block.segments,
          .depth = block.depth,
          .weight_start = segment_.data() + block.first,
          .weight = panel,
          .layout = {columns, depth_, 1, panel_bytes_},
          .in = rows_,
          .out = Dtype::kFloat32,
          .out_offset = out_offset,
          .scale = kOnes.data(),
          .shift = kZeros.data()};
}

// The rows that are the last, unfilled vector of a packed x, where dot products are faster for so few.
int64_t ExpertProduct::beside(int64_t rows) const {
  const int64_t last = rows % kernels().lanes;
  return last <= kBesideRows ? last : 0;
}

bool ExpertProduct::streams(int64_t rows) const {
  const int64_t lanes = kernels().lanes, wide = round_up(rows - beside(rows), lanes);
  const bool idle = double(rows) < kTurnedShare * double(wide + beside(rows));
  return !weight_.transposed && (rows <= kStreamRows || (rows <= kTurnedRows && idle));
}

bool ExpertProduct::turns(int64_t rows) const {
  return !weight_.transposed && weight_.dtype == rows_ && weight_.inputs > 0 && rows <= kTurnedRows;
}

void ExpertProduct::dots(ExpertWork& work, const ExpertColumns& columns, int64_t rows,
                         const ExpertColumns* next) const {
  const int64_t width = run_width(columns.count), stride = sums_stride(columns);
  work.sums.reserve(rows * stride);
  for (int run = 0; run < columns.runs(); ++run) {
    const bool last = run + 1 == columns.runs();
    const char* following = !last  ? weight_.column(columns.expert, columns.second)
                            : next ? weight_.column(next->expert, next->begin)
                                   : nullptr;
    kernels().row_dots({.rows = int32_t(rows),
                        .columns = int32_t(columns.count),
                        .depth = int32_t(weight_.inputs),
                        .x = work.x.data(),
                        .x_dtype = rows_,
                        .weight = weight_.column(columns.expert, columns.begin_of(run)),
                        .weight_stride = weight_.row_stride,
                        .weight_dtype = weight_.dtype,
                        .next = following,
                        .sums = work.sums.data() + run * width,
                        .sums_stride = stride});
  }
}

void ExpertProduct::pack_panel(ExpertWork& work, const char* from, Dtype dtype, int64_t step, int64_t count,
                               int64_t width, char* to) const {
  const Kernels& k = kernels();
  const int64_t depth = weight_.inputs;
  // pairs along a row are units of 32 bits, which move as floats do
  const bool units = dot_ && dtype == Dtype::kBFloat16 && depth % 2 == 0 && step % 2 == 0;
  const int64_t unit = units ? 2 : 1;
  const bool detour = dot_ && !units;
  if (detour) work.floats.reserve(depth_ * width);
  float* out = detour ? work.floats.data() : reinterpret_cast<float*>(to);
  k.pack_columns({.from = from,
                  .dtype = units ? Dtype::kFloat32 : dtype,
                  .step = step / unit,
                  .columns = int32_t(count),
                  .width = int32_t(width),
                  .count = int32_t(depth / unit),
                  .row = row_.data(),
                  .to = out});
  if (!detour) return;
  std::fill_n(out + depth * width, (depth_ - depth) * width, 0.f);
  k.pack_pairs(out, depth_ / 2, width, to);
}

void ExpertProduct::pack(ExpertWork& work, const ExpertColumns& columns, int run, int64_t panel,
                         char* to) const {
  const Kernels& k = kernels();
  const int64_t first = panel * k.panel_width, left = std::min<int64_t>(columns.count - first, k.panel_width);
  const char* from = weight_.column(columns.expert, columns.begin_of(run) + first);
  const int64_t step = weight_.row_stride / size_of(weight_.dtype), width = round_up(left, k.lanes);
  if (!weight_.transposed) return pack_panel(work, from, weight_.dtype, step, left, width, to);
  k.pack_rows({.from = from,
               .dtype = weight_.dtype,
               .step = step,
               .columns = int32_t(left),
               .width = int32_t(width),
               .count = int32_t(weight_.inputs),
               .pairs = dot_,
               .to = to});
}

// Rows [first, first + count) side by side: where they are, or copied.
const char* ExpertProduct::together(ExpertWork& work, int64_t first, int64_t count, int64_t row_bytes) const {
  const char* const* x = work.x.data() + first;
  bool adjacent = true;
  for (int64_t i = 1; i < count; ++i) adjacent &= x[i] == x[0] + i * row_bytes;
  if (adjacent) return x[0];
  char* to = work.gathered.reserve(count * row_bytes);
  for (int64_t i = 0; i < count; ++i) kernels().fill(to + i * row_bytes, x[i], row_bytes, false);
  return to;
}

void ExpertProduct::pack_x(ExpertWork& work, int64_t expert, int64_t rows) const {
  if (work.packed_by == this && work.packed_expert == expert) return;
  work.packed_by = this;
  work.packed_expert = expert;
  const WidePanels panels(rows);
  const int64_t depth = weight_.inputs, lanes = kernels().lanes,
                vector_bytes = lanes * depth_ * size_of(rows_);
  work.packed.reserve(panels.vectors * vector_bytes);
  for (int32_t p = 0; p < panels.panels; ++p) {
    const int64_t first = panels.begin(p) * lanes, wide = panels.width(p) * lanes;
    const int64_t left = std::min(rows - first, wide);
    pack_panel(work, together(work, first, left, depth * size_of(rows_)), rows_, depth, left, wide,
               work.packed.data() + panels.begin(p) * vector_bytes);
  }
}

// The weight's rows that follow [begin, end) of a run of columns.
Ahead ExpertProduct::rows_after(const ExpertColumns& columns, int run, int64_t end,
                                const ExpertColumns* next) const {
  const auto rows_of = [&](int64_t expert, int64_t first, int64_t left) {
    return Ahead{weight_.column(expert, first), weight_.row_stride, weight_.inputs * size_of(weight_.dtype),
                 int32_t(std::min(left, kTurnedColumns))};
  };
  if (end < columns.count) {
    return rows_of(columns.expert, columns.begin_of(run) + end, columns.count - end);
  }
  if (run + 1 < columns.runs()) return rows_of(columns.expert, columns.second, columns.count);
  return next ? rows_of(next->expert, next->begin, next->count) : Ahead{};
}

// The i-th of n shares of what lies ahead.
Ahead share_of(const Ahead& whole, int32_t i, int32_t n) {
  const int32_t begin = whole.rows * i / n, end = whole.rows * (i + 1) / n;
  if (begin == end) return {};
  return {whole.from + begin * whole.stride, whole.stride, whole.bytes, end - begin};
}

void ExpertProduct::turned(ExpertWork& work, const ExpertColumns& columns, int64_t rows,
                           const ExpertColumns* next) const {
  const Kernels& k = kernels();
  const int64_t lanes = k.lanes, aside = beside(rows), packed = rows - aside;
  const int64_t width = run_width(columns.count), stride = sums_stride(columns);
  const WidePanels panels(packed);
  const int64_t wide = panels.vectors * lanes;
  pack_x(work, columns.expert, packed);
  work.sums.reserve(rows * stride);
  work.turned_sums.reserve(kTurnedColumns * wide);
  work.turned_row.resize(packed);
  for (int64_t i = 0; i < packed; ++i) work.turned_row[i] = int32_t(i * stride / lanes);
  const char* weight[kTurnedColumns];
  char* out[kTurnedColumns];
  for (int64_t i = 0; i < kTurnedColumns; ++i) {
    out[i] = bytes_of(work.turned_sums.data() + i * wide);
  }
  for (int run = 0; run < columns.runs(); ++run) {
    for (int64_t c = 0; c < columns.count; c += kTurnedColumns) {
      const int64_t count = std::min(columns.count - c, kTurnedColumns), begin = columns.begin_of(run) + c;
      for (int64_t i = 0; i < count; ++i) weight[i] = weight_.column(columns.expert, begin + i);
      const Ahead after = rows_after(columns, run, c + count, next);
      const int32_t blocks = int32_t(blocks_.size()), steps = panels.panels * blocks;
      for (int32_t step = 0; step < steps; ++step) {
        const int32_t p = step / blocks, vectors = panels.width(p);
        const DepthBlock& block = blocks_[step % blocks];
        const int64_t first = panels.begin(p) * lanes;
        Gemm gemm =
            gemm_of(block, work.packed.data() + first * depth_ * size_of(rows_), vectors * lanes, first * 4);
        gemm.ahead = share_of(after, step, steps);
        gemm.vectors = vectors;
        const char* const* in = in_segments(work, block, weight, count, tile_rows(vectors));
        const RowBlock outputs{.rows = int32_t(count),
                               .in = in,
                               .out = out,
                               .residual = block.first ? out : nullptr,
                               .near = true};
        k.gemm(gemm, outputs, 0, 1);
      }
      float* sums = work.sums.data() + run * width + c;
      for (int64_t i = 0; i < count; i += lanes) {  // [column][row] to [row][column]
        k.pack_columns({.from = out[i],
                        .dtype = Dtype::kFloat32,
                        .step = wide,
                        .columns = int32_t(std::min(count - i, lanes)),
                        .width = int32_t(lanes),
                        .count = int32_t(packed),
                        .row = work.turned_row.data(),
                        .to = sums + i});
      }
      if (!aside) continue;
      k.row_dots({.rows = int32_t(aside),
                  .columns = int32_t(count),
                  .depth = int32_t(weight_.inputs),
                  .x = work.x.data() + packed,
                  .x_dtype = rows_,
                  .weight = weight[0],
                  .weight_stride = weight_.row_stride,
                  .weight_dtype = weight_.dtype,
                  .next = nullptr,
                  .sums = sums + packed * stride,
                  .sums_stride = stride});
    }
  }
}

Ahead ExpertProduct::ahead(const ExpertColumns& columns, int run, int64_t panel) const {
  const int64_t width = kernels().panel_width, first = panel * width;
  const int64_t left = std::min(columns.count - first, width);
  const char* from = weight_.column(columns.expert, columns.begin_of(run) + first);
  const int64_t element = size_of(weight_.dtype);
  if (weight_.transposed) return {from, weight_.row_stride, left * element, int32_t(weight_.inputs)};
  return {from, weight_.row_stride, weight_.inputs * element, int32_t(left)};
}

void ExpertProduct::multiply(ExpertWork& work, const ExpertColumns& columns, Span block, bool last,
                             const ExpertColumns* next) const {
  const Kernels& k = kernels();
  const int64_t width = run_width(columns.count), stride = sums_stride(columns);
  const int64_t panels = width / k.panel_width, all = panels * columns.runs();
  const bool once = block.begin == 0 && last;  // then one panel after another takes the same place
  work.packed.reserve((once ? 1 : all) * panel_bytes_);
  work.packed_by = nullptr;
  work.sums.reserve(block.size() * stride);
  work.sums_out.resize(block.size());
  for (int64_t i = 0; i < block.size(); ++i) work.sums_out[i] = bytes_of(work.sums.data() + i * stride);
  for (int64_t p = 0; p < all; ++p) {
    const int run = int(p / panels);
    const int64_t panel = p % panels, first = panel * k.panel_width;
    char* to = work.packed.data() + (once ? 0 : p * panel_bytes_);
    if (block.begin == 0) pack(work, columns, run, panel, to);
    Ahead after;
    if (p + 1 < all && block.begin == 0) after = ahead(columns, int((p + 1) / panels), (p + 1) % panels);
    if (p + 1 == all && last && next) after = ahead(*next, 0, 0);
    const int32_t steps = int32_t(blocks_.size());
    for (int32_t step = 0; step < steps; ++step) {
      const DepthBlock& depth = blocks_[step];
      Gemm gemm = gemm_of(depth, to, std::min<int64_t>(columns.count - first, k.panel_width),
                          (run * width + first) * 4);
      gemm.ahead = share_of(after, step, steps);
      char* const* sums = work.sums_out.data();
      const RowBlock rows{.rows = int32_t(block.size()),
                          .in = in_segments(work, depth, work.x.data() + block.begin, block.size()),
                          .out = sums,
                          .residual = step ? sums : nullptr,
                          .near = p > 0};
      k.gemm(gemm, rows, 0, 1);
    }
  }
}

}  // namespace dynops::cpu
