"""Convolutions on a subset of channels, another one for each sample: FBS-, RNP-, slimmable- and DGC-shaped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynops import ChannelPlan, ops

from ..harness.compare import compare
from ..harness.contenders import bound, with_backward
from ..harness.rows import Row
from ..harness.setting import Setting
from ..harness.theory import Work
from ..pixels import layers
from ..pixels.layers import conv_versions, leaves_of, on_device, random_tensors

# (N, C, O, H) of the 3x3 layers that the project's targets are stated for
TARGET_SIZES = ((8, 128, 128, 28), (8, 256, 256, 14), (1, 256, 256, 28), (16, 64, 64, 56), (8, 512, 512, 7))


@dataclass(frozen=True)
class Case:
    """One convolution, and how the live channels of a sample are drawn; ``live``: the share of them."""

    group: str
    conv: layers.Case
    sides: str = "in and out"
    kind: str = "top-k"  # of CHOICES
    live: tuple[float, ...] = (0.5,)
    gated: bool = False  # a soft gate [N, O] and ReLU follow, for the dense layer too (FBS)
    packed: bool = False  # the input comes, and the output stays, packed

    @property
    def name(self) -> str:
        return self.conv.name


# --------------------------------------------------------------------------------- live channels


def top_k(samples: int, channels: int, live: float, generator) -> Tensor:
    """Exactly ``live * channels`` random channels, others in each sample."""
    scores = torch.rand(samples, channels, generator=generator)
    kept = scores.topk(round(live * channels), 1).indices
    return torch.zeros(samples, channels, dtype=torch.bool).scatter_(1, kept, True)


def ragged(samples: int, channels: int, live: float, generator) -> Tensor:
    """Each channel by itself with probability ``live``: lists of different lengths."""
    return torch.rand(samples, channels, generator=generator) < live


def in_groups(samples: int, channels: int, live: float, generator) -> Tensor:
    """Random groups of 8 adjacent channels (RNP)."""
    return top_k(samples, channels // 8, live, generator).repeat_interleave(8, 1)


def widths(samples: int, channels: int, live: float, generator) -> Tensor:
    """Prefixes of half to one and a half times ``live``, which the samples share out evenly (slimmable)."""
    share = torch.linspace(0.5, 1.5, samples) if samples > 1 else torch.ones(1)
    count = (share[torch.randperm(samples, generator=generator)] * live * channels).round().clamp(1, channels)
    return torch.arange(channels) < count[:, None]


def one_width(samples: int, channels: int, live: float, generator) -> Tensor:
    """One prefix for all samples."""
    return (torch.arange(channels) < round(live * channels)).expand(samples, -1)


CHOICES = {
    "top-k": top_k,
    "ragged": ragged,
    "groups of 8": in_groups,
    "widths": widths,
    "one width": one_width,
}


def plan_maker(kind: str, mask: Tensor | None) -> Callable[[], ChannelPlan | None]:
    """A function that makes the plan of a gate's mask, or of widths, each time that it is called."""
    if mask is None:
        return lambda: None
    if kind in ("widths", "one width"):
        count, channels = mask.sum(1), mask.shape[1]
        width = int(count[0]) if kind == "one width" else count
        return lambda: ChannelPlan.prefix(width, channels)
    return lambda: ChannelPlan.from_mask(mask)


# ------------------------------------------------------------------------------------------ cases


def _conv(n: int, c: int, o: int, h: int, kernel: int = 3, **rest) -> layers.Case:
    return layers.Case("", n, c, o, h, h, kernel, **rest)


def all_cases(quick: bool = False) -> list[Case]:
    sizes = TARGET_SIZES[:2] if quick else TARGET_SIZES
    convs = [_conv(*size) for size in sizes]
    cases = [Case("half in, half out", conv) for conv in convs]
    cases += [Case("half out", conv, "out") for conv in convs]
    cases += [Case("half in", conv, "in") for conv in convs]
    cases += [Case("widths of samples", conv, kind="widths") for conv in convs]
    cases += [Case("one width", conv, kind="one width", live=(0.75, 0.5, 0.25)) for conv in convs]
    if quick:
        return cases
    cases += [Case("ragged", conv, kind="ragged", live=(0.75, 0.5, 0.25)) for conv in convs]
    cases += [Case("groups of 8", conv, kind="groups of 8") for conv in convs]
    cases += [Case("FBS", conv, gated=True, live=(0.5, 0.25)) for conv in _resnet18()]
    cases += [Case("FBS packed", conv, gated=True, packed=True, live=(0.5, 0.25)) for conv in _resnet18()]
    cases += [
        Case("half, 1x1", _conv(8, c, o, h, 1)) for c, o, h in ((256, 64, 56), (64, 256, 56), (512, 512, 14))
    ]
    cases += [
        Case("half, strided", _conv(8, c, 2 * c, h, stride=2)) for c, h in ((64, 56), (128, 28), (256, 14))
    ]
    depthwise = ((96, 112, 2), (144, 56, 1), (384, 14, 1), (960, 7, 1))
    return cases + [
        Case("half out, depthwise", _conv(8, c, c, h, stride=s, groups=c), "out") for c, h, s in depthwise
    ]


