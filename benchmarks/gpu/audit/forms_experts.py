"""The forms of the kernels over experts: grouped products and their gradients, activations, rows of tokens."""

from __future__ import annotations

from functools import partial

import torch

from dynops import ExpertPlan, ops
from dynops.kernels.triton import experts

from .launches import Form, wide


def _mlp(
    dtype: torch.dtype,
    hidden: int = 256,
    inner: int = 256,
    activation: str = "silu",
    interleaved: bool = False,
    transposed: bool = False,
    int8: bool = False,
    topk: int = 2,
    grads: bool = False,
    each: int = 512,
) -> None:
    """The MLP of ``each`` rows for two experts, and with ``grads`` the weight gradient, packed and gathered."""
    tokens, count = 2 * each // topk, 2
    plan = ExpertPlan.from_topk(torch.arange(2 * each).view(tokens, topk) % count, count)
    indices = (plan.order, plan.offsets, plan.position)
    x, weights = torch.zeros(tokens, hidden, dtype=dtype), torch.zeros(tokens, topk)
    shapes = ((2 * inner, hidden), (hidden, inner))
    shapes = [shape[::-1] for shape in shapes] if transposed else shapes
    up, down = ((torch.zeros(count, *shape, dtype=dtype), None) for shape in shapes)
    if int8:
        up, down = (ops.quantize_experts(weight, transposed) for weight, _ in (up, down))
    biases = (torch.zeros(count, n, dtype=dtype) for n in (2 * inner, hidden))
    options = (activation, True, interleaved, transposed, transposed, 1.702, 7.0)
    experts.mlp(x, up[0], down[0], up[1], down[1], *biases, weights, *indices, *options)
    if grads:
        rows = torch.zeros(plan.num_rows, inner, dtype=dtype)
        experts.weight_grad(x, rows, weights, *indices, False, True, transposed, True)
        experts.weight_grad(rows, x, None, *indices, True, False, transposed, False)


def _rows(dtype: torch.dtype) -> None:
    plan = ExpertPlan.from_topk(torch.arange(64).view(32, 2) % 4, 4)
    indices, weights = (plan.order, plan.offsets, plan.position), torch.zeros(32, 2)
    x = torch.zeros(32, 256, dtype=dtype)
    rows = experts.gather(x, weights, *indices)
    experts.gather(x, None, *indices)
    experts.combine(rows, weights, *indices)
    experts.dots(x, rows, False, *indices)
    experts.dots(rows, rows, True, *indices)


def _activations(dtype: torch.dtype) -> None:
    z = torch.zeros(32, 256, dtype=dtype)
    for activation, interleaved in (("silu", False), ("clamped_swiglu", True), ("gelu", False)):
        options = (activation, True, interleaved, 1.702, 7.0)
        experts.activation_grad(experts.activation(z, *options), z, *options)
    experts.activation_grad(
        experts.activation(z, "gelu", False, False, 0.0, 0.0), z, "gelu", False, False, 0.0, 0.0
    )


HALF = (torch.bfloat16,)
FORMS = (
    Form("gated", partial(_mlp, grads=True), every_tile=HALF, vectors=("linear_kernel",)),
    Form("gated, int8", partial(_mlp, int8=True)),
    Form("gated gelu, ragged, one choice", partial(_mlp, hidden=261, inner=261, activation="gelu", topk=1)),
    Form("gated gelu, ragged, one choice, gradients", partial(_mlp, hidden=261, inner=261, activation="gelu", topk=1, grads=True), HALF),
    Form("interleaved, transposed", partial(_mlp, activation="clamped_swiglu", interleaved=True, transposed=True), HALF),
    Form("gated gelu, one choice", partial(_mlp, activation="gelu", topk=1), HALF),
    Form("few rows", partial(_mlp, each=16), every_tile=(torch.float32,)),
    Form("few rows, int8", partial(_mlp, each=4, int8=True)),
    Form("few rows, ragged, gelu, one choice", partial(_mlp, each=4, hidden=261, inner=261, activation="gelu", topk=1)),
    Form("gated, split", partial(_mlp, grads=True), processors=2048),
    Form("gated, float16", partial(_mlp, grads=True), (torch.float16,)),
    Form("gated, 64-bit offsets", wide(partial(_mlp, grads=True)), HALF),
    Form("rows", _rows),
    Form("rows, 64-bit offsets", wide(_rows), HALF),
    Form("activations", _activations),
    Form("activations, 64-bit offsets", wide(_activations), HALF),
)  # fmt: skip
