// Channel lists from masks and back, and gather_channels and scatter_channels, on the CPU.
#include "../engine/mask.h"
#include "../engine/parallel.h"
#include "lists.h"

namespace dynops::cpu {
namespace {

// ------------------------------------------------------------------------------------------ lists

std::tuple<Tensor, Tensor> channel_index(const Tensor& mask_in, int64_t size) {
  STD_TORCH_CHECK(mask_in.dim() == 2, "mask: expected [S, C], got ", mask_in.dim(), " dimensions");
  const Tensor mask = torch::stable::contiguous(mask_in);
  const int64_t rows = mask.size(0), channels = mask.size(1);
  STD_TORCH_CHECK(size >= 0 && size <= channels, "size: expected 0 to ", channels, ", got ", size);
  Tensor index = empty({rows, size}, ScalarType::Int), count = empty({rows}, ScalarType::Int);
  int32_t* out = data_of<int32_t>(index);
  int32_t* counts = data_of<int32_t>(count);
  visit_mask(mask, [&](auto data, auto bits, auto largest) {
    STD_TORCH_CHECK(!count_active(data, bits, largest, mask.numel()).nan, "mask: expected numbers, got NaN");
    for (int64_t s = 0; s < rows; ++s, data += channels, out += size) {
      counts[s] = int32_t(write_index(data, bits, channels, out, size));
      std::fill(out + counts[s], out + size, -1);
    }
  });
  return {index, count};
}

Tensor channel_mask(const Tensor& index, const Tensor& count, int64_t channels) {
  const int64_t rows = index.size(0);
  const ChannelLists lists(index, count, channels, 1, 1, rows);
  Tensor mask = empty({rows, channels}, ScalarType::Bool);
  uint8_t* out = data_of<uint8_t>(mask);
  std::fill(out, out + mask.numel(), uint8_t(0));
  for (int64_t s = 0; s < rows; ++s, out += channels) {
    const ChannelList list = lists.whole(s);
    for (int32_t j = 0; j < list.count; ++j) out[list.index[j]] = 1;
  }
  return mask;
}

// ----------------------------------------------------------------------------------------- copies

// The two maps of a copy: `whole` has all channels, `packed` the live ones, both in the same memory format.
struct Maps {
  const Tensor &whole, &packed;
  int64_t batch, pixels, channels, width, element;
  bool last;  // channels_last

  Maps(const Tensor& whole, const Tensor& packed, bool last)
      : whole(whole),
        packed(packed),
        batch(whole.size(0)),
        pixels(whole.size(2) * whole.size(3)),
        channels(whole.size(1)),
        width(packed.size(1)),
        element(int64_t(whole.element_size())),
        last(last) {
    STD_TORCH_CHECK(packed.dim() == 4 && packed.size(0) == batch &&
                        packed.size(2) * packed.size(3) == pixels &&
                        packed.scalar_type() == whole.scalar_type(),
                    "packed: expected the batch, size and dtype of the map, got ", packed.numel(),
                    " elements, the map has ", whole.numel());
  }

  // The bytes of what is copied: a row of channels (channels_last) or a plane.
  int64_t whole_bytes() const { return (last ? channels : pixels) * element; }
  int64_t packed_bytes() const { return (last ? width : pixels) * element; }

  // The list of a sample, cut to the packed width.
  ChannelList list(const ChannelLists& lists, int64_t n) const {
    ChannelList list = lists.whole(n);
    list.count = std::min(list.count, int32_t(width));
    return list;
  }

