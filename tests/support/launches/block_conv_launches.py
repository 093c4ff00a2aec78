"""Launches of the convolution at blocks: their tensors, and the reference that they are compared with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dynops import BlockPlan, PixelPlan
from dynops.geometry import conv_geometry
from dynops.kernels.epilogue import Epilogue
from dynops.kernels.triton import blocks
from dynops.ops.pixels import conv as reference
from dynops.testing import assert_within_budget, random_mask, random_tensor


@dataclass(frozen=True)
class Case:
    """A convolution of stride 1, its blocks and which are active."""

    c: int = 16
    o: int = 16
    kernel: tuple = (3, 3)
    pad: tuple = (1, 1)
    dil: tuple = (1, 1)
    n: int = 2
    h: int = 20
    w: int = 25
    block: tuple = (8, 8)
    offset: tuple = (0, 0)
    kind: str = "random"
    capacity: int | None = None
    transposed: bool = False  # the geometry of an input's gradient
    nchw: bool = False
    unaligned: bool = False  # memory that does not begin at a multiple of 16 bytes

    @property
    def geometry(self):
        g = conv_geometry((self.n, self.h, self.w), self.kernel, before=self.pad, dilation=self.dil)
        if not self.transposed:
            return g
        return g._replace(in_h=g.out_h, in_w=g.out_w, out_h=g.in_h, out_w=g.in_w, transposed=1)

    @property
    def plan(self) -> BlockPlan:
        none = torch.zeros(self.geometry.out_shape, dtype=torch.bool)
        g = BlockPlan.from_mask(none, self.block, offset=self.offset).geometry
        grid = PixelPlan.from_mask(random_mask(g.grid, 0.5, self.kind), self.capacity)
        return BlockPlan(grid.index, g, grid.count)


CASES = {
    "3x3": Case(),
    "full": Case(kind="full", n=1),
    "empty": Case(kind="empty"),
    "one": Case(kind="one"),
    "1x1": Case(kernel=(1, 1), pad=(0, 0)),
    "dilation": Case(dil=(2, 2), pad=(2, 2)),
    "uneven": Case(kernel=(3, 2), pad=(0, 1), dil=(1, 2), n=1, kind="full"),
    "no-padding": Case(pad=(0, 0), n=1, kind="full"),
    "wide-padding": Case(pad=(4, 3), h=9, w=10, kind="full"),
    "transposed": Case(transposed=True, o=32),
    "transposed-dilation": Case(transposed=True, kernel=(2, 3), dil=(3, 1), pad=(1, 0), n=1, kind="full"),
    "blocks-of-boxes": Case(block=(16, 16), n=1, kind="full"),
    "ragged-blocks": Case(block=(12, 9)),
    "blocks-over-the-map": Case(h=5, w=6, block=(16, 8), kind="full"),
    "offset": Case(offset=(-3, 2), n=1, kind="full"),
    "lines": Case(block=(1, 64), n=1, h=7, kind="full"),
    "channels": Case(c=80, o=144, n=1, h=9, w=9),
    "batch-7": Case(n=7, h=9, w=8),
    "nchw": Case(nchw=True),
    "unaligned": Case(unaligned=True),
    "capacity": Case(capacity=20),
    "capacity-exceeded": Case(capacity=3, kind="full"),
    "capacity-empty": Case(capacity=4, kind="empty"),
    "capacity-0": Case(capacity=0),
    "no-images": Case(n=0),
}


class Inputs:
    """The tensors of a case; ``double`` gives the same ones in float64."""

    def __init__(self, case: Case, dtype: torch.dtype):
        self.case, self.plan, g = case, case.plan, case.geometry
        lead, inner = (case.c, case.o) if case.transposed else (case.o, case.c)
        self.x, self.residual, self.base = (
            self._map(dtype, *shape)
            for shape in ((case.n, case.c, *g.in_shape[1:]), *[(case.n, case.o, *g.out_shape[1:])] * 2)
        )
        self.weight = random_tensor(lead, inner, *case.kernel, dtype=dtype)
        self.bias, self.scale, self.shift = (random_tensor(case.o, dtype=dtype) for _ in range(3))

    def _map(self, dtype: torch.dtype, *shape: int) -> Tensor:
        x = random_tensor(*shape, dtype=dtype)
        if self.case.nchw:
            return x
        x = x.to(memory_format=torch.channels_last)
        flat = torch.empty(x.numel() + 1, dtype=dtype)[int(self.case.unaligned) :]
        return flat.as_strided(x.shape, x.stride()).copy_(x)

    def finish(self, epilogue: bool) -> tuple:
        """Scale, shift and residual, and a base."""
        return (self.scale, self.shift, self.residual, self.base) if epilogue else (None,) * 4

    def ours(self, activation: str, epilogue: bool) -> Tensor:
        where = self.plan.index, self.plan.count, self.plan.geometry, self.case.geometry
        return blocks.conv(self.x, self.weight, self.bias, *where, activation, *self.finish(epilogue))

    def reference(self, activation: str, epilogue: bool, double: bool) -> Tensor:
        def cast(t):
            return t.double() if double and t is not None else t

        scale, shift, residual, base = map(cast, self.finish(epilogue))
        pixels = self.plan.pixels()
        if residual is not None:
            residual = torch.ops.dynops.gather_rows(residual, pixels.index, pixels.count)
        finish = Epilogue(activation, scale, shift, None, residual), base, False
        tensors = map(cast, (self.x, self.weight, self.bias))
        return reference._conv(*tensors, pixels.index, pixels.count, None, self.case.geometry, *finish)


def check(case: Case, dtype: torch.dtype) -> None:
    """Plain, and with an epilogue and a base."""
    inputs = Inputs(case, dtype)
    for activation, epilogue in (("", False), ("silu", True)):
        out = inputs.ours(activation, epilogue)
        exact, dense = (inputs.reference(activation, epilogue, double) for double in (True, False))
        assert_within_budget(out, exact, dense)
        assert out.is_contiguous(memory_format=torch.contiguous_format if case.nchw else torch.channels_last)
