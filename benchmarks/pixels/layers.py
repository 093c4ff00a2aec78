"""Single convolutions: the layers of ResNet-50, MobileNetV2, RegNetY and SBNet's table, and large maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynops import PixelPlan, ops
from dynops.geometry import ConvGeometry

from ..harness import masks
from ..harness.compare import Comparison, compare
from ..harness.contenders import bound, dense_versions, with_backward
from ..harness.rows import Row
from ..harness.setting import Setting


@dataclass(frozen=True)
class Case:
    """One convolution: input ``[n, c, h, w]``, ``o`` output channels. Padding keeps H / stride."""

    group: str
    n: int
    c: int
    o: int
    h: int
    w: int
    kernel: int
    stride: int = 1
    groups: int = 1
    mask_kinds: tuple[str, ...] = ("random", "square", "photo")
    densities: tuple[float, ...] | None = None  # instead of the run's

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> tuple[int, int]:
        return tuple((s + 2 * self.padding - self.kernel) // self.stride + 1 for s in (self.h, self.w))

    @property
    def dense_macs(self) -> int:
        h, w = self.out_size
        return self.n * h * w * self.kernel**2 * self.c * self.o // self.groups

    @property
    def arguments(self) -> dict:
        """Arguments of ``conv2d``."""
        return {"stride": self.stride, "padding": self.padding, "groups": self.groups}

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.o * (self.c // self.groups) * self.kernel**2

    @property
    def outputs(self) -> int:
        """Elements of the output."""
        return self.n * self.o * self.out_size[0] * self.out_size[1]

    def geometry(self) -> ConvGeometry:
        k, s, p = (self.kernel,) * 2, (self.stride,) * 2, (self.padding,) * 2
        return ConvGeometry(self.n, self.h, self.w, *self.out_size, *k, *s, *p, 1, 1, self.groups, 0)

    @property
    def name(self) -> str:
        text = f"{self.n},{self.c},{self.o},{self.h}"
        text += f"x{self.w}" if self.w != self.h else ""
        text += f" {self.kernel}x{self.kernel}"
        text += f" s{self.stride}" if self.stride > 1 else ""
        return text + (f" g{self.groups}" if self.groups > 1 else "")


SIZES = (56, 28, 14, 7)
MID = (64, 128, 256, 512)
OUT = (256, 512, 1024, 2048)


def _resnet50(n: int) -> list[Case]:
    """Every distinct convolution of the bottlenecks; the stride sits on the 3x3, as in torchvision."""
    cases = []
    for i, (size, mid, out) in enumerate(zip(SIZES, MID, OUT, strict=True)):
        cases += [Case("3x3", n, mid, mid, size, size, 3)]
        cases += [Case("1x1", n, out, mid, size, size, 1), Case("1x1", n, mid, out, size, size, 1)]
        if i:
            cases += [Case("strided", n, mid, mid, size * 2, size * 2, 3, 2)]
            cases += [Case("strided", n, OUT[i - 1], out, size * 2, size * 2, 1, 2)]
    return cases


def _maps() -> list[Case]:
    return [Case("200x200", 1, c, c, 200, 200, k) for c in (64, 128) for k in (3, 1)]


def _depthwise(n: int) -> list[Case]:
    """MobileNetV2: (channels, size, stride)."""
    table = [(32, 112, 1), (96, 112, 2), (144, 56, 1), (144, 56, 2), (192, 28, 1), (192, 28, 2)]
    table += [(384, 14, 1), (576, 14, 1), (576, 14, 2), (960, 7, 1)]
    return [Case("depthwise", n, c, c, s, s, 3, stride, groups=c) for c, s, stride in table]


def _regnety() -> list[Case]:
    """RegNetY-400M (group width 8) and 800M (16)."""
    widths = {8: (48, 104, 208, 440), 16: (64, 144, 320, 784)}
    return [
        Case(f"width {width}", 1, c, c, size, size, 3, groups=c // width)
        for width, channels in widths.items()
        for c, size in zip(channels, SIZES, strict=True)
    ]


def _sbnet() -> list[Case]:
    """SBNet's ResNet-50 table [H, W, C, K]: the 3x3 K to K, at the sparsities of its paper."""
    table = [(400, 700, 64), (200, 350, 128), (100, 175, 256), (50, 88, 512)]
    densities = (0.4, 0.3, 0.2, 0.1, 0.05, 0.01)
    kinds = ("top-left", "random")
    return [Case("SBNet", 1, k, k, h, w, 3, mask_kinds=kinds, densities=densities) for h, w, k in table]


