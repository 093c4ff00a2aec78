// The places of a grid's blocks in a map, for host and device. dynops/geometry.py defines the same.
#pragma once

#include "divisor.h"
#include "geometry.h"

namespace dynops {

// The layout of a map's lines in memory. A map is `planes` planes of H lines an image, a tile as many of
// tile_h lines. A pixel of a line holds every channel in channels_last, and one of them in NCHW.
struct Lines {
  int64_t planes;    // of an image: 1 in channels_last, C in NCHW
  int64_t elements;  // of a pixel: C in channels_last, 1 in NCHW
  int64_t size;      // bytes of an element

  int64_t pixel() const { return elements * size; }
};

// One axis of a BlockGeometry: block b covers [first + b*step, first + b*step + tile) of [0, size).
template <class Int>
struct BlockAxis {
  Divisor<Int> size, grid, step, tile;
  Int first;

  DYNOPS_HD Int origin(Int block) const { return first + block * step.value; }
  DYNOPS_HD bool inside(Int at) const { return at >= 0 && at < size.value; }

  // The coordinates [begin, end) of a block that lie in the map. Where none does, end <= begin.
  DYNOPS_HD Int begin_inside(Int block) const { return origin(block) > 0 ? origin(block) : 0; }
  DYNOPS_HD Int end_inside(Int block) const {
    const Int end = origin(block) + tile.value;
    return end < size.value ? end : size.value;
  }

  // The blocks [begin, end) that cover a coordinate. Where none does, end <= begin.
  DYNOPS_HD Int begin_over(Int at) const {
    const Int past = at - first - tile.value;
    return past < 0 ? 0 : step.divide(past).quotient + 1;
  }
  DYNOPS_HD Int end_over(Int at) const {
    const Int from_first = at - first;
    if (from_first < 0) return 0;
    const Int end = step.divide(from_first).quotient + 1;
    return end < grid.value ? end : grid.value;
  }
};

// The grid over maps [N, planes, height, width]; tiles are [B, planes, tile_h, tile_w].
template <class Int>
struct BlockGrid {
  Divisor<Int> planes;
  BlockAxis<Int> rows, columns;

  BlockGrid(const BlockGeometry& g, int64_t planes)
      : planes(planes),
        rows{g.height, g.grid_h, g.step_h, g.tile_h, Int(g.first_h)},
        columns{g.width, g.grid_w, g.step_w, g.tile_w, Int(g.first_w)} {}

  // The place of element `at` of the tiles in the map, or -1: outside of it, or past the count.
  DYNOPS_HD Int in_map(Int at, const int32_t* index) const {
    const auto [line, j] = columns.tile.divide(at);
    const auto [plane, i] = rows.tile.divide(line);
    const auto [tile, p] = planes.divide(plane);
    if (index[tile] < 0) return -1;
    const auto [row, bx] = columns.grid.divide(Int(index[tile]));
    const auto [n, by] = rows.grid.divide(row);
    const Int y = rows.origin(by) + i, x = columns.origin(bx) + j;
    if (!rows.inside(y) || !columns.inside(x)) return -1;
    return ((n * planes.value + p) * rows.size.value + y) * columns.size.value + x;
  }

  // Calls f(where in the tiles) for each active tile over element `at` of the map, in the order of the
  // plan. `inverse` [N, grid_h, grid_w] is the tile of each block, or -1.
  template <class F>
  DYNOPS_HD void for_each_tile(Int at, const int32_t* inverse, const F& f) const {
    const auto [line, x] = columns.size.divide(at);
    const auto [plane, y] = rows.size.divide(line);
    const auto [n, p] = planes.divide(plane);
    const Int end_y = rows.end_over(y), begin_x = columns.begin_over(x), end_x = columns.end_over(x);
    for (Int by = rows.begin_over(y); by < end_y; ++by) {
      const Int i = y - rows.origin(by), row = n * rows.grid.value + by;
      for (Int bx = begin_x; bx < end_x; ++bx) {
        const Int tile = inverse[row * columns.grid.value + bx], j = x - columns.origin(bx);
        if (tile >= 0) {
          f(((tile * planes.value + p) * rows.tile.value + i) * columns.tile.value + j);
        }
      }
    }
  }
};

}  // namespace dynops
