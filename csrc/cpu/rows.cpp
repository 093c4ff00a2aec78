// gather_rows and scatter_rows on the CPU: copies of whole rows, of any dtype.
#include <cstring>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

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

void fill_inactive(char* out, const char* base, int64_t bytes, const int32_t* index, int64_t rows,
                   int64_t begin, int64_t end, bool stream) {
  const int32_t* next = std::lower_bound(index, index + rows, int32_t(begin));
  while (begin < end) {
    const int64_t stop = next < index + rows ? std::min<int64_t>(*next++, end) : end;
    kernels().fill(out + begin * bytes, base ? base + begin * bytes : nullptr, (stop - begin) * bytes,
                   stream);
    begin = stop + 1;
  }
#if defined(__x86_64__)
  if (stream) _mm_sfence();  // other threads may read the output after this one's part is done
#endif
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
  const int64_t threads = threads_for(double(pixels) * bytes, kBytesPerThread);
  parallel(threads, [&](int64_t t) {
    fill_inactive(to, below, bytes, at, rows, part(pixels, t, threads), part(pixels, t + 1, threads), false);
    for (int64_t i = part(rows, t, threads); i < part(rows, t + 1, threads); ++i) {
      std::memcpy(to + at[i] * bytes, from + i * bytes, size_t(bytes));
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
