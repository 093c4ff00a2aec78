"""Layers whose output pixels each stand for one place of the input: enlarging by whole factors, shuffling, padding."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...geometry import BlockGeometry, ConvGeometry, enlarged_geometry
from ...kernels.cpu.prepared import StepKind
from ...plans import PixelPlan
from ..receptive_field import Enlarged, Window
from ..trace import Step, dense_type
from .base import Layer, Rows, spans_of


class Padded(NamedTuple):
    """Rows with zeros around their map, which convolutions read through. ``geometry``: of the padding."""

    inner: Rows
    plan: PixelPlan
    geometry: ConvGeometry

    def rows(self) -> Rows:
        return Rows(rows_at(self.inner, _source(self.plan, self.geometry)), self.plan)


def through(pad: ConvGeometry, g: ConvGeometry) -> ConvGeometry:
    """The geometry, on the map inside of a padding, of a convolution that reads the padded one."""
    shift = (-pad.pad_h * g.stride_h, -pad.pad_w * g.stride_w) if g.transposed else (pad.pad_h, pad.pad_w)
    return g._replace(in_h=pad.in_h, in_w=pad.in_w, pad_h=g.pad_h + shift[0], pad_w=g.pad_w + shift[1])


def rows_at(rows: Rows, index: Tensor) -> Tensor:
    """The rows of a map at flat positions, int64 ``[P]``; zero at -1 and where it has none."""
    at = rows.plan.inverse().reshape(-1)[index.clamp(min=0)].long()
    return picked(rows.values, torch.where(index < 0, -1, at))


def picked(rows: Tensor, at: Tensor) -> Tensor:
    """Rows by their numbers, int64 ``[P]``; zero at -1."""
    if rows.shape[0] == 0:
        return F.pad(rows, (0, 0, 0, at.shape[0]))  # zeros that keep the gradient's way
    return torch.where((at >= 0)[:, None], rows[at.clamp(min=0)], 0)


MAX_FACTOR = 40  # from 41 on torch's float32 index of "nearest" is off by one


class Resizing(NamedTuple):
    """A resizing that the kernels of rows make: nearest by whole factors, or bilinear.

    Attributes:
        geometry: its sizes, and its factors where they are whole.
        moves: brings the mask to the output's size; None: the ratio of sizes does.
        linear: (align_corners, factor of height, of width), the factors None where sizes say them; None: nearest.
    """

    kind: StepKind
    geometry: ConvGeometry
    moves: ConvGeometry | None
    linear: tuple[bool, float | None, float | None] | None


def resizing(
    shape, size=None, scale_factor=None, mode="nearest", align_corners=None,
    recompute_scale_factor=None, antialias=False,
) -> Resizing | None:  # fmt: skip
    """What ``F.interpolate`` does to a map of ``shape = (N, H, W)``; None where rows cannot."""
    if antialias or mode not in ("nearest", "bilinear") or min(shape) < 1:
        return None
    if mode == "nearest" and align_corners is not None:  # which torch refuses
        return None
    size, scale_factor = (tuple(v) if isinstance(v, (tuple, list)) else v for v in (size, scale_factor))
    return _resizing(shape, size, scale_factor, mode, bool(align_corners), bool(recompute_scale_factor))


@functools.lru_cache(maxsize=256)
def _resizing(shape, size, scale_factor, mode, align_corners, recompute_scale_factor) -> Resizing | None:
    n, h, w = shape
    # "nearest": torch takes 5 ms for the size alone where it is bilinear
    out = F.interpolate(torch.empty(1, 1, h, w, device="meta"), size, scale_factor).shape[2:]
    moves = enlarged_geometry((n, h, w), (n, *out))
    if mode == "nearest":
        whole = moves is not None and max(moves.stride_h, moves.stride_w) <= MAX_FACTOR
        return Resizing(StepKind.NEAREST, moves, moves, None) if whole else None
    factors = (None, None)
    if scale_factor is not None and not recompute_scale_factor:
        given = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor, scale_factor)
        factors = tuple(float(f) for f in given)
    sizes = ConvGeometry(n, h, w, *out, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0)
    return Resizing(StepKind.BILINEAR, sizes, moves, (align_corners, *factors))


class _Moved(Layer):
    """A layer whose output pixels read one input pixel each, or, outside the input, zero: ``reaches`` says which."""

    packs = True
    feeds_convs = False  # of zeros around a map: every reader is a convolution, which reads through it

    def __init__(self, name: str, step: Step, layer: nn.Module, reach=None):
        super().__init__(name, step.inputs, step.out, None if reach is None else (reach,))
        self.layer, self.converted = layer, step.kind == "layer"
        self.masked = step.kind in ("layer", "function")  # the third is a module that stays dense
        self.forward = dense_type(layer).forward

    def geometry(self, in_shape: tuple[int, int, int]) -> ConvGeometry:
        n, *size = in_shape
        out = tuple(reach.out_size(size[i]) for i, reach in enumerate(self.reaches[0]))
        y, x = self.reaches[0]
        if isinstance(y, Enlarged):  # input i writes the outputs from i * factor on
            factors = (y.factor, x.factor)
            return ConvGeometry(n, *size, *out, *factors, *factors, 0, 0, 1, 1, 1, 1)
        return ConvGeometry(n, *size, *out, 1, 1, 1, 1, y.before, x.before, 1, 1, 1, 0)

    def rows(self, run):
        x = self.inputs[0]
        # Convolutions read through zeros. Each size has one mask, and another padding may have made this one's.
        through = self.feeds_convs and self.masked and self.packs and run.rows_of(x) is not None
        if run.policy.zero_outside and not self.converted and not through:
            return self.recorded.rows(run)
        if not self.packs or (run.rows_of(x) is None and run.dense(x).dim() != 4):
            if run.dense(x).dim() == 4:
                if run.maps and (run.policy.active.ragged or type(self) is Upsample):
                    # functions of maps know the edges of each image, and rows
                    return self.forward(self.layer, run.map(x))
                return run.masked(self.layer, x)
            return self.forward(self.layer, run.dense(x))
        g = self.geometry(run.shape(x))
        plan = run.policy.plan(self.out, g.out_shape, run.device(x), g)
        return self._moved(run, x, plan, g)

    def _moved(self, run, x: int, plan: PixelPlan, g: ConvGeometry):
        return Rows(self._of_rows(run.read_at(x, _source(plan, g)), plan, g), plan)

    def whole(self, inputs: list[Tensor]) -> Tensor:
        return self.forward(self.layer, inputs[0])

    def _of_rows(self, rows: Tensor, plan: PixelPlan, g: ConvGeometry) -> Tensor:
        """The output's rows, of those of the input pixel that each reads."""
        return rows


