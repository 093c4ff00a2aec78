"""Convolutions, and how the pixel ops are compared with the dense layer and a mask."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dynops import PixelPlan, ops
from dynops.testing import (
    assert_within_budget,
    available_backends,
    dense_masked_conv2d,
    dense_masked_conv_transpose2d,
    in_both_formats,
    in_layout,
    random_tensor,
)

BACKENDS = available_backends()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", "relu2")
MASKS = {"random": 0.3, "square": 0.25, "one": 0, "empty": 0, "full": 1}


@dataclass(frozen=True)
class Conv:
    """A convolution's sizes and arguments."""

    c: int = 8
    o: int = 8
    kernel: int | tuple = 3
    stride: int | tuple = 1
    padding: int | tuple | str = 0
    dilation: int | tuple = 1
    groups: int = 1
    padding_mode: str = "zeros"
    output_padding: int | tuple | None = None  # not None: a transposed convolution
    n: int = 2
    h: int = 11
    w: int = 13

    @property
    def transposed(self) -> bool:
        return self.output_padding is not None

    @property
    def arguments(self) -> dict:
        """The arguments that the op and the oracle share."""
        extra = "output_padding" if self.transposed else "padding_mode"
        return {k: getattr(self, k) for k in ("stride", "padding", "dilation", "groups", extra)}

    def layer(self) -> torch.nn.Module:
        """The dense layer, without values: for its shapes."""
        make = torch.nn.ConvTranspose2d if self.transposed else torch.nn.Conv2d
        return make(self.c, self.o, self.kernel, **self.arguments, device="meta")

    def out_shape(self) -> tuple[int, int, int]:
        out = self.layer()(torch.empty(self.n, self.c, self.h, self.w, device="meta"))
        return out.shape[0], out.shape[2], out.shape[3]

    def tensors(self, dtype=torch.float32, bias=True) -> dict[str, Tensor | None]:
        return {
            "x": in_layout(random_tensor(self.n, self.c, self.h, self.w, dtype=dtype), "channels_last"),
            "weight": random_tensor(*self.layer().weight.shape, dtype=dtype),
            "bias": random_tensor(self.o, dtype=dtype) if bias else None,
        }

    def epilogue(self, dtype=torch.float32) -> dict[str, Tensor]:
        n, h, w = self.out_shape()
        return {
            "scale": random_tensor(self.o, dtype=dtype),
            "shift": random_tensor(self.o, dtype=dtype),
            "gate": random_tensor(n, 1, h, w, dtype=dtype),
            "residual": random_tensor(n, self.o, h, w, dtype=dtype),
            "base": random_tensor(n, self.o, h, w, dtype=dtype),
        }

    def op(self, x, weight, bias, plan, **rest) -> Tensor:
        run = ops.sparse_conv_transpose2d if self.transposed else ops.sparse_conv2d
        return run(x, weight, bias, plan, **self.arguments, **rest)

    def packed_op(self, x, weight, bias, in_plan, plan, **rest) -> Tensor:
        arguments = {k: v for k, v in self.arguments.items() if k != "padding_mode"}
        run = ops.packed_conv_transpose2d if self.transposed else ops.packed_conv2d
        return run(x, weight, bias, in_plan, plan, **arguments, **rest)

    def oracle(self, x, weight, bias, mask, **rest) -> Tensor:
        run = dense_masked_conv_transpose2d if self.transposed else dense_masked_conv2d
        return run(x, weight, bias, mask, **self.arguments, **rest)


