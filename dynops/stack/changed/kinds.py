"""Rules: what a function does to a change of its inputs, and how it computes rows.

A rule is found when a step is recorded. Convolutions, pools, paddings and resizings read a neighbourhood, of which the
mask of a change goes through. Any other function is tried on random maps: where its rows at a few pixels, made of the
inputs' rows there alone, are those of its dense result, it works pixel by pixel. What remains runs dense.
"""

from __future__ import annotations

import inspect
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ...geometry import ConvGeometry
from ...kept import kept
from ...ops.dense_conv import dense_conv
from ...plans import PixelPlan
from ..layers.pool import spread_over, windows_of_rows
from ..layers.resample import resizing
from ..maps import SparseMap, bare, entered
from ..maps import convolution as maps_conv
from ..maps.layout import NCHW, NCS, gathered
from ..maps.value import RowsOnly
from ..norm import fold_of
from . import masks
from .stored import Stored, positions
from .tape import ALL, Ref

_PIXELS_TRIED = 40
_AGREE = {torch.float32: 1e-4, torch.float64: 1e-8}  # relative; of half precision 0.03


class Context:
    """Stands for ``use_mask`` in the maps of a step: it knows the plan of what is made, and no other."""

    ragged, rows_only = False, True

    def __init__(self, plan: PixelPlan | None = None):
        self.target, self.geometry = plan, None

    def plan(self, shape, device) -> PixelPlan:
        if self.target is None or self.target.shape != tuple(shape):
            raise RowsOnly
        return self.target

    def after(self, geometry: ConvGeometry, device, ceil: bool = False) -> PixelPlan:
        self.geometry = geometry
        return self.plan(geometry.out_shape, device)


class Rule:
    """How a function is run. This one is of functions without a rule: dense, and its result is compared."""

    compares = True  # its result's change is found by comparing it
    may_be_dense = False  # a dense run gives the same result as rows at the pixels that changed

    def reads_own_place(self, step, i: int) -> bool:
        """True where output pixel p reads input ``i`` at p alone."""
        return False

    def knows_places(self, step) -> bool:
        """True where the result depends on where a pixel lies, as that of a sum with an embedding of positions."""
        return False

    def spread(self, frame, step):
        """What changes in the result: None, a plan or ``ALL``."""
        return ALL

    def rows(self, frame, step, plan: PixelPlan) -> list:
        """The result's leaves at a plan: maps, or rows."""
        raise RowsOnly

    def dense(self, frame, step) -> list:
        """The result's leaves, whole."""
        return pytree.tree_leaves(frame.called(step, frame.for_step(step)))

    def macs(self, step) -> float:
        """Multiply-accumulates of one pixel of the result."""
        return 0.0


class PixelByPixel(Rule):
    """Reads each map at the pixel that it makes; what is no map, or of one pixel a sample, as a whole."""

    compares, may_be_dense = False, True

    def reads_own_place(self, step, i: int) -> bool:
        value = step.inputs[i]
        return value.axes is not None and value.size == step.size

    def knows_places(self, step) -> bool:
        _, h, w = step.size
        weights = step.name in ("linear", "batch_norm", "layer_norm", "prelu", "rms_norm")
        return not weights and any({h, w, h * w} & (set(x.shape) - {1}) for x in step.plains)

    def spread(self, frame, step):
        return frame.together(step, step.inputs)

    def rows(self, frame, step, plan: PixelPlan) -> list:
        context = Context(plan)

        def value_of(number: int):
            value = frame.tape.values[number]
            if value.axes is not None and value.size == step.size:
                return frame.map_at(value, plan, context)
            return frame.whole(value)

        with entered():
            leaves = pytree.tree_leaves(frame.called(step, lambda v: value_of(v.number)))
        if not all(type(x) is SparseMap and x.plan is plan for x in leaves if isinstance(x, Tensor)):
            raise RowsOnly
        return leaves

    def macs(self, step) -> float:
        if step.name == "linear" and step.plains:
            return step.plains[0].numel()
        return 0.0


