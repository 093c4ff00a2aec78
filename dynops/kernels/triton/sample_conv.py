"""Convolutions with weights of their own for samples and regions, or mixed from a few, in Triton.

The signatures and the meaning are those of the references in ``dynops/ops/channels/sample_conv.py`` and
``mixed_conv.py``. The kernels are those of ``channels.py``, with every channel live and a weight for each job. A job is
a sample; with regions it is a region, of each sample if its weights are. Nothing here reads a value on the host, and
nothing uses atomics: every result is bitwise reproducible.

**Regions.** Pixels are sorted by region on the device, and a tile has pixels of one region alone. All regions
together then cost the products of one convolution. An input gradient is computed pixel by pixel: a tile walks over the regions of
the pixels that it reads. Where regions are areas these are one or two; where every pixel has another, all.

**Weights** are read with their input channels side by side. One in another order is copied at every call: it is new at
every call, but for those that are mixed, whose copies are kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import ConvGeometry
from ...kept import kept
from ..layout import empty_map
from . import experts_weight_grad, gemm
from .channel_lists import Side
from .channels import MOST_REGIONS, Own, product
from .channels_weight_grad import own_weight_grads
from .launch import cdiv, launch

__all__ = ["conv", "conv_input_grad", "conv_weight_grad", "mixed_conv"]


@triton.jit(do_not_specialize=["pixels", "plane"])
def region_key_kernel(region, key, pixels, plane, jobs, regions, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """key = the job of each pixel: its region, EACH: of its sample; ``jobs`` where it has none."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    job = tl.load(region + pixel, mask=pixel < pixels, other=-1)
    known = (job >= 0) & (job < regions)
    if EACH:
        job += (pixel // plane).to(tl.int32) * regions
    tl.store(key + pixel, tl.where(known, job, jobs), mask=pixel < pixels)


def conv(x, weight, bias, region, geometry, activation: str) -> Tensor:
    """See ``ops.channels.sample_conv._conv``."""
    g = ConvGeometry(*geometry)
    out = empty_map(x, (g.batch, weight.shape[2], g.out_h, g.out_w), torch.channels_last)
    if out.numel() == 0:
        return out
    if region is not None and bias is not None and bias.shape[0] != weight.shape[0]:
        samples = max(bias.shape[0], weight.shape[0])
        bias, weight = (t.expand(samples, *t.shape[1:]) for t in (bias, weight))
    bias = None if bias is None else bias.flatten(0, 1)
    own = _jobs(region, weight.shape, g)
    product(
        x, _rows(weight, g.groups).flatten(0, 1), out, *_sides(weight.shape, g), g, bias, activation, own=own
    )
    return out


def mixed_conv(x, weight, mix, bias, geometry, activation: str) -> Tensor:
    """See ``ops.channels.mixed_conv._conv``: cuBLAS mixes the weights, which accumulates in float32."""
    rows = kept.get(("triton", "mixed"), lambda: weight.detach().permute(0, 1, 3, 4, 2).contiguous(), weight)
    mixed = mix.to(weight.dtype) @ rows.view(len(weight), rows[0].numel())
    mixed = mixed.view(-1, 1, *rows.shape[1:]).permute(0, 1, 2, 5, 3, 4)
    return conv(x, mixed, bias, None, geometry, activation)


def conv_input_grad(grad, weight, region, geometry) -> Tensor:
    """See ``ops.channels.sample_conv._conv_input_grad``."""
    g = ConvGeometry(*geometry)
    ins, outs = _sides(weight.shape, g)
    dx = empty_map(grad, (g.batch, ins.groups * ins.size, g.in_h, g.in_w), torch.channels_last)
    if 0 in (dx.numel(), grad.numel()):
        return dx.zero_()
    w = _rows(weight, g.groups)
    if region is None:
        product(grad, w[:, 0], dx, outs, ins, gemm.adjoint(g), own=Own(g.batch))
        return dx
    parts = []
    for first in range(0, weight.shape[1], MOST_REGIONS):
        some = w[:, first : first + MOST_REGIONS]
        parts.append(torch.empty_like(dx, dtype=torch.float32) if some.shape[1] < weight.shape[1] else dx)
        shifted = (region - first if first else region).contiguous()
        own = Own(g.batch, region=shifted, regions=some.shape[1])
        product(grad, some, parts[-1], outs, ins, gemm.adjoint(g), own=own)
    return dx if len(parts) == 1 else sum(parts).to(grad.dtype)


def conv_weight_grad(grad, x, region, weight_shape, geometry, bias: bool) -> tuple[Tensor, Tensor]:
    """See ``ops.channels.sample_conv._conv_weight_grad``."""
    g = ConvGeometry(*geometry)
    if 0 in (grad.numel(), x.numel()):
        return grad.new_zeros(weight_shape), grad.new_zeros(weight_shape[:3] if bias else 0)
    own = _jobs(region, weight_shape, g)
    lists = () if own.order is None else (own.order, own.offsets)
    dw = own_weight_grads(grad, x, *_sides(weight_shape, g), g, own.jobs, *lists)
    *lead, outputs, inputs, kh, kw = weight_shape
    if own.jobs != lead[0] * lead[1]:  # one weight of all samples
        dw = dw.sum(0, keepdim=True)
    dw = dw.view(*lead, outputs, kh, kw, inputs).permute(0, 1, 2, 5, 3, 4)
    db = _bias_grad(grad, own, weight_shape) if bias else grad.new_empty(0)
    return dw.to(grad.dtype, memory_format=torch.contiguous_format), db


def _bias_grad(grad: Tensor, own: Own, weight_shape) -> Tensor:
    """``[N or 1, R, O]``."""
    if own.order is None:
        db = grad.sum((2, 3), dtype=torch.float32)
        db = db if weight_shape[0] == grad.shape[0] else db.sum(0)
    else:
        rows = gemm.rows_of(grad).permute(0, 2, 3, 1).flatten(0, 2)
        db = experts_weight_grad.bias_grads(rows, own.order, own.offsets)
    return db.view(list(weight_shape[:3])).to(grad.dtype)


def _sides(weight_shape, g: ConvGeometry) -> tuple[Side, Side]:
    """The inputs and the outputs: every channel is live."""
    outputs, inputs = weight_shape[2:4]
    return Side(None, None, g.batch, g.groups, inputs), Side(
        None, None, g.batch, g.groups, outputs // g.groups
    )


def _rows(weight: Tensor, groups: int) -> Tensor:
    """``[N or 1, R, O, C/groups, kh, kw]`` as ``[N or 1, R, O, taps, C/groups]``; no copy where channels lie side by side.

    A copy for products in TF32 is rounded, as ``gemm.weight_rows`` does.
    """
    rows = weight.detach().permute(0, 1, 2, 4, 5, 3)
    sizes = {"k_size": weight.shape[3], "n_size": weight.shape[2] // groups}
    if not rows.is_contiguous() and gemm.cuts_off(sizes, groups, weight, weight.dtype):
        return gemm.rounded_rows(weight.detach())
    return rows.contiguous().flatten(3, 4)


def _jobs(region: Tensor | None, weight_shape, g: ConvGeometry) -> Own:
    """The pixels that share a weight, sorted on the device; a region outside of [0, R) has none."""
    if region is None:
        return Own(g.batch)
    samples, regions = weight_shape[:2]
    region, jobs = region.contiguous(), samples * regions
    key, plane = torch.empty_like(region), region.shape[1] * region.shape[2]
    if key.numel():
        with gemm.on_device(key):
            launch(region_key_kernel, cdiv(key.numel(), 1024))(
                region, key, key.numel(), plane, jobs, regions, EACH=samples > 1, BLOCK=1024
            )
    order, offsets, _ = torch.ops.dynops.expert_index(key.view(-1, 1), jobs, -1)
    return Own(jobs, order, offsets)
