"""Functions of maps that work pixel by pixel, and those over the channels or all pixels of a sample."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.epilogue import apply_epilogue
from ..layers.norm import group_norm_rows
from ..layers.pool import over_pixels, pixels_of_samples
from ..norm import check_features, fold, fold_of, norm_rows, uses_batch_statistics
from . import layout
from .convolution import Convolution
from .layout import NCHW
from .value import SparseMap, dense_tree, masked


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# by the names of functions: each makes an output pixel of the input's at its own place
ELEMENTWISE = words("""
relu relu6 hardtanh silu hardswish hardsigmoid gelu mish elu selu celu leaky_relu rrelu sigmoid tanh
softplus softsign logsigmoid threshold hardshrink softshrink tanhshrink abs neg exp expm1 log log1p
log2 sqrt rsqrt square reciprocal sin cos erf floor ceil round trunc frac sign clamp clamp_min
clamp_max clip nan_to_num pow add sub subtract rsub __rsub__ mul multiply div divide true_divide
__rdiv__ __rtruediv__ __rpow__ maximum minimum fmod remainder lerp addcmul addcdiv atan2 eq ne lt le
gt ge logical_and logical_or logical_not logical_xor where isnan isfinite isinf type_as float half
bfloat16 double to detach clone dropout alpha_dropout masked_fill
""")
_ACTIVATIONS = {"relu": "relu", "relu6": "relu6", "silu": "silu", "hardswish": "hardswish", "gelu": "gelu"}


def elementwise(func, name: str, args: tuple, kwargs: dict):
    """A function that works element by element, of maps, tensors that broadcast with them, and numbers."""
    base = _largest([*args, *kwargs.values()])
    if base is None:
        return _of_inputs(func, name, args, kwargs)
    kwargs = {k: v for k, v in kwargs.items() if k != "memory_format"}  # rows have one
    operands = [*args, *kwargs.values()]
    inplace = _writes(name, kwargs)
    if inplace and type(args[0]) is not SparseMap:
        return _into_dense(func, args, kwargs, base)
    grown = _grown(base, name.removesuffix("_"), args, kwargs)
    if grown is None:
        values = [_operand(x, base) for x in operands]
        if any(v is NotImplemented for v in values):
            return NotImplemented
        if inplace:
            values[0] = values[0].clone()
        named = dict(zip(kwargs, values[len(args) :], strict=True))
        rows = func(*values[: len(args)], **named)
        if not isinstance(rows, Tensor) or rows.dim() == 0 or rows.shape[0] != base.plan.num_rows:
            return NotImplemented
        grown = base.like(rows)
    if not inplace:
        return grown
    args[0].exchange(grown)
    return args[0]


def _largest(operands) -> SparseMap | None:
    """The map whose pixels the result has: one of [N, C, 1, 1] is spread over another."""
    base = None
    for x in operands:
        if (
            type(x) is SparseMap
            and x.plan is not None
            and (base is None or x.plan.num_pixels > base.plan.num_pixels)
        ):
            base = x
    return base


def _writes(name: str, kwargs: dict) -> bool:
    return bool(kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))


def _operand(x, base: SparseMap):
    """An operand for the rows of ``base``; NotImplemented where it does not fit."""
    if type(x) is SparseMap:
        found = x.at(base.plan, base.axes)
    elif isinstance(x, Tensor):
        found = layout.gathered(x, base.plan, base.axes)
    else:
        return x
    return NotImplemented if found is None else found


def _of_inputs(func, name: str, args: tuple, kwargs: dict):
    """A function of inputs alone: dense, and an input again."""
    first = next(x for x in (*args, *kwargs.values()) if type(x) is SparseMap)
    dense = dense_tree(args)
    out = func(*dense, **dense_tree(kwargs))
    if type(args[0]) is SparseMap and out is dense[0]:
        return args[0]
    if not isinstance(out, Tensor) or out.shape != first.shape:
        return out
    made = SparseMap.of_input(out, first.active)
    made.margins = first.margins
    return made


def _into_dense(func, args: tuple, kwargs: dict, base: SparseMap):
    """A function that writes a map into a dense tensor: what it writes is zero outside of the map's pixels."""
    dense = [x.dense() if type(x) is SparseMap else x for x in args]
    out = func(*dense, **kwargs)
    if out.shape == base.shape:
        with torch.no_grad():
            out.copy_(masked(out, base.plan, base.axes))
    return out


