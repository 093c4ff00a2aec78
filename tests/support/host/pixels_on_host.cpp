// The kernels of csrc/cuda/pixels.cu compiled for a CPU. Built and called by test_cuda_pixels_on_host.py.
#include "block_of_threads.h"

#include "../../../csrc/cuda/needed.cuh"
#include "../../../csrc/cuda/rows.cuh"
#include "../../../csrc/cuda/select.cuh"

namespace {

using namespace dynops::cuda;

template <class Word>
MaskView<Word> view(const void* mask, int64_t pixels, uint64_t value, uint64_t largest) {
  return {static_cast<const Word*>(mask), pixels, Word(value), Word(largest)};
}

}  // namespace

extern "C" {

#define SELECT(bits)                                                                                       \
  int64_t parts_##bits(const void* mask, int64_t pixels) {                                                 \
    return Selection<uint##bits##_t>(view<uint##bits##_t>(mask, pixels, 0, 0)).parts;                      \
  }                                                                                                        \
  void count_##bits(int descending, const void* mask, int64_t pixels, uint64_t value, uint64_t largest,    \
                    uint64_t* counts) {                                                                    \
    const Selection<uint##bits##_t> selection(view<uint##bits##_t>(mask, pixels, value, largest));         \
    count_parts(host::Threads{descending != 0}, selection, counts);                                        \
  }                                                                                                        \
  void compact_##bits(int descending, const void* mask, int64_t pixels, uint64_t value, uint64_t largest,  \
                      const uint64_t* counts, int64_t rows, int32_t* index) {                              \
    const Selection<uint##bits##_t> selection(view<uint##bits##_t>(mask, pixels, value, largest));         \
    write_compact(host::Threads{descending != 0}, selection, counts, rows, index);                         \
  }                                                                                                        \
  void capacity_##bits(int descending, const void* mask, int64_t pixels, uint64_t value, uint64_t largest, \
                       uint64_t* counts, int64_t capacity, int32_t* index, int32_t* count) {               \
    const Selection<uint##bits##_t> selection(view<uint##bits##_t>(mask, pixels, value, largest));         \
    write_capacity(host::Threads{descending != 0}, selection, counts, capacity, index, count);             \
  }
SELECT(8)
SELECT(16)
SELECT(32)
SELECT(64)

// The last part alone of a mask of bytes, after the others counted what `counts` says.
void last_part(const uint8_t* mask, int64_t pixels, uint64_t* counts, int64_t rows, int32_t* index) {
  const Selection<uint8_t> s(view<uint8_t>(mask, pixels, 0xff, 0xff));
  host::run_blocks(s.parts - 1, s.parts, s.parts, kSelectThreads, false,
                   [&] { count_active<uint8_t>(s.mask, s.vectors, counts); });
  host::run_blocks(s.parts - 1, s.parts, s.parts, kSelectThreads, false,
                   [&] { write_active<uint8_t>(s.mask, s.vectors, counts, rows, index, nullptr); });
}

void inverse(const int32_t* index, int64_t rows, int32_t* out) {
  host::Threads()("write_inverse", rows, write_inverse, index, rows, out);
}

void needed(const int32_t* index, int64_t rows, const dynops::Geometry* geometry, uint8_t* mask) {
  host::Threads()("mark_needed", rows, mark_needed, index, rows, *geometry, mask);
}

void gather(int descending, int64_t limit, int64_t rows, const StridedMap* map, const void* x,
            const int32_t* index, void* out) {
  gather_pixel_rows(host::Threads{descending != 0, limit}, rows, *map, x, index, out);
}

void scatter(int64_t limit, int64_t rows, int64_t pixels, int64_t bytes, const void* values,
             const int32_t* index, void* out) {
  scatter_pixel_rows(host::Threads{false, limit}, rows, pixels, bytes, values, index, out);
}
}
