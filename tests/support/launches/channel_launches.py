"""Launches of the channel kernels: their tensors, and the reference that they are compared with."""

import os
from dataclasses import dataclass

import launch_checks
import torch

from dynops import ChannelPlan
from dynops.geometry import ConvGeometry, conv_geometry
from dynops.kernels.lists import Lists
from dynops.testing import random_tensor

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@dataclass(frozen=True)
class Case:
    """A convolution, the plans of its two sides and the form of its tensors.

    A plan is "random" (other channels in each sample), "shared", "prefix", "empty", "one", "ends" (a sample without
    a live channel, one with one, one with all), "padded" (lists with room past all channels) or None.
    """

    c: int = 20
    o: int = 24
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1)
    pad: tuple = (1, 1)
    dil: tuple = (1, 1)
    groups: int = 1
    heads: int = 1
    n: int = 3
    h: int = 6
    w: int = 5
    ins: str | None = "random"
    outs: str | None = "random"
    capacity: int | None = None
    packed_in: bool = False
    packed_out: bool = False
    nchw: bool = False

    @property
    def geometry(self) -> ConvGeometry:
        size = (self.n, self.h, self.w)
        return conv_geometry(size, self.kernel, self.stride, self.pad, self.dil, self.groups)

    def plan(self, kind: str | None, size: int, heads: int = 1) -> ChannelPlan | None:
        shape = (self.n, size) if heads == 1 else (self.n, heads, size)
        if kind is None:
            return None
        if kind == "prefix":
            return ChannelPlan.prefix(torch.randint(1, size + 1, (self.n,)), size, DEVICE)
        if kind == "padded":
            index = [sorted(torch.randperm(size)[: size // 2].tolist()) for _ in range(self.n)]
            index = torch.nn.functional.pad(
                torch.tensor(index, dtype=torch.int64, device=DEVICE), (0, size), value=-1
            )
            return ChannelPlan.from_index(index, size)
        mask = torch.rand(shape, device=DEVICE) < 0.5
        if kind == "shared":
            mask = mask[0]
        elif kind == "ends":
            mask[0], mask[1], mask[2] = False, torch.arange(size, device=DEVICE) == size // 2, True
        elif kind in ("empty", "one"):
            mask[:] = kind == "one" and torch.arange(size, device=DEVICE) == size - 1
        return ChannelPlan.from_mask(mask, self.capacity)


CASES = {
    "3x3": Case(),
    "3x3-in": Case(outs=None),
    "3x3-out": Case(ins=None),
    "3x3-all": Case(ins=None, outs=None),
    "1x1": Case(kernel=(1, 1), pad=(0, 0)),
    "1x1-stride": Case(kernel=(1, 1), pad=(0, 0), stride=(2, 2)),
    "linear": Case(kernel=(1, 1), pad=(0, 0), c=40, o=50, h=1, w=1, n=5),
    "stride": Case(stride=(2, 2), nchw=True),
    "uneven": Case(kernel=(3, 2), stride=(2, 1), pad=(0, 1), dil=(1, 2)),
    "dilation": Case(dil=(2, 2), pad=(2, 2)),
    "5x5": Case(kernel=(5, 5), pad=(2, 2)),
    "wide": Case(c=36, o=70, h=3, w=3),
    "aligned": Case(c=32, o=32, n=2, h=9, w=9),  # maps so large that the weight is packed
    "aligned-in": Case(c=32, o=32, n=2, h=9, w=9, outs=None),
    "groups": Case(c=34, o=36, groups=2),
    "groups-in": Case(c=34, o=36, groups=2, outs=None),
    "groups-out": Case(c=34, o=36, groups=2, ins=None),
    "groups-packed": Case(c=34, o=36, groups=2, packed_in=True, packed_out=True),
    "groups-packed-1x1": Case(
        c=34, o=36, groups=2, packed_in=True, packed_out=True, kernel=(1, 1), pad=(0, 0)
    ),
    "groups-large": Case(c=32, o=32, groups=2, h=8, w=8),
    "groups-ends": Case(c=34, o=36, groups=2, ins="ends", outs="ends", packed_out=True),
    "narrow-groups": Case(c=12, o=18, groups=6),
    "narrow-groups-packed": Case(c=12, o=18, groups=6, packed_in=True, packed_out=True),
    "depthwise": Case(c=21, o=21, groups=21),
    "depthwise-multiplier": Case(c=10, o=30, groups=10, stride=(2, 2)),
    "depthwise-out": Case(c=21, o=21, groups=21, ins=None),
    "depthwise-in": Case(c=21, o=21, groups=21, outs=None),
    "depthwise-shared": Case(c=21, o=21, groups=21, ins="shared", outs="shared"),
    "depthwise-packed": Case(c=21, o=21, groups=21, packed_in=True, packed_out=True),
    "heads": Case(heads=3),
    "heads-1x1": Case(heads=3, kernel=(1, 1), pad=(0, 0), outs=None),
    "heads-large": Case(heads=2, h=8, w=8),
    "heads-narrow": Case(heads=6, stride=(2, 2)),
    "heads-packed-out": Case(heads=3, packed_out=True),
    "heads-ends": Case(heads=3, ins="ends", outs="ends"),
    "packed-in": Case(packed_in=True, outs=None),
    "packed-out": Case(packed_out=True, ins=None),
    "packed": Case(packed_in=True, packed_out=True, stride=(2, 2)),
    "packed-1x1": Case(packed_in=True, packed_out=True, kernel=(1, 1), pad=(0, 0), nchw=True),
    "packed-padded": Case(packed_in=True, packed_out=True, ins="padded", outs="padded"),
    "capacity": Case(capacity=16),
    "capacity-exceeded": Case(capacity=5, packed_in=True, packed_out=True),
    "capacity-none": Case(capacity=0),
    "capacity-none-packed": Case(capacity=0, packed_in=True, outs=None),
    "shared": Case(ins="shared", outs="shared"),
    "shared-in": Case(ins="shared"),
    "shared-out": Case(outs="shared", h=8, w=8),
    "prefix": Case(ins="prefix", outs="prefix"),
    "empty": Case(ins="empty", outs="empty"),
    "empty-in": Case(ins="empty"),
    "one": Case(ins="one", outs="one"),
    "ends": Case(ins="ends", outs="ends"),
    "one-channel": Case(c=1, o=1, ins="one", outs="one"),
    "no-samples": Case(n=0),
}
HALF = ("3x3", "1x1", "aligned", "groups", "depthwise", "heads", "packed")
of_cases = launch_checks.of_cases(CASES, HALF, slow=(torch.float16,))


class Inputs:
    """The tensors of a case; what lies at channels that are not live is NaN, and must not be read."""

    def __init__(self, case: Case, dtype: torch.dtype):
        self.case, self.g, self.dtype = case, case.geometry, dtype
        self.ins = case.plan(case.ins, case.c, case.heads)
        self.outs = case.plan(case.outs, case.o)
        lists = [(None, None) if p is None else (p.index, p.count) for p in (self.ins, self.outs)]
        self.lists = Lists(*lists[0], *lists[1])
        self.weight = random_tensor(case.o, case.c // case.groups, *case.kernel, dtype=dtype).to(DEVICE)
        self.in_width = self.ins.width if case.packed_in else -1
        self.out_width = self.outs.width if case.packed_out else -1
        self.x = self.map(self.ins, case.c, case.packed_in, self.g.in_shape)
        self.grad = self.map(self.outs, case.o, case.packed_out, self.g.out_shape)

    def map(self, plan, size: int, packed: bool, shape):
        size = plan.width if packed else size
        x = random_tensor(shape[0], size, *shape[1:], dtype=self.dtype).to(DEVICE)
        if plan is not None:
            live = torch.arange(size, device=DEVICE) < plan.count[:, None] if packed else plan.mask()
            live = live.any(1) if live.dim() == 3 else live
            x = torch.where(live.expand(shape[0], -1)[:, :, None, None], x, float("nan"))
        return x if self.case.nchw else x.to(memory_format=torch.channels_last)

    def conv(self, run, double: bool = False, bias=None, activation="", scale=None, base=None):
        tensors = (self.x, self.weight, bias, scale, base)
        x, weight, bias, scale, base = (None if t is None else t.double() if double else t for t in tensors)
        return run(
            x, weight, bias, self.lists, list(self.g), self.case.heads, activation, scale, base,
            self.case.packed_in, self.out_width,
        )  # fmt: skip

    def input_grad(self, run, double: bool = False):
        grad, weight = (t.double() if double else t for t in (self.grad, self.weight))
        return run(
            grad, weight, self.lists, list(self.g), self.case.heads, self.in_width, self.case.packed_out
        )

    def weight_grad(self, run, double: bool = False):
        grad, x = (t.double() if double else t for t in (self.grad, self.x))
        return run(
            grad, x, self.lists, list(self.weight.shape), list(self.g), self.case.heads, self.case.packed_in,
            self.case.packed_out, True,
        )  # fmt: skip
