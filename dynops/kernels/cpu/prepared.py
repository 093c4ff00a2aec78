"""Convolutions from rows to rows, called by address: what an op looks up and checks in each call is looked up once.

A call through the dispatcher matches 17 arguments, three lists among them: 25 us where a layer of 20 active rows
computes for 10. What is prepared is kept with the weight, as its packed form is (:mod:`dynops.kept`).
"""

from __future__ import annotations

import enum
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ... import backends
from ...geometry import ConvGeometry, bilinear_sources
from ...kept import kept
from ..epilogue import Epilogue
from .engine import ACTIVATIONS, Setup, packed_weight, quads_of, setup_of, winograd_weight

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cpu/engine/engine.h: Dtype


class StepKind(enum.IntEnum):
    """What a step of a sequence does: csrc/cpu/pixels/sequence.h."""

    CONV = 0
    EACH = 1  # of each row by itself: a norm, an activation
    MEAN = 2
    SUM = 3
    PRODUCT = 4
    SIGMOID = 5
    HARDSIGMOID = 6
    CAT = 7
    MAX_POOL = 8
    MEAN_POOL = 9
    NEAREST = 10
    TAKE = 11  # channels
    LAYER_NORM = 12
    RESPONSE_NORM = 13
    GROUP_NORM = 14  # the one number in `channels`: groups
    BILINEAR = 15
    INNER_MEAN_POOL = 16  # over those pixels of windows that lie inside the map


class Prepared:
    """A convolution of one geometry, weight and epilogue.

    Args:
        scale, shift: ``[O]`` or None.
        pointwise: row i reads row i.
        quads: it runs as Winograd's.
    """

    __slots__ = ("conv", "out_channels", "weight")

    def __init__(
        self, weight: Tensor, bias: Tensor | None, g: ConvGeometry, setup: Setup,
        activation: str, scale: Tensor | None, shift: Tensor | None, pointwise: bool, quads: bool,
    ):  # fmt: skip
        self.weight = winograd_weight(weight, False) if quads else packed_weight(weight, g, setup, False)
        self.out_channels = setup.out_channels
        ins = weight.shape[0] if g.transposed else weight.shape[1] * g.groups
        for name, v in (("bias", bias), ("scale", scale), ("shift", shift)):
            if v is not None and (v.dtype not in _DTYPES or v.numel() != setup.out_channels):
                raise ValueError(
                    f"{name}: expected {setup.out_channels} values of float32, bfloat16 or float16, "
                    f"got {v.numel()} of {v.dtype}"
                )
        vectors = [None if v is None else v.detach().contiguous() for v in (bias, scale, shift)]
        addresses = [n for v in vectors for n in ((0, 0) if v is None else (v.data_ptr(), _DTYPES[v.dtype]))]
        sizes = (
            _DTYPES[weight.dtype],
            ins,
            setup.out_channels,
            int(pointwise),
            int(quads),
            ACTIVATIONS[activation],
        )
        self.conv = backends._C.prepare_conv(*g, *sizes, self.weight.data_ptr(), *addresses)

    def run(
        self,
        x: Tensor,  # [R, C]
        index: Tensor,  # [P]
        source: Tensor | None,  # [N, in_h, in_w]; None: pointwise
        residual: Tensor | None,  # [P, O]
        quads: Tensor | None,
    ) -> Tensor:  # [P, O]
        rows = index.shape[0]
        out = x.new_empty((rows, self.out_channels))
        tiles = (0, 0) if quads is None else (quads.data_ptr(), quads.shape[0])
        backends._C.run_conv(
            self.conv, x.data_ptr(), index.data_ptr(), rows, 0 if source is None else source.data_ptr(),
            0 if residual is None else residual.data_ptr(), *tiles, out.data_ptr(),
        )  # fmt: skip
        return out


def weight_shape(g: ConvGeometry, ins: int, outs: int) -> tuple[int, int, int, int]:
    """The shape of the weight of a convolution of ``ins`` channels to ``outs``."""
    first, second = (ins, outs) if g.transposed else (outs, ins)
    return first, second // g.groups, g.kernel_h, g.kernel_w


def key_of(g: ConvGeometry, pointwise: bool, activation: str, quads: bool) -> tuple:
    """What a :class:`Prepared` of a weight depends on beside tensors: a pointwise one holds for every number of rows."""
    return "prepared", g.groups if pointwise else g, activation, quads


def takes(
    x: Tensor, weight: Tensor, bias: Tensor | None, g: ConvGeometry, epilogue: Epilogue, rows: int, ins: int
) -> bool:
    """True for rows ``[ins, C]`` to ``rows`` rows that a prepared convolution computes as the op does."""
    _, scale, shift, gate, residual = epilogue
    if (
        gate is not None
        or x.dim() != 2
        or x.shape[0] != ins
        or weight.dtype is not x.dtype
        or weight.shape != weight_shape(g, x.shape[1], setup_of(g, weight.shape, x.dtype, True).out_channels)
        or not x.is_contiguous()
    ):
        return False
    if residual is not None and not fits(residual, x, rows):
        return False
    return all(v is None or v.dtype in _DTYPES for v in (bias, scale, shift))