CONVS = {
    "3x3": Conv(padding=1),
    "3x3 valid": Conv(),
    "1x1": Conv(kernel=1, c=24, o=20),
    "1x1 stride 2": Conv(kernel=1, stride=2),
    "1x1 padded": Conv(kernel=1, padding=1),
    "1x3": Conv(kernel=(1, 3), padding=(0, 1)),
    "3x1": Conv(kernel=(3, 1), padding=(1, 0)),
    "5x5": Conv(kernel=5, padding=2),
    "7x7 stride 2, 3 channels": Conv(c=3, o=16, kernel=7, stride=2, padding=3),
    "2x2": Conv(kernel=2),
    "4x4 stride 2": Conv(kernel=4, stride=2, padding=1),
    "stride over kernel": Conv(kernel=2, stride=3),
    "uneven stride and padding": Conv(kernel=3, stride=(1, 2), padding=(0, 2)),
    "padding over kernel": Conv(kernel=2, padding=4),
    "dilation 2": Conv(padding=2, dilation=2),
    "uneven dilation, stride 2": Conv(padding=(2, 3), dilation=(2, 3), stride=2),
    "same": Conv(padding="same"),
    "same, even kernel": Conv(kernel=(4, 2), padding="same"),
    "same, dilated": Conv(kernel=(3, 4), padding="same", dilation=(1, 3)),
    "valid": Conv(padding="valid", kernel=5),
    "reflect": Conv(padding=2, padding_mode="reflect", kernel=5),
    "replicate": Conv(padding=(1, 3), padding_mode="replicate"),
    "circular, same": Conv(padding="same", padding_mode="circular", kernel=(4, 3)),
    "one channel": Conv(c=1, o=1, padding=1),
    "one to many": Conv(c=1, o=33, padding=1),
    "many to one": Conv(c=37, o=1, padding=1),
    "odd wide": Conv(c=70, o=101, padding=1, h=6, w=5),
    "winograd": Conv(c=40, o=72, padding=1, h=21, w=23),
    "winograd, padded by 2": Conv(c=33, o=37, padding=2, h=19, w=14),
    "one output pixel": Conv(kernel=(11, 13), n=1),
    "one image row": Conv(kernel=(1, 3), padding=(0, 1), h=1, w=40),
    "depthwise": Conv(c=16, o=16, groups=16, padding=1),
    "depthwise 5x5 stride 2": Conv(c=19, o=19, groups=19, kernel=5, stride=2, padding=2),
    "depthwise dilated": Conv(c=35, o=35, groups=35, padding=2, dilation=2),
    "depthwise, 3 vectors": Conv(c=48, o=48, groups=48, padding=1),
    "depthwise 5x5, 5 vectors": Conv(c=83, o=83, groups=83, kernel=5, padding=2, h=6, w=7),
    "depthwise multiplier": Conv(c=6, o=18, groups=6, padding=1),
    "group width 2 to 1": Conv(c=8, o=4, groups=4, padding=1),
    "fewer rows than outputs, groups": Conv(c=8, o=80, groups=2, padding=1, n=1, h=5, w=6),
    "group width 3": Conv(c=12, o=12, groups=4, padding=1),
    "group width 8": Conv(c=32, o=32, groups=4, padding=1),
    "group width 16": Conv(c=32, o=32, groups=2, padding=1, stride=2),
    "grouped 1x1": Conv(c=12, o=20, groups=2, kernel=1),
}
TRANSPOSED = {
    "T 2x2 stride 2": Conv(kernel=2, stride=2, output_padding=0, h=5, w=6),
    "T 3x3": Conv(padding=1, output_padding=0, h=7, w=5),
    "T 3x3 stride 2": Conv(stride=2, padding=1, output_padding=1, h=5, w=6),
    "T 4x4 stride 2": Conv(kernel=4, stride=2, padding=1, output_padding=0, h=5, w=4),
    "T uneven": Conv(kernel=(3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), h=4, w=4),
    "T stride over kernel": Conv(kernel=2, stride=3, output_padding=0, h=4, w=5),
    "T dilated": Conv(kernel=3, stride=2, dilation=2, padding=2, output_padding=1, h=4, w=5),
    "T 1x1": Conv(kernel=1, output_padding=0, h=4, w=5),
    "T grouped": Conv(c=6, o=9, groups=3, stride=2, padding=1, output_padding=1, h=4, w=5),
    "T depthwise": Conv(c=16, o=16, groups=16, kernel=4, stride=2, padding=1, output_padding=0, h=4, w=5),
}
ALL = CONVS | TRANSPOSED
FEW = {k: ALL[k] for k in ("3x3", "1x1", "7x7 stride 2, 3 channels", "depthwise", "group width 3", "odd wide", "winograd", "T 3x3 stride 2")}  # fmt: skip


