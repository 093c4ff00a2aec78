// The activation between the two GEMMs of an expert on the CPU, and its gradient.
#include "../engine/operands.h"
#include "../engine/parallel.h"

namespace dynops::cpu {
namespace {

constexpr double kElementsPerThread = 32 * 1024;

// The way from rows of z to rows of h (or between their gradients).
Glu glu_of(const Tensor& z, const Tensor& h, int64_t activation, bool gated, bool interleaved, double alpha,
           double limit) {
  const auto name = static_cast<Activation>(activation);
  const Activation last = gated ? Activation::kClampedSwiglu : Activation::kRelu2;
  STD_TORCH_CHECK(activation >= 0 && name <= last, "activation: expected 0 to ", int64_t(last), ", got ",
                  activation);
  STD_TORCH_CHECK(z.dim() == 2 && h.dim() == 2 && z.is_contiguous() && h.is_contiguous() &&
                      z.size(0) == h.size(0) && z.size(1) == h.size(1) * (gated ? 2 : 1),
                  "z: expected contiguous rows, ", gated ? "two columns for each of " : "as wide as ",
                  h.size(1), ", got ", z.numel(), " elements");
  return {.activation = name,
          .gated = gated,
          .interleaved = interleaved,
          .alpha = float(alpha),
          .limit = float(limit),
          .n = h.size(1),
          .up = h.size(1),
          .in = dtype_of(z),
          .out = dtype_of(h)};
}

template <class Row>
void each_row(const Tensor& h, const Row& row) {
  parallel_shares(h.size(0), threads_for(double(h.numel()), kElementsPerThread), row);
}

int64_t row_bytes(const Tensor& t) { return t.size(1) * int64_t(t.element_size()); }

void expert_activation(const Tensor& z, int64_t activation, bool gated, bool interleaved, double alpha,
                       double limit, Tensor h) {
  const Glu glu = glu_of(z, h, activation, gated, interleaved, alpha, limit);
  each_row(h, [&](int64_t p) {
    kernels().glu(glu, data_of<const char>(z) + p * row_bytes(z), data_of<char>(h) + p * row_bytes(h));
  });
}

void expert_activation_grad(const Tensor& grad, const Tensor& z, int64_t activation, bool gated,
                            bool interleaved, double alpha, double limit, Tensor dz) {
  const Glu glu = glu_of(z, grad, activation, gated, interleaved, alpha, limit);
  STD_TORCH_CHECK(dz.numel() == z.numel() && dz.is_contiguous() && dtype_of(dz) == glu.in,
                  "dz: expected z's shape and dtype, got ", dz.numel(), " elements");
  each_row(grad, [&](int64_t p) {
    kernels().glu_grad(glu, data_of<const char>(grad) + p * row_bytes(grad),
                       data_of<const char>(z) + p * row_bytes(z), data_of<char>(dz) + p * row_bytes(z));
  });
}

DYNOPS_CPU_OP(expert_activation)
DYNOPS_CPU_OP(expert_activation_grad)

}  // namespace
}  // namespace dynops::cpu