class BatchNorm(PixelByPixel):
    """A batch norm in eval mode. Of a whole convolution that nothing else reads it is in the weights."""

    folded: tuple[Tensor, Tensor] | None = None

    def affine(self, step) -> tuple[Tensor, Tensor] | None:
        """The norm as a scale and a shift ``[C]``; kept, as a call begins with a look at the parameters."""
        if self.folded is None:
            given = _bound(step, _BATCH)
            names = ("weight", "bias", "running_mean", "running_var")
            self.folded = fold_of(
                given["eps"], *(None if given[k] is None else step.plains[given[k].place] for k in names)
            )
        return self.folded

    def dense(self, frame, step) -> list:
        x = step.inputs[0]
        if len(step.inputs) > 1 or x.dtype not in (torch.float32, torch.float64):
            return super().dense(frame, step)
        scale, shift = self.affine(step)
        if scale.dtype != x.dtype:
            return super().dense(frame, step)
        if x.dense is None and x.stored is None and isinstance(x.step.rule, Convolution) and x.step.rule.waits_for_norms:
            return [x.step.rule.folded(frame, x.step, scale, shift)]
        return [torch.addcmul(shift.view(-1, 1, 1), frame.whole(x), scale.view(-1, 1, 1))]


class Neighbourhood(Rule):
    """Reads a window of its first input. This one computes the whole result, of which the rows are taken."""

    compares, may_be_dense = False, True

    geometry: ConvGeometry | None = None

    def __init__(self, reads: tuple[masks.Reads, masks.Reads], size: tuple[int, int, int]):
        self.reads, self.size = reads, size

    def spread(self, frame, step):
        x = step.inputs[0]
        others = [v for v in step.inputs[1:] if v.plan is not None]
        if others or frame.constants_moved:
            return ALL
        return frame.through(x, self.reads, self.size, self.geometry)

    def rows(self, frame, step, plan: PixelPlan) -> list:
        return [gathered(self.dense(frame, step)[0], plan, NCHW)]


class Convolution(Neighbourhood):
    """A convolution, or a transposed one, whose weight is no value."""

    def __init__(self, step, g: ConvGeometry, arguments: dict, device):
        super().__init__(masks.of_geometry(g, device), g.out_shape)
        self.geometry = g
        self.pointwise = g.is_pointwise and not g.transposed
        self.weight = step.plains[arguments["weight"].place]
        bias = arguments.get("bias")
        self.bias = None if bias is None else bias.place

    @property
    def waits_for_norms(self) -> bool:
        """True where a norm that follows may be in the weights."""
        return not self.geometry.transposed

    def reads_own_place(self, step, i: int) -> bool:
        return self.pointwise

    def rows(self, frame, step, plan: PixelPlan) -> list:
        x, g, context = step.inputs[0], self.geometry, Context(plan)
        weight = self.weight
        bias = None if self.bias is None else step.plains[self.bias]
        dense = frame.whole_or_none(x)
        if dense is not None:
            values, in_plan = dense.contiguous(memory_format=torch.channels_last), None
        else:
            in_plan = plan if self.pointwise else plan.needed_by(g)
            values = frame.map_at(x, in_plan, context).rows()
        values, bias = maps_conv._operands(values, weight, bias)
        return [bare(values, in_plan, weight, bias, plan, g, context)]

    def folded(self, frame, step, scale: Tensor, shift: Tensor) -> Tensor:
        """The whole result with a norm after it."""
        weight = self.weight
        bias = None if self.bias is None else step.plains[self.bias]

        folded = kept.get("scaled", lambda: weight * scale.view(-1, 1, 1, 1), weight, scale)
        moved = shift if bias is None else shift + bias * scale
        x = frame.whole(step.inputs[0]) if step.held is None else step.held
        step.held = None
        return dense_conv(x, folded, self.geometry, moved)

    def macs(self, step) -> float:
        w = self.weight
        return w.numel() / (self.geometry.stride_h * self.geometry.stride_w) if self.geometry.transposed else w.numel()


