"""The MACs of the layers of ``dynops.nn``, from one call of each."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import context
from ..nn import (
    ChannelConv2d,
    ChannelGatedConv2d,
    ChannelLinear,
    CondConv2d,
    DynamicConv2d,
    Experts,
    GroupedDynamicConv2d,
    ParallelExperts,
    SkimRNN,
    SkipRNN,
    SlimmableConv2d,
    SlimmableLinear,
    SparseBlocks,
    SparseConv2d,
    SparseConvTranspose2d,
    SparseSequential,
    TokenEncoderLayer,
    TopKRouter,
)
from ..plans import ChannelPlan, ExpertPlan, PixelPlan
from ..stack.traced import Macs
from .called_rules import called_experts, called_router, is_router, matrices_of
from .dense_rules import DENSE_RULES, Cost, argument, conv, step_macs
from .mac_sums import opened, slope

# ------------------------------------------------------------------------------------------ pixels


def pixel_conv(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Cost:
    mask = argument(args, kwargs, 1, "mask_or_plan")
    if isinstance(mask, (list, tuple, torch.Size)):  # output_size of a transposed convolution
        mask = None
    dense = conv(module, args, kwargs, out)
    if mask is None:
        active = context.current()
        if active is None:
            return dense
        shape = (out.shape[0] if out.dim() == 4 else 1, *out.shape[-2:])
        mask = active.plan(shape, out.device)
    pixels = live_pixels(mask, kwargs.get("gate"), dense.rows)
    return Cost(dense.rows, dense.each / max(out.shape[-2:].numel(), 1), pixels, dense.each)


def live_pixels(mask: Tensor | PixelPlan, gate: Tensor | None, rows: int) -> Tensor:
    """float64 ``[N]``: each sample's pixels that are computed, with the gradient of the mask and the gate.

    A mask or plan of one sample is that of all ``rows`` samples.
    """
    if isinstance(mask, PixelPlan):
        mask = mask.expand(rows) if mask.shape[0] == 1 else mask
    if isinstance(mask, Tensor):
        mask = mask[None] if mask.dim() == 2 else mask
        mask = mask.expand(rows, *mask.shape[1:]) if mask.shape[0] == 1 else mask
        live = opened(mask).flatten(1).sum(1)
        at = mask != 0
    else:
        at = mask.mask()
        live = at.flatten(1).sum(1).double()
    if gate is None or not gate.requires_grad:
        return live
    if gate.dim() > 1:
        return live + (slope(gate).reshape(at.shape) * at).flatten(1).sum(1)
    index = mask.index.long() if isinstance(mask, PixelPlan) else at.flatten().nonzero().squeeze(1)
    owner = index.clamp(min=0) // max(at[0].numel(), 1)
    return live.index_add(0, owner, slope(gate) * (index >= 0))


# ---------------------------------------------------------------------------------- pixels of chains


def chain(module: SparseSequential, args: tuple, kwargs: dict, out: Tensor) -> Cost:
    mask = argument(args, kwargs, 1, "mask_or_plan")
    return _of_stack(module.macs(argument(args, kwargs, 0, "input"), mask), mask)


def blocks(module: SparseBlocks, args: tuple, kwargs: dict, out: Tensor) -> Cost:
    x, mask = argument(args, kwargs, 0, "x"), argument(args, kwargs, 1, "mask_or_plan")
    active = context.current()
    if mask is None and active is not None:
        mask = active.plan((x.shape[0], *out.shape[2:]), x.device).mask()
    return _of_stack(module.macs(x, mask), mask)


def _of_stack(macs: Macs, mask) -> Cost:
    """The cost of a call. A mask's gradient is what an active pixel costs on average, halo included."""
    live, dense = macs
    if isinstance(mask, Tensor) and mask.requires_grad:
        mask = mask[None] if mask.dim() == 2 else mask
        active = (mask.detach() != 0).flatten(1).sum(1)
        price = torch.where(active > 0, live / active.clamp(min=1), dense / max(mask[0].numel(), 1))
        live = live + slope(mask).flatten(1).sum(1) * price
    return Cost(live.shape[0], 1.0, live, dense)


# ---------------------------------------------------------------------------------------- channels


def _sizes(module: nn.Module, out: Tensor) -> tuple[int, int, int, int, int]:
    """Samples, the MACs of a pair of channels, input channels, output channels and groups."""
    if isinstance(module, nn.Linear):
        rows = out.shape[0] if out.dim() > 1 else 1
        return rows, out.shape[1:-1].numel(), module.in_features, module.out_features, 1
    rows, each = out.shape[0] if out.dim() == 4 else 1, out.shape[-2:].numel() * math.prod(module.kernel_size)
    return rows, each, module.in_channels, module.out_channels, module.groups


