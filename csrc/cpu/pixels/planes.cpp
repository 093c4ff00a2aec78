// Maps that lie channel by channel, [N, C, H, W], read and written where they lie: pixels to packed rows and
// back. Strided views are read in place too.
#include "planes.h"

#include <vector>

#include "../engine/operands.h"
#include "../engine/parallel.h"

namespace dynops::cpu {
namespace {

constexpr double kPlaneBytesPerThread = 32 * 1024;
// Pixels are copied some at a time with all of their channels, so that their rows stay in the L2 cache. 3136
// pixels of 256 channels take 180 us in steps of 512, and 147 in steps of 96.
constexpr int64_t kStepBytes = 96 << 10;
constexpr int64_t kLeastStep = 64, kMostStep = 512;
constexpr int64_t kPlaneChannels = 16;  // a thread's share of channels is a multiple of these

// Pixels copied at a time.
int64_t step_of(int64_t row_bytes) {
  return std::clamp<int64_t>(kStepBytes / std::max<int64_t>(row_bytes, 1) / 64 * 64, kLeastStep, kMostStep);
}

// The places of the pixels of a map [N, C, H, W] of any strides.
struct Places {
  explicit Places(const Tensor& map)
      : h(map.size(2)),
        w(map.size(3)),
        size(int64_t(map.element_size())),
        n_bytes(map.stride(0) * size),
        c_bytes(map.stride(1) * size),
        y_bytes(map.stride(2) * size),
        x_bytes(map.stride(3) * size) {}

  // True if each plane is without gaps: then a line's end is the next one's beginning.
  bool whole() const { return (x_bytes == size || w <= 1) && (y_bytes == w * size || h <= 1); }

  // True if ascending pixels lie at ascending addresses: not where images overlap (an expanded batch).
  bool ascends(int64_t images) const { return whole() && (images <= 1 || n_bytes >= h * w * size); }

  // Bytes to the first channel of the pixels at[0 .. count), or without `at` of those from `first` on.
  void of(const int32_t* at, int64_t first, int64_t count, int64_t* out) const {
    const int64_t pixels = h * w;
    int64_t n = 0, end = 0;  // the image, and the first pixel past it
    for (int64_t i = 0; i < count; ++i) {
      const int64_t q = at ? at[i] : first + i;
      if (q >= end) {
        n = q / pixels;
        end = (n + 1) * pixels;
      }
      const int64_t inside = q - n * pixels;
      const int64_t lines = whole() ? inside * size : inside / w * y_bytes + inside % w * x_bytes;
      out[i] = n * n_bytes + lines;
    }
  }

