"""Single convolutions: the layers of ResNet-50, MobileNetV2, RegNetY and SBNet's table, and large maps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dynops import PixelPlan, ops

from . import masks
from .report import Row
from .timing import Budget, Comparison, compare, progress


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


@dataclass(frozen=True)
class Setting:
    """What one run holds fixed."""

    device: torch.device
    dtype: torch.dtype
    densities: tuple[float, ...] = (0.5, 0.25, 0.1)
    backward: bool = False
    compiled: bool = True
    compiled_formats: tuple[str, ...] = ("NCHW", "channels_last")
    break_even: bool = True
    variants: bool = True  # also rows with the plan reused and on packed rows, for random masks
    budget: Budget = field(default_factory=Budget)
    mask_kinds: tuple[str, ...] = ("random", "square", "photo")
    graph: bool = (
        False  # dense replayed from CUDA graphs; ours too, in the capacity form, where that is faster
    )

    @property
    def mode(self) -> str:
        return "forward+backward" if self.backward else "forward"


BREAK_EVEN_DENSITIES = (0.75, 0.9, 1.0)


def run(cases: list[Case], setting: Setting, label: str = "layers") -> list[Row]:
    rows = []
    for case in progress(cases, label, "layer"):
        rows += measure(case, setting)
    return rows


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
        for variant, call in _ours(case, setting, last, mask, plan, with_variants).items():
            plans[kind, density, variant] = plan
            ours[kind, density, variant] = call
        if setting.graph:
            replays[kind, density, "plain"] = _capturable(case, last, mask)
    with torch.inference_mode(not setting.backward):
        dense = dense_versions(case, setting, tensors)
        times = compare(dense, ours, setting.device, setting.budget, replays if setting.graph else None)
    return [_row(case, setting, key, plans[key], times) for key in ours]


def _masks_to_measure(case: Case, setting: Setting) -> list[tuple[str, float]]:
    kinds = [kind for kind in case.mask_kinds if kind in (*setting.mask_kinds, "top-left")]
    pairs = [(kind, d) for kind in kinds for d in case.densities or setting.densities]
    if setting.break_even and "random" in kinds and case.densities is None:
        pairs += [("random", d) for d in BREAK_EVEN_DENSITIES if ("random", d) not in pairs]
    return pairs


def random_tensors(case: Case, setting: Setting, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """``(x [N, C, H, W], weight [O, C/groups, k, k], grad [N, O, H', W'])``, made outside inference mode
    so that the weight has a version and its packed form is kept, as a layer's is."""
    fan_in = case.c // case.groups * case.kernel**2
    where = {"generator": generator, "device": generator.device}
    x = torch.randn(case.n, case.c, case.h, case.w, **where)
    weight = torch.randn(case.o, case.c // case.groups, case.kernel, case.kernel, **where)
    grad = torch.randn(case.n, case.o, *case.out_size, **where) if setting.backward else x[:0]
    options = {"device": setting.device, "dtype": setting.dtype}
    return x.to(**options), weight.div_(fan_in**0.5).to(**options), grad.to(**options)


def on_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """A generator for tensors: on a GPU its own there, since a CPU takes seconds for a large map."""
    return torch.Generator(device).manual_seed(0) if device.type == "cuda" else generator


def with_backward(call, grad: Tensor, *inputs: Tensor):
    """A call that also computes the gradients of ``inputs``."""

    def forward_and_backward():
        return torch.autograd.grad(call(), inputs, grad)

    return forward_and_backward


def dense_versions(case: Case, setting: Setting, tensors) -> dict:
    """{NCHW, channels_last} x {eager, torch.compile}; channels_last turns the weight too, as a model's."""
    arguments = {"stride": case.stride, "padding": case.padding, "groups": case.groups}

    def conv(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, **arguments)

    functions = {"eager": conv}
    if setting.compiled:
        torch._dynamo.reset()  # a recompilation limit is counted over all layers otherwise
        functions["compiled"] = torch.compile(conv, dynamic=False)
    formats = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
    dense = {}
    for format_name, memory_format in formats.items():
        x, weight, grad = (t.contiguous(memory_format=memory_format).detach() for t in tensors)
        x.requires_grad_(setting.backward), weight.requires_grad_(setting.backward)
        for function_name, function in functions.items():
            if function_name == "compiled" and format_name not in setting.compiled_formats:
                continue
            call = _bound(function, x, weight)
            name = f"{format_name} {function_name}"
            dense[name] = with_backward(call, grad, x, weight) if setting.backward else call
    return dense


def _bound(function, *arguments):
    return lambda: function(*arguments)


def _ours(case: Case, setting: Setting, tensors, mask: Tensor, plan: PixelPlan, with_variants: bool) -> dict:
    """{variant: call}. "plain" is a mask and a dense map in, a dense map out; targets count only it."""
    x, weight, grad = (t.contiguous(memory_format=torch.channels_last).detach() for t in tensors)
    x.requires_grad_(setting.backward), weight.requires_grad_(setting.backward)
    arguments = {"stride": case.stride, "padding": case.padding, "groups": case.groups}

    def plain():
        return ops.sparse_conv2d(x, weight, None, PixelPlan.from_mask(mask), **arguments)

    if setting.backward:
        return {"plain": with_backward(plain, grad, x, weight)}
    calls = {"plain": plain}
    if with_variants:
        calls["plan reused"] = lambda: ops.sparse_conv2d(x, weight, None, plan, **arguments)
        calls["packed out"] = lambda: ops.packed_conv2d(
            x, weight, None, None, PixelPlan.from_mask(mask), **arguments
        )
        if case.kernel == 1 and case.stride == 1:
            rows = ops.gather_pixels(x, plan)
            calls["packed in and out, plan reused"] = lambda: ops.packed_conv2d(
                rows, weight, None, plan, plan
            )
    return calls


def _capturable(case: Case, tensors, mask: Tensor):
    """What "plain" does, in the form that a CUDA graph can capture: the plan has room for every pixel."""
    x, weight, _ = tensors
    arguments = {"stride": case.stride, "padding": case.padding, "groups": case.groups}
    return lambda: ops.sparse_conv2d(
        x, weight, None, PixelPlan.from_mask(mask, capacity=mask.numel()), **arguments
    )


def _row(case: Case, setting: Setting, key, plan: PixelPlan, times: Comparison) -> Row:
    kind, density, variant = key
    computed = case.dense_macs * plan.num_rows / max(plan.num_pixels, 1)
    return Row(
        suite="layers",
        group=case.group,
        case=case.name,
        mask=kind,
        density=density,
        variant=variant,
        break_even_only=density not in (case.densities or setting.densities),
        mode=setting.mode,
        dtype=str(setting.dtype).removeprefix("torch."),
        gmacs=case.dense_macs / 1e9,
        computed_gmacs=computed / 1e9,
        dense_ms=times.dense_ms,
        dense_name=times.dense_name,
        ours_ms=times.ours[key],
        dense_all=times.dense_all,
        **times.versions(key),
    )


def one_call(case: Case, setting: Setting, contender: str, kind: str, density: float):
    """A single contender, for measuring its memory: "ours" (plain) or a memory format of dense eager."""
    generator = torch.Generator().manual_seed(0)
    tensors = random_tensors(case, setting, generator)
    if contender != "ours":
        return dense_versions(case, setting, tensors)[f"{contender} eager"]
    mask = masks.MASKS[kind](case.n, *case.out_size, density, generator).to(setting.device)
    return _ours(case, setting, tensors, mask, PixelPlan.from_mask(mask), False)["plain"]
