"""Argument checks of the public functions: a misfit raises before a kernel sees it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import geometry, modes
from ..geometry import ConvGeometry, pair
from ..plans import PixelPlan
from .epilogue import ACTIVATIONS, Epilogue

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def tensor(value, name: str, dims: int, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {what}, got {type(value).__name__}")
    if value.dim() != dims:
        raise ValueError(f"{name}: expected {what}, got shape {tuple(value.shape)}")
    return value


def same(value: Tensor, name: str, x: Tensor, x_name: str = "x", dtype: bool = True) -> None:
    if value.device != x.device:
        raise ValueError(f"{name}: expected it on {x_name}'s device {x.device}, got {value.device}")
    if dtype and value.dtype != x.dtype:
        raise TypeError(f"{name}: expected {x_name}'s dtype {x.dtype}, got {value.dtype}")


def floating(x: Tensor, name: str = "x") -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")


def shaped(value: Tensor, name: str, expected: tuple, why: str = "", what: str = "shape ") -> None:
    if value.shape != expected:
        raise ValueError(f"{name}: expected {what}{tuple(expected)}{why}, got {tuple(value.shape)}")


def activation(name: str | None, known=tuple(ACTIVATIONS)) -> str:
    """The name that ops know an activation by; None is ""."""
    if name is not None and (not isinstance(name, str) or name not in known):
        raise ValueError(f"activation: expected None or one of {tuple(known)[1:]}, got {name!r}")
    return name or ""


def plan(value, kind: type, name: str, device: torch.device | None = None, made_by: str = "from_mask"):
    """``value`` is a plan of this kind, on the device of x if that is given."""
    if not isinstance(value, kind):
        expected = f"{kind.__name__} ({kind.__name__}.{made_by})"
        article = "an" if expected[0] == "E" else "a"
        raise TypeError(f"{name}: expected {article} {expected}, got {type(value).__name__}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected it on x's device {device}, got {value.device}")
    return value


def on_plan(value: Tensor, plan, name: str) -> None:
    """``value`` lies on the plan's device."""
    if value.device != plan.device:
        raise ValueError(f"{name}: expected it on the plan's device {plan.device}, got {value.device}")


def pixel_plan(value, name: str, device: torch.device | None = None) -> PixelPlan:
    if isinstance(value, PixelPlan) and (device is None or value.index.device == device):
        return value  # the shortest way: it takes part in every call
    return plan(value, PixelPlan, name, device)


def dense_map(x, plan, name: str, channels: int | None = None, dtype=None) -> None:
    """``x`` is ``[N, C, H, W]`` at the plan's resolution."""
    n, h, w = plan.shape
    tensor(x, name, 4, "[N, C, H, W]")
    shaped(x, name, (n, x.shape[1] if channels is None else channels, h, w), ", as the plan has it")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {x.dtype}")
    on_plan(x, plan, name)


def packed_rows(rows, plan: PixelPlan, name: str, channels: int | None = None) -> None:
    """``rows`` is ``[plan.num_rows, C]``."""
    tensor(rows, name, 2, "packed rows [P, C]")
    if rows.shape[0] != plan.num_rows or (channels is not None and rows.shape[1] != channels):
        expected = (plan.num_rows, "C" if channels is None else channels)
        raise ValueError(f"{name}: expected packed rows {expected}, got shape {tuple(rows.shape)}")
    on_plan(rows, plan, name)


# Types, shapes, dtypes and devices that passed before: the checks take 12 us, this look-up 3.
_passed: set = set()