def headline_cases() -> list[Case]:
    """Half of the channels on both sides, and a width for each sample."""
    conv = _conv(8, 128, 128, 28)
    return [Case("half in, half out", conv), Case("widths of samples", conv, kind="widths")]


def _resnet18() -> list[layers.Case]:
    """The 3x3 layers of ResNet-18, which FBS gates, at batch 8."""
    return [_conv(8, c, c, h) for c, h in ((64, 56), (128, 28), (256, 14), (512, 7))]


# ---------------------------------------------------------------------------------------- running


def measure(case: Case, setting: Setting) -> list[Row]:
    """The rows of one layer: every share of live channels, timed in one interleaved run with the dense layer."""
    if setting.backward and (case.gated or case.packed):
        return []
    generator = torch.Generator().manual_seed(0)
    tensors = random_tensors(case.conv, setting, on_device(generator, setting.device))
    gate = torch.rand(case.conv.n, case.conv.o, generator=generator).to(tensors[0]) if case.gated else None
    ours, works = {}, {}
    for live in case.live:
        masks = live_channels(case, live, generator)
        works[live] = live_work(case, *masks)
        ours[live] = our_call(case, setting, tensors, gate, *masks)
    with torch.inference_mode(not setting.backward):
        dense = conv_versions(case.conv, setting, tensors)
        if gate is not None:
            dense = {name: bound(gated, call, gate) for name, call in dense.items()}
        times = compare(dense, ours, setting, replays=ours)  # a channel plan never waits for the device
    return [
        times.row(
            live,
            megabytes=work.values * setting.dtype.itemsize / 1e6,
            suite="channels",
            group=case.group,
            case=case.name,
            mask=f"{case.kind}, {case.sides}",
            density=live,
            gmacs=case.conv.dense_macs / 1e9,
            computed_gmacs=work.macs / 1e9,
        )
        for live, work in works.items()
    ]


def live_channels(case: Case, live: float, generator) -> tuple[Tensor | None, Tensor | None]:
    """The live input and output channels, bool ``[N, C]`` and ``[N, O]``, or None for all."""
    choose, conv = CHOICES[case.kind], case.conv
    inputs = choose(conv.n, conv.c, live, generator) if "in" in case.sides else None
    outputs = choose(conv.n, conv.o, live, generator) if "out" in case.sides else None
    return inputs, outputs


def live_work(case: Case, inputs: Tensor | None, outputs: Tensor | None) -> Work:
    """The MACs of the live (input, output) pairs of each sample, and the values that must move.

    Those are the weights of pairs that are live in some sample, the live inputs, and the output: the whole map, or its
    live channels where it stays packed. A depthwise layer has a pair for each live output.
    """
    conv = case.conv
    inputs = torch.ones(conv.n, conv.c, dtype=torch.bool) if inputs is None else inputs
    outputs = torch.ones(conv.n, conv.o, dtype=torch.bool) if outputs is None else outputs
    pairs = float((inputs.sum(1) * outputs.sum(1)).sum()) / (conv.n * conv.c * conv.o)
    weights = conv.weights * float(inputs.any(0).float().mean() * outputs.any(0).float().mean())
    read = int(inputs.sum()) * conv.h * conv.w
    written = conv.outputs * float(outputs.float().mean()) if case.packed else conv.outputs
    return Work(conv.dense_macs * pairs, weights + read + written)


def gated(call: Callable, gate: Tensor) -> Tensor:
    return F.relu(call() * gate[:, :, None, None])


def our_call(case: Case, setting: Setting, tensors, gate: Tensor | None, inputs, outputs) -> Callable:
    """A mask and a dense map in, a dense map out; or packed maps, with the input's plan made before."""
    x, weight, grad = leaves_of(tensors, torch.channels_last, setting)
    options = dict(case.conv.arguments)
    if gate is not None:
        options |= {"activation": "relu", "scale": gate}
    to_device = [mask if mask is None else mask.to(setting.device) for mask in (inputs, outputs)]
    in_plan, out_plan = (plan_maker(case.kind, mask) for mask in to_device)
    if case.packed:
        plan = in_plan()
        rows = ops.gather_channels(x, plan)
        return lambda: ops.packed_channel_conv2d(rows, weight, None, plan, out_plan(), **options)

    def call() -> Tensor:
        return ops.channel_conv2d(x, weight, None, in_plan(), out_plan(), **options)

    return with_backward(call, (x, weight), grad) if setting.backward else call