def _grown(base: SparseMap, name: str, args: tuple, kwargs: dict) -> SparseMap | None:
    """The map with the function in the epilogue of the convolution that makes it, or None."""
    pending, binary = base.convolution(), len(args) == 2 and not kwargs
    if name == "add" and binary and type(args[0]) is type(args[1]):
        return _sum(*args)
    if pending is None:
        return None
    if name in ("add", "mul", "multiply") and binary:
        return _of_channels(base, pending, name, args[1] if args[0] is base else args[0])
    options = {k: v for k, v in kwargs.items() if k != "inplace" and v != "none"}
    if name not in _ACTIVATIONS or args != (base,):
        return None
    activation = _ACTIVATIONS[name]
    if options == {"approximate": "tanh"}:
        activation, options = "gelu_tanh", {}
    return pending.grown(base, activation=activation) if not options and pending.takes("activation") else None


def _of_channels(base: SparseMap, pending: Convolution, name: str, other) -> SparseMap | None:
    """A convolution times or plus one number for each channel, as a frozen norm writes it, or None for another one."""
    if type(other) is SparseMap or not isinstance(other, Tensor) or other.dtype != base.dtype:
        return None
    numbers, what = layout.gathered(other, base.plan, base.axes), "shift" if name == "add" else "norm"
    if numbers is None or tuple(numbers.shape) != (pending.channels,) or not pending.takes(what):
        return None
    return pending.grown(base, **{"shift" if name == "add" else "scale": numbers})


def _sum(a, b) -> SparseMap | None:
    """The sum of two maps of the same pixels in the epilogue of the later of their convolutions, or None."""
    maps = type(a) is type(b) is SparseMap and a.axes == b.axes and a.plan is b.plan and a is not b
    if not maps or a.shape != b.shape or a.dtype != b.dtype or a.plan is None:
        return None
    for one, other in ((a, b), (b, a)):
        pending = one.convolution()
        if pending is not None and pending.takes("residual"):
            return pending.grown(one, residual=other.rows())
    return None


def batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    """``F.batch_norm`` of a map: in training with the statistics of its pixels."""
    if type(input) is not SparseMap or input.axes != NCHW:
        return NotImplemented
    x = masked_input(input)
    enough = x.plan.num_rows > 1
    if training and x.plan.count is None and (enough or running_mean is None):
        rows = x.rows()
        if not enough:
            return x.like(apply_epilogue(rows * 0, "", None, bias, None, None))
        return x.like(F.batch_norm(rows, running_mean, running_var, weight, bias, True, momentum, eps))
    if training and x.plan.count is not None:
        return NotImplemented
    return affine(x, *fold_of(eps, weight, bias, running_mean, running_var))


def affine(x: SparseMap, scale: Tensor, shift: Tensor) -> SparseMap:
    """``scale * x + shift`` for each channel."""
    pending = x.convolution()
    if pending is not None and pending.takes("norm"):
        return pending.grown(x, scale=scale, shift=shift)
    return x.like(apply_epilogue(x.rows(), "", scale, shift, None, None))


def normed(norm: nn.Module, x: SparseMap) -> SparseMap:
    """A converted norm of a map, or of an input's pixels under the mask."""
    x = masked_input(x)
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return x.like(group_norm_rows(norm, x.rows(), x.plan))
    check_features(norm, x.shape[1])
    if uses_batch_statistics(norm):
        return x.like(norm_rows(norm, x.rows(), x.plan))
    return affine(x, *fold(norm))


def masked_input(x: SparseMap) -> SparseMap:
    """A map as it is; of an input its pixels under the mask."""
    if not x.is_input:
        return x
    plan = x.active.plan((x.shape[0], *x.shape[2:]), x.device)
    return SparseMap.of_rows(layout.gathered(x.dense(), plan, NCHW), plan, x.active)


def over_channels(func, input, *args, **kwargs):
    """A function over the last dimensions, where these are channels: layer_norm, rms_norm."""
    maps = (*args, *kwargs.values())
    if type(input) is not SparseMap or input.is_input or any(type(x) is SparseMap for x in maps):
        return NotImplemented
    rows, axes = input.rows(), input.axes
    over = len(args[0])
    if axes[-over:] != ("c",) * over:
        return NotImplemented
    return input.like(func(rows, *args, **kwargs))


def softmax(func, input, dim=None, *args, **kwargs):
    """softmax and log_softmax over channels."""
    if type(input) is not SparseMap or input.is_input or not isinstance(dim, int):
        return NotImplemented
    axis = layout.channel_axis(input.axes, dim % input.dim())
    return NotImplemented if axis is None else input.like(func(input.rows(), axis, *args, **kwargs))


def prelu(input, weight):
    if type(input) is not SparseMap or input.is_input or input.axes != NCHW:
        return NotImplemented
    return input.like(F.prelu(input.rows(), weight))


# -------------------------------------------------------------------------------- reductions


