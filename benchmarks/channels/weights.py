"""Convolutions whose weights, or outputs, depend on the input: CondConv, DRConv, CGNet, involution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynops import ops

from ..harness.compare import compare
from ..harness.contenders import bound
from ..harness.rows import Row
from ..harness.setting import Setting


@dataclass
class Problem:
    """Calls of the versions that exist, and of ours for each density.

    Attributes:
        macs: of the versions that exist.
        computed: MACs of ours, for each density.
        values: that must move: weights, inputs, outputs.
    """

    dense: dict[str, Callable[[], Tensor]]
    ours: dict[float, Callable[[], Tensor]]
    macs: float
    computed: dict[float, float]
    values: float


@dataclass(frozen=True)
class Case:
    """One layer: ``build(setting, generator, *size)``, where size begins with (N, C, O, H)."""

    group: str
    build: Callable[..., Problem]
    size: tuple[int, ...]
    note: str
    mask: str = "-"

    @property
    def name(self) -> str:
        n, c, o, h = self.size[:4]
        return f"{n},{c},{o},{h} {self.note}"


SIZES = ((8, 64, 64, 56), (8, 128, 128, 28), (8, 256, 256, 14), (8, 512, 512, 7))


def all_cases(quick: bool = False) -> list[Case]:
    sizes = SIZES[1:3] if quick else SIZES
    cases = [Case("sample weights", sample_weights, size, "3x3") for size in sizes]
    cases += [
        Case("CondConv", mixed_weights, (*s, experts), f"3x3, {experts} kernels")
        for s in sizes
        for experts in (4, 8)
    ]
    cases += [
        Case("DRConv", regions, (*size, 8), "3x3, 8 regions", mask="regions of 7x7 pixels") for size in sizes
    ]
    cases += [Case("CGNet", output_mask, size, "3x3, 3/4 of the inputs", mask="random") for size in sizes]
    cases += [
        Case("involution", local_filters, (*size, 16, 7), "7x7, 16 channels a kernel") for size in sizes[:3]
    ]
    return cases + [Case("dynamic filters", local_filters, (*size, 1, 3), "3x3") for size in sizes[:2]]


# --------------------------------------------------------------------------------------- problems


def _random(setting: Setting, generator, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator) * scale).to(**setting.options)


def _conv_tensors(setting: Setting, generator, n: int, c: int, o: int, h: int, *weights: int):
    x = _random(setting, generator, n, c, h, h)
    return x, _random(setting, generator, *weights, o, c, 3, 3, scale=(9 * c) ** -0.5)


def _versions(setting: Setting, functions: dict[str, Callable], x: Tensor) -> dict[str, Callable]:
    """Each function of ``x`` in {NCHW, channels_last} x {eager, torch.compile}."""
    if setting.compiled:
        torch._dynamo.reset()
        functions |= {f"{name}, compiled": torch.compile(f, dynamic=False) for name, f in functions.items()}
    last = x.contiguous(memory_format=torch.channels_last)
    found = {}
    for name, function in functions.items():
        found[f"{name}, NCHW"] = bound(function, x)
        found[f"{name}, channels_last"] = bound(function, last)
    return found


def _moved(*tensors: Tensor) -> int:
    return sum(t.numel() for t in tensors)


def _conv_problem(
    setting: Setting,
    functions: dict[str, Callable],
    x: Tensor,
    weight: Tensor,
    ours: Callable,
    existing: int = 1,
) -> Problem:
    """A 3x3 convolution ``ours(x)``, whose versions that exist do ``existing`` times as much."""
    n, c, h, w = x.shape
    o = weight.shape[-4]
    last, macs = x.contiguous(memory_format=torch.channels_last), n * h * w * 9.0 * c * o
    calls, values = {1.0: bound(ours, last)}, _moved(x, weight) + n * o * h * w
    return Problem(_versions(setting, functions, x), calls, macs * existing, {1.0: macs}, values)


def grouped_trick(x: Tensor, weight: Tensor) -> Tensor:
    """A batch of convolutions ``weight [N, O, C, 3, 3]`` as one of N groups, as public code has it."""
    n, c, h, w = x.shape
    out = F.conv2d(x.reshape(1, n * c, h, w), weight.flatten(0, 1), padding=1, groups=n)
    return out.view(n, -1, h, w)


def one_by_one(x: Tensor, weight: Tensor) -> Tensor:
    """A call for each sample."""
    return torch.cat([F.conv2d(x[i : i + 1], weight[i], padding=1) for i in range(x.shape[0])])


def sample_weights(setting: Setting, generator, n, c, o, h) -> Problem:
    x, weight = _conv_tensors(setting, generator, n, c, o, h, n)
    functions = {
        "grouped": lambda x: grouped_trick(x, weight),
        "a call a sample": lambda x: one_by_one(x, weight),
    }
    ours = lambda x: ops.sample_conv2d(x, weight, padding=1)  # noqa: E731
    return _conv_problem(setting, functions, x, weight, ours)


def mixed_weights(setting: Setting, generator, n, c, o, h, experts) -> Problem:
    x, weights = _conv_tensors(setting, generator, n, c, o, h, experts)
    mix = torch.rand(n, experts, generator=generator).to(x)

    def mixed():
        return (mix @ weights.flatten(1)).view(n, o, c, 3, 3)

    def outputs(x):
        every = F.conv2d(x, weights.flatten(0, 1), padding=1)
        return torch.einsum("ne,neohw->nohw", mix, every.unflatten(1, (experts, o)))

    functions = {
        "grouped": lambda x: grouped_trick(x, mixed()),
        "a call a sample": lambda x: one_by_one(x, mixed()),
        "outputs mixed": outputs,
    }
    ours = lambda x: ops.mixed_conv2d(x, weights, mix, padding=1)  # noqa: E731
    return _conv_problem(setting, functions, x, weights, ours)


def regions(setting: Setting, generator, n, c, o, h, count) -> Problem:
    """A guide map of ``count`` regions; the version that exists computes every region and selects."""
    x, weights = _conv_tensors(setting, generator, n, c, o, h, n, count)
    cells = torch.randint(0, count, (n, 1, (h + 6) // 7, (h + 6) // 7), generator=generator)
    region = F.interpolate(cells.float(), size=(h, h))[:, 0].long().to(setting.device)
    chosen = region[:, None, None].expand(n, 1, o, h, h)

    def select(x, conv):
        every = conv(x, weights.flatten(1, 2)).view(n, count, o, h, h)
        return every.gather(1, chosen)[:, 0]

    functions = {
        "grouped": lambda x: select(x, grouped_trick),
        "a call a sample": lambda x: select(x, one_by_one),
    }
    ours = lambda x: ops.region_conv2d(x, weights, region, padding=1)  # noqa: E731
    return _conv_problem(setting, functions, x, weights, ours, existing=count)


def output_mask(setting: Setting, generator, n, c, o, h) -> Problem:
    """CGNet's second convolution: the last three quarters of the inputs, where the partial sum passed."""
    x, weight = _conv_tensors(setting, generator, n, c, o, h)
    first = c // 4
    weight = weight[:, first:].contiguous()
    partial = _random(setting, generator, n, o, h, h)
    last = {"x": x.contiguous(memory_format=torch.channels_last)}
    last["partial"] = partial.contiguous(memory_format=torch.channels_last)
    ours, computed, macs = {}, {}, n * h * h * 9.0 * (c - first) * o
    draw = torch.rand(n, o, h, h, generator=generator)

    def dense(rest):
        return torch.where(mask, F.conv2d(rest, weight, padding=1) + partial, partial)

    for density in (0.4, 0.2, 0.1):
        mask = (draw < density).to(setting.device).contiguous(memory_format=torch.channels_last)
        computed[density] = macs * float(mask.double().mean())
        ours[density] = bound(
            lambda m: ops.masked_output_conv2d(
                last["x"], weight, m, last["partial"], padding=1, in_channels=(first, c)
            ),
            mask,
        )
    rest = x[:, first:].contiguous()
    values = _moved(rest, weight, partial, partial)  # the sums are read and written
    return Problem(_versions(setting, {"dense": dense}, rest), ours, macs, computed, values)