def fits(residual: Tensor, x: Tensor, rows: int) -> bool:
    """True for a residual ``[rows, O]`` that can be read as it lies."""
    return (
        residual.dim() == 2
        and residual.dtype is x.dtype
        and residual.shape[0] == rows
        and residual.is_contiguous()
    )


class BilinearTable(NamedTuple):
    """Which rows and columns each output pixel of a resizing reads."""

    first: list[int]  # [out_h + out_w], rows and then columns
    down: Tensor  # float32 [out_h], the share of the next row
    across: Tensor  # float32 [out_w], of the next column

    def vectors(self) -> tuple[int, int, float]:
        return self.down.data_ptr(), self.across.data_ptr(), 0.0


@functools.lru_cache(maxsize=256)
def bilinear_table(
    g: ConvGeometry, align_corners: bool, factor_h: float | None, factor_w: float | None
) -> BilinearTable:
    rows, down = bilinear_sources(g.in_h, g.out_h, align_corners, factor_h)
    columns, across = bilinear_sources(g.in_w, g.out_w, align_corners, factor_w)
    shares = [torch.tensor(share, dtype=torch.float32, device="cpu") for share in (down, across)]
    return BilinearTable([*rows, *columns], *shares)


@functools.lru_cache(maxsize=1024)
def _window(kind: StepKind, channels: int, g: ConvGeometry, linear: tuple | None):
    table, taken, vectors = None, [], (0, 0, 0.0)
    if linear is not None:
        table = bilinear_table(g, *linear)
        taken, vectors = table.first, table.vectors()
    step = kind, [0], 1, None, g, [], taken, vectors
    return sequence([(0, channels), (1, channels)], [0], [1], [step]), table


def sequence(values: list, inputs: list, outputs: list, steps: list):
    """What ``run_sequence`` takes: csrc/calls.h.

    Args:
        values: (plan, channels) of each.
        inputs, outputs: values.
        steps: (kind, inputs, out, :class:`Prepared` or None, geometry of a window or None, values freed, channels,
            (address of gamma, of beta, eps)) of each. The caller keeps the prepared ones.
    """
    numbers = [2 * len(values), *(n for value in values for n in value)]
    numbers += [len(inputs), *inputs, len(outputs), *outputs, len(steps)]
    for kind, reads, out, conv, g, freed, channels, vectors in steps:
        numbers += [int(kind), len(reads), *reads, out, int(conv is not None)]
        numbers += [0] if g is None else [1, *g]
        numbers += [len(freed), *freed, len(channels), *channels, *vectors]
    return backends._C.make_sequence(numbers, [step[3].conv for step in steps if step[3] is not None])


def windows(
    kind: StepKind, x: Tensor, index: tuple[Tensor, Tensor], inverse: Tensor, g: ConvGeometry,
    linear: tuple | None = None,
) -> Tensor:  # fmt: skip
    """float32 rows ``[P, C]`` of a pool or a resizing of rows ``[R, C]``.

    Args:
        index: of the input and of the output.
        inverse: of the input.
        linear: the arguments of :func:`bilinear_table` after the geometry.
    """
    ins, outs = index
    out = x.new_empty((outs.shape[0], x.shape[1]))
    capsule, _table = _window(kind, x.shape[1], g, linear)  # which the capsule reads
    backends._C.run_sequence(
        capsule, 2,
        ins.data_ptr(), inverse.data_ptr(), 0, ins.shape[0], 0, g.in_h * g.in_w,
        outs.data_ptr(), 0, 0, outs.shape[0], 0, g.out_h * g.out_w, x.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def group_norm(
    x: Tensor,
    index: Tensor,
    inverse: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """A GroupNorm of float32 rows ``[P, C]`` over each sample's rows. ``inverse``: ``[N, H, W]``."""
    vectors = (*(0 if v is None else v.data_ptr() for v in (weight, bias)), eps)
    step = StepKind.GROUP_NORM, [0], 1, None, None, [], [groups], vectors
    out, (_, h, w) = torch.empty_like(x), inverse.shape
    capsule = sequence([(0, x.shape[1])] * 2, [0], [1], [step])
    plan = index.data_ptr(), inverse.data_ptr(), 0, index.shape[0], 0, h * w
    backends._C.run_sequence(capsule, 1, *plan, x.data_ptr(), out.data_ptr())
    return out


def conv(x, weight, bias, index, source, g: ConvGeometry, epilogue: Epilogue, derived) -> Tensor:
    """See :func:`.pixels.conv`, and :meth:`Prepared.run` for the shapes."""
    setup, pointwise = setup_of(g, weight.shape, x.dtype, True), source is None
    quads = quads_of(index, None, g, derived) if setup.winograd else None
    activation, scale, shift, _, residual = epilogue

    def make() -> Prepared:
        return Prepared(weight, bias, g, setup, activation, scale, shift, pointwise, quads is not None)

    made = kept.get(key_of(g, pointwise, activation, quads is not None), make, weight, bias, scale, shift)
    return made.run(x, index, source, residual, quads)
