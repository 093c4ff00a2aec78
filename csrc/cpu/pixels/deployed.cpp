// The ops of converted models by their whole schema: what a package of AOTInductor calls in a process without
// Python. There the kernels below run. In Python the launchers of dynops/kernels go before them, whose key
// has the higher priority; they do the same and know more layouts, dtypes and backends.
#include <array>
#include <map>
#include <mutex>
#include <string>

#include "../engine/operands.h"
#include "../fingerprint.h"

namespace dynops::cpu {
namespace {

using torch::headeronly::MemoryFormat;

// Calls an op of the binary. Returns its result, if it has one.
template <class Return = void, class... Arguments>
Return call(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  if constexpr (!std::is_void_v<Return>) return torch::stable::detail::to<Return>(stack[0]);
}

void expect_cpu(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(),
                  "dynops: expected CPU tensors, as the kernels of other devices need Python's dynops");
}

// True for a map [N, C, H, W] whose rows of channels have no gaps.
bool lies_last(const Tensor& x) {
  if (x.dim() != 4) return false;
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t expected[4] = {c * h * w, 1, w * c, c}, sizes[4] = {n, c, h, w};
  bool last = true;
  for (int i = 0; i < 4; ++i) last &= sizes[i] == 1 || x.stride(i) == expected[i];
  return last;
}

// The format of an output for `x`, as dynops.kernels.layout.memory_format_of: strides tell where both are
// right.
MemoryFormat format_of(const Tensor& x) {
  const bool last = lies_last(x) && !(x.is_contiguous() && !(x.stride(1) == 1 && x.stride(3) == x.size(1)));
  return last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

Tensor empty_map(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w, MemoryFormat format) {
  const int64_t shape[4] = {n, c, h, w};
  return torch::stable::empty({shape, 4}, like.scalar_type(), {}, {}, {}, format);
}

OptionalTensor laid_out(const OptionalTensor& t, MemoryFormat format = MemoryFormat::Contiguous) {
  if (!t) return t;
  return torch::stable::contiguous(*t, t->dim() == 4 ? format : MemoryFormat::Contiguous);
}

// ----------------------------------------------------------------------------------------- packed weights

enum Packing : int64_t { kGemm, kMerged, kDepthwise, kWinograd };

// A weight as a kernel reads it, made once. As dynops/kept.py, it is made again where 64 of its lines differ.
Tensor packed_weight(const Tensor& weight, const Geometry& g, Packing packing, bool dot) {
  struct Entry {
    uint64_t seen;
    Tensor packed;
  };
  constexpr size_t kMostEntries = 4096;
  static std::mutex mutex;
  static std::map<std::vector<int64_t>, Entry> kept;
  const void* memory = weight.const_data_ptr();
  std::vector<int64_t> key{
      int64_t(memory), int64_t(weight.scalar_type()), g.groups, g.transposed, packing, dot};
  for (int64_t i = 0; i < 4; ++i) key.insert(key.end(), {weight.size(i), weight.stride(i)});
  const uint64_t seen = fingerprint(memory, weight.numel() * int64_t(weight.element_size()), 64);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = kept.find(key);
  if (found != kept.end() && found->second.seen == seen) return found->second.packed;
  Tensor packed = packing == kWinograd    ? call<Tensor>("dynops::cpu_pack_winograd", weight)
                  : packing == kDepthwise ? call<Tensor>("dynops::cpu_pack_depthwise", weight)
                                          : call<Tensor>("dynops::cpu_pack_weight", weight, g.groups,
                                                         bool(g.transposed), false, packing == kMerged, dot);
  if (kept.size() >= kMostEntries) kept.clear();
  kept.insert_or_assign(key, Entry{seen, packed});
  return packed;
}

// As dynops.kernels.cpu.engine.setup_of. Winograd's also needs tiles that are full enough.
Packing packing_of(const Geometry& g, const Tensor& weight, bool packed_in) {
  const int64_t first = weight.size(0), second = weight.size(1);
  if (g.groups > 1 && first == g.groups && second == 1) return kDepthwise;
  if (g.groups > 1 || g.transposed) return kGemm;
  const bool square = g.kernel_h == 3 && g.kernel_w == 3 && g.stride_h * g.stride_w * g.dil_h * g.dil_w == 1;
  if (square && std::min(first, second) >= 32 && weight.scalar_type() == ScalarType::Float) return kWinograd;
  return !packed_in && g.dil_w == 1 && g.kernel_w > 1 && second < 16 ? kMerged : kGemm;
}

// ---------------------------------------------------------------------------------------------------- ops

int64_t activation_of(const std::string& name) {
  const char* const names[] = {"", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", "relu2"};
  const auto found = std::find(std::begin(names), std::end(names), name);
  STD_TORCH_CHECK(found != std::end(names), "activation: expected one that ops know, got ", name);
  return found - std::begin(names);
}

Tensor pixel_conv(const Tensor& x_in, const Tensor& weight, const OptionalTensor& bias, const Tensor& index,
                  const OptionalTensor& count, const OptionalTensor& source, IntHeaderOnlyArrayRef geometry,
                  std::string activation, const OptionalTensor& scale, const OptionalTensor& shift,
                  const OptionalTensor& gate, const OptionalTensor& residual, const OptionalTensor& base,
                  bool rows, std::optional<int64_t>, bool, bool, std::string backend) {
  expect_cpu(x_in);
  STD_TORCH_CHECK(backend.empty() || backend == "cpp", "backend: expected 'cpp' without Python, got ",
                  backend);
  const Geometry g = geometry_of(geometry);
  const int64_t channels = g.transposed ? weight.size(1) * g.groups : weight.size(0);
  const MemoryFormat format = source ? MemoryFormat::ChannelsLast : format_of(x_in);
  const Tensor x = *laid_out(x_in, MemoryFormat::ChannelsLast);
  Packing packing = packing_of(g, weight, bool(source));
  OptionalTensor quads;
  if (packing == kWinograd) {
    if (index.size(0) >= 96) quads = call<Tensor>("dynops::cpu_winograd_quads", index, count, geometry);
    if (quads && quads->size(0) == 0) quads.reset();
    if (!quads) packing = kGemm;
  }
  const Tensor packed = packed_weight(weight, g, packing, multiplies_pairs(dtype_of(x)));
  const Tensor out = rows ? torch::stable::new_empty(x, std::array{index.size(0), channels})
                          : empty_map(x, g.batch, channels, g.out_h, g.out_w, format);
  const OptionalTensor gates =
      gate ? laid_out(torch::stable::to(*gate, ScalarType::Float)) : OptionalTensor();
  call("dynops::cpu_conv", x, packed, laid_out(bias), index, count, source, geometry,
       activation_of(activation), laid_out(scale), laid_out(shift), gates,
       laid_out(residual, MemoryFormat::ChannelsLast), laid_out(base, format), packing == kMerged, quads,
       out);
  return out;
}

Tensor gather_rows(const Tensor& x, const Tensor& index, const OptionalTensor& count) {
  expect_cpu(x);
  const Tensor out = torch::stable::new_empty(x, std::array{index.size(0), x.size(1)});
  if (lies_last(x)) {
    call("dynops::cpu_gather", x, index, count, out);
  } else {
    call("dynops::cpu_gather_planes", x, OptionalTensor(index), count, out);
  }
  return out;
}

template <class Index>  // a tensor, or an optional one, as the kernel's schema has it
Tensor scattered(const char* kernel, const Tensor& rows, const Index& index, const OptionalTensor& count,
                 IntHeaderOnlyArrayRef shape, const OptionalTensor& base, MemoryFormat format) {
  expect_cpu(rows);
  const Tensor out = empty_map(rows, shape[0], rows.size(1), shape[1], shape[2], format);
  call(kernel, torch::stable::contiguous(rows), index, count, laid_out(base, format), out);
  return out;
}

Tensor scatter_rows(const Tensor& rows, const Tensor& index, const OptionalTensor& count,
                    IntHeaderOnlyArrayRef shape, const OptionalTensor& base) {
  return scattered("dynops::cpu_scatter", rows, index, count, shape, base, MemoryFormat::ChannelsLast);
}

Tensor scatter_planes(const Tensor& rows, const Tensor& index, const OptionalTensor& count,
                      IntHeaderOnlyArrayRef shape, const OptionalTensor& base) {
  return scattered("dynops::cpu_scatter_planes", rows, OptionalTensor(index), count, shape, base,
                   MemoryFormat::Contiguous);
}

}  // namespace
}  // namespace dynops::cpu

// As dynops/ops has them: ops/registry.py compares them.
STABLE_TORCH_LIBRARY_FRAGMENT(dynops, m) {
  m.def("mask_to_index(Tensor mask) -> Tensor");
  m.def("mask_to_index_capacity(Tensor mask, SymInt capacity) -> (Tensor, Tensor)");
  m.def("inverse_index(Tensor index, Tensor? count, SymInt[] shape) -> Tensor");
  m.def("needed_mask(Tensor index, Tensor? count, SymInt[] geometry) -> Tensor");
  m.def("gather_rows(Tensor x, Tensor index, Tensor? count) -> Tensor");
  m.def("scatter_rows(Tensor rows, Tensor index, Tensor? count, SymInt[] shape, Tensor? base) -> Tensor");
  m.def("scatter_planes(Tensor rows, Tensor index, Tensor? count, SymInt[] shape, Tensor? base) -> Tensor");
  m.def(
      "pixel_conv(Tensor x, Tensor weight, Tensor? bias, Tensor index, Tensor? count, Tensor? source, "
      "SymInt[] geometry, str activation, Tensor? scale, Tensor? shift, Tensor? gate, Tensor? residual, "
      "Tensor? base, bool rows, SymInt? expected, bool zero_tail, bool same_rows, str backend) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dynops, CompositeExplicitAutograd, m) {
  m.impl("gather_rows", TORCH_BOX(&dynops::cpu::gather_rows));
  m.impl("scatter_rows", TORCH_BOX(&dynops::cpu::scatter_rows));
  m.impl("scatter_planes", TORCH_BOX(&dynops::cpu::scatter_planes));
  m.impl("pixel_conv", TORCH_BOX(&dynops::cpu::pixel_conv));
}