  int64_t h, w, size, n_bytes, c_bytes, y_bytes, x_bytes;
};

// The rows of a plan, or without an index all pixels; those past the count are none.
int64_t rows_of(const OptionalTensor& index, const OptionalTensor& count, int64_t pixels) {
  return index ? active_rows(*index, count) : pixels;
}

void check_rows(const Tensor& rows, int64_t least, const Tensor& map) {
  STD_TORCH_CHECK(rows.dim() == 2 && map.dim() == 4 && rows.size(1) == map.size(1) && rows.size(0) >= least &&
                      rows.is_contiguous() && rows.scalar_type() == map.scalar_type(),
                  "rows: expected at least ", least, " of the map's ", map.dim() == 4 ? map.size(1) : -1,
                  " channels and dtype, contiguous, got ", rows.dim() == 2 ? rows.size(0) : -1, " of ",
                  rows.dim() == 2 ? rows.size(1) : -1);
}

// x [N, C, H, W] of any strides and dtype to out [P, C]; rows past the count become zero.
void gather_planes(const Tensor& x, const OptionalTensor& index, const OptionalTensor& count, Tensor out) {
  const int64_t pixels = x.dim() == 4 ? x.size(0) * x.size(2) * x.size(3) : 0;
  const int64_t rows = rows_of(index, count, pixels), channels = out.size(1);
  check_rows(out, rows, x);
  const int32_t* at = index ? checked_index(*index, rows, pixels) : nullptr;
  const Places places(x);
  const int64_t row_bytes = channels * places.size;
  const char* from = data_of<const char>(x);
  char* to = data_of<char>(out);
  const int64_t threads = threads_for(double(rows * row_bytes), kPlaneBytesPerThread);
  const int64_t step = std::clamp<int64_t>(ceil_div(rows, threads), 1, step_of(row_bytes));
  const int64_t blocks = ceil_div(rows, step), tasks = std::min(threads, blocks);
  parallel(tasks, [&](int64_t t) {
    std::vector<int64_t> place(step);
    for (const int64_t b : each(share_of(blocks, t, tasks))) {
      const int64_t first = b * step, height = std::min(step, rows - first);
      places.of(at ? at + first : nullptr, first, height, place.data());
      char* row = to + first * row_bytes;
      if (places.c_bytes == places.size) {  // a slice of a channels_last map
        for (int64_t i = 0; i < height; ++i, row += row_bytes) std::copy_n(from + place[i], row_bytes, row);
        continue;
      }
      kernels().gather_planes({.rows = height,
                               .channels = channels,
                               .at = place.data(),
                               .ascends = places.ascends(x.size(0)),
                               .channel_bytes = places.c_bytes,
                               .row_bytes = row_bytes,
                               .size = places.size},
                              from, row);
    }
  });
  if (out.size(0) > rows) std::fill_n(to + rows * row_bytes, (out.size(0) - rows) * row_bytes, char(0));
}

}  // namespace

// Filled and written while they lie in the L1 cache: written in two passes, a map comes from memory twice.
void scatter_pixels(const PlaneMap& map, const PlaneSource& source, int64_t n, Span pixels, Span channels,
                    bool stream, std::vector<int32_t>& row) {
  const int64_t image = n * map.plane, first_pixel = image + pixels.begin, count = pixels.size();
  Span rows{first_pixel, image + pixels.end};
  if (!source.all) {  // an empty index has no address either
    const int32_t* const end = source.at + source.count;
    rows.begin = std::lower_bound(source.at, end, first_pixel) - source.at;
    rows.end = std::lower_bound(source.at + rows.begin, end, image + pixels.end) - source.at;
  }
  const int64_t to = ((n * map.channels + channels.begin) * map.plane + pixels.begin) * map.size;
  if (map.base || rows.size() == 0) {
    for (int64_t k = 0; k < channels.size(); ++k) {
      const int64_t line = to + k * map.plane * map.size;
      kernels().fill(map.to + line, map.base ? map.base + line : nullptr, count * map.size,
                     stream && rows.size() == 0);
    }
  }
  if (int64_t(row.size()) < count) row.resize(count);
  PlaneSpread spread{.pixels = count,
                     .channels = channels.size(),
                     .row = row.data(),
                     .rows = source.rows + channels.begin * map.size,
                     .planes = map.to + to,
                     .channel_bytes = map.plane * map.size,
                     .row_bytes = map.channels * map.size,
                     .size = map.size};
  const auto pixel_of = [&](int64_t r) { return (source.all ? r : source.at[r]) - first_pixel; };
  if (!map.base && rows.size()) {
    std::fill_n(row.begin(), count, -1);
    for (int64_t r = rows.begin; r < rows.end; ++r) row[pixel_of(r)] = int32_t(r);
    kernels().spread_planes(spread);
  }
  for (int64_t r = rows.begin; map.base && r < rows.end;
       ++r) {  // pixel by pixel into what lies there already
    row[0] = int32_t(r);
    spread.pixels = 1;
    spread.planes = map.to + to + pixel_of(r) * map.size;
    kernels().spread_planes(spread);
  }
}

void scatter_to_planes(const PlaneMap& map, const PlaneSource& source) {
  const int64_t step = step_of(map.channels * map.size), pixel_shares = ceil_div(map.plane, step);
  const int64_t heads = map.batch * pixel_shares, least = 4 * int64_t(torch::stable::get_num_threads());
  if (heads == 0 || map.channels == 0) return;
  // threads share the channels of a small map
  const int64_t blocks = ceil_div(map.channels, kPlaneChannels);
  const int64_t channel_shares = std::clamp<int64_t>(ceil_div(least, heads), 1, blocks);
  const int64_t units = heads * channel_shares;
  const int64_t threads = std::min(threads_for(double(map.bytes()), kPlaneBytesPerThread), units);
  const bool stream = map.bytes() >= kStreamBytes;
  parallel(threads, [&](int64_t t) {
    std::vector<int32_t> row;
    for (const int64_t i : each(share_of(units, t, threads))) {
      const int64_t begin = i / channel_shares % pixel_shares * step;
      scatter_pixels(map, source, i / channel_shares / pixel_shares,
                     {begin, std::min(map.plane, begin + step)},
                     share_of(map.channels, i % channel_shares, channel_shares, kPlaneChannels), stream, row);
    }
    if (stream) end_stream();
  });
}

namespace {

// Rows [P, C] to out [N, C, H, W]; elsewhere the base, or zero. Both of them NCHW without gaps.
void scatter_planes(const Tensor& rows_in, const OptionalTensor& index, const OptionalTensor& count,
                    const OptionalTensor& base, Tensor out) {
  const int64_t pixels = out.dim() == 4 ? out.size(0) * out.size(2) * out.size(3) : 0;
  const int64_t rows = rows_of(index, count, pixels);
  check_rows(rows_in, rows, out);
  STD_TORCH_CHECK(out.is_contiguous() && (!base || (base->is_contiguous() && base->numel() == out.numel() &&
                                                    base->scalar_type() == out.scalar_type())),
                  "base: expected a map of the output's ", out.numel(), " elements, both NCHW, got ",
                  base ? base->numel() : out.numel(), " elements");
  const int32_t* at = index ? checked_index(*index, rows, pixels) : nullptr;
  const PlaneMap map{.to = data_of<char>(out),
                     .base = data_of<const char>(base),
                     .batch = out.size(0),
                     .channels = out.size(1),
                     .plane = out.size(2) * out.size(3),
                     .size = int64_t(out.element_size())};
  scatter_to_planes(map, {data_of<const char>(rows_in), at, rows, !index});
}

DYNOPS_CPU_OP(gather_planes)
DYNOPS_CPU_OP(scatter_planes)

}  // namespace
}  // namespace dynops::cpu
