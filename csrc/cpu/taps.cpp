#include "taps.h"

namespace dynops::cpu {

const char ZeroRow::shared_[1 << 16] = {};

std::vector<RowClass> row_classes(const Geometry& g, const int32_t* index, int64_t rows) {
  const int32_t phases_y = g.transposed ? int32_t(g.stride_h) : 1;
  const int32_t phases_x = g.transposed ? int32_t(g.stride_w) : 1;
  std::vector<RowClass> classes(size_t(phases_y * phases_x));
  for (int32_t phase = 0; phase < phases_y * phases_x; ++phase) {
    for (int32_t tap = 0; tap < g.taps(); ++tap) {
      const int64_t r = tap / g.kernel_w, s = tap % g.kernel_w;
      const int64_t y = phase / phases_x + g.pad_h - r * g.dil_h, x = phase % phases_x + g.pad_w - s * g.dil_w;
      if (y % phases_y == 0 && x % phases_x == 0) classes[size_t(phase)].taps.push_back(tap);
    }
  }
  if (classes.size() == 1) return classes;
  for (int64_t i = 0; i < rows; ++i) {
    const Pixel p = pixel_at(index[i], int32_t(g.out_h), int32_t(g.out_w));
    classes[size_t(p.y % phases_y * phases_x + p.x % phases_x)].rows.push_back(int32_t(i));
  }
  return classes;
}

namespace {

// A run of kernel_w pixels that starts at column x0 of an input line, partly outside it.
void copy_run(const Source& source, const char* line, int32_t x0, char* to) {
  const Geometry& g = source.g;
  for (int32_t s = 0; s < g.kernel_w; ++s, to += source.row_bytes) {
    const int32_t x = x0 + s;
    const bool inside = line && x >= 0 && x < g.in_w;
    std::memcpy(to, inside ? line + x * source.row_bytes : source.zero, size_t(source.row_bytes));
  }
}

void fill_merged(const Source& source, Pixel p, int32_t step, const char** table, char* patches) {
  const Geometry& g = source.g;
  const int64_t run = g.kernel_w * source.row_bytes;
  const int32_t x0 = int32_t(p.x * g.stride_w - g.pad_w);
  for (int32_t r = 0; r < g.kernel_h; ++r) {
    const int32_t y = input_coordinate(p.y, r, int32_t(g.in_h), int32_t(g.stride_h), int32_t(g.pad_h),
                                       int32_t(g.dil_h), false);
    const char* line = y < 0 ? nullptr : source.x + (int64_t(p.n) * g.in_h + y) * g.in_w * source.row_bytes;
    if (line && x0 >= 0 && x0 + g.kernel_w <= g.in_w) {
      table[r * step] = line + x0 * source.row_bytes;
    } else {
      copy_run(source, line, x0, patches + r * run);
      table[r * step] = patches + r * run;
    }
  }
}

// A row whose taps all lie inside: one base pointer and constant steps, 0.5 ns a tap against 3.
bool fill_interior(const Source& source, const RowClass& rows, Pixel p, int32_t step, const char** table) {
  const Geometry& g = source.g;
  const int64_t y0 = p.y * g.stride_h - g.pad_h, x0 = p.x * g.stride_w - g.pad_w;
  if (g.transposed || y0 < 0 || x0 < 0 || y0 + (g.kernel_h - 1) * g.dil_h >= g.in_h ||
      x0 + (g.kernel_w - 1) * g.dil_w >= g.in_w) {
    return false;
  }
  const int64_t q0 = (p.n * g.in_h + y0) * g.in_w + x0;
  const int32_t taps = int32_t(rows.taps.size());
  if (source.inverse) {
    const int32_t* inverse = source.inverse + q0;
    for (int32_t t = 0, r = 0; r < g.kernel_h; ++r, inverse += g.dil_h * g.in_w) {
      for (int32_t s = 0; s < g.kernel_w; ++s, ++t) {
        const int32_t row = inverse[s * g.dil_w];
        table[t * step] = row < 0 ? source.zero : source.x + row * source.row_bytes;
      }
    }
    return true;
  }
  const char* base = source.x + q0 * source.row_bytes;
  const int64_t across = g.dil_w * source.row_bytes, down = g.dil_h * g.in_w * source.row_bytes;
  if (taps == 1) {
    table[0] = base;
    return true;
  }
  for (int32_t t = 0, r = 0; r < g.kernel_h; ++r, base += down) {
    for (int32_t s = 0; s < g.kernel_w; ++s, ++t) table[t * step] = base + s * across;
  }
  return true;
}

}  // namespace

void fill_tile(const Source& source, const RowClass& rows, const int32_t* at, int32_t height,
               const char** table, char* patches) {
  const Geometry& g = source.g;
  if (g.pointwise()) {
    for (int32_t i = 0; i < height; ++i) table[i] = source.row(at[i]);
    return;
  }
  for (int32_t i = 0; i < height; ++i) {
    const Pixel p = pixel_at(at[i], int32_t(g.out_h), int32_t(g.out_w));
    if (source.merged) {
      fill_merged(source, p, height, table + i, patches + i * g.taps() * source.row_bytes);
      continue;
    }
    if (fill_interior(source, rows, p, height, table + i)) continue;
    for (size_t t = 0; t < rows.taps.size(); ++t) {
      const int32_t r = rows.taps[t] / int32_t(g.kernel_w), s = rows.taps[t] % int32_t(g.kernel_w);
      table[int64_t(t) * height + i] = source.row(input_pixel(g, p, r, s));
    }
  }
}

}  // namespace dynops::cpu