def _inputs(x, weight, bias, plan, in_plan: PixelPlan | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Types, ranks, devices and dtypes; autocast as the dense layer has it."""
    try:
        if torch.compiler.is_compiling() or modes.autocast_dtype(x) is not None:
            return _checked_inputs(x, weight, bias, plan, in_plan)
        own = (type(x), x.shape, x.dtype, x.device, type(weight), weight.shape, weight.dtype, weight.device)
        third = None if bias is None else (type(bias), bias.shape, bias.dtype, bias.device)
        inputs = None if in_plan is None else (type(in_plan), in_plan.index.shape, in_plan.index.device)
        known = own, third, type(plan), plan.index.device, inputs
        if known in _passed:
            return x, weight, bias
    except (AttributeError, TypeError):  # something that is no tensor; sizes that are symbols
        return _checked_inputs(x, weight, bias, plan, in_plan)
    checked = _checked_inputs(x, weight, bias, plan, in_plan)
    if len(_passed) >= _MAX_GEOMETRIES:
        _passed.clear()
    _passed.add(known)
    return checked


def _checked_inputs(x, weight, bias, plan, in_plan: PixelPlan | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if in_plan is None:
        tensor(x, "x", 4, "[N, C, H, W]")
    else:
        tensor(x, "x", 2, "packed rows [P, C]")
        pixel_plan(in_plan, "in_plan", x.device)
        packed_rows(x, in_plan, "x")
    pixel_plan(plan, "plan", x.device)
    return conv_tensors(x, weight, bias)


def conv_tensors(x: Tensor, weight, bias) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks the tensors of a convolution of ``x``, and casts them where autocast does."""
    tensor(weight, "weight", 4, "[out, in, kh, kw]")
    if min(weight.shape[2:]) < 1:
        raise ValueError(f"weight: expected a kernel of at least 1x1, got shape {tuple(weight.shape)}")
    floating(x)
    dtype = modes.autocast_dtype(x)
    autocast = dtype is not None
    if autocast:
        x = x.to(dtype)  # the weight where it is packed: a cast one would be packed again at every call
        bias = None if bias is None else bias.to(dtype)
    same(weight, "weight", x, dtype=not autocast)
    if bias is not None:
        tensor(bias, "bias", 1, "[out]")
        same(bias, "bias", x)
    return x, weight, bias


def _channels(in_shape, weight_shape, channels: int, groups: int, transposed: bool) -> None:
    """The channels of x, weight and groups agree; ``channels`` is the weight's inputs (of one group)."""
    if not isinstance(groups, int) or groups < 1 or in_shape[1] % groups or weight_shape[0] % groups:
        out = weight_shape[1] if transposed else weight_shape[0]
        raise ValueError(
            f"groups: expected a divisor of the {in_shape[1]} input and {out} output channels, got {groups}"
        )
    expected = channels if transposed else channels * groups
    if in_shape[1] != expected:
        raise ValueError(
            f"x: expected {expected} channels, as weight {tuple(weight_shape)} with groups={groups} has them, "
            f"got {in_shape[1]}, [N, C, H, W] = {tuple(in_shape)}"
        )


def _same_padding(kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]):
    """(before, after) paddings of padding='same' in y and x; the odd one goes after, as in torch."""
    if stride != (1, 1):
        raise ValueError(f"padding: 'same' expects stride 1, got stride {stride}")
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return [(t // 2, t - t // 2) for t in total]


def _fits(plan_shape, g: ConvGeometry) -> None:
    if plan_shape is not None and plan_shape != g.out_shape:
        raise ValueError(
            f"plan: expected one for the output's [N, H, W] = {g.out_shape}, got one for {plan_shape}"
        )


def _fits_padding_mode(in_shape, pads: list[tuple[int, int]], mode: str) -> None:
    for size, pad in zip(in_shape[2:], pads, strict=True):
        if (mode == "reflect" and max(pad) >= size) or (mode == "circular" and max(pad) > size):
            raise ValueError(
                f"padding: expected less than the input's size for mode {mode!r}, got {pads} for {tuple(in_shape)}"
            )


# Geometries that were checked before, by everything that they follow from: a check takes 4 us, a look-up
# 0.4. Emptied when it is full, so that ever new sizes do not gather.
_geometries: dict = {}
_MAX_GEOMETRIES = 4096


def _geometry(compute, in_shape, weight_shape, out_shape, options: tuple):
    """``compute`` of the other arguments, remembered (not while compiling, where sizes may be symbols)."""
    arguments = in_shape, weight_shape, out_shape, options
    if torch.compiler.is_compiling():
        return compute(*arguments)
    key = compute, arguments, *map(type, options)  # 2.0 == 2
    try:
        found = _geometries.get(key)
    except TypeError:  # a list among the arguments
        return compute(*arguments)
    if found is None:
        if len(_geometries) >= _MAX_GEOMETRIES:
            _geometries.clear()
        found = _geometries[key] = compute(*arguments)
    return found


def _conv_geometry(in_shape, weight_shape, out_shape, options: tuple):
    """The geometry of a convolution of ``in_shape`` [N, C, H, W], and the paddings that ``F.pad`` adds first."""
    stride, padding, dilation, groups, padding_mode = options
    kernel = tuple(weight_shape[2:])
    stride, dilation = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    _channels(in_shape, weight_shape, weight_shape[1], groups, False)
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode: expected one of {PADDING_MODES}, got {padding_mode!r}")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding: expected ints, 'same' or 'valid', got {padding!r}")
        pads = _same_padding(kernel, stride, dilation) if padding == "same" else [(0, 0), (0, 0)]
    else:
        pads = [(p, p) for p in pair(padding, "padding", 0)]
    batch, *in_size = in_shape[0], *in_shape[2:]
    fill = None
    if padding_mode != "zeros" and pads != [(0, 0), (0, 0)]:
        _fits_padding_mode(in_shape, pads, padding_mode)
        fill, in_size = (
            (*pads[1], *pads[0]),
            [size + sum(pad) for size, pad in zip(in_size, pads, strict=True)],
        )
        pads = [(0, 0), (0, 0)]
    before, after = zip(*pads, strict=True)
    g = geometry.conv_geometry((batch, *in_size), kernel, stride, before, dilation, groups, after)
    _fits(out_shape, g)
    return g, fill


def _conv_transpose_geometry(in_shape, weight_shape, out_shape, options: tuple):
    """The geometry of a transposed convolution of ``in_shape`` [N, C, H, W]; nothing is padded first."""
    stride, padding, dilation, groups, output_padding = options
    kernel = tuple(weight_shape[2:])
    stride, dilation = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    padding, output_padding = pair(padding, "padding", 0), pair(output_padding, "output_padding", 0)
    _channels(in_shape, weight_shape, weight_shape[0], groups, True)
    if any(output_padding[i] >= max(stride[i], dilation[i]) for i in (0, 1)):
        raise ValueError(
            f"output_padding: expected it smaller than stride {stride} or dilation {dilation}, got {output_padding}"
        )
    in_shape = (in_shape[0], *in_shape[2:])
    g = geometry.conv_transpose_geometry(in_shape, kernel, stride, padding, dilation, groups, output_padding)
    _fits(out_shape, g)
    return g, None


def conv_arguments(x, weight, bias, plan, options: tuple, in_plan=None, transposed: bool = False):
    """Checks a convolution's arguments. Returns x (padded where the mode needs it), weight, bias, geometry.

    Args:
        options: (stride, padding, dilation, groups, padding_mode), transposed output_padding in its place.
    """
    x, weight, bias = _inputs(x, weight, bias, plan, in_plan)
    in_shape = x.shape if in_plan is None else (in_plan.shape[0], x.shape[1], *in_plan.shape[1:])
    compute = _conv_transpose_geometry if transposed else _conv_geometry
    g, fill = _geometry(compute, in_shape, weight.shape, plan.shape, options)
    if bias is not None:
        shaped(bias, "bias", (weight.shape[1] * g.groups if transposed else weight.shape[0],))
    return (x if fill is None else F.pad(x, fill, mode=options[-1])), weight, bias, g


def conv_geometry(in_shape, weight_shape, options: tuple, bias: Tensor | None = None):
    """The geometry of a convolution of every pixel of ``in_shape`` [N, C, H, W], and the paddings of ``F.pad``."""
    if bias is not None:
        shaped(bias, "bias", (weight_shape[0],))
    return _geometry(_conv_geometry, in_shape, weight_shape, None, options)


_BARE = {name: Epilogue(name) for name in ACTIVATIONS}


def epilogue(plan, x, channels, name, scale, shift, gate, residual, base) -> Epilogue:
    """Checks the parts of an epilogue; ``name``: of the activation. The gate becomes ``[P]``.

    The residual is ``[P, O]`` or ``[N, O, H, W]``.
    """
    if scale is None and shift is None and gate is None and residual is None and base is None:
        return _BARE[activation(name)]
    for value, of in ((scale, "scale"), (shift, "shift")):
        if value is not None:
            shaped(tensor(value, of, 1, "[O]"), of, (channels,))
            same(value, of, x, dtype=False)
    if gate is not None:
        gate = _gate_rows(gate, plan)
    if residual is not None:
        residual = residual.to(x.dtype) if isinstance(residual, Tensor) else residual
        if isinstance(residual, Tensor) and residual.dim() != 2:
            dense_map(residual, plan, "residual", channels=channels)
        else:
            packed_rows(residual, plan, "residual", channels=channels)
    if base is not None:
        autocast = modes.autocast_dtype(x) is not None  # which casts the base, as it does x
        dense_map(base, plan, "base", channels=channels, dtype=None if autocast else x.dtype)
    return Epilogue(activation(name), scale, shift, gate, residual)


def _gate_rows(gate, plan: PixelPlan) -> Tensor:
    """A gate ``[P]``, ``[N, H, W]`` or ``[N, 1, H, W]`` as ``[P]``."""
    if not isinstance(gate, Tensor):
        raise TypeError(f"gate: expected a tensor, got {type(gate).__name__}")
    n, h, w = plan.shape
    if tuple(gate.shape) not in ((plan.num_rows,), (n, h, w), (n, 1, h, w)):
        raise ValueError(
            f"gate: expected [N, H, W], [N, 1, H, W] or packed [{plan.num_rows}] for {plan.shape}, "
            f"got shape {tuple(gate.shape)}"
        )
    on_plan(gate, plan, "gate")
    if gate.dim() == 1:
        return gate
    gate = gate[:, None] if gate.dim() == 3 else gate
    return torch.ops.dynops.gather_rows(gate, plan.index, plan.count)[:, 0]
