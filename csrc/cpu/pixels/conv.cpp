// Pixel-sparse convolution on the CPU, forward: gather, multiply, finish, scatter.
#include <cstring>
#include <memory>

#include "../engine/forward_pass.h"
#include "planes.h"
#include "winograd.h"

namespace dynops::cpu {
namespace {

void run_forward(const Forward& f) {
  bool fills = !f.packed_out;
  const double fill_macs = fills ? double(f.g.out_pixels() - f.rows) * f.out_channels : 0;
  for (const RowClass& rows : row_classes(f.g, f.index, f.rows)) {
    const ForwardPass pass(f, rows);
    const int64_t threads = threads_for(pass.macs() + fill_macs, kMacsPerThread);
    const int64_t weight_bytes = f.in_channels / f.g.groups * f.out_channels * f.g.taps() * (f.dot() ? 2 : 4);
    const Partition split(threads, pass.rows(), pass.panels(), weight_bytes);
    parallel(threads, [&](int64_t t) {
      if (fills) fill_part(f, t, threads);
      const int64_t r = t % split.row_parts, p = t / split.row_parts;
      pass.run(part(pass.rows(), r, split.row_parts, kTileRows),
               part(pass.rows(), r + 1, split.row_parts, kTileRows),
               part(pass.panels(), p, split.panel_parts), part(pass.panels(), p + 1, split.panel_parts));
    });
    fills = false;
  }
}

// Shares of active pixels from which on the rows of a block go to their planes while they lie in the L2
// cache. Below it threads have the same number of rows, and not of pixels to fill.
constexpr double kFusedShare = 0.25;
constexpr int64_t kFusedBytes = 256 << 10;

// The forward pass to NCHW: `f` writes packed rows, here.
void run_to_planes(Forward f, const OptionalTensor& quads, const PlaneMap& map) {
  const std::vector<RowClass> classes = row_classes(f.g, f.index, f.rows);
  const int64_t bytes = f.out_bytes();
  const int64_t weight_bytes = f.in_channels / f.g.groups * f.out_channels * f.g.taps() * (f.dot() ? 2 : 4);
  f.packed_out = true;
  if (classes.size() == 1 && !quads && double(f.rows) >= kFusedShare * double(f.g.out_pixels())) {
    const ForwardPass whole(f, classes[0]);
    const int64_t threads = threads_for(whole.macs(), kMacsPerThread);
    const int64_t step = std::clamp<int64_t>(kFusedBytes / bytes / kTileRows, 4, 64) * kTileRows;
    if (Partition(threads, f.rows, whole.panels(), weight_bytes).panel_parts == 1) {
      parallel(threads, [&](int64_t t) {
        Forward mine = f;
        const ForwardPass pass(mine, classes[0]);
        Block block;
        std::vector<int32_t> row;
        const std::unique_ptr<char[]> sums(new char[size_t(step * bytes)]);
        const int64_t end = part(f.rows, t + 1, threads, kTileRows);
        for (int64_t a = part(f.rows, t, threads, kTileRows); a < end; a += step) {
          const int64_t b = std::min(end, a + step);
          mine.out = sums.get() - a * bytes;
          pass.run(block, a, b, 0, pass.panels());
          // with its rows a block has the pixels up to the next one's first row
          int64_t q = a == 0 ? 0 : f.index[a];
          const int64_t last = b == f.rows ? f.g.out_pixels() : f.index[b];
          while (q < last) {
            const int64_t n = q / map.plane, stop = std::min({last, (n + 1) * map.plane, q + step});
            scatter_part(map, {mine.out, f.index, f.rows, false}, n, q - n * map.plane, stop - n * map.plane,
                         0, map.channels, false, row);
            q = stop;
          }
        }
      });
      return;
    }
  }
  const std::unique_ptr<char[]> rows(new char[size_t(std::max<int64_t>(f.rows * bytes, 1))]);
  f.out = rows.get();
  quads ? run_winograd(f, *quads) : run_forward(f);
  scatter_to_planes(map, {rows.get(), f.index, f.rows, false});
}

// What the kernels read and write has the sizes that the geometry and the index name: else they would leave
// outputs as the allocator gave them, or read past a tensor's end.
void check_sizes(const Geometry& g, const Tensor& x, int64_t rows, const OptionalTensor& source,
                 const OptionalTensor& gate, const OptionalTensor& residual, const OptionalTensor& base,
                 const Tensor& out) {
  const bool packed_in = bool(source), packed_out = out.dim() == 2;
  const int64_t outputs = out.size(1), in_pixels = x.size(1) ? x.numel() / x.size(1) : 0;
  STD_TORCH_CHECK(packed_in ? x.dim() == 2 && source->numel() == g.in_pixels()
                            : in_pixels == g.in_pixels() || x.numel() == 0,
                  "x: expected the geometry's ", g.in_pixels(), " input pixels, or their rows, got ",
                  in_pixels, " and ", source ? source->numel() : 0, " rows of pixels");
  STD_TORCH_CHECK(packed_out ? out.size(0) >= rows : out.numel() == g.out_pixels() * outputs,
                  "out: expected the geometry's ", g.out_pixels(), " output pixels, or ", rows, " rows, got ",
                  out.numel(), " elements of ", outputs, " channels");
  const int64_t added = residual && residual->dim() == 4 ? g.out_pixels() : rows;
  STD_TORCH_CHECK((!gate || gate->numel() >= rows) && (!residual || residual->numel() >= added * outputs) &&
                      (!base || base->numel() == g.out_pixels() * outputs),
                  "gate, residual, base: expected ", rows, " rows and ", g.out_pixels(), " pixels of ",
                  outputs, " channels, got ", gate ? gate->numel() : 0, ", ",
                  residual ? residual->numel() : 0, " and ", base ? base->numel() : 0, " elements");
}

void conv(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& index,
          const OptionalTensor& count, const OptionalTensor& source, IntHeaderOnlyArrayRef geometry,
          int64_t activation, const OptionalTensor& scale, const OptionalTensor& shift,
          const OptionalTensor& gate, const OptionalTensor& residual, const OptionalTensor& base, bool merged,
          const OptionalTensor& quads, Tensor out) {
  const Geometry g = geometry_of(geometry);
  const int64_t rows = active_rows(index, count), in_channels = x.size(1), out_channels = out.size(1);
  const Dtype dtype = dtype_of(x);
  const int64_t row_bytes = in_channels * size_of(dtype);
  const ZeroRow zero(row_bytes);
  const int32_t* at = checked_index(index, rows, g.out_pixels());
  const bool packed_out = out.dim() == 2;
  check_sizes(g, x, rows, source, gate, residual, base, out);
  const Forward f{g,
                  in_channels,
                  out_channels,
                  rows,
                  dtype,
                  at,
                  {g, data_of<const char>(x), row_bytes, data_of<const int32_t>(source), zero.data(), merged},
                  Affine(bias, scale, shift, out_channels),
                  Activation(activation),
                  data_of<const char>(weight),
                  data_of<const float>(gate),
                  data_of<const char>(residual),
                  data_of<const char>(base),
                  data_of<char>(out),
                  packed_out,
                  residual && residual->dim() == 4};
  // an output that is NCHW; of one channel or one pixel it is channels_last too
  if (!packed_out && out_channels > 1 && out.stride(1) != 1) {
    STD_TORCH_CHECK(out.is_contiguous() && (!base || base->is_contiguous()),
                    "out, base: expected NCHW or channels_last, got other strides");
    run_to_planes(f, quads,
                  {f.out, f.base, g.batch, out_channels, g.out_h * g.out_w, int64_t(out.element_size())});
  } else if (quads) {
    run_winograd(f, *quads);
  } else {
    run_forward(f);
  }
  const int64_t unused = packed_out ? out.size(0) - rows : 0;  // rows past a capacity plan's count
  if (unused) std::memset(f.out + rows * f.out_bytes(), 0, size_t(unused * f.out_bytes()));
}

}  // namespace
}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) {
  m.def(
      "cpu_conv(Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor? count, Tensor? source, int[] "
      "geometry, "
      "int activation, Tensor? scale, Tensor? shift, Tensor? gate, Tensor? residual, Tensor? base, bool "
      "merged, "
      "Tensor? quads, Tensor(a!) out) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) { m.impl("cpu_conv", TORCH_BOX(&dynops::cpu::conv)); }
