#include "taps.h"

namespace dynops::cpu {

const char ZeroRow::shared_[1 << 16] = {};

std::vector<RowClass> row_classes(const Geometry& g, const int32_t* index, int64_t rows) {
  const int32_t phases_y = g.transposed ? int32_t(g.stride_h) : 1;
  const int32_t phases_x = g.transposed ? int32_t(g.stride_w) : 1;
  std::vector<RowClass> classes(phases_y * phases_x);
  for (int32_t phase = 0; phase < phases_y * phases_x; ++phase) {
    for (int32_t tap = 0; tap < g.taps(); ++tap) {
      const int64_t r = tap / g.kernel_w, s = tap % g.kernel_w;
      const int64_t y = phase / phases_x + g.pad_h - r * g.dil_h,
                    x = phase % phases_x + g.pad_w - s * g.dil_w;
      if (y % phases_y == 0 && x % phases_x == 0) classes[phase].taps.push_back(tap);
    }
  }
  classes[0].all = classes.size() == 1;
  if (classes[0].all) return classes;
  for (int64_t i = 0; i < rows; ++i) {
    const Pixel p = g.out_pixel(index[i]);
    classes[p.y % phases_y * phases_x + p.x % phases_x].rows.push_back(int32_t(i));
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
    std::memcpy(to, inside ? line + x * source.row_bytes : source.zero, source.row_bytes);
  }
}

}  // namespace

TapTable::TapTable(const Source& source, const std::vector<int32_t>& taps) : source_(source), taps_(taps) {
  const Geometry& g = source.g;
  if (g.transposed) return;
  inner_y_ = interior(g.out_h, g.in_h, g.kernel_h, g.stride_h, g.pad_h, g.dil_h);
  inner_x_ = interior(g.out_w, g.in_w, g.kernel_w, g.stride_w, g.pad_w, g.dil_w);
  for (int32_t tap : taps) {
    const int64_t pixels = tap / g.kernel_w * g.dil_h * g.in_w + tap % g.kernel_w * g.dil_w;
    offset_.push_back(source.inverse ? pixels : pixels * source.row_bytes);
  }
}

void TapTable::fill_merged(Pixel p, int32_t step, const char** table, char* patches) const {
  const Geometry& g = source_.g;
  const int64_t run = g.kernel_w * source_.row_bytes;
  const int32_t x0 = int32_t(p.x * g.stride_w - g.pad_w);
  for (int32_t r = 0; r < g.kernel_h; ++r) {
    const int32_t y = g.in_line(p.y, r);
    const char* line = y < 0 ? nullptr : source_.x + (int64_t(p.n) * g.in_h + y) * g.in_w * source_.row_bytes;
    if (line && x0 >= 0 && x0 + g.kernel_w <= g.in_w) {
      table[r * step] = line + x0 * source_.row_bytes;
    } else {
      copy_run(source_, line, x0, patches + r * run);
      table[r * step] = patches + r * run;
    }
  }
}

void TapTable::fill_row(Pixel p, int32_t step, const char** table) const {
  const Geometry& g = source_.g;
  const int32_t taps = int32_t(taps_.size());
  if (!inner_y_.holds(p.y) || !inner_x_.holds(p.x)) {
    for (int32_t t = 0; t < taps; ++t) {
      const int32_t tap = taps_[t];
      table[t * step] = source_.row(g.in_pixel(p, tap / int32_t(g.kernel_w), tap % int32_t(g.kernel_w)));
    }
    return;
  }
  // All taps inside: one base and constant steps, 0.5 ns a tap where the general case takes 3.
  const int64_t y = p.y * g.stride_h - g.pad_h, x = p.x * g.stride_w - g.pad_w;
  const int64_t first = (p.n * g.in_h + y) * g.in_w + x;
  const int64_t bytes = source_.row_bytes;
  const int64_t* offset = offset_.data();
  if (source_.inverse) {
    const int32_t* inverse = source_.inverse + first;
    for (int32_t t = 0; t < taps; ++t) {
      const int32_t row = inverse[offset[t]];
      table[t * step] = row < 0 ? source_.zero : source_.x + row * bytes;
    }
  } else {
    const char* base = source_.x + first * bytes;
    for (int32_t t = 0; t < taps; ++t) table[t * step] = base + offset[t];
  }
}

void TapTable::fill(const int32_t* at, int32_t height, const char** table, char* patches, bool by_row) const {
  const Geometry& g = source_.g;
  if (g.pointwise()) {
    if (source_.inverse) {
      for (int32_t i = 0; i < height; ++i) table[i] = source_.row(at[i]);
    } else {
      for (int32_t i = 0; i < height; ++i) table[i] = source_.x + at[i] * source_.row_bytes;
    }
    return;
  }
  Pixel p = g.out_pixel(at[0]);
  for (int32_t i = 0; i < height; ++i) {
    const int32_t x = i ? p.x + at[i] - at[i - 1] : p.x;
    if (x < g.out_w) {  // positions ascend: most rows stay on their line, and need no division
      p.x = x;
    } else {
      p = g.out_pixel(at[i]);
    }
    if (source_.merged) {
      fill_merged(p, height, table + i, patches + i * patch_bytes());
    } else if (by_row) {
      fill_row(p, 1, table + i * int64_t(taps_.size()));
    } else {
      fill_row(p, height, table + i);
    }
  }
}

}  // namespace dynops::cpu
