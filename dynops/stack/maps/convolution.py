"""Convolutions of maps. The norm, the sum and the activation that follow one are computed with it."""

from __future__ import annotations

import contextlib
import functools
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from ... import geometry, modes
from ...geometry import ConvGeometry, pair
from ...ops.epilogue import Epilogue, apply_epilogue
from ...ops.pixels.conv import _pixel_conv, convolve_into
from ...plans import PixelPlan
from .images import each_image
from .layout import NCHW, gathered
from .value import Pending, SparseMap, saved_hooks


class _Mode(NamedTuple):
    """What autograd does at the time of a call."""

    grad: bool
    inference: bool
    hooks: tuple | None  # the innermost hooks of saved tensors, which checkpointing sets and counts calls of

    @contextlib.contextmanager
    def again(self):
        """Inside it the mode is this one, without hooks that came since."""
        others = []
        while (top := saved_hooks()) is not None and top != self.hooks:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            others.append(top)
        try:
            with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad):
                yield
        finally:
            for hooks in reversed(others):
                torch._C._autograd._push_saved_tensors_default_hooks(*hooks)


def _mode() -> _Mode:
    return _Mode(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), saved_hooks())


class Convolution(Pending):
    """A convolution that was not computed yet.

    Its epilogue grows with the functions that follow: a scale and shift, then a residual, then an activation.
    Where the map that it grew from is still in use when it is computed, that one's rows are made first.
    """

    grows = True

    def __init__(
        self, values: Tensor, in_plan: PixelPlan | None, weight, bias, plan: PixelPlan, g: ConvGeometry
    ):
        self.values, self.in_plan, self.weight, self.bias = values, in_plan, weight, bias
        self.plan, self.geometry = plan, g
        self.dtype = values.dtype
        self.scale = self.shift = self.residual = None
        self.activation = ""
        self.grown_from: list[tuple[weakref.ref, Convolution]] = []  # maps, and what these waited for
        self.mode = _mode()

    @property
    def channels(self) -> int:
        g = self.geometry
        return self.weight.shape[1] * g.groups if g.transposed else self.weight.shape[0]

    @property
    def requires_grad(self) -> bool:
        tensors = (self.values, self.weight, self.bias, self.scale, self.shift, self.residual)
        return self.mode.grad and any(t is not None and t.requires_grad for t in tensors)

    def takes(self, what: str) -> bool:
        """True if "norm", "shift", "residual" or "activation" may be added to the epilogue."""
        if self.activation or self.mode != _mode():
            return False
        if what == "norm":
            return self.scale is None and self.shift is None and self.residual is None
        if what == "shift":
            return self.shift is None and self.residual is None
        return self.residual is None if what == "residual" else True

    def grown(self, source: SparseMap, **epilogue) -> SparseMap:
        """The map of this convolution with more of an epilogue."""
        made = Convolution(self.values, self.in_plan, self.weight, self.bias, self.plan, self.geometry)
        made.scale, made.shift = self.scale, self.shift
        made.residual, made.activation = self.residual, self.activation
        made.grown_from = [*self.grown_from, (weakref.ref(source.shown()[-1]), self)]
        for name, value in epilogue.items():
            setattr(made, name, value)
        return SparseMap.of_pending(made, self.plan, source.active, (self.channels,), source.axes)

    def rows(self) -> Tensor:
        if self.mode == _mode():
            return self._computed()
        with self.mode.again():
            return self._computed()

    def _computed(self) -> Tensor:
        for reference, before in reversed(self.grown_from):
            source = reference()
            if source is not None and source.holds(before):
                return self._rest(source.rows(), before)
        epilogue = Epilogue(self.activation, self.scale, self.shift, None, self.residual)
        rest = (epilogue, None, True, None, False)
        return _pixel_conv(self.values, self.weight, self.bias, self.plan, self.in_plan, self.geometry, *rest)

    def into(self, out: Tensor) -> bool:
        """Writes the rows into a channels_last map; False where that cannot be."""
        if self.mode != _mode():
            return False
        for reference, before in self.grown_from:
            source = reference()
            if source is not None and source.holds(before):
                return False
        epilogue = Epilogue(self.activation, self.scale, self.shift, None, self.residual)
        where = self.plan, self.in_plan, self.geometry
        return convolve_into(out, self.values, self.weight, self.bias, *where, epilogue)

    def _rest(self, rows: Tensor, before: Convolution) -> Tensor:
        """The rows, from those of a map that this one grew from, which its model still holds."""
        scale = None if before.scale is not None else self.scale
        shift = None if before.shift is not None else self.shift
        residual = None if before.residual is not None else self.residual
        return apply_epilogue(rows, self.activation, scale, shift, None, residual)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """``F.conv2d`` of a map."""
    if _unfit(input, weight):
        return NotImplemented
    x, pads = input, (0, 0, 0, 0)  # left, right, top, bottom
    if type(x.pending) is Padding:
        pads, x = x.pending.pads, x.pending.base
    margins = x.margins
    kernel = tuple(weight.shape[2:])
    stride, dilation = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    before, after = _paddings(padding, kernel, dilation, pads)
    n, h, w = x.shape[0], x.shape[2], x.shape[3]
    g = _conv_geometry((n, h, w), kernel, stride, before, dilation, groups, after)
    at = g
    if x is not input and x.active.ragged:  # the padding may differ before and after
        own = _paddings(padding, kernel, dilation, (0, 0, 0, 0))
        at = _conv_geometry((n, *input.shape[2:]), kernel, stride, own[0], dilation, groups, own[1])
    if margins is not None:  # the padding is in the map already
        left, right, top, bottom = margins
        at = g._replace(
            in_h=h - top - bottom, in_w=w - left - right, pad_h=top + before[0], pad_w=left + before[1]
        )
    return _convolved(x, weight, bias, g, x.active.after(at, x.device))


