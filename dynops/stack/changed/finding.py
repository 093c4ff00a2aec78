"""Finds the rule of a step, when it is recorded.

Convolutions, pools, paddings and resizings read a neighbourhood, of which the mask of a change goes through. Any other
function is tried (:mod:`.trying`). What remains runs dense.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from ...plans import PixelPlan
from ..layers.resample import resizing
from ..maps import SparseMap
from ..maps import convolution as maps_conv
from ..maps.layout import NCHW, NCS
from ..maps.value import RowsOnly
from . import arguments, masks
from .rules import BatchNorm, Context, Convolution, Linear, Moved, PixelByPixel, Pool, Rule
from .tape import Plain, Ref
from .trying import tried
from .views import Attention, Statistics


def rule_of(frame, step, out) -> Rule:
    """The rule of a step that was just computed. Sets ``step.size``."""
    maps = [v for v in step.inputs if v.axes is not None]
    if not maps or not all(isinstance(x, Tensor) for x in step.leaves):
        return Rule()
    found = _known(frame, step, out)
    if found is not None:
        return found
    if step.name in _KNOWN:
        return Rule()
    step.size = max((v.size for v in maps), key=math.prod)
    if math.prod(step.size[1:]) < 2 or not tried(frame, step):
        return Rule()
    return BatchNorm() if step.name == "batch_norm" else PixelByPixel()


def _known(frame, step, out) -> Rule | None:
    make, x = _KNOWN.get(step.name), step.inputs[0]
    args = step.key[1][1]
    first_is_map = bool(args) and type(args[0]) is Ref and args[0].value == x.number
    if make is None or not first_is_map or x.axes is None or not x.dtype.is_floating_point:
        return None
    if x.size[1:] == (1, 1) and step.name != "interpolate":
        return None
    step.size = x.size
    return make(frame, step, out)


def _convolution(frame, step, out) -> Rule | None:
    given = arguments.of_step(step)
    x = step.inputs[0]
    if given is None or x.axes != NCHW or len(step.inputs) != 1 or type(given["weight"]) is not Plain:
        return None
    stand_in = SparseMap.of_input(torch.empty(x.shape, dtype=x.dtype, device="meta"), context := Context())
    run = maps_conv.conv_transpose2d if step.name == "conv_transpose2d" else maps_conv.conv2d
    numbers = {k: v for k, v in given.items() if k not in ("input", "weight", "bias")}
    with contextlib.suppress(RowsOnly):
        run(stand_in, step.plains[given["weight"].place], None, **numbers)
    g = context.geometry
    if g is None or g.out_shape != (out.shape[0], *out.shape[2:]):
        return None
    return Convolution(step, g, given, x.device)


def _pool(frame, step, out) -> Rule | None:
    x = step.inputs[0]
    if x.axes != NCHW or not isinstance(out, Tensor) or out.dim() != 4:
        return None
    context, plan = Context(), PixelPlan.full(x.size)
    stand_in = SparseMap.of_rows(torch.zeros(len(plan), 1, device="cpu"), plan, context)
    stand_in._dense = torch.zeros(x.size[0], 1, *x.size[1:], device="cpu")
    with contextlib.suppress(RowsOnly):
        frame.called(step, lambda v: stand_in)
    g = context.geometry
    if g is None or g.out_shape != (out.shape[0], *out.shape[2:]):
        return None
    return Pool(g, x.device)


def _resize(frame, step, out) -> Rule | None:
    given, x = arguments.of_step(step), step.inputs[0]
    if given is None or x.axes != NCHW or len(step.inputs) != 1 or given["antialias"]:
        return None
    options = {k: v for k, v in given.items() if k != "input"}
    mode, scales, to = options["mode"], (None, None), (out.shape[0], *out.shape[2:])
    if options["scale_factor"] is not None and not options["recompute_scale_factor"]:
        s = options["scale_factor"]
        scales = tuple(float(f) for f in (s if isinstance(s, (tuple, list)) else (s, s)))
    if mode == "nearest":
        reads = tuple(masks.nearest(x.size[1 + i], to[1 + i], scales[i], x.device) for i in (0, 1))
        return Moved(reads, to)
    if mode != "bilinear":
        return None
    corners = bool(options["align_corners"])
    reads = tuple(masks.linear(x.size[1 + i], to[1 + i], corners, scales[i], x.device) for i in (0, 1))
    return Linear(reads, to, resizing(x.size, **options))


def _pad(frame, step, out) -> Rule | None:
    given, x = arguments.of_step(step), step.inputs[0]
    if given is None or x.axes != NCHW or len(step.inputs) != 1:
        return None
    pads, mode, value = given["pad"], given["mode"], given["value"]
    if len(pads) not in (2, 4) or not all(type(p) is int for p in pads):
        return None
    left, right, top, bottom = (*pads, 0, 0)[:4]
    reads = (
        masks.padded(x.size[1], top, bottom, mode, x.device),
        masks.padded(x.size[2], left, right, mode, x.device),
    )
    return Moved(reads, (out.shape[0], *out.shape[2:]), float(value or 0))


def _norm(frame, step, out) -> Rule | None:
    given, x = arguments.of_step(step), step.inputs[0]
    if given is None or x.axes not in (NCHW, NCS) or len(step.inputs) != 1:
        return None
    if step.name == "instance_norm" and (given["running_mean"] is not None or not given["use_input_stats"]):
        return None
    groups = given["num_groups"] if step.name == "group_norm" else x.shape[1]
    return Statistics(groups, frame.options.statistics == "kept")


def _attention(frame, step, out) -> Rule | None:
    given = arguments.of_step(step)
    q = step.inputs[0]
    known = (
        given is not None
        and len(step.inputs) == 3
        and q.axes == ("n", "c", "s", "c")
        and all(len(v.shape) == 4 and v.shape[0] == q.shape[0] for v in step.inputs)
        and given["attn_mask"] is None
        and not given["dropout_p"]
        and not given["is_causal"]
        and not given["enable_gqa"]
    )
    if not known:
        return None
    step.scale = given["scale"]
    return Attention(frame.options.attention == "kept")


_KNOWN = {
    "conv2d": _convolution,
    "conv_transpose2d": _convolution,
    "max_pool2d": _pool,
    "avg_pool2d": _pool,
    "interpolate": _resize,
    "pad": _pad,
    "group_norm": _norm,
    "instance_norm": _norm,
    "scaled_dot_product_attention": _attention,
}