def assert_format(out: Tensor, layout: str) -> None:
    """NCHW and channels_last come back as they went in; what other layouts become is free."""
    if layout in ("nchw", "channels_last"):
        same = torch.contiguous_format if layout == "nchw" else torch.channels_last
        assert out.is_contiguous(memory_format=same)


def each(cases: dict):
    return pytest.mark.parametrize("conv", list(cases.values()), ids=list(cases))


def run(function, tensors: dict, grads, dy_of, dtype=None) -> tuple[Tensor, dict[str, Tensor]]:
    """``function(**tensors)`` and the gradients of those named in ``grads``."""
    leaves = {k: None if v is None else v.to(dtype or v.dtype).detach() for k, v in tensors.items()}
    for name in grads:
        leaves[name].requires_grad_()
    out = function(**leaves)
    if not grads:
        return out, {}
    # None: out does not depend on it (a full plan has no base)
    found = torch.autograd.grad(out, [leaves[name] for name in grads], dy_of(out), allow_unused=True)
    found = [torch.zeros_like(leaves[k]) if g is None else g for k, g in zip(grads, found, strict=True)]
    return out, dict(zip(grads, found, strict=True))


def upstream(dtype: torch.dtype):
    """What gives the same upstream gradient to all runs that are compared."""
    made = []

    def dy_of(out: Tensor) -> Tensor:
        if not made:
            made.append(random_tensor(*out.shape, dtype=dtype))
        return made[0].to(out.dtype)

    return dy_of


def compare(ours, oracle, tensors: dict, grads=(), backend=None) -> Tensor:
    """Checks the value of ``ours``, with and without gradients, and these against ``oracle``. Returns the value.

    The reference is torch's own convolution: its yardstick is that in the memory format of ``tensors`` alone.
    """
    dy_of = upstream(tensors["x"].dtype)
    exact, exact_grads = run(oracle, tensors, grads, dy_of, torch.float64)
    formats = [tensors] if backend == "reference" else in_both_formats(tensors)
    dense, dense_grads = zip(*(run(oracle, t, grads, dy_of) for t in formats), strict=True)
    actual, actual_grads = run(ours, tensors, grads, dy_of)
    assert_close(actual, exact, dense, "output")
    for name in grads:
        assert actual_grads[name].shape == tensors[name].shape
        both = [found[name] for found in dense_grads]
        assert_close(actual_grads[name], exact_grads[name], both, f"gradient of {name}")
    if grads:  # the fused way
        assert_close(run(ours, tensors, (), dy_of)[0], exact, dense, "output without gradients")
    return actual


def assert_close(actual: Tensor, exact: Tensor, dense: Sequence[Tensor], what: str) -> None:
    if dense[0].dtype == torch.float64:  # nothing is more exact than it: rounding of a sum in another order
        assert actual.dtype == torch.float64 and actual.shape == exact.shape, what
        assert (actual - exact).norm() <= 1e-14 * max(exact.numel(), 1) * exact.norm(), what
    else:
        assert_within_budget(actual, exact, dense, what)


def check(conv: Conv, backend, mask, tensors, grads=(), plan=None, **rest) -> Tensor:
    """:func:`compare` for a dense-to-dense convolution of ``conv`` at the pixels of ``mask``."""
    plan = PixelPlan.from_mask(mask) if plan is None else plan
    return compare(
        lambda x, weight, bias, **t: conv.op(x, weight, bias, plan, backend=backend, **t, **rest),
        lambda x, weight, bias, **t: conv.oracle(x, weight, bias, mask, **t, **rest),
        tensors,
        grads,
        backend,
    )