class Pool(Neighbourhood):
    """A max or mean pool."""

    def __init__(self, g: ConvGeometry, device):
        super().__init__(masks.of_geometry(g, device), g.out_shape)
        self.geometry = g

    def rows(self, frame, step, plan: PixelPlan) -> list:
        x = frame.whole_map(step.inputs[0], Context(plan))
        made = frame.called(step, lambda v: x)
        return [made if type(made) is SparseMap else gathered(made, plan, NCHW)]


class Moved(Neighbourhood):
    """A padding, or nearest interpolation: each pixel is one of the input, or a number."""

    def __init__(self, reads, size, fill: float = 0.0):
        super().__init__(reads, size)
        self.fill = fill

    def rows(self, frame, step, plan: PixelPlan) -> list:
        def source() -> tuple[Tensor, Tensor | None]:
            (_, h, w), (y, x) = plan.shape, self.reads
            at = positions(plan)
            row, column = y.at[0][at // w % h], x.at[0][at % w]
            outside = (row < 0) | (column < 0)
            flat = (at // (h * w) * y.size + row) * x.size + column
            return flat.clamp(min=0).masked_fill(outside, 0), outside if bool(outside.any()) else None

        flat, outside = plan.derived(("moved", id(self)), source)
        rows = frame.whole_rows(step.inputs[0]).index_select(0, flat)
        return [rows if outside is None else rows.masked_fill_(outside[:, None], self.fill)]


class Linear(Neighbourhood):
    """Bilinear interpolation."""

    def __init__(self, reads, size, found):
        super().__init__(reads, size)
        self.found = found

    def rows(self, frame, step, plan: PixelPlan) -> list:
        x, found = step.inputs[0], self.found
        if found is not None:
            full = frame.full(x.size)
            rows = windows_of_rows(found.kind, frame.whole_rows(x), full, plan, found.geometry, found.linear)
            if rows is not None:
                return [rows]
        return super().rows(frame, step, plan)


class Statistics(Rule):
    """A group or instance norm. With kept statistics it works pixel by pixel; else a change moves all of a sample."""

    compares = False

    def __init__(self, groups: int, kept: bool):
        self.groups, self.kept = groups, kept
        self.scale = self.shift = None  # [N, C]

    def fits(self) -> bool:
        """True where it is a scale and a shift of each channel, for all samples."""
        return self.kept and self.scale is not None and self.scale.shape[0] == 1

    def affine(self, step) -> tuple[Tensor, Tensor] | None:
        return (self.scale[0], self.shift[0]) if self.fits() else None

    def reads_own_place(self, step, i: int) -> bool:
        return self.kept

    def spread(self, frame, step):
        x = step.inputs[0]
        if any(v.plan is not None for v in step.inputs[1:]) or frame.constants_moved or x.plan is ALL:
            return ALL
        return x.plan if self.kept else frame.of_samples(x.plan, x.size)

    def dense(self, frame, step) -> list:
        x = frame.whole(step.inputs[0])
        if not self.kept:
            return super().dense(frame, step)
        if step.outs and step.outs[0].plan is not ALL and self.scale is not None:  # asked for by what needs all of it
            shape = (*self.scale.shape, *(1,) * (x.dim() - 2))
            return [torch.addcmul(self.shift.view(shape), x, self.scale.view(shape)).to(x.dtype)]
        given = norm_arguments(step, frame.whole)
        n, c = x.shape[:2]
        x = x if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)) else x.contiguous()
        weight, bias = given["weight"], given["bias"]
        if frame.autocasts(x):
            x = x.float()
        out, mean, rstd = torch.native_group_norm(
            x, weight, bias, n, c, math.prod(x.shape[2:]), self.groups, given["eps"]
        )
        scale = rstd.repeat_interleave(c // self.groups, 1)
        shift = -mean.repeat_interleave(c // self.groups, 1) * scale
        if weight is not None:
            scale, shift = scale * weight, shift * weight
        self.scale, self.shift = scale, shift if bias is None else shift + bias
        return [out]

    def rows(self, frame, step, plan: PixelPlan) -> list:
        x = step.inputs[0]
        if not self.kept:
            return [gathered(self.dense(frame, step)[0], plan, x.axes)]
        context = Context(plan)
        found = frame.map_at(x, plan, context)
        if plan.shape[0] == 1 and frame.autocasts(found) is False:
            scale, shift = self.scale[0], self.shift[0]
            waits = found.convolution()
            if waits is not None and waits.takes("norm"):
                return [waits.grown(found, scale=scale, shift=shift)]
            rows = found.rows()
            return [torch.addcmul(shift.to(rows.dtype), rows, scale.to(rows.dtype))]
        rows = found.rows()
        wide = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        made = torch.addcmul(spread_over(self.shift, plan), wide, spread_over(self.scale, plan))
        return [made.to(step.outs[0].dtype)]


class Attention(Rule):
    """``scaled_dot_product_attention`` without a mask. A query that changed reads all keys and values.

    A key that changed moves every query of its sample. With kept keys it moves none but those that changed too.
    """

    compares = False

    def __init__(self, kept: bool):
        self.kept = kept

    def reads_own_place(self, step, i: int) -> bool:
        return i == 0

    def spread(self, frame, step):
        q, k, v = step.inputs[:3]
        others = [x for x in (k, v) if x.plan is not None]
        if q.plan is ALL or any(x.plan is ALL or x.size != q.size for x in others) or frame.constants_moved:
            return ALL
        if others and not self.kept:
            plans = [x.plan for x in (q, *others) if x.plan is not None]
            return frame.of_samples(frame.union(plans), q.size)
        return q.plan if not others else frame.union([x.plan for x in (q, *others) if x.plan is not None])

    def rows(self, frame, step, plan: PixelPlan) -> list:
        q, k, v = (step.inputs[i] for i in range(3))
        rows = frame.map_at(q, plan, Context(plan)).rows()  # [P, heads, d]
        keys, values = frame.whole(k), frame.whole(v)
        scale = step.scale
        n = plan.shape[0]
        sizes = [len(plan)] if n == 1 else torch.bincount(positions(plan) // math.prod(plan.shape[1:]), minlength=n).tolist()
        made = []
        for i, part in enumerate(rows.split(sizes)):
            heads = part.transpose(0, 1)[None]  # [1, heads, P, d]
            out = F.scaled_dot_product_attention(heads, keys[i : i + 1], values[i : i + 1], scale=scale)
            made.append(out[0].transpose(0, 1))
        return [made[0] if n == 1 else torch.cat(made)]

    def macs(self, step) -> float:
        q, k, v = step.inputs[:3]
        return q.shape[1] * k.shape[2] * (q.shape[3] + v.shape[3])


# ------------------------------------------------------------------------------------------- finding


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
    if math.prod(step.size[1:]) < 2 or not _tried(frame, step):
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


def _bound(step, signature: inspect.Signature) -> dict | None:
    args, kwargs = step.key[1][1], dict(step.key[2][1])
    try:
        given = signature.bind(*args, **kwargs)
    except TypeError:
        return None
    given.apply_defaults()
    return {k: (v[1] if type(v) is tuple and len(v) == 2 and v[0] is None else v) for k, v in given.arguments.items()}


def _signature(text: str) -> inspect.Signature:
    scope: dict = {}
    exec(f"def function({text}): pass", scope)  # the arguments of functions that are built into torch
    return inspect.signature(scope["function"])


_CONV = _signature("input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1")
_CONV_T = _signature("input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1")
_RESIZE = _signature(
    "input, size=None, scale_factor=None, mode='nearest', align_corners=None, recompute_scale_factor=None, antialias=False"
)
_PAD = _signature("input, pad, mode='constant', value=None")
_GROUP = _signature("input, num_groups, weight=None, bias=None, eps=1e-05, *rest")
_INSTANCE = _signature(
    "input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-05, *rest"
)
_BATCH = _signature("input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05, *rest")
_SDPA = _signature(
    "query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False"
)


def _plainly(value):
    """A frozen argument that is a number or a tuple of numbers."""
    if type(value) is tuple and len(value) == 2 and value[0] in (tuple, list, torch.Size):
        return tuple(_plainly(x) for x in value[1])
    if type(value) is tuple and len(value) == 2 and value[0] is None:
        return value[1]
    return value


def _convolution(frame, step, out) -> Rule | None:
    given = _bound(step, _CONV_T if step.name == "conv_transpose2d" else _CONV)
    x = step.inputs[0]
    if given is None or x.axes != NCHW or len(step.inputs) != 1 or not hasattr(given["weight"], "place"):
        return None
    stand_in = SparseMap.of_input(torch.empty(x.shape, dtype=x.dtype, device="meta"), context := Context())
    run = maps_conv.conv_transpose2d if step.name == "conv_transpose2d" else maps_conv.conv2d
    numbers = {k: _plainly(v) for k, v in given.items() if k not in ("input", "weight", "bias")}
    try:
        run(stand_in, step.plains[given["weight"].place], None, **numbers)
    except RowsOnly:
        pass
    g = context.geometry
    if g is None or g.out_shape != (out.shape[0], *out.shape[2:]):
        return None
    return Convolution(step, g, given, x.device)


def _pool(frame, step, out) -> Rule | None:
    x = step.inputs[0]
    if x.axes != NCHW or not isinstance(out, Tensor) or out.dim() != 4:
        return None
    context, plan = Context(), PixelPlan.full(x.size)
    stand_in = SparseMap.of_rows(torch.zeros(len(plan), 1), plan, context)
    stand_in._dense = torch.zeros(x.size[0], 1, *x.size[1:])
    try:
        frame.called(step, lambda v: stand_in)
    except RowsOnly:
        pass
    g = context.geometry
    if g is None or g.out_shape != (out.shape[0], *out.shape[2:]):
        return None
    return Pool(g, x.device)


def _resize(frame, step, out) -> Rule | None:
    given, x = _bound(step, _RESIZE), step.inputs[0]
    if given is None or x.axes != NCHW or len(step.inputs) != 1 or given["antialias"]:
        return None
    options = {k: _plainly(v) for k, v in given.items() if k != "input"}
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
    given, x = _bound(step, _PAD), step.inputs[0]
    if given is None or x.axes != NCHW or len(step.inputs) != 1:
        return None
    pads, mode, value = _plainly(given["pad"]), given["mode"], given["value"]
    if len(pads) not in (2, 4) or not all(type(p) is int for p in pads):
        return None
    left, right, top, bottom = (*pads, 0, 0)[:4]
    reads = (
        masks.padded(x.size[1], top, bottom, mode, x.device),
        masks.padded(x.size[2], left, right, mode, x.device),
    )
    return Moved(reads, (out.shape[0], *out.shape[2:]), float(value or 0))


def norm_arguments(step, value_of) -> dict:
    """The weight, bias and eps of a group or instance norm."""
    given = _bound(step, _GROUP if step.name == "group_norm" else _INSTANCE)
    tensors = {k: None if given[k] is None else step.plains[given[k].place] for k in ("weight", "bias")}
    return {**tensors, "eps": given["eps"]}


def _norm(frame, step, out) -> Rule | None:
    given, x = _bound(step, _GROUP if step.name == "group_norm" else _INSTANCE), step.inputs[0]
    if given is None or x.axes not in (NCHW, NCS) or len(step.inputs) != 1:
        return None
    if step.name == "instance_norm" and (given["running_mean"] is not None or not given["use_input_stats"]):
        return None
    groups = given["num_groups"] if step.name == "group_norm" else x.shape[1]
    return Statistics(groups, frame.options.statistics == "kept")


def _attention(frame, step, out) -> Rule | None:
    given = _bound(step, _SDPA)
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


def _tried(frame, step) -> bool:
    """As :func:`_works_pixel_by_pixel`, once for each function with these arguments and sizes."""
    numbers = {v.number: i for i, v in enumerate(step.inputs)}
    renamed = tuple(_renamed(part, numbers) for part in step.key[1:])
    inputs = tuple((v.shape, v.dtype, v.axes, v.size) for v in step.inputs)
    values = tuple(id(v) for v in step.inputs if v.axes is None or v.size != step.size)
    key = step.name, renamed, inputs, values, tuple(map(id, step.plains))
    known = frame.tape.tried
    try:
        found = known.get(key)
    except TypeError:  # an argument without a hash
        return _works_pixel_by_pixel(frame, step)
    if found is None:
        found = known[key] = (_works_pixel_by_pixel(frame, step), step.axes)
    if found[0]:
        step.axes = found[1]
    return found[0]


def _renamed(key, numbers: dict[int, int]):
    """A frozen tree with inputs counted from 0."""
    if type(key) is Ref:
        return Ref(numbers[key.value])
    if type(key) is not tuple or key[0] is None:
        return key
    container, inner = key
    if container is dict:
        return container, tuple((k, _renamed(x, numbers)) for k, x in inner)
    return container, tuple(_renamed(x, numbers) for x in inner)


def _works_pixel_by_pixel(frame, step) -> bool:
    """Tries a function on random maps of the step's sizes: are its rows at a few pixels those of its dense result?"""
    n, h, w = step.size
    maps = {v.number: v for v in step.inputs if v.axes is not None and v.size == step.size}
    if not all(v.dtype.is_floating_point for v in maps.values()):
        return False
    generator = torch.Generator().manual_seed(step.number)
    count = n * h * w
    mask = torch.zeros(count, dtype=torch.bool)
    mask[torch.randperm(count, generator=generator)[: min(_PIXELS_TRIED, count // 2)]] = True
    plan = PixelPlan.from_mask(mask.view(n, h, w).to(next(iter(maps.values())).device))
    context = Context(plan)
    tried = {
        number: torch.randn(v.shape, generator=generator).to(v.device, v.dtype) for number, v in maps.items()
    }

    def sparse(value):
        x = tried.get(value.number)
        return frame.whole(value) if x is None else SparseMap.of_rows(gathered(x, plan, value.axes), plan, context, value.axes)

    try:
        with entered():
            made = pytree.tree_leaves(frame.called(step, sparse))
        if not made or not all(type(x) is SparseMap and x.plan is plan for x in made):
            return False
        rows = [x.rows() for x in made]
        dense = pytree.tree_leaves(
            frame.called(step, lambda v: tried[v.number].clone() if v.number in tried else frame.whole(v))
        )
    except Exception:  # of a function that takes no maps: it runs dense
        return False
    for x, mine, theirs in zip(made, rows, dense, strict=True):
        if tuple(x.shape) != tuple(theirs.shape) or x.dtype != theirs.dtype:
            return False
        expected = gathered(theirs, plan, x.axes)
        if expected is None or expected.shape != mine.shape or not _agree(mine, expected):
            return False
    step.axes = [x.axes for x in made]
    return True


def _agree(a: Tensor, b: Tensor) -> bool:
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    most = _AGREE.get(a.dtype, 0.03)
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a[~finite].nan_to_num(0), b[~finite].nan_to_num(0)):
        return False
    a, b = a[finite].double(), b[finite].double()
    return float((a - b).norm()) <= most * float(b.norm()) + 1e-12