def linear(input, weight, bias=None):
    """``F.linear`` of a map whose last dimension is its channels: a 1x1 convolution of its rows."""
    fits = (
        type(input) is SparseMap
        and not input.is_input
        and type(weight) is not SparseMap
        and weight.dim() == 2
    )
    if not fits or input.axes[-1] != "c" or input.axes.count("c") != 1:
        return NotImplemented
    if input.shape[-1] != weight.shape[1]:
        return NotImplemented  # torch has the error
    plan, values, bias = input.plan, *_operands(input.rows(), weight, bias)
    made = Convolution(values, plan, weight[:, :, None, None], bias, plan, plan.pointwise(1))
    return SparseMap.of_pending(made, plan, input.active, (made.channels,), input.axes)


def conv_transpose2d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    """``F.conv_transpose2d`` of a map."""
    if _unfit(input, weight):
        return NotImplemented
    n, _, h, w = input.shape
    sizes = (
        tuple(weight.shape[2:]),
        pair(stride, "stride", 1),
        pair(padding, "padding", 0),
        pair(dilation, "dilation", 1),
    )
    g = geometry.conv_transpose_geometry((n, h, w), *sizes, groups, pair(output_padding, "output_padding", 0))
    return _convolved(input, weight, bias, g, input.active.after(g, input.device))


def _unfit(x, weight) -> bool:
    return type(x) is not SparseMap or x.dim() != 4 or x.axes != NCHW or type(weight) is SparseMap


_kept_geometry = functools.lru_cache(maxsize=512)(geometry.conv_geometry)


def _conv_geometry(*sizes) -> ConvGeometry:
    """The geometry of a convolution, kept where the sizes are no symbols, which have no hash."""
    return geometry.conv_geometry(*sizes) if is_compiling() else _kept_geometry(*sizes)


def _paddings(padding, kernel, dilation, pads) -> tuple[tuple[int, int], tuple[int, int]]:
    left, right, top, bottom = pads
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        before, after = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    elif padding == "valid":
        before = after = (0, 0)
    else:
        before = after = pair(padding, "padding", 0)
    return (before[0] + top, before[1] + left), (after[0] + bottom, after[1] + right)


