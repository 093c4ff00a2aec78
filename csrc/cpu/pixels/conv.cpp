// Pixel-sparse convolution on the CPU, forward: gather, multiply, finish, scatter.
#include <cstring>
#include <memory>

#include "../engine/forward_pass.h"
#include "conv.h"
#include "planes.h"

namespace dynops::cpu {

void run_forward(const Forward& f) {
  bool fills = !f.packed_out;
  const double fill_macs = fills ? double(f.g.out_pixels() - f.rows) * f.out_channels : 0;
  for (const RowClass& rows : row_classes(f.g, f.index, f.rows)) {
    const ForwardPass pass(f, rows);
    const int64_t threads = threads_for(pass.macs() + fill_macs, kMacsPerThread);
    const bool by_panel = shares_panels(threads, pass.rows(), pass.panels(), f.weight_bytes());
    parallel(threads, [&](int64_t t) {
      if (fills) fill_share(f, t, threads);
      const Span all_rows{0, pass.rows()}, all_panels{0, pass.panels()};
      RowTables tables;
      pass.run(tables, by_panel ? all_rows : share_of(pass.rows(), t, threads, kTileRows),
               by_panel ? share_of(pass.panels(), t, threads) : all_panels);
    });
    fills = false;
  }
}

namespace {

void run_winograd_of(const Forward& f, const Tensor& quads) {
  STD_TORCH_CHECK(quads.dim() == 2 && quads.size(1) == 5 && quads.scalar_type() == ScalarType::Int &&
                      quads.is_contiguous(),
                  "quads: expected contiguous int32 [T, 5], got ", quads.dim(), " dimensions");
  run_winograd(f, data_of<const int32_t>(quads), quads.size(0));
}

// From this share of active pixels on, the rows of a block go to their planes while they lie in the L2 cache.
// Below it threads have the same number of rows, and not of pixels to fill.
constexpr double kFusedShare = 0.25;
constexpr int64_t kFusedBytes = 256 << 10;

// Rows of one class, computed some at a time and brought to their planes from the cache.
void run_fused(const Forward& f, const RowClass& rows, int64_t threads, const PlaneMap& map) {
  const int64_t bytes = f.out_bytes();
  const int64_t step = std::clamp<int64_t>(kFusedBytes / bytes / kTileRows, 4, 64) * kTileRows;
  parallel(threads, [&](int64_t t) {
    Forward mine = f;
    const ForwardPass pass(mine, rows);
    RowTables tables;
    std::vector<int32_t> row;
    const std::unique_ptr<char[]> sums(new char[step * bytes]);
    const Span all = share_of(f.rows, t, threads, kTileRows);
    for (int64_t a = all.begin; a < all.end; a += step) {
      const int64_t b = std::min(all.end, a + step);
      mine.out = sums.get() - a * bytes;
      pass.run(tables, {a, b}, {0, pass.panels()});
      // with its rows a block has the pixels up to the next one's first row
      int64_t q = a == 0 ? 0 : f.index[a];
      const int64_t last = b == f.rows ? f.g.out_pixels() : f.index[b];
      while (q < last) {
        const int64_t n = q / map.plane, stop = std::min({last, (n + 1) * map.plane, q + step});
        scatter_pixels(map, {mine.out, f.index, f.rows, false}, n, {q - n * map.plane, stop - n * map.plane},
                       {0, map.channels}, false, row);
        q = stop;
      }
    }
  });
}

// The forward pass to NCHW: `f` writes packed rows, here.
void run_to_planes(Forward f, const OptionalTensor& quads, const PlaneMap& map) {
  const std::vector<RowClass> classes = row_classes(f.g, f.index, f.rows);
  f.packed_out = true;
  if (classes.size() == 1 && !quads && double(f.rows) >= kFusedShare * double(f.g.out_pixels())) {
    const ForwardPass whole(f, classes[0]);
    const int64_t threads = threads_for(whole.macs(), kMacsPerThread);
    if (!shares_panels(threads, f.rows, whole.panels(), f.weight_bytes())) {
      return run_fused(f, classes[0], threads, map);
    }
  }
  const std::unique_ptr<char[]> rows(new char[std::max<int64_t>(f.rows * f.out_bytes(), 1)]);
  f.out = rows.get();
  quads ? run_winograd_of(f, *quads) : run_forward(f);
  scatter_to_planes(map, {rows.get(), f.index, f.rows, false});
}

// Checks that the tensors have the sizes that the geometry and the index name. Kernels would else leave
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
  const Forward f{.g = g,
                  .in_channels = in_channels,
                  .out_channels = out_channels,
                  .rows = rows,
                  .dtype = dtype,
                  .index = at,
                  .source = {.g = g,
                             .x = data_of<const char>(x),
                             .row_bytes = row_bytes,
                             .inverse = data_of<const int32_t>(source),
                             .zero = zero.data(),
                             .merged = merged},
                  .affine = Affine(bias, scale, shift, out_channels),
                  .activation = Activation(activation),
                  .weight = data_of<const char>(weight),
                  .gate = data_of<const float>(gate),
                  .residual = data_of<const char>(residual),
                  .base = data_of<const char>(base),
                  .out = data_of<char>(out),
                  .packed_out = packed_out,
                  .residual_map = residual && residual->dim() == 4};
  // an output that is NCHW; of one channel or one pixel it is channels_last too
  if (!packed_out && out_channels > 1 && out.stride(1) != 1) {
    STD_TORCH_CHECK(out.is_contiguous() && (!base || base->is_contiguous()),
                    "out, base: expected NCHW or channels_last, got other strides");
    run_to_planes(f, quads,
                  {f.out, f.base, g.batch, out_channels, g.out_h * g.out_w, int64_t(out.element_size())});
  } else if (quads) {
    run_winograd_of(f, *quads);
  } else {
    run_forward(f);
  }
  const int64_t unused = packed_out ? out.size(0) - rows : 0;  // rows past a capacity plan's count
  if (unused) std::memset(f.out + rows * f.out_bytes(), 0, unused * f.out_bytes());
}

DYNOPS_CPU_OP(conv)

}  // namespace
}  // namespace dynops::cpu