def channels(module: ChannelConv2d | ChannelLinear, args: tuple, kwargs: dict, out: Tensor) -> Cost:
    """Each pair of a live input and a live output channel of one group."""
    rows, each, inputs, outputs, groups = _sizes(module, out)
    dense = float(each * inputs * outputs // groups)
    in_live = live_channels(argument(args, kwargs, 1, "in_plan"), None)
    out_live = live_channels(argument(args, kwargs, 2, "out_plan"), kwargs.get("scale"))
    if in_live is None and out_live is None:
        return Cost(rows, dense)
    return Cost(rows, float(each), pairs(in_live, out_live, rows, inputs, outputs, groups), dense)


def live_channels(plan: ChannelPlan | Tensor | None, scale: Tensor | None) -> Tensor | None:
    """float64 ``[N or 1, heads, C]``, 1 where live, with the gradient of the mask, or of the scale."""
    if plan is None:
        return None
    if isinstance(plan, Tensor):
        live = opened(plan)
        live = live[:, :, 0, 0] if live.dim() == 4 else live
    else:
        live = plan.mask().double()
    if live.dim() == 1:
        live = live[None]
    live = live[:, None] if live.dim() == 2 else live
    if scale is not None and scale.requires_grad and not live.requires_grad:
        live = live + slope(scale).reshape(-1, 1, live.shape[2]) * live
    return live


def pairs(in_live, out_live, rows: int, inputs: int, outputs: int, groups: int) -> Tensor:
    """float64 ``[rows]``: pairs of a live input and a live output channel that meet."""
    if in_live is None:
        in_live = out_live.new_ones(1, 1, inputs)
    if out_live is None:
        out_live = in_live.new_ones(1, 1, outputs)
    heads = max(in_live.shape[1], groups)
    if in_live.shape[1] == 1:  # groups have inputs of their own; with heads each reads its own list of all
        in_live = in_live.reshape(-1, groups, inputs // groups)
    out_live = out_live.reshape(-1, heads, outputs // heads)
    return (in_live.sum(2) * out_live.sum(2)).sum(1).expand(rows)


def slimmable(module: SlimmableConv2d | SlimmableLinear, args: tuple, kwargs: dict, out: Tensor) -> Cost:
    rows, each, inputs, outputs, groups = _sizes(module, out)
    width = argument(args, kwargs, 1, "width")
    width = module.width if width is None else width
    dense = float(each * inputs * outputs // groups)
    live = [side.of(width) for side in (module._inputs, module._outputs)]
    if not isinstance(width, Tensor):
        at = groups * live[0] // inputs if groups > 1 else 1
        return Cost(rows, float(each * live[0] * live[1] // at), None, dense)
    masks = (_first(n, most, width) for n, most in zip(live, (inputs, outputs), strict=True))
    return Cost(rows, float(each), pairs(*masks, rows, inputs, outputs, groups), dense)


def _first(live: int | Tensor, most: int, width: Tensor) -> Tensor:
    """float64 ``[N or 1, 1, most]``: ones up to a width."""
    live = torch.as_tensor(live, device=width.device).reshape(-1, 1, 1)
    return (torch.arange(most, device=width.device) < live).double()


def saliency_heads(module: GroupedDynamicConv2d, args: tuple, kwargs: dict, out, returned: dict) -> Cost:
    """The heads' linear layers count by themselves; their plans are what the heads returned."""
    pixels, live = out[0].shape[-2:].numel(), 0.0
    for i in range(module.heads):
        head = getattr(module, f"headconv_{i}")
        live = live + returned[head][1].count.double()
    each = float(pixels * math.prod(head.conv.kernel_size) * (module.out_channels // module.heads))
    return Cost(out[0].shape[0], each, live, each * module.in_channels * module.heads)


def gated_conv(module: ChannelGatedConv2d, args: tuple, kwargs: dict, out: Tensor) -> Cost:
    """The first channels everywhere, the rest at the outputs whose gate is open (which gives no gradient)."""
    outputs = out.shape[-3:].numel()
    inputs = module.in_channels // module.groups
    taps, first = math.prod(module.kernel_size), module.base_channels
    dense = float(outputs * taps * inputs)
    if module.p == 1:
        return Cost(out.shape[0] if out.dim() == 4 else 1, dense)
    open_ = module._open.flatten(1).sum(1).double()
    live = (outputs * first + open_ * (inputs - first)) * taps
    return Cost(module._open.shape[0], 1.0, live, dense)


# ------------------------------------------------------------------------------ weights of samples


def mixed_conv(module: CondConv2d | DynamicConv2d, args: tuple, kwargs: dict, out: Tensor) -> Cost:
    """One convolution, and for each sample the mixing of its kernels and biases."""
    kernels = module.weight.numel() + (0 if module.bias is None else module.bias.numel())
    one = module.weight.numel() // module.weight.shape[0] // out.shape[1]
    return Cost(out.shape[0], float(out.shape[1:].numel() * one + kernels))


# ----------------------------------------------------------------------------------------- experts


def experts(module: Experts | ParallelExperts, args: tuple, kwargs: dict, out: Tensor) -> Cost:
    """The chosen experts of each token; every gate open: all of them."""
    inner = module.experts if isinstance(module, ParallelExperts) else module
    index = argument(args, kwargs, 1, "topk_index")
    if not isinstance(index, ExpertPlan):
        index = index.reshape(-1, index.shape[-1]) if index.dim() != 1 else index[:, None]
        capacity = kwargs.get("capacity")
        index = ExpertPlan.from_topk(index, module.num_experts, capacity)
    tokens = (index.position >= 0).sum(1).double()
    rows = out.shape[0] if out.dim() > 1 else 1
    each = float(inner.hidden * inner.intermediate * (3 if inner.gated else 2))
    per = out.shape[1:-1].numel() if out.dim() > 1 else 1
    return Cost(rows, each, tokens.view(rows, -1).sum(1), each * module.num_experts * per)


def router(module: TopKRouter, args: tuple, kwargs: dict, out) -> Cost:
    logits = out.logits
    products = 2 if module.noise_weight is not None and module.training else 1
    rows = logits.shape[0] if logits.dim() > 1 else 1
    return Cost(rows, float(products * logits.shape[1:-1].numel() * module.weight.numel()))


# ------------------------------------------------------------------------------------------- steps


def skip_rnn(module: SkipRNN, args: tuple, kwargs: dict, out) -> Cost:
    """The updates of each sequence, and its own gate: once before the first step and after each update."""
    updates = out.updates if module.batch_first else out.updates.transpose(0, 1)
    rows, steps = updates.shape
    each, live = step_macs(module), opened(updates).sum(1)
    dense = each * steps
    if argument(args, kwargs, 2, "updates") is None:
        gate = float(module.gate.weight.numel())
        live, dense = live + (live + 1) * (gate / each), dense + gate * (steps + 1)
    return Cost(rows, each, live, dense)


def skim_rnn(module: SkimRNN, args: tuple, kwargs: dict, out) -> Cost:
    """The small cell or the big one at each step, and the gate."""
    skim = out.skim if module.batch_first else out.skim.transpose(0, 1)
    rows, steps = skim.shape
    small, big = (float(c.weight_ih.numel() + c.weight_hh.numel()) for c in (module.small, module.big))
    gate = float(module.gate.weight.numel())
    live = opened(skim)
    macs = live * small + (1 - live) * big + gate
    lengths = argument(args, kwargs, 3, "lengths", None)
    if lengths is not None:
        lengths = torch.as_tensor(lengths, device=skim.device)
        macs = macs * (torch.arange(steps, device=skim.device) < lengths[:, None])
    return Cost(rows, 1.0, macs.sum(1), (big + gate) * steps)


# ------------------------------------------------------------------------------------------ tokens


def token_encoder(module: TokenEncoderLayer, args: tuple, kwargs: dict, out: Tensor) -> Cost | None:
    """A plan's tokens as queries, and their products with all keys of the sequences that have one."""
    plan = argument(args, kwargs, 1, "plan")
    if plan is None:  # the attention was called, and counted
        return None
    src = argument(args, kwargs, 0, "src")
    rows, time, width = src.shape
    index = plan.index.long()
    tokens = torch.zeros(rows + 1, dtype=torch.float64, device=src.device)
    owner = torch.where(index < 0, rows, index // max(time, 1))
    tokens = tokens.index_add(0, owner, torch.ones_like(owner, dtype=torch.float64))[:-1]
    query, keys = width * width + 2 * time * width, 2 * time * width * width
    return Cost(rows, 1.0, tokens * query + (tokens > 0) * keys, float(time * query + keys))


RULES = {
    **DENSE_RULES,
    SparseConv2d: pixel_conv,
    SparseConvTranspose2d: pixel_conv,
    SparseSequential: chain,
    SparseBlocks: blocks,
    ChannelConv2d: channels,
    ChannelLinear: channels,
    SlimmableConv2d: slimmable,
    SlimmableLinear: slimmable,
    GroupedDynamicConv2d: saliency_heads,
    ChannelGatedConv2d: gated_conv,
    CondConv2d: mixed_conv,
    DynamicConv2d: mixed_conv,
    Experts: experts,
    ParallelExperts: experts,
    TopKRouter: router,
    SkipRNN: skip_rnn,
    SkimRNN: skim_rnn,
    TokenEncoderLayer: token_encoder,
}
"""The rule of a class, for its subclasses too, unless they have their own."""

OPAQUE = (SparseBlocks, SparseSequential, ParallelExperts)
"""Layers that count for the modules inside. With hooks on these the first two would not run on parts of a map."""


def rule_of(module: nn.Module):
    """The rule of a module, or None where it has no MACs of its own."""
    if matrices_of(module):
        return called_experts
    if is_router(module):
        return called_router
    for kind in type(module).__mro__:
        if kind in RULES:
            return RULES[kind]
    return None
