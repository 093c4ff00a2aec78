// Blocks of a map on a GPU: which are active, the pixels they cover, their tiles in and out.
//
// Everything runs on the current stream, and nothing reads back from the device.
#include "blocks.cuh"

#include "launch.h"

namespace dynops::cuda {
namespace {

// ------------------------------------------------------------------------------- tiles in and out

const int32_t* positions(const Tensor& tensor, const char* name, int64_t size) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int && tensor.is_contiguous() && tensor.numel() == size,
                  name, ": expected ", size, " contiguous int32, got ", tensor.numel(), " elements");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// x and out are both channels_last or both contiguous; tiles of the index -1 become zero.
void cuda_gather_tiles(const Tensor& x, const Tensor& index, IntHeaderOnlyArrayRef geometry, Tensor out) {
  const BlockGeometry g = block_geometry_of(geometry);
  check_tiles(x, out, g);
  const int32_t* at = positions(index, "index", out.size(0));
  if (out.numel() == 0) return;
  const Launch launch(x);
  if (x.numel() == 0) return launch.zero(out);  // every index is -1
  gather_tiles(launch, g, lines_of(x, out), out.size(0), x.data_ptr(), at, out.data_ptr());
}

// tiles, base and out are all channels_last or all contiguous. `inverse` [N, GH, GW] is of inverse_index.
void cuda_scatter_tiles(const Tensor& tiles, const Tensor& inverse, IntHeaderOnlyArrayRef geometry,
                        const OptionalTensor& base, bool add, Tensor out) {
  const BlockGeometry g = block_geometry_of(geometry);
  check_tiles(out, tiles, g);
  check_base(base, out);
  const int32_t* tile_of = positions(inverse, "inverse", g.blocks());
  if (out.numel() == 0) return;
  const Launch launch(out);
  const auto run = [&](auto scatter) {
    scatter(launch, g, lines_of(out, tiles), tiles.size(0), tiles.data_ptr(), tile_of,
            base ? base->data_ptr() : nullptr, out.data_ptr());
  };
  if (!add || !(base || g.overlaps())) return run(replace_tiles<Launch>);  // zero and one tile: the tile
  switch (out.scalar_type()) {
    case ScalarType::Float:
      return run(add_tiles<float, Launch>);
    case ScalarType::Half:
      return run(add_tiles<__half, Launch>);
    case ScalarType::BFloat16:
      return run(add_tiles<__nv_bfloat16, Launch>);
    default:
      STD_TORCH_CHECK(false, "tiles: expected float32, float16 or bfloat16 to add, got another dtype");
  }
}

// ------------------------------------------------------------------ masks of blocks and of pixels

Tensor block_mask(const Tensor& given, IntHeaderOnlyArrayRef geometry, bool mean, double threshold) {
  const BlockGeometry g = block_geometry_of(geometry);
  STD_TORCH_CHECK(given.numel() == g.pixels(), "mask: expected ", g.pixels(), " pixels, got ", given.numel());
  const Launch launch(given);
  const Tensor mask = torch::stable::contiguous(given);
  const Tensor blocks = empty_on(mask, {g.batch, g.grid_h, g.grid_w}, ScalarType::Bool);
  if (blocks.numel() == 0) return blocks;
  auto* active = static_cast<bool*>(blocks.data_ptr());
  visit_values<__half, __nv_bfloat16>(
      mask, "mask", [&](const auto* values) { mask_blocks<32>(launch, g, values, mean, threshold, active); });
  return blocks;
}

Tensor block_cover(const Tensor& index, const OptionalTensor&, IntHeaderOnlyArrayRef geometry) {
  const BlockGeometry g = block_geometry_of(geometry);
  const int32_t* at = positions(index, "index", index.numel());
  const Launch launch(index);
  const Tensor mask = empty_on(index, {g.batch, g.height, g.width}, ScalarType::Bool);
  launch.zero(mask);
  if (index.numel() == 0 || mask.numel() == 0) return mask;
  mark_blocks(launch, g, index.numel(), at, static_cast<bool*>(mask.data_ptr()));
  return mask;
}

}  // namespace
}  // namespace dynops::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) {
  m.def("cuda_gather_tiles(Tensor x, Tensor index, int[] geometry, Tensor(a!) out) -> ()");
  m.def(
      "cuda_scatter_tiles(Tensor tiles, Tensor inverse, int[] geometry, Tensor? base, bool add, "
      "Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynops, CUDA, m) {
  m.impl("block_mask", TORCH_BOX(&dynops::cuda::block_mask));
  m.impl("block_cover", TORCH_BOX(&dynops::cuda::block_cover));
  m.impl("cuda_gather_tiles", TORCH_BOX(&dynops::cuda::cuda_gather_tiles));
  m.impl("cuda_scatter_tiles", TORCH_BOX(&dynops::cuda::cuda_scatter_tiles));
}