def _source(plan: PixelPlan, g: ConvGeometry) -> Tensor:
    """int64 ``[P]``: the flat position of the input pixel that each pixel of a plan reads, or -1."""
    n, y, x = _coordinates(plan)
    y, x = (y // g.stride_h, x // g.stride_w) if g.transposed else (y - g.pad_h, x - g.pad_w)
    inside = (y >= 0) & (y < g.in_h) & (x >= 0) & (x < g.in_w) & (plan.index >= 0)
    return torch.where(inside, (n * g.in_h + y) * g.in_w + x, -1)


def _coordinates(plan: PixelPlan) -> tuple[Tensor, Tensor, Tensor]:
    """n, y and x of each row of a plan."""
    _, h, w = plan.shape
    index = plan.index.long().clamp(min=0)
    line = index // w
    return line // h, line % h, index % w


class Upsample(_Moved):
    """Nearest or bilinear interpolation (align_corners=False) by integer factors. Bilinear does not run on rows."""

    def __init__(self, name: str, step: Step, layer: nn.Upsample):
        factors = layer.scale_factor
        factors = tuple(factors) if isinstance(factors, (tuple, list)) else (factors, factors)
        self.mode, reach = layer.mode, None
        if layer.size is not None or not all(_is_whole(f) for f in factors):
            self.refusal = f"{name}: expected integer scale factors up to {MAX_FACTOR}, got {layer}"
        elif self.mode not in ("nearest", "bilinear") or layer.align_corners:
            self.refusal = f"{name}: expected mode nearest or bilinear (align_corners=False), got {layer}"
        else:
            self.factors = tuple(int(f) for f in factors)
            reach = tuple(Enlarged(f, self.mode == "bilinear") for f in self.factors)
        self.packs = self.mode == "nearest" and self.refusal == ""
        self.outside = "edge" if self.mode == "bilinear" else ""
        super().__init__(name, step, layer, reach)

    def geometry(self, in_shape: tuple[int, int, int]) -> ConvGeometry | None:
        return super().geometry(in_shape) if self.packs else None

    @property
    def joins(self) -> bool:
        return self.masked

    def join(self, bound) -> None:
        layer = self.layer
        bound.resize(self, self.inputs[0], layer.size, layer.scale_factor, layer.mode, layer.align_corners)

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        corners = False if self.mode == "bilinear" else None
        y = F.interpolate(inputs[0], None, tuple(float(f) for f in self.factors), self.mode, corners)
        return _cut(y, self.reaches[0], out)


class PixelShuffle(_Moved):
    """Channels become pixels: ``[N, C * r * r, H, W]`` to ``[N, C, H * r, W * r]``."""

    def __init__(self, name: str, step: Step, layer: nn.PixelShuffle):
        self.factor = layer.upscale_factor
        super().__init__(name, step, layer, (Enlarged(self.factor, False),) * 2)

    def _of_rows(self, rows: Tensor, plan: PixelPlan, g: ConvGeometry) -> Tensor:
        _, y, x = _coordinates(plan)
        r = self.factor
        channels = rows.shape[1] // (r * r)
        phase = (y % r * r + x % r)[:, None, None].expand(-1, channels, 1)
        return rows.view(rows.shape[0], channels, r * r).gather(2, phase)[:, :, 0]

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        x, r = inputs[0], self.factor
        if x.shape[0] == 0:  # torch's derivative of nothing has another shape than its input
            y = x.reshape(0, x.shape[1] // (r * r), x.shape[2] * r, x.shape[3] * r)
        else:
            y = F.pixel_shuffle(x, r)
        return _cut(y, self.reaches[0], out)


class ZeroPad(_Moved):
    """Zeros around a map."""

    outside = "zero"

    def __init__(self, name: str, step: Step, layer: nn.ZeroPad2d):
        left, right, top, bottom = layer.padding
        if min(layer.padding) < 0:
            self.refusal, self.packs = f"{name}: expected paddings >= 0, got {layer}", False
        super().__init__(name, step, layer, (Window(1, 1, top, bottom, 1), Window(1, 1, left, right, 1)))

    @property
    def joins(self) -> bool:
        return self.masked and self.packs and self.feeds_convs

    def join(self, bound) -> None:
        bound.pad(self, self.geometry(bound.size(self.inputs[0])))

    def rows(self, run):
        if self.converted and run.maps and (x := run.read_whole(self.inputs[0])) is not None:
            return self.forward(self.layer, x)
        return super().rows(run)

    def _moved(self, run, x: int, plan: PixelPlan, g: ConvGeometry):
        rows = run.rows_of(x)
        return super()._moved(run, x, plan, g) if rows is None else Padded(rows, plan, g)

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        return inputs[0].clone()  # the zeros are there; what is written around it later is not the input's


def _cut(y: Tensor, reaches, out: BlockGeometry) -> Tensor:
    """The tile of the output, of all that the input's tile makes."""
    top, left = (
        span.first - reach.span(span).first * reach.factor
        for reach, span in zip(reaches, spans_of(out), strict=True)
    )
    return y[:, :, top : top + out.tile_h, left : left + out.tile_w]


def _is_whole(factor: float | None) -> bool:
    return factor is not None and factor == int(factor) and 1 <= factor <= MAX_FACTOR


def interpolate(
    size=None,
    scale_factor=None,
    mode="nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias=False,
):
    """The module of a call of ``F.interpolate``."""
    if antialias:
        raise TypeError("antialias=True")
    return nn.Upsample(size, scale_factor, mode, align_corners)


def pad(pad, mode="constant", value=None):
    """The module of a call of ``F.pad``."""
    if mode != "constant" or value not in (None, 0) or len(pad) != 4:
        raise TypeError(f"pad={tuple(pad)}, mode={mode!r}, value={value}")
    return nn.ZeroPad2d(tuple(pad))