  // Calls f(sample, first line, lines): the threads share the `lines` of every sample.
  template <class F>
  void share(int64_t lines, const F& f) const {
    const double bytes = double(batch * pixels) * double((channels + width) * element);
    const int64_t threads = threads_for(bytes, kCopyBytesPerThread), all = batch * lines;
    parallel(threads, [&](int64_t t) {
      const Span mine = share_of(all, t, threads);
      for (int64_t at = mine.begin; at < mine.end;) {
        const int64_t n = at / lines, stop = std::min(mine.end, (n + 1) * lines);
        f(n, at - n * lines, stop - at);
        at = stop;
      }
    });
  }
};

// x and out: both channels_last (`last`) or both contiguous.
void gather_channels(const Tensor& x, const Tensor& index, const Tensor& count, bool last, Tensor out) {
  const Maps m(x, out, last);
  const ChannelLists lists(index, count, m.channels, 1, 1, m.batch);
  const Dtype dtype = dtype_of(x);
  const char* from = data_of<const char>(x);
  char* to = data_of<char>(out);
  if (out.numel() == 0) return;
  if (!last) {
    m.share(m.width, [&](int64_t n, int64_t first, int64_t planes) {
      const ChannelList list = m.list(lists, n);
      for (int64_t j = first; j < first + planes; ++j) {
        char* plane = to + (n * m.width + j) * m.packed_bytes();
        const char* source =
            j < list.count ? from + (n * m.channels + list.index[j]) * m.whole_bytes() : nullptr;
        kernels().fill(plane, source, m.packed_bytes(), false);
      }
    });
    return;
  }
  m.share(m.pixels, [&](int64_t n, int64_t first, int64_t rows) {
    const ChannelList list = m.list(lists, n);
    const int64_t row = n * m.pixels + first, live = list.count * m.element;
    char* begin = to + row * m.packed_bytes();
    kernels().compress(from + row * m.whole_bytes(), m.whole_bytes(), rows, list, dtype, begin,
                       m.packed_bytes());
    for (int64_t i = 0; live < m.packed_bytes() && i < rows; ++i)
      fill_zero(begin + i * m.packed_bytes() + live, m.packed_bytes() - live);
  });
}

// packed, base and out: all channels_last (`last`) or all contiguous.
void scatter_channels(const Tensor& packed, const Tensor& index, const Tensor& count,
                      const OptionalTensor& base, bool last, Tensor out) {
  const Maps m(out, packed, last);
  const ChannelLists lists(index, count, m.channels, 1, 1, m.batch);
  STD_TORCH_CHECK(!base || base->numel() == out.numel(), "base: expected ", out.numel(), " elements, got ",
                  base ? base->numel() : 0);
  const Dtype dtype = dtype_of(out);
  const char *from = data_of<const char>(packed), *below = data_of<const char>(base);
  char* to = data_of<char>(out);
  if (out.numel() == 0) return;
  const bool stream = out.numel() * m.element >= kStreamBytes;
  m.share(last ? m.pixels : m.channels, [&](int64_t n, int64_t first, int64_t lines) {
    const ChannelList list = m.list(lists, n);
    if (last) {
      const int64_t row = n * m.pixels + first, step = m.whole_bytes();
      kernels().expand(from + row * m.packed_bytes(), m.packed_bytes(), lines, list, dtype,
                       below ? below + row * step : nullptr, step, to + row * step, step, stream);
    } else {
      const int32_t* next = std::lower_bound(list.index, list.index + list.count, int32_t(first));
      for (int64_t c = first; c < first + lines; ++c) {
        const int64_t at = (n * m.channels + c) * m.whole_bytes();
        const bool live = next < list.index + list.count && *next == c;
        const char* source = below ? below + at : nullptr;
        if (live) source = from + (n * m.width + (next++ - list.index)) * m.packed_bytes();
        kernels().fill(to + at, source, m.whole_bytes(), stream);
      }
    }
    if (stream) end_stream();
  });
}

DYNOPS_CPU_OP(gather_channels)
DYNOPS_CPU_OP(scatter_channels)

}  // namespace
}  // namespace dynops::cpu

STABLE_TORCH_LIBRARY_IMPL(dynops, CPU, m) {
  m.impl("channel_index", TORCH_BOX(&dynops::cpu::channel_index));
  m.impl("channel_mask", TORCH_BOX(&dynops::cpu::channel_mask));
}