def _operands(values: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The input and the bias in the dtype that autocast makes of them."""
    autocast = modes.autocast_dtype(values)
    if autocast is not None and values.dtype != torch.float64:
        return values.to(autocast), None if bias is None else bias.to(autocast)
    if values.dtype != weight.dtype:
        raise TypeError(f"input: expected the weight's dtype {weight.dtype}, got {values.dtype}")
    return values, bias


def _convolved(
    x: SparseMap, weight: Tensor, bias: Tensor | None, g: ConvGeometry, plan: PixelPlan
) -> SparseMap:
    channels = weight.shape[0] if g.transposed else weight.shape[1] * g.groups
    if x.shape[1] != channels:
        raise ValueError(f"input: expected {channels} channels, got {x.shape[1]}")
    if x.border is not None:
        values, in_plan = x.border.rows(), x.border.plan
    else:
        values, in_plan = (x.dense(), None) if x.is_input else (x.rows(), x.plan)
    if in_plan is None:
        values = values.contiguous(memory_format=torch.channels_last)
    values, bias = _operands(values, weight, bias)
    out = bare(values, in_plan, weight, bias, plan, g, x.active)
    if in_plan is None:
        out.rows()  # at once: the model may write into its input
    return out


def bare(
    values: Tensor, in_plan: PixelPlan | None, weight, bias, plan: PixelPlan, g: ConvGeometry, active
) -> SparseMap:
    """The map of a convolution of rows, or of a dense map where ``in_plan`` is None, that waits for what follows."""
    made = Convolution(values, in_plan, weight, bias, plan, g)
    return SparseMap.of_pending(made, plan, active, (made.channels,))


class Padding(Pending):
    """A padding that was not computed yet: a convolution reads through it."""

    def __init__(self, base: SparseMap, pads: tuple[int, int, int, int], plan: PixelPlan):
        self.base, self.pads, self.plan, self.dtype = base.like(base.rows()), pads, plan, base.dtype

    def rows(self) -> Tensor:
        return gathered(F.pad(self.base.dense(), self.pads), self.plan, NCHW)


def pad(input, pad, mode="constant", value=None):
    """``F.pad`` of a map: zeros are read through by a convolution; other borders are made on the dense map."""
    if type(input) is SparseMap and not input.is_input and mode == "constant":
        made = _more_channels(input, tuple(pad), value or 0)
        if made is not None:
            return made
    if type(input) is not SparseMap or input.axes != NCHW or len(pad) not in (2, 4) or input.dim() != 4:
        return NotImplemented
    pads = tuple(pad) if len(pad) == 4 else (*pad, 0, 0)
    if not any(pads):
        return input
    x, zeros = input, mode == "constant" and not value
    left, right, top, bottom = pads
    n, c, h, w = x.shape
    g = ConvGeometry(n, h, w, h + top + bottom, w + left + right, 1, 1, 1, 1, top, left, 1, 1, 1, 0)
    if x.active.ragged and not zeros:  # the edge of an image is its own
        return each_image(x, lambda image, _: F.pad(image, pads, mode, value), (g.out_h, g.out_w))
    if not zeros or (x.is_input and not x.active.ragged):
        return _bordered(x, pads, mode, value)
    plan = x.active.after(g, x.device)
    if x.is_input:
        return SparseMap.of_rows(gathered(F.pad(x.dense(), pads), plan, NCHW), plan, x.active)
    if x.plan is not x.active.plan(x.plan.shape, x.device):  # packed rows have pixels of their own
        plan = x.plan._moved_to(F.pad(x.plan.mask(), pads))
    if min(pads) >= 0:
        return SparseMap.of_pending(Padding(x, pads, plan), plan, x.active, (c,))
    # it cuts, and may so move pixels to where the mask is not
    return SparseMap.of_rows(gathered(F.pad(x.dense(), pads), plan, NCHW), plan, x.active)


class Border(NamedTuple):
    """A map with a border of its own pixels, as rows: what a convolution reads of it."""

    base: SparseMap
    index: Tensor  # of its rows
    plan: PixelPlan
    pads: tuple[int, int, int, int]
    mode: str

    def rows(self) -> Tensor:
        return self.base.rows()[self.index]

    def make(self) -> Tensor:
        return F.pad(self.base.dense(), self.pads, self.mode)


def _bordered(x: SparseMap, pads: tuple[int, int, int, int], mode: str, value) -> SparseMap:
    """A map with another border than zeros, or an input: convolutions read all of it."""
    left, right, top, bottom = pads
    size, border = (x.shape[2] + top + bottom, x.shape[3] + left + right), None
    if mode == "constant" or x.is_input or x.plan.count is not None:
        padded = F.pad(x.dense(), pads, mode, value)
    else:
        index, plan = x.plan.derived(("border", pads, mode), lambda: _border_of(x.plan, pads, mode))
        border, padded = Border(x.like(x.rows()), index, plan, pads, mode), None
    made = SparseMap.of_input(padded, x.active) if border is None else SparseMap.of_border(border, size, x)
    made.margins = tuple(a + b for a, b in zip(x.margins or (0, 0, 0, 0), pads, strict=True))
    return made


def _border_of(plan: PixelPlan, pads: tuple[int, int, int, int], mode: str) -> tuple[Tensor, PixelPlan]:
    """The rows of a map with a border, and their plan."""
    left, right, top, bottom = pads

    def positions(size: int, before: int, after: int) -> Tensor:
        own = torch.arange(size, dtype=torch.float64, device=plan.device)
        return F.pad(own[None, None], (before, after), mode)[0, 0].long()

    rows, columns = positions(plan.shape[1], top, bottom), positions(plan.shape[2], left, right)
    index = plan.inverse()[:, rows][:, :, columns]
    return index[index >= 0].long(), PixelPlan.from_mask(index >= 0)


def _more_channels(x: SparseMap, pads: tuple[int, ...], value: float) -> SparseMap | None:
    """A map whose channels alone are padded; None for any other padding."""
    by_dim = {x.dim() - 1 - i // 2: pads[i : i + 2] for i in range(0, len(pads), 2)}
    if not any(pads) or any(any(pair) and x.axes[d] != "c" for d, pair in by_dim.items()):
        return None
    channels = [d for d, axis in enumerate(x.axes) if axis == "c"]
    of_rows = [size for d in reversed(channels) for size in by_dim.get(d, (0, 0))]
    return x.like(F.pad(x.rows(), of_rows, value=value))
