// gather_rows, scatter_rows and merge_rows on the CPU: rows of a pixel or a sample. Copies are of any dtype.
#include <cstring>
#include <vector>

#include "../engine/forward.h"

namespace dynops::cpu {
namespace {

// The bytes of one pixel of a map [N, C, H, W] that lies channels_last.
int64_t row_bytes(const Tensor& map) { return map.size(1) * int64_t(map.element_size()); }

// Rows in pieces: a sample's row may be megabytes, and two of them have to keep every thread busy.
struct Pieces {
  static constexpr int64_t kBytes = 32 * 1024;
  int64_t bytes, per_row;

  explicit Pieces(int64_t row_bytes)
      : bytes(row_bytes), per_row(std::max<int64_t>(1, ceil_div(row_bytes, kBytes))) {}

  // Calls f(row, first byte, bytes) for a thread's share of the pieces of all rows.
  template <class F>
  void each(int64_t rows, int64_t t, int64_t threads, const F& f) const {
    const Span mine = share_of(rows * per_row, t, threads);
    int64_t row = mine.begin / per_row, piece = mine.begin % per_row;
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      f(row, piece * kBytes, std::min(kBytes, bytes - piece * kBytes));
      if (++piece == per_row) piece = 0, ++row;
    }
  }
};

// Rows of `bytes` out of `inputs`; those past the count become zero.
void gather_bytes(const Tensor& x, const Tensor& index, const OptionalTensor& count, int64_t inputs,
                  int64_t bytes, const Tensor& out) {
  const int64_t rows = active_rows(index, count);
  STD_TORCH_CHECK(out.size(0) >= rows && out.numel() * int64_t(out.element_size()) == out.size(0) * bytes &&
                      x.numel() * int64_t(x.element_size()) >= inputs * bytes,
                  "rows: expected room for ", rows, " rows of ", bytes, " bytes, got ", out.size(0), " and ",
                  out.numel(), " elements");
  const char* from = data_of<const char>(x);
  char* to = data_of<char>(out);
  const int32_t* at = checked_index(index, rows, inputs);
  const int64_t threads = threads_for(double(rows) * bytes, kCopyBytesPerThread);
  const Pieces pieces(bytes);
  parallel(threads, [&](int64_t t) {
    pieces.each(rows, t, threads, [&](int64_t i, int64_t begin, int64_t size) {
      std::memcpy(to + i * bytes + begin, from + at[i] * bytes + begin, size);
    });
  });
  if (out.size(0) > rows) std::memset(to + rows * bytes, 0, (out.size(0) - rows) * bytes);
}

// x must be channels_last.
void gather(const Tensor& x, const Tensor& index, const OptionalTensor& count, Tensor out) {
  gather_bytes(x, index, count, x.size(0) * x.size(2) * x.size(3), row_bytes(x), out);
}

// The bytes of one sample of `batch`.
int64_t sample_bytes(const Tensor& x, int64_t batch) {
  return batch ? x.numel() / batch * int64_t(x.element_size()) : 0;
}

// x [N, ...] and out [K, ...] lie alike, without gaps and sample after sample.
void gather_samples(const Tensor& x, const Tensor& index, const OptionalTensor& count, Tensor out) {
  gather_bytes(x, index, count, x.size(0), sample_bytes(x, x.size(0)), out);
}

// Puts rows in their places among the rows of a base [N], adds them to it or mixes them with it.
class Merge {
 public:
  Merge(const Tensor& rows, int64_t bytes, int64_t outputs, const int32_t* index, int64_t count)
      : rows_(data_of<const char>(rows)),
        bytes_(bytes),
        size_(int64_t(rows.element_size())),
        row_of_(outputs, -1) {
    for (int64_t i = 0; i < count; ++i) row_of_[index[i]] = int32_t(i);
  }

  // out[n] = rows[i], where there is no row base[n], or zero.
  void copy(const char* base, char* out) const {
    each([&](int64_t n, int64_t i, int64_t begin, int64_t size) {
      const char* below = base ? base + n * bytes_ + begin : nullptr;
      kernels().fill(out + n * bytes_ + begin, i < 0 ? below : rows_ + i * bytes_ + begin, size, false);
    });
  }

  // out[n] = scale[i] * rows[i] + base[n], or with `mix` + (1 - scale[i]) * base[n]; no scale: 1. In float32.
  void add(const char* base, const float* scale, bool mix, Dtype dtype, char* out) const {
    each([&](int64_t n, int64_t i, int64_t begin, int64_t size) {
      const int64_t at = n * bytes_ + begin;
      const char* row = rows_ + i * bytes_ + begin;
      const float share = i >= 0 && scale ? scale[i] : 1.f;
      if (i < 0 || (mix && share == 1.f)) {  // of a row that stands alone: nothing of the base, were it NaN
        kernels().fill(out + at, i < 0 ? base + at : row, size, false);
        return;
      }
      const int64_t in_at[2] = {0, row - (base + at)}, filter_at[2] = {0, 1};
      const float filter[2] = {mix ? 1.f - share : 1.f, share};
      kernels().local_filter({.pairs = 2,
                              .in = base + at,
                              .in_at = in_at,
                              .filter = filter,
                              .filter_at = filter_at,
                              .group = size / size_,
                              .dtype = dtype,
                              .out = out + at});
    });
  }