# The groups that the project's targets are stated for; the others are reported beside them.
TARGET_GROUPS = ("3x3", "1x1", "strided", "200x200")


def all_cases(quick: bool = False) -> list[Case]:
    if quick:
        return _resnet50(1) + _maps()[:2] + _depthwise(1)[2:6]
    return _resnet50(1) + _resnet50(8) + _maps() + _depthwise(1) + _depthwise(8) + _regnety() + _sbnet()


def headline_cases() -> list[Case]:
    """One layer of each kind, small and large."""
    keep = {("3x3", 56), ("3x3", 28), ("3x3", 14), ("3x3", 7), ("1x1", 56), ("strided", 28)}
    found = {}
    for case in _resnet50(1):
        if (case.group, case.h) in keep:
            found.setdefault((case.group, case.h), case)
    return [*found.values(), _maps()[0], _depthwise(1)[2]]


BREAK_EVEN_DENSITIES = (0.75, 0.9, 1.0)


def measure(case: Case, setting: Setting) -> list[Row]:
    """The rows of one layer: every mask and density, timed in one interleaved run with the dense layer."""
    generator = torch.Generator().manual_seed(0)
    tensors = random_tensors(case, setting, on_device(generator, setting.device))
    last = tuple(t.contiguous(memory_format=torch.channels_last) for t in tensors)
    plans, ours, replays = {}, {}, {}
    for kind, density in _masks_to_measure(case, setting):
        mask = masks.MASKS[kind](case.n, *case.out_size, density, generator).to(setting.device)
        plan = PixelPlan.from_mask(mask)
        with_variants = setting.variants and kind == "random" and density in setting.densities
        for variant, call in our_versions(case, setting, last, mask, plan, with_variants).items():
            plans[kind, density, variant] = plan
            ours[kind, density, variant] = call
        replays[kind, density, "plain"] = _capturable(case, last, mask)
    with torch.inference_mode(not setting.backward):
        times = compare(conv_versions(case, setting, tensors), ours, setting, replays=replays)
    return [_row(case, setting, key, plans[key], times) for key in ours]


def _masks_to_measure(case: Case, setting: Setting) -> list[tuple[str, float]]:
    kinds = [kind for kind in case.mask_kinds if kind in (*setting.mask_kinds, "top-left")]
    pairs = [(kind, d) for kind in kinds for d in case.densities or setting.densities]
    if setting.break_even and "random" in kinds and case.densities is None:
        pairs += [("random", d) for d in BREAK_EVEN_DENSITIES if ("random", d) not in pairs]
    return pairs


