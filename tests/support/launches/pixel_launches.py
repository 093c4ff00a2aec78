"""Launches of the pixel kernels: their tensors, and the reference that they are compared with."""

from dataclasses import dataclass

import launch_checks
import torch

from dynops import PixelPlan
from dynops.geometry import ConvGeometry, conv_geometry, conv_transpose_geometry
from dynops.kernels.epilogue import Epilogue
from dynops.kernels.triton import pixels
from dynops.testing import random_mask, random_tensor


@dataclass(frozen=True)
class Case:
    """A convolution, its plan and the form of its tensors."""

    c: int = 20
    o: int = 24
    kernel: tuple = (3, 3)
    stride: tuple = (1, 1)
    pad: tuple = (1, 1)
    dil: tuple = (1, 1)
    groups: int = 1
    extra: int | None = None  # not None: a transposed convolution with this output_padding
    n: int = 2
    h: int = 7
    w: int = 6
    mask: str = "random"
    packed_in: bool = False
    packed_out: bool = False
    capacity: int | None = None
    nchw: bool = False

    @property
    def geometry(self) -> ConvGeometry:
        steps = ((self.n, self.h, self.w), self.kernel, self.stride, self.pad, self.dil, self.groups)
        if self.extra is None:
            return conv_geometry(*steps)
        return conv_transpose_geometry(*steps, (self.extra, self.extra))


CASES = {
    "3x3": Case(),
    "1x1": Case(kernel=(1, 1), pad=(0, 0)),
    "1x1-stride": Case(kernel=(1, 1), pad=(0, 0), stride=(2, 2)),
    "stride": Case(stride=(2, 2), nchw=True),
    "uneven": Case(kernel=(3, 2), stride=(2, 1), pad=(0, 1), dil=(1, 2)),
    "dilation": Case(dil=(2, 2), pad=(2, 2)),
    "5x5": Case(kernel=(5, 5), pad=(2, 2)),  # int32 tap sets
    "7x7": Case(kernel=(7, 7), pad=(3, 3), c=5, o=6),  # int64 tap sets
    "9x7": Case(kernel=(9, 7), pad=(4, 3), c=5, o=6),  # more taps than a set holds
    "groups": Case(c=32, o=48, groups=2),
    "narrow-groups": Case(c=12, o=18, groups=6),
    "depthwise": Case(c=21, o=21, groups=21),
    "depthwise-multiplier": Case(c=10, o=30, groups=10, stride=(2, 2)),
    "wide": Case(c=70, o=130, n=1, h=5, w=5),
    "one-channel": Case(c=1, o=1),
    "transposed": Case(extra=0, pad=(0, 0)),
    "transposed-stride": Case(extra=1, stride=(2, 2)),
    "transposed-2x2": Case(extra=0, kernel=(2, 2), stride=(2, 2), pad=(0, 0), nchw=True),
    "transposed-groups": Case(extra=1, stride=(2, 2), c=32, o=48, groups=2),
    "transposed-depthwise": Case(extra=1, stride=(2, 2), c=18, o=18, groups=18),
    "packed-in": Case(packed_in=True),
    "packed-out": Case(packed_out=True),
    "packed": Case(packed_in=True, packed_out=True, stride=(2, 2)),
    "packed-depthwise": Case(packed_in=True, packed_out=True, c=9, o=9, groups=9),
    "packed-1x1": Case(packed_in=True, packed_out=True, kernel=(1, 1), pad=(0, 0)),
    "packed-transposed": Case(packed_in=True, packed_out=True, extra=1, stride=(2, 2)),
    "capacity": Case(capacity=60),
    "capacity-exceeded": Case(capacity=16),
    "capacity-packed": Case(capacity=60, packed_in=True, packed_out=True),
    "capacity-transposed": Case(capacity=200, extra=1, stride=(2, 2), packed_out=True),
    "capacity-depthwise": Case(capacity=60, c=9, o=9, groups=9, packed_out=True),
    "capacity-empty": Case(capacity=8, mask="empty", packed_out=True),
    "empty": Case(mask="empty"),
    "one": Case(mask="one"),
    "full": Case(mask="full"),
    "square": Case(mask="square", n=3, h=9, w=9),
    "no-images": Case(n=0),
}
HALF = ("3x3", "stride", "groups", "depthwise", "transposed-stride", "packed", "capacity")
of_cases = launch_checks.of_cases(CASES, HALF, slow=(torch.float16,))


