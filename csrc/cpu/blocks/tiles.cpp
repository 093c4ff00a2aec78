// gather_tiles and scatter_tiles on the CPU: blocks of a map to tiles and back.
//
// Both memory formats are the same walk over lines of memory, see Lines. Copies are of any dtype.
#include <cstring>

#include "../engine/operands.h"
#include "../engine/parallel.h"
#include "grid.h"

namespace dynops::cpu {
namespace {

void check_shapes(const Tensor& map, const Tensor& tiles, const Tensor& index, const BlockGeometry& g) {
  check_tiles(map, tiles, g);
  STD_TORCH_CHECK(tiles.size(0) == index.size(0), "tiles: expected ", index.size(0), " as the index, got ",
                  tiles.size(0));
}

// -------------------------------------------------------------------------------------- gather

// One plane of a tile whose first pixel is (y0, x0) of the plane `from` of a map.
void gather_plane(const char* from, int64_t y0, int64_t x0, const BlockGeometry& g, int64_t pixel, char* to) {
  const Span ys = clipped(y0, g.tile_h, g.height), xs = clipped(x0, g.tile_w, g.width);
  const int64_t line = g.tile_w * pixel, left = (xs.begin - x0) * pixel, run = xs.size() * pixel;
  fill_zero(to, (ys.begin - y0) * line);
  for (int64_t y = ys.begin; y < ys.end; ++y) {
    char* row = to + (y - y0) * line;
    fill_zero(row, left);
    std::memcpy(row + left, from + (y * g.width + xs.begin) * pixel, run);
    fill_zero(row + left + run, line - left - run);
  }
  fill_zero(to + (ys.end - y0) * line, (y0 + g.tile_h - ys.end) * line);
}

// x and out are both channels_last or both contiguous; tiles past the count become zero.
void gather_tiles(const Tensor& x, const Tensor& index, const OptionalTensor& count,
                  IntHeaderOnlyArrayRef geometry, Tensor out) {
  const BlockGeometry g = block_geometry_of(geometry);
  check_shapes(x, out, index, g);
  if (out.numel() == 0) return;
  const int64_t tiles = active_rows(index, count);
  const int32_t* at = checked_index(index, tiles, g.blocks());
  const Lines layout = lines_of(x, out);
  const int64_t plane = g.tile_h * g.tile_w * layout.pixel(), planes = tiles * layout.planes;
  const char* from = data_of<const char>(x);
  char* to = data_of<char>(out);
  const int64_t threads = threads_for(double(planes) * double(plane), kCopyBytesPerThread);
  parallel_shares(planes, threads, [&](int64_t i) {
    const int64_t block = at[i / layout.planes], row = block / g.grid_w, n = row / g.grid_h;
    const int64_t y0 = g.first_h + row % g.grid_h * g.step_h, x0 = g.first_w + block % g.grid_w * g.step_w;
    const int64_t source = (n * layout.planes + i % layout.planes) * g.height * g.width;
    gather_plane(from + source * layout.pixel(), y0, x0, g, layout.pixel(), to + i * plane);
  });
  fill_zero(to + planes * plane, (out.size(0) - tiles) * layout.planes * plane);
}

// ------------------------------------------------------------------------------------- scatter

// A line of memory of a map, and the walk to the next one without a division.
struct Line {
  int64_t n, plane, y, begin;  // begin: its first byte

  Line(int64_t line, const BlockGeometry& g, const Lines& layout)
      : n(line / g.height / layout.planes),
        plane(line / g.height % layout.planes),
        y(line % g.height),
        begin(line * g.width * layout.pixel()) {}

  void next(const BlockGeometry& g, const Lines& layout) {
    begin += g.width * layout.pixel();
    if (++y < g.height) return;
    y = 0;
    if (++plane < layout.planes) return;
    plane = 0;
    ++n;
  }
};

struct Scatter {
  BlockGeometry g;
  Lines layout;
  GridRows grid;
  std::vector<Span> rows_over;  // [H]: the rows of the grid that cover a line of an image
  const char* tiles;
  const char* base;  // or null: zero
  char* out;
  bool stream;

  int64_t line_bytes() const { return g.width * layout.pixel(); }
  int64_t lines() const { return g.batch * layout.planes * g.height; }

  // Calls f(run of a tile, its columns) for all tiles over a line, in the order of the plan.
  template <class F>
  void for_each_run(const Line& line, const F& f) const {
    for (const int64_t by : each(rows_over[line.y])) {
      const int64_t row = line.n * g.grid_h + by, i = line.y - (g.first_h + by * g.step_h);
      for (const int64_t b : each(grid.blocks_of(row))) {
        const Span xs = grid.columns(row, b);
        const int64_t j = xs.begin - grid.left(row, b);
        const int64_t pixel = ((b * layout.planes + line.plane) * g.tile_h + i) * g.tile_w + j;
        if (xs.size() > 0) f(tiles + pixel * layout.pixel(), xs);
      }
    }
  }