def random_tensors(case: Case, setting: Setting, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """``(x [N, C, H, W], weight [O, C/groups, k, k], grad [N, O, H', W'])``, made outside inference mode.

    The weight so has a version, and its packed form is kept as a layer's is.
    """
    fan_in = case.c // case.groups * case.kernel**2
    where = {"generator": generator, "device": generator.device}
    x = torch.randn(case.n, case.c, case.h, case.w, **where)
    weight = torch.randn(case.o, case.c // case.groups, case.kernel, case.kernel, **where)
    grad = torch.randn(case.n, case.o, *case.out_size, **where) if setting.backward else x[:0]
    return x.to(**setting.options), weight.div_(fan_in**0.5).to(**setting.options), grad.to(**setting.options)


def on_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator for tensors: on a GPU one of its own, since a CPU takes seconds for a large map."""
    return torch.Generator(device).manual_seed(0) if device.type == "cuda" else generator


def leaves_of(tensors, memory_format: torch.memory_format, setting: Setting) -> list[Tensor]:
    """``[x, weight, grad]`` in a memory format; x and weight ask for gradients where the setting has a backward pass."""
    x, weight, grad = (t.contiguous(memory_format=memory_format).detach() for t in tensors)
    return [x.requires_grad_(setting.backward), weight.requires_grad_(setting.backward), grad]


def conv_versions(case: Case, setting: Setting, tensors) -> dict[str, Callable]:
    """The dense versions of the layer; channels_last turns the weight too, as a model's."""

    def conv(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, **case.arguments)

    def make(memory_format: torch.memory_format):
        x, weight, grad = leaves_of(tensors, memory_format, setting)
        return conv, (x, weight), (x, weight), grad

    return dense_versions(make, setting)


def our_versions(
    case: Case, setting: Setting, tensors, mask: Tensor, plan: PixelPlan, with_variants: bool
) -> dict[str, Callable]:
    """{variant: call}. "plain" is a mask and a dense map in, a dense map out; targets count only it."""
    x, weight, grad = leaves_of(tensors, torch.channels_last, setting)

    def plain():
        return ops.sparse_conv2d(x, weight, None, PixelPlan.from_mask(mask), **case.arguments)

    def packed_out():
        return ops.packed_conv2d(x, weight, None, None, PixelPlan.from_mask(mask), **case.arguments)

    if setting.backward:
        return {"plain": with_backward(plain, (x, weight), grad)}
    calls = {"plain": plain}
    if with_variants:
        calls["plan reused"] = bound(ops.sparse_conv2d, x, weight, None, plan, **case.arguments)
        calls["packed out"] = packed_out
        if case.kernel == 1 and case.stride == 1:
            rows = ops.gather_pixels(x, plan)
            calls["packed in and out, plan reused"] = bound(ops.packed_conv2d, rows, weight, None, plan, plan)
    return calls


def _capturable(case: Case, tensors, mask: Tensor) -> Callable:
    """The call "plain" in the form that a CUDA graph can capture: the plan has room for every pixel, and expects as many as
    masks of this kind have."""
    x, weight, _ = tensors
    sizes = mask.numel(), int(mask.sum())
    return lambda: ops.sparse_conv2d(x, weight, None, PixelPlan.from_mask(mask, *sizes), **case.arguments)


def _row(case: Case, setting: Setting, key, plan: PixelPlan, times: Comparison) -> Row:
    kind, density, variant = key
    share = plan.num_rows / max(plan.num_pixels, 1)
    return times.row(
        key,
        megabytes=_megabytes(case, setting, plan, variant) if setting.roofline else 0.0,
        suite="layers",
        group=case.group,
        case=case.name,
        mask=kind,
        density=density,
        variant=variant,
        break_even_only=density not in (case.densities or setting.densities),
        gmacs=case.dense_macs / 1e9,
        computed_gmacs=case.dense_macs * share / 1e9,
    )


def _megabytes(case: Case, setting: Setting, plan: PixelPlan, variant: str) -> float:
    """The weight, the input pixels that active outputs read, and the output: the whole map, or the packed rows."""
    read = plan.needed_by(case.geometry()).num_rows * case.c
    written = plan.num_rows * case.o if variant.startswith("packed") else case.outputs
    return (case.weights + read + written) * setting.dtype.itemsize / 1e6


def one_call(case: Case, setting: Setting, contender: str, kind: str, density: float) -> Callable:
    """A single contender, for measuring its memory: "ours" (plain) or a memory format of dense eager."""
    generator = torch.Generator().manual_seed(0)
    tensors = random_tensors(case, setting, generator)
    if contender != "ours":
        return conv_versions(case, setting, tensors)[f"{contender} eager"]
    mask = masks.MASKS[kind](case.n, *case.out_size, density, generator).to(setting.device)
    return our_versions(case, setting, tensors, mask, PixelPlan.from_mask(mask), False)["plain"]