def mask_of(shape, density: float, kind: str) -> torch.Tensor:
    """``random_mask``, of which "last" is a kind too: random, and the last pixel of the buffer."""
    mask = random_mask(shape, density, "random" if kind == "last" else kind)
    mask.view(-1)[-1:] |= kind == "last"
    return mask


class Inputs:
    """The tensors of a case; ``double`` gives the same ones in float64."""

    def __init__(self, case: Case, dtype: torch.dtype):
        self.case, self.g, self.dtype = case, case.geometry, dtype
        self.plan = PixelPlan.from_mask(mask_of(self.g.out_shape, 0.4, case.mask), case.capacity)
        in_plan = None
        if case.packed_in:
            in_capacity = case.capacity and self.g.batch * self.g.in_h * self.g.in_w
            in_mask = mask_of(self.g.in_shape, 0.6, "last" if case.mask == "last" else "random")
            in_plan = PixelPlan.from_mask(in_mask, in_capacity)
        self.source = None if in_plan is None else in_plan.inverse()
        inner = case.o if case.extra is not None else case.c
        lead = case.c if case.extra is not None else case.o
        self.weight = random_tensor(lead, inner // case.groups, *case.kernel, dtype=dtype)
        self.x = self.map_or_rows(in_plan, case.c, self.g.in_shape)
        self.grad = self.map_or_rows(self.plan if case.packed_out else None, case.o, self.g.out_shape)
        self.live = self.plan.index >= 0  # [P]

    def map_or_rows(self, plan, channels: int, shape):
        if plan is not None:  # what lies past the count must not be read
            rows = random_tensor(plan.num_rows, channels, dtype=self.dtype)
            return torch.where((plan.index >= 0)[:, None], rows, float("nan"))
        x = random_tensor(shape[0], channels, *shape[1:], dtype=self.dtype)
        return x if self.case.nchw else x.to(memory_format=torch.channels_last)

    def epilogue(self) -> dict[str, torch.Tensor]:
        """A bias and all that may follow it, in the form that the case takes."""
        case, rows, g = self.case, self.plan.num_rows, self.g
        shapes = dict.fromkeys(("bias", "scale", "shift"), (case.o,))
        shapes |= {"gate": (rows,), "residual": (rows, case.o)}
        if not case.packed_out:
            shapes["base"] = (g.batch, case.o, g.out_h, g.out_w)
        return {name: random_tensor(*shape, dtype=self.dtype) for name, shape in shapes.items()}

    def conv(self, run, double: bool = False, **changes):
        x, weight = (t.double() if double else t for t in (self.x, self.weight))
        names = ("bias", "activation", "scale", "shift", "gate", "residual", "base")
        given = {name: changes.get(name) for name in names}
        if double:
            given = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        out = run(
            x, weight, given["bias"], self.plan.index, self.plan.count, self.source, list(self.g),
            Epilogue(given["activation"] or "", *(given[name] for name in names[2:-1])), given["base"],
            self.case.packed_out,
        )  # fmt: skip
        if not self.case.packed_out:
            return out
        if run is pixels.conv:
            assert not out[~self.live].any(), "rows past the count are zero"
        return out[self.live]

    def input_grad(self, run, double: bool = False):
        grad, weight = (t.double() if double else t for t in (self.grad, self.weight))
        rows = self.x.shape[0] if self.case.packed_in else 0
        return run(
            self.clean(run, grad), weight, self.plan.index, self.plan.count, self.source, rows, list(self.g),
            self.case.packed_out,
        )  # fmt: skip

    def weight_grad(self, run, double: bool = False):
        grad, x = (t.double() if double else t for t in (self.grad, self.x))
        return run(
            self.clean(run, grad), self.clean(run, x), self.plan.index, self.plan.count, self.source,
            list(self.weight.shape), list(self.g), self.case.packed_out,
        )  # fmt: skip

    def clean(self, run, value):
        """The reference multiplies unused rows by zero and needs them finite; the kernels skip them."""
        return value if run.__module__.startswith("dynops.kernels") else value.nan_to_num(0)