  // Base, or zero, from one byte of the output to another.
  void fill(int64_t begin, int64_t end) const {
    if (begin < end) kernels().fill(out + begin, base ? base + begin : nullptr, end - begin, stream);
  }
};

std::vector<Span> rows_over_lines(const BlockGeometry& g) {
  std::vector<Span> rows;
  rows.reserve(g.height);
  for (int64_t y = 0; y < g.height; ++y) {
    const int64_t from_first = y - g.first_h, past_first = from_first - g.tile_h;
    const int64_t begin = past_first < 0 ? 0 : past_first / g.step_h + 1;
    const int64_t end = from_first < 0 ? 0 : from_first / g.step_h + 1;
    rows.push_back({begin, std::min(end, g.grid_h)});
  }
  return rows;
}

// Runs come in the order of memory: what lies between two is filled, so that every byte is written once.
void replace_lines(const Scatter& s, Span lines) {
  int64_t done = lines.begin * s.line_bytes();
  Line line(lines.begin, s.g, s.layout);
  for (int64_t i = lines.begin; i < lines.end; ++i, line.next(s.g, s.layout)) {
    s.for_each_run(line, [&](const char* run, Span xs) {
      const int64_t start = line.begin + xs.begin * s.layout.pixel(), bytes = xs.size() * s.layout.pixel();
      s.fill(done, start);
      std::memcpy(s.out + start, run, bytes);
      done = start + bytes;
    });
  }
  s.fill(done, lines.end * s.line_bytes());
}

// Base and the tiles over one line. `memory` holds the sums of a line where they cannot be in the output.
void add_line(const Scatter& s, const Line& line, Dtype dtype, float* memory) {
  const Kernels& k = kernels();
  const int64_t pixel = s.layout.pixel(), elements = s.layout.elements;
  Span covered{s.g.width, 0};
  s.for_each_run(line, [&](const char*, Span xs) {
    covered = {std::min(covered.begin, xs.begin), std::max(covered.end, xs.end)};
  });
  const int64_t left = line.begin + covered.begin * pixel, right = line.begin + covered.end * pixel;
  s.fill(line.begin, left);
  if (covered.size() <= 0) return;
  float* sums = dtype == Dtype::kFloat32 ? reinterpret_cast<float*>(s.out + left) : memory;
  if (s.base) {
    k.to_float(s.base + left, dtype, covered.size() * elements, sums);
  } else {
    std::fill(sums, sums + covered.size() * elements, 0.f);
  }
  s.for_each_run(line, [&](const char* run, Span xs) {
    k.add_to(run, dtype, xs.size() * elements, sums + (xs.begin - covered.begin) * elements);
  });
  if (sums == memory) k.from_float(sums, covered.size() * elements, dtype, s.out + left);
  s.fill(right, line.begin + s.line_bytes());
}

// A thread owns lines of the output, and each sums its tiles in their order: no thread count changes a bit.
void add_lines(const Scatter& s, Dtype dtype, Span lines) {
  std::vector<float> memory(dtype == Dtype::kFloat32 ? 0 : s.g.width * s.layout.elements);
  Line line(lines.begin, s.g, s.layout);
  for (int64_t i = lines.begin; i < lines.end; ++i, line.next(s.g, s.layout))
    add_line(s, line, dtype, memory.data());
}

// tiles, base and out are all channels_last or all contiguous.
void scatter_tiles(const Tensor& tiles, const Tensor& index, const OptionalTensor& count,
                   IntHeaderOnlyArrayRef geometry, const OptionalTensor& base, bool add, Tensor out) {
  const BlockGeometry g = block_geometry_of(geometry);
  check_shapes(out, tiles, index, g);
  check_base(base, out);
  STD_TORCH_CHECK(add || !g.overlaps(), "add: expected True for tiles that overlap, got False");
  if (out.numel() == 0) return;
  const int64_t bytes = out.numel() * int64_t(out.element_size());
  const Scatter s{.g = g,
                  .layout = lines_of(out, tiles),
                  .grid = GridRows(index, count, g),
                  .rows_over = rows_over_lines(g),
                  .tiles = data_of<const char>(tiles),
                  .base = data_of<const char>(base),
                  .out = data_of<char>(out),
                  .stream = bytes >= kStreamBytes};
  const bool sums = add && (base || g.overlaps());  // one tile and zero: the tile
  const Dtype dtype = sums ? dtype_of(out) : Dtype::kFloat32;
  const int64_t threads = threads_for(double(bytes), kCopyBytesPerThread);
  parallel(threads, [&](int64_t t) {
    const Span lines = share_of(s.lines(), t, threads);
    sums ? add_lines(s, dtype, lines) : replace_lines(s, lines);
    if (s.stream) end_stream();
  });
}

DYNOPS_CPU_OP(gather_tiles)
DYNOPS_CPU_OP(scatter_tiles)

}  // namespace
}  // namespace dynops::cpu
