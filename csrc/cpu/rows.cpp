// gather_rows and scatter_rows on the CPU: copies of whole rows, of any dtype.
#include <cstring>

#include "../common/tensors.h"
#include "engine.h"
#include "parallel.h"
#include "rows.h"

namespace dynops::cpu {
namespace {

constexpr double kBytesPerThread = 64 * 1024;

// The bytes of one pixel of a map [N, C, H, W] that lies channels_last.
int64_t row_bytes(const Tensor& map) { return map.size(1) * int64_t(map.element_size()); }

}  // namespace

// x must be channels_last; rows past the count become zero.
void gather(const Tensor& x, const Tensor& index, const OptionalTensor& count, Tensor out) {
  const int64_t rows = active_rows(index, count), bytes = row_bytes(x);
  const char* from = static_cast<const char*>(x.data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  const int32_t* at = checked_index(index, rows, x.size(0) * x.size(2) * x.size(3));
  const int64_t threads = threads_for(double(rows) * bytes, kBytesPerThread);
  parallel(threads, [&](int64_t t) {
    for (int64_t i = part(rows, t, threads); i < part(rows, t + 1, threads); ++i) {
      std::memcpy(to + i * bytes, from + at[i] * bytes, size_t(bytes));
    }
  });
  if (out.size(0) > rows) std::memset(to + rows * bytes, 0, size_t((out.size(0) - rows) * bytes));
}

void Background::fill_inactive(int64_t begin, int64_t end) const {
  const int32_t* next = std::lower_bound(index, index + rows, int32_t(begin));
  while (begin < end) {
    const int64_t stop = next < index + rows ? std::min<int64_t>(*next++, end) : end;
    kernels().fill(out + begin * bytes, base ? base + begin * bytes : nullptr, (stop - begin) * bytes);
    begin = stop + 1;
  }
}

// Stores in order, without gaps, need not read the line that they write: 14.5 MB at 10 % take 150 us instead
// of 260, and at 50 % 140 instead of 280.
void Background::fill_before(int64_t begin, int64_t end) const {
  if (begin >= end) return;
  const int32_t* first = std::lower_bound(index, index + rows, int32_t(begin));
  const int64_t active = std::lower_bound(first, index + rows, int32_t(end)) - first;
  if (base || 4 * active > 3 * (end - begin)) return fill_inactive(begin, end);
  kernels().fill(out + begin * bytes, nullptr, (end - begin) * bytes);
}

// base and out must be channels_last.
void scatter(const Tensor& rows_in, const Tensor& index, const OptionalTensor& count,
             const OptionalTensor& base, Tensor out) {
  const int64_t rows = active_rows(index, count), bytes = row_bytes(out);
  const int64_t pixels = out.size(0) * out.size(2) * out.size(3);
  const char* from = static_cast<const char*>(rows_in.data_ptr());
  const char* below = base ? static_cast<const char*>(base->data_ptr()) : nullptr;
  char* to = static_cast<char*>(out.data_ptr());
  const int32_t* at = checked_index(index, rows, pixels);
  const Background background{to, below, bytes, at, rows};
  const int64_t threads = threads_for(double(pixels) * bytes, kBytesPerThread);
  parallel(threads, [&](int64_t t) {
    const int64_t begin = part(pixels, t, threads), end = part(pixels, t + 1, threads);
    background.fill_before(begin, end);
    const int32_t* last = std::lower_bound(at, at + rows, int32_t(end));
    for (const int32_t* p = std::lower_bound(at, at + rows, int32_t(begin)); p < last; ++p) {
      std::memcpy(to + *p * bytes, from + (p - at) * bytes, size_t(bytes));
    }
  });
}

}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) {
  m.def("cpu_gather(Tensor x, Tensor index, Tensor? count, Tensor(a!) out) -> ()");
  m.def("cpu_scatter(Tensor rows, Tensor index, Tensor? count, Tensor? base, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) {
  m.impl("cpu_gather", TORCH_BOX(&dynops::cpu::gather));
  m.impl("cpu_scatter", TORCH_BOX(&dynops::cpu::scatter));
}
