// Tensors over libtorch's stable ABI, as the op files of both devices read and check them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "blocks.h"

namespace dynops {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Geometry geometry_of(IntHeaderOnlyArrayRef v) {
  STD_TORCH_CHECK(v.size() == 15, "geometry: expected 15 numbers, got ", v.size());
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14]};
}

inline BlockGeometry block_geometry_of(IntHeaderOnlyArrayRef v) {
  STD_TORCH_CHECK(v.size() == 11, "geometry: expected 11 numbers, got ", v.size());
  const BlockGeometry g{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10]};
  const int64_t least = std::min({g.batch, g.height, g.width, g.grid_h, g.grid_w, g.step_h - 1, g.step_w - 1,
                                  g.tile_h - 1, g.tile_w - 1});
  STD_TORCH_CHECK(least >= 0, "geometry: expected sizes >= 0, steps and tiles >= 1, got less");
  return g;
}

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

// Calls f with a pointer to a tensor's integers.
template <class F>
void visit_integers(const Tensor& t, const char* name, const F& f) {
  const void* data = t.const_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Byte:
      return f(static_cast<const uint8_t*>(data));
    case ScalarType::Char:
      return f(static_cast<const int8_t*>(data));
    case ScalarType::Short:
      return f(static_cast<const int16_t*>(data));
    case ScalarType::Int:
      return f(static_cast<const int32_t*>(data));
    case ScalarType::Long:
      return f(static_cast<const int64_t*>(data));
    default:
      STD_TORCH_CHECK(false, name, ": expected uint8, int8, int16, int32 or int64, got another dtype");
  }
}

// The same of integers, bool (as bytes) and floats; Half and BFloat16 are the device's types.
template <class Half, class BFloat16, class F>
void visit_values(const Tensor& t, const char* name, const F& f) {
  const void* data = t.const_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Bool:
      return f(static_cast<const uint8_t*>(data));
    case ScalarType::Half:
      return f(static_cast<const Half*>(data));
    case ScalarType::BFloat16:
      return f(static_cast<const BFloat16*>(data));
    case ScalarType::Float:
      return f(static_cast<const float*>(data));
    case ScalarType::Double:
      return f(static_cast<const double*>(data));
    default:
      return visit_integers(t, name, f);
  }
}

// Checks that a map [N, C, H, W] and tiles [B, C, h, w] have the sizes of the geometry, and one dtype.
inline void check_tiles(const Tensor& map, const Tensor& tiles, const BlockGeometry& g) {
  STD_TORCH_CHECK(
      map.dim() == 4 && map.size(0) == g.batch && map.size(2) == g.height && map.size(3) == g.width,
      "map: expected [", g.batch, ", C, ", g.height, ", ", g.width, "], got ", map.dim(), " dimensions, ",
      map.numel(), " elements");
  STD_TORCH_CHECK(tiles.dim() == 4 && tiles.size(1) == map.size(1) && tiles.size(2) == g.tile_h &&
                      tiles.size(3) == g.tile_w,
                  "tiles: expected [B, ", map.size(1), ", ", g.tile_h, ", ", g.tile_w, "], got ", tiles.dim(),
                  " dimensions, ", tiles.numel(), " elements");
  STD_TORCH_CHECK(map.scalar_type() == tiles.scalar_type(), "tiles: expected the dtype of the map");
}

// The format that map and tiles share. A single pixel is contiguous in both: the other tensor then tells, or
// it does not matter.
inline Lines lines_of(const Tensor& map, const Tensor& tiles) {
  const int64_t channels = map.size(1), size = int64_t(map.element_size());
  const bool last = channels == 1 || (map.stride(1) == 1 && tiles.stride(1) == 1);
  return last ? Lines{1, channels, size} : Lines{channels, 1, size};
}

inline void check_base(const OptionalTensor& base, const Tensor& out) {
  STD_TORCH_CHECK(!base || (base->scalar_type() == out.scalar_type() && base->numel() == out.numel()),
                  "base: expected the dtype and shape of the output, got ", base ? base->numel() : 0,
                  " elements for ", out.numel());
}

// Rows that a plan computes: those of the index, or the count of a capacity plan (on the CPU).
inline int64_t active_rows(const Tensor& index, const OptionalTensor& count) {
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int && index.dim() == 1 && index.is_contiguous(),
                  "index: expected a contiguous int32 vector, got ", index.dim(), " dimensions");
  if (!count) return index.size(0);
  const int64_t active = *static_cast<const int32_t*>(count->const_data_ptr());
  STD_TORCH_CHECK(active >= 0 && active <= index.size(0), "count: expected 0 to ", index.size(0), ", got ",
                  active);
  return active;
}

// The index of a plan on the CPU: strictly ascending positions below `pixels`, or an error. A kernel that
// met another would write outside its output; the pass over it costs 0.1 ns a row.
inline const int32_t* checked_index(const int32_t* at, int64_t rows, int64_t pixels) {
  bool ascends = true;
  for (int64_t i = 1; i < rows; ++i) ascends &= at[i - 1] < at[i];
  STD_TORCH_CHECK(ascends && (rows == 0 || (at[0] >= 0 && at[rows - 1] < pixels)),
                  "index: expected ascending positions in [0, ", pixels, "), got ", rows ? at[0] : 0, " to ",
                  rows ? at[rows - 1] : 0, ascends ? "" : ", not ascending");
  return at;
}

inline const int32_t* checked_index(const Tensor& index, int64_t rows, int64_t pixels) {
  return checked_index(static_cast<const int32_t*>(index.const_data_ptr()), rows, pixels);
}

}  // namespace dynops
