"""Launches of the kernels with weights of their own for samples, regions and pixels: their tensors, and the reference."""

from dataclasses import dataclass

import torch
from channel_launches import DEVICE
from launch_checks import check

from dynops.geometry import ConvGeometry, conv_geometry
from dynops.kernels.triton import channel_filters, sample_conv
from dynops.ops.channels import filters as filter_reference
from dynops.ops.channels import mixed_conv as mixed_reference
from dynops.ops.channels import sample_conv as reference
from dynops.testing import random_tensor


@dataclass(frozen=True)
class Case:
    """A convolution; ``regions`` of weights, 0: one of each sample's own; ``each``: of each sample.

    ``kind`` of the region map: "random" (some pixels have none), "areas" (rows of the map), "none", or "last".
    """

    c: int = 20
    o: int = 24
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    n: int = 2
    h: int = 5
    w: int = 4
    regions: int = 0
    each: bool = True
    kind: str = "random"
    bias_of_each: bool | None = None  # None: as the weight
    nchw: bool = False

    @property
    def geometry(self) -> ConvGeometry:
        kernel, pad = (self.kernel,) * 2, (self.kernel // 2,) * 2
        return conv_geometry((self.n, self.h, self.w), kernel, (self.stride,) * 2, pad, (1, 1), self.groups)

    @property
    def region(self) -> torch.Tensor | None:
        shape, r = self.geometry.out_shape, self.regions
        if not r:
            return None
        if self.kind == "random":
            region = torch.randint(-1, r + 1, shape)
        elif self.kind == "areas":
            region = (torch.arange(shape[1]) * r // shape[1])[:, None].expand(shape)
        else:
            region = torch.full(shape, r - 1 if self.kind == "last" else r)
        return region.to(DEVICE, torch.int32).contiguous()


def check_own(case: Case, dtype: torch.dtype, activation: str = "silu") -> None:
    """The convolution and its gradients with weights of samples or regions."""
    g, region, samples = case.geometry, case.region, case.n if case.each else 1
    bias_of = case.each if case.bias_of_each is None else case.bias_of_each
    shape = (samples, max(1, case.regions), case.o, case.c // case.groups, case.kernel, case.kernel)
    x, dy = _map(case, case.c, g.in_shape, dtype), _map(case, case.o, g.out_shape, dtype)
    weight = random_tensor(*shape, dtype=dtype).to(DEVICE)
    bias = random_tensor(case.n if bias_of else 1, *shape[1:3], dtype=dtype).to(DEVICE)
    check(calling((x, weight, bias), region, list(g), activation), sample_conv.conv, reference._conv)
    check(calling((dy, weight), region, list(g)), sample_conv.conv_input_grad, reference._conv_input_grad)
    grads = calling((dy, x), region, list(shape), list(g), True)
    check(grads, sample_conv.conv_weight_grad, reference._conv_weight_grad)


def check_mixed(case: Case, dtype: torch.dtype) -> None:
    x = _map(case, case.c, case.geometry.in_shape, dtype)
    weight = random_tensor(4, case.o, case.c // case.groups, case.kernel, case.kernel, dtype=dtype).to(DEVICE)
    mix, bias = (random_tensor(case.n, *size, dtype=dtype).to(DEVICE) for size in ((4,), (1, case.o)))
    method = calling((x, weight, mix, bias), list(case.geometry), "relu")
    check(method, sample_conv.mixed_conv, mixed_reference._conv)


def check_local(case: Case, dtype: torch.dtype, upsample: int = 1) -> None:
    """Filters of pixels, and the gradients; ``case.o`` does not count."""
    g = case.geometry
    fine = (g.batch, g.out_h * upsample, g.out_w * upsample)
    x, dy = _map(case, case.c, g.in_shape, dtype), _map(case, case.c, fine, dtype)
    kernels, options = _map(case, g.groups * g.taps, fine, dtype), (list(g), upsample)
    check(calling((x, kernels), *options), channel_filters.conv, filter_reference._conv)
    check(calling((dy, kernels), *options), channel_filters.conv_input_grad, filter_reference._conv_input_grad)  # fmt: skip
    check(calling((dy, x), *options), channel_filters.conv_kernel_grad, filter_reference._conv_kernel_grad)


def calling(tensors: tuple, *options):
    """A method for :func:`channel_launches.check`: ``run(*tensors, *options)``, in float64 if asked for."""

    def method(run, double: bool = False):
        return run(*(t.double() if double else t for t in tensors), *options)

    return method


def _map(case: Case, channels: int, shape: tuple, dtype: torch.dtype) -> torch.Tensor:
    x = random_tensor(shape[0], channels, *shape[1:], dtype=dtype).to(DEVICE)
    return x if case.nchw else x.to(memory_format=torch.channels_last)