def reduced(func, name: str, args: tuple, kwargs: dict):
    """mean, sum, amax, amin or a 2-norm: over channels a map; over each sample's pixels, and channels, over the mask."""
    x, given = args[0], dict(kwargs)
    if type(x) is not SparseMap or x.is_input:
        return NotImplemented
    rest = list(args[1:])
    if name in ("norm", "vector_norm"):
        order = rest.pop(0) if rest else given.pop("p", given.pop("ord", 2))
        if order not in (2, 2.0, "fro"):
            return NotImplemented
    dims = rest.pop(0) if rest else given.pop("dim", given.pop("axis", None))
    keepdim = rest.pop(0) if rest else given.pop("keepdim", given.pop("keepdims", False))
    dtype = given.pop("dtype", None)
    if rest or dims is None or any(v is not None for v in given.values()):
        return NotImplemented
    dims = layout.normalized(dims, x.dim())
    if not dims:
        return NotImplemented
    letters = {x.axes[d] for d in dims}
    x = x if dtype is None else x.like(x.rows().to(dtype))
    if letters == {"c"}:
        return _over_channels(func, name, x, dims, keepdim)
    if not _holds_pixels(x, letters):
        return NotImplemented
    if "c" in letters:
        x = _over_channels(func, name, x, tuple(d for d in dims if x.axes[d] == "c"), True)
    return _over_pixels(name, x, dims, keepdim)


def _holds_pixels(x: SparseMap, letters: set[str]) -> bool:
    """True for axes that are all of a sample's pixels, with channels or without."""
    return letters - {"c"} in ({"h", "w"}, {"s"}) and x.axes[0] == "n"


def _over_channels(func, name: str, x: SparseMap, dims: tuple[int, ...], keepdim: bool) -> SparseMap:
    rows, over = x.rows(), tuple(layout.channel_axis(x.axes, d) for d in dims)
    order = (2,) if name in ("norm", "vector_norm") else ()
    made = func(rows, *order, dim=over, keepdim=keepdim)
    axes = x.axes if keepdim else tuple(a for i, a in enumerate(x.axes) if i not in dims)
    return SparseMap.of_rows(made, x.plan, x.active, axes)


def spread(func, input, dim=None, *args, **kwargs):
    """var and std over channels; over each sample's pixels, and channels, over the mask."""
    if type(input) is not SparseMap or input.is_input or dim is None:
        return NotImplemented
    dims = layout.normalized(dim, input.dim())
    named = ("unbiased", "keepdim")
    kwargs = {**dict(zip(named, args, strict=False)), **kwargs}
    letters = {input.axes[d] for d in dims or ()}
    if not kwargs.keys() <= {*named, "correction"}:
        return NotImplemented
    if _holds_pixels(input, letters):
        correction = kwargs.get("correction", 1.0 if kwargs.get("unbiased", True) else 0.0)
        made = _variance(input, dims, 1.0 if correction is None else float(correction), kwargs.get("keepdim"))
        return made if func in (torch.var, Tensor.var) else made.sqrt()
    if letters != {"c"}:
        return NotImplemented
    made = func(input.rows(), dim=tuple(layout.channel_axis(input.axes, d) for d in dims), **kwargs)
    axes = (
        input.axes if kwargs.get("keepdim") else tuple(a for d, a in enumerate(input.axes) if d not in dims)
    )
    return SparseMap.of_rows(made, input.plan, input.active, axes)


def _variance(x: SparseMap, dims: tuple[int, ...], correction: float, keepdim) -> Tensor:
    """Of each sample's pixels, in two passes; 0 of none."""
    mean = reduced(torch.mean, "mean", (x, dims, True), {})
    width = math.prod(x.shape[d] for d in dims if x.axes[d] == "c")
    squares = x.like((x.rows() - layout.gathered(mean, x.plan, x.axes)).square())
    sums = reduced(torch.sum, "sum", (squares, dims, bool(keepdim)), {})
    count = (pixels_of_samples(x.plan) * width).to(sums.dtype)
    count = count.reshape(-1, *(1,) * (sums.dim() - 1))
    return torch.where(count == 0, 0, sums / (count - correction).clamp(min=0))


def _over_pixels(name: str, x: SparseMap, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    rows = x.rows()
    channels = rows.flatten(1) if rows.dim() > 1 else rows[:, None]
    made = over_pixels("norm" if name == "vector_norm" else name, channels, x.plan)
    left = iter(rows.shape[1:])  # of channels that were reduced 1
    sizes = [made.shape[0] if a == "n" else next(left) if a == "c" else 1 for a in x.axes]
    return made.reshape([size for i, size in enumerate(sizes) if keepdim or i not in dims])