def local_filters(setting: Setting, generator, n, c, o, h, share, kernel) -> Problem:
    """A kernel for each pixel, which ``share`` channels have in common."""
    x = _random(setting, generator, n, c, h, h)
    groups, taps = c // share, kernel * kernel
    kernels = _random(setting, generator, n, groups * taps, h, h, scale=1 / kernel)

    def unfolded(x):
        patches = F.unfold(x, kernel, padding=kernel // 2).view(n, groups, share, taps, h * h)
        return torch.einsum("ngctp,ngtp->ngcp", patches, kernels.view(n, groups, taps, -1)).reshape(
            n, c, h, h
        )

    def shifted(x):
        wide = F.pad(x, (kernel // 2,) * 4).view(n, groups, share, h + kernel - 1, h + kernel - 1)
        taps_of = kernels.view(n, groups, 1, taps, h, h)
        out = 0
        for t in range(taps):
            out = out + taps_of[:, :, :, t] * wide[..., t // kernel :, t % kernel :][..., :h, :h]
        return out.reshape(n, c, h, h)

    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, kernels)]
    macs = n * h * h * float(taps * c)
    ours = {1.0: lambda: ops.local_conv2d(*last, kernel, padding=kernel // 2, groups=groups)}
    functions = {"unfold, einsum": unfolded, "shifted copies": shifted}
    return Problem(_versions(setting, functions, x), ours, macs, {1.0: macs}, _moved(x, kernels, x))


# ---------------------------------------------------------------------------------------- running


def measure(case: Case, setting: Setting) -> list[Row]:
    """The rows of one layer, timed in one interleaved run with the versions that exist."""
    # made outside inference mode, so that the weights have a version and their packed forms are kept
    problem = case.build(setting, torch.Generator().manual_seed(0), *case.size)
    with torch.inference_mode():
        times = compare(problem.dense, problem.ours, setting)
    return [
        times.row(
            density,
            megabytes=problem.values * setting.dtype.itemsize / 1e6,
            suite="channels",
            group=case.group,
            case=case.name,
            mask=case.mask,
            density=density,
            gmacs=problem.macs / 1e9,
            computed_gmacs=problem.computed[density] / 1e9,
        )
        for density in problem.ours
    ]
