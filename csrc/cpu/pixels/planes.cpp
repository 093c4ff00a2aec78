// Maps that lie channel by channel, [N, C, H, W], read and written where they lie: pixels to packed rows and
// back. Strided views are read in place too.
#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "../engine/operands.h"
#include "../engine/parallel.h"
#include "planes.h"

namespace dynops::cpu {
namespace {

constexpr double kBytesPerThread = 32 * 1024;
// Pixels are copied some at a time with all of their channels, so that their rows stay in the L2 cache: 3136
// pixels of 256 channels in steps of 512 take 180 us, of 96 147.
constexpr int64_t kStepBytes = 96 << 10;
constexpr int64_t kLeastStep = 64, kMostStep = 512;
constexpr int64_t kPlaneChannels = 16;  // threads share channels in parts of so many

// Pixels copied at a time.
int64_t step_of(int64_t row_bytes) {
  return std::clamp<int64_t>(kStepBytes / std::max<int64_t>(row_bytes, 1) / 64 * 64, kLeastStep, kMostStep);
}

// Where the pixels of a map [N, C, H, W] lie, whatever its strides.
struct Places {
  explicit Places(const Tensor& map)
      : h(map.size(2)),
        w(map.size(3)),
        size(int64_t(map.element_size())),
        n_bytes(map.stride(0) * size),
        c_bytes(map.stride(1) * size),
        y_bytes(map.stride(2) * size),
        x_bytes(map.stride(3) * size) {}

  // Whether each plane is without gaps: then a line's end is the next one's beginning.
  bool whole() const { return (x_bytes == size || w <= 1) && (y_bytes == w * size || h <= 1); }

  // Whether ascending pixels lie at ascending addresses: not where images overlap, as those of an expanded
  // batch.
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
  const int64_t threads = threads_for(double(rows * row_bytes), kBytesPerThread);
  const int64_t step = std::clamp<int64_t>((rows + threads - 1) / threads, 1, step_of(row_bytes));
  const int64_t blocks = (rows + step - 1) / step;
  parallel(std::min(threads, blocks), [&](int64_t t) {
    const int64_t parts = std::min(threads, blocks);
    std::vector<int64_t> place(static_cast<size_t>(step));
    for (int64_t b = part(blocks, t, parts); b < part(blocks, t + 1, parts); ++b) {
      const int64_t first = b * step, height = std::min(step, rows - first);
      places.of(at ? at + first : nullptr, first, height, place.data());
      char* row = to + first * row_bytes;
      if (places.c_bytes == places.size) {  // a slice of a channels_last map
        for (int64_t i = 0; i < height; ++i, row += row_bytes)
          std::copy_n(from + place[size_t(i)], row_bytes, row);
        continue;
      }
      kernels().gather_planes(
          {height, channels, place.data(), places.ascends(x.size(0)), places.c_bytes, row_bytes, places.size},
          from, row);
    }
  });
  if (out.size(0) > rows) std::fill_n(to + rows * row_bytes, (out.size(0) - rows) * row_bytes, char(0));
}

}  // namespace

// Filled and then written while they lie in the L1 cache: a map that is written in two passes comes from
// memory twice.
void scatter_part(const PlaneMap& map, const PlaneSource& source, int64_t n, int64_t begin, int64_t end,
                  int64_t c, int64_t channels, bool stream, std::vector<int32_t>& row) {
  const int64_t image = n * map.plane, row_bytes = map.channels * map.size;
  int64_t first = image + begin, last = image + end;
  if (!source.all) {  // an empty index has no address either
    first = std::lower_bound(source.at, source.at + source.count, image + begin) - source.at;
    last = std::lower_bound(source.at + first, source.at + source.count, image + end) - source.at;
  }
  const int64_t to = ((n * map.channels + c) * map.plane + begin) * map.size;
  if (map.base || first == last) {
    for (int64_t k = 0; k < channels; ++k) {
      const int64_t line = to + k * map.plane * map.size;
      kernels().fill(map.to + line, map.base ? map.base + line : nullptr, (end - begin) * map.size,
                     stream && first == last);
    }
  }
  if (row.size() < size_t(end - begin)) row.resize(size_t(end - begin));
  PlaneSpread spread{end - begin,          channels,  row.data(), source.rows + c * map.size, map.to + to,
                     map.plane * map.size, row_bytes, map.size};
  if (!map.base && first < last) {
    std::fill_n(row.begin(), end - begin, -1);
    for (int64_t r = first; r < last; ++r) {
      row[size_t((source.all ? r : source.at[r]) - image - begin)] = int32_t(r);
    }
    kernels().spread_planes(spread);
  }
  for (int64_t r = first; map.base && r < last; ++r) {  // pixel by pixel into what lies there already
    const int64_t pixel = (source.all ? r : source.at[r]) - image - begin;
    row[0] = int32_t(r);
    spread.pixels = 1;
    spread.planes = map.to + to + pixel * map.size;
    kernels().spread_planes(spread);
  }
}

void scatter_to_planes(const PlaneMap& map, const PlaneSource& source) {
  const int64_t step = step_of(map.channels * map.size), pixel_parts = (map.plane + step - 1) / step;
  const int64_t heads = map.batch * pixel_parts, least = 4 * int64_t(torch::stable::get_num_threads());
  if (heads == 0 || map.channels == 0) return;
  // threads share the channels of a small map
  const int64_t blocks = (map.channels + kPlaneChannels - 1) / kPlaneChannels;
  const int64_t channel_parts = std::clamp<int64_t>((least + heads - 1) / heads, 1, blocks);
  const int64_t parts = heads * channel_parts;
  const int64_t threads = std::min(threads_for(double(map.bytes()), kBytesPerThread), parts);
  const bool stream = map.bytes() >= kStreamBytes;
  parallel(threads, [&](int64_t t) {
    std::vector<int32_t> row;
    for (int64_t i = part(parts, t, threads); i < part(parts, t + 1, threads); ++i) {
      const int64_t c = part(map.channels, i % channel_parts, channel_parts, kPlaneChannels);
      const int64_t end_c = part(map.channels, i % channel_parts + 1, channel_parts, kPlaneChannels);
      const int64_t begin = i / channel_parts % pixel_parts * step;
      scatter_part(map, source, i / channel_parts / pixel_parts, begin, std::min(map.plane, begin + step), c,
                   end_c - c, stream, row);
    }
#if defined(__x86_64__)
    if (stream) _mm_sfence();  // other threads may read the output after this one's part is done
#endif
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
  const PlaneMap map{data_of<char>(out), data_of<const char>(base), out.size(0),
                     out.size(1),        out.size(2) * out.size(3), int64_t(out.element_size())};
  scatter_to_planes(map, {data_of<const char>(rows_in), at, rows, !index});
}

}  // namespace
}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) {
  m.def("cpu_gather_planes(Tensor x, Tensor? index, Tensor? count, Tensor(a!) out) -> ()");
  m.def("cpu_scatter_planes(Tensor rows, Tensor? index, Tensor? count, Tensor? base, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) {
  m.impl("cpu_gather_planes", TORCH_BOX(&dynops::cpu::gather_planes));
  m.impl("cpu_scatter_planes", TORCH_BOX(&dynops::cpu::scatter_planes));
}