 private:
  // f(n, its row or -1, first byte, bytes), on all threads.
  template <class F>
  void each(const F& f) const {
    const int64_t outputs = int64_t(row_of_.size());
    const int64_t threads = threads_for(double(outputs) * double(bytes_), kCopyBytesPerThread);
    const Pieces pieces(bytes_);
    parallel(threads, [&](int64_t t) {
      pieces.each(outputs, t, threads,
                  [&](int64_t n, int64_t begin, int64_t size) { f(n, row_of_[n], begin, size); });
    });
  }

  const char* rows_;
  int64_t bytes_, size_;  // of a row, of an element
  std::vector<int32_t> row_of_;
};

// base and out must be channels_last.
void scatter(const Tensor& rows_in, const Tensor& index, const OptionalTensor& count,
             const OptionalTensor& base, Tensor out) {
  const int64_t rows = active_rows(index, count), bytes = row_bytes(out);
  const int64_t pixels = out.size(0) * out.size(2) * out.size(3);
  STD_TORCH_CHECK(rows_in.dim() == 2 && rows_in.size(0) >= rows && rows_in.size(1) == out.size(1) &&
                      (!base || base->numel() == out.numel()),
                  "rows: expected at least ", rows, " of ", out.size(1),
                  " channels and a base of the output's ", out.numel(), " elements, got ", rows_in.size(0),
                  " and ", base ? base->numel() : 0);
  const char *from = data_of<const char>(rows_in), *below = data_of<const char>(base);
  char* to = data_of<char>(out);
  const int32_t* at = checked_index(index, rows, pixels);
  if (bytes > Pieces::kBytes) return Merge(rows_in, bytes, pixels, at, rows).copy(below, to);
  const int64_t threads = threads_for(double(pixels) * bytes, kCopyBytesPerThread);
  parallel(threads, [&](int64_t t) {
    fill_inactive(to, below, bytes, at, rows, share_of(pixels, t, threads), false);
    for (const int64_t i : each(share_of(rows, t, threads))) {
      std::memcpy(to + at[i] * bytes, from + i * bytes, bytes);
    }
  });
}

// Writes the base, or zero, at the pixels of a channels_last map that are not in the index.
void keep(const Tensor& index, const OptionalTensor& count, const OptionalTensor& base, Tensor out) {
  const int64_t rows = active_rows(index, count), bytes = row_bytes(out);
  const int64_t pixels = out.size(0) * out.size(2) * out.size(3);
  const int32_t* at = checked_index(index, rows, pixels);
  STD_TORCH_CHECK(!base || base->numel() == out.numel(), "base: expected the output's ", out.numel(),
                  " elements, got ", base ? base->numel() : 0);
  const int64_t threads = threads_for(double(pixels - rows) * bytes, kCopyBytesPerThread);
  parallel(threads, [&](int64_t t) {
    fill_inactive(data_of<char>(out), data_of<const char>(base), bytes, at, rows,
                  share_of(pixels, t, threads), false);
  });
}

// out [N, ...] is base (or zero) with the samples of rows [K, ...] in their slots; all lie alike, as above.
void scatter_samples(const Tensor& rows_in, const Tensor& index, const OptionalTensor& count,
                     const OptionalTensor& base, Tensor out) {
  const int64_t rows = active_rows(index, count), batch = out.size(0);
  const int32_t* at = checked_index(index, rows, batch);
  STD_TORCH_CHECK(rows_in.size(0) == index.size(0) &&
                      rows_in.numel() * batch == out.numel() * rows_in.size(0) &&
                      (!base || base->numel() == out.numel()),
                  "rows: expected ", index.size(0), " samples of the output's size, got ", rows_in.size(0),
                  " of ", rows_in.numel(), " elements");
  Merge(rows_in, sample_bytes(out, batch), batch, at, rows)
      .copy(data_of<const char>(base), data_of<char>(out));
}

// rows [K, F], base and out [N, F], contiguous; scale float32 [K]. The rows past the count are not read.
void merge(const Tensor& rows_in, const Tensor& index, const OptionalTensor& count, const Tensor& base,
           const OptionalTensor& scale, bool mix, Tensor out) {
  const int64_t rows = active_rows(index, count);
  const int32_t* at = checked_index(index, rows, out.size(0));
  STD_TORCH_CHECK(rows_in.size(0) == index.size(0) && rows_in.size(1) == out.size(1) &&
                      base.numel() == out.numel() && (!scale || scale->numel() == index.size(0)),
                  "rows: expected [", index.size(0), ", ", out.size(1),
                  "] and a base of the output's shape, got ", rows_in.numel(), " and ", base.numel(),
                  " elements");
  Merge(rows_in, row_bytes(out), out.size(0), at, rows)
      .add(data_of<const char>(base), data_of<const float>(scale), mix, dtype_of(out), data_of<char>(out));
}

}  // namespace

DYNOPS_CPU_OP(gather)
DYNOPS_CPU_OP(scatter)
DYNOPS_CPU_OP(keep)
DYNOPS_CPU_OP(gather_samples)
DYNOPS_CPU_OP(scatter_samples)
DYNOPS_CPU_OP(merge)

}  // namespace dynops::cpu
