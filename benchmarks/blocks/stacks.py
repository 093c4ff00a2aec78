"""Stacks of layers on active blocks: SBNet's table, stacks that need the tile path, scattered masks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dynops
from dynops import BlockPlan, PixelPlan
from dynops.nn import SparseBlocks, SparseConv2d, SparseSequential

from ..harness import masks
from ..harness.compare import compare
from ..harness.contenders import bound, calibrated, with_backward
from ..harness.rows import Row
from ..harness.setting import Setting
from ..harness.theory import Work, chain_macs, chain_work, output_shape
from ..pixels.layers import BREAK_EVEN_DENSITIES, on_device
from ..pixels.model import network_versions
from ..resnet import Bottleneck

PIXELS = "pixel path"  # the variant that computes the mask's pixels instead of its blocks


@dataclass(frozen=True)
class Case:
    """A stack of layers, ``build(channels)``, on an input ``[n, channels, h, w]``."""

    group: str
    kind: str
    build: Callable[[int], nn.Module]
    channels: int
    h: int
    w: int
    n: int = 1
    mask_kinds: tuple[str, ...] = ("top-left",)
    densities: tuple[float, ...] = (0.5, 0.2, 0.1)
    block: int | None = None  # None: what dynops.suggest_block_size chooses for each mask
    path: str | None = None

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.n},{self.channels},{self.h}x{self.w}"

    @property
    def in_shape(self) -> tuple[int, int, int]:
        return self.n, self.h, self.w

    def module(self) -> nn.Module:
        """The stack with random weights in eval mode; its norms' statistics are those of normal noise."""
        torch.manual_seed(0)
        size = [min(side, 64) for side in (self.h, self.w)]
        return calibrated(self.build(self.channels), torch.randn(2, self.channels, *size))


def conv3x3(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False)


def bottleneck(channels: int) -> nn.Module:
    """1x1 down to a quarter, 3x3, 1x1 up, norms, ReLU and the residual sum."""
    return Bottleneck(channels, channels // Bottleneck.expansion)


def _conv_norm_relu(channels: int) -> list[nn.Module]:
    return [conv3x3(channels), nn.BatchNorm2d(channels), nn.ReLU()]


def chain(channels: int) -> nn.Module:
    """Two 3x3 convolutions with norm and ReLU."""
    return nn.Sequential(*_conv_norm_relu(channels), *_conv_norm_relu(channels))


def pooled(channels: int) -> nn.Module:
    """Convolution, max-pool and convolution: a stack that packed rows cannot take."""
    return nn.Sequential(*_conv_norm_relu(channels), nn.MaxPool2d(2), *_conv_norm_relu(channels))


# SBNet's ResNet-50 table, (H, W, K); the bottlenecks around these 3x3 layers have 4 K channels.
SBNET = ((400, 700, 64), (200, 350, 128), (100, 175, 256), (50, 88, 512))
SBNET_DENSITIES = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.01)
SCATTERED = {"mask_kinds": ("random blocks", "random", "photo"), "densities": (0.1,)}
TILES = {"block": 32, "path": "tiles"}


def all_cases(quick: bool = False) -> list[Case]:
    sizes = SBNET[2:3] if quick else SBNET
    cases = [Case("SBNet 3x3", "3x3", conv3x3, k, h, w, densities=SBNET_DENSITIES) for h, w, k in sizes]
    cases += [Case("SBNet bottleneck", "bottleneck", bottleneck, 4 * k, h, w) for h, w, k in sizes]
    cases += [Case("tiles", "3x3, pool, 3x3", pooled, k, h, w, **TILES) for h, w, k in sizes[:2]]
    cases += [Case("tiles", "bottleneck", bottleneck, 4 * k, h, w, **TILES) for h, w, k in sizes[:2]]
    cases += [Case("scattered", "3x3", conv3x3, k, h, w, **SCATTERED) for h, w, k in sizes]
    return cases + [Case("scattered", "3x3, 3x3", chain, k, h, w, **SCATTERED) for h, w, k in sizes[:2]]


@dataclass(frozen=True)
class Contender:
    """A call of ours and its work, halo included; ``replay`` is the call that a CUDA graph can capture."""

    call: Callable[[], Tensor]
    work: Work
    block: int = 0
    replay: Callable[[], Tensor] | None = None


def measure(case: Case, setting: Setting) -> list[Row]:
    """The rows of one stack: every mask and density, timed in one interleaved run with the dense stack."""
    generator = torch.Generator().manual_seed(0)
    module = case.module().to(**setting.options)
    own = on_device(generator, setting.device)
    x = torch.randn(case.n, case.channels, case.h, case.w, generator=own, device=own.device)
    x = x.to(**setting.options, memory_format=torch.channels_last)
    ours = {}
    stack = copy.deepcopy(module).to(memory_format=torch.channels_last)
    for kind, density in _masks_to_measure(case, setting):
        mask = masks.MASKS[kind](*output_shape(stack, case.in_shape), density, generator).to(setting.device)
        for variant, contender in contenders(case, setting, stack, x, mask).items():
            ours[kind, density, variant] = contender
    with torch.inference_mode(not setting.backward):
        calls = {key: contender.call for key, contender in ours.items()}
        replays = {key: contender.replay for key, contender in ours.items() if contender.replay}
        times = compare(network_versions(module, x, setting), calls, setting, replays=replays)
    dense_macs = chain_macs(stack, case.in_shape)
    return [
        times.row(
            key,
            megabytes=contender.work.values * setting.dtype.itemsize / 1e6,
            suite="blocks",
            group=case.group,
            case=case.name,
            mask=key[0],
            density=key[1],
            variant=key[2],
            gmacs=dense_macs / 1e9,
            computed_gmacs=contender.work.macs / 1e9,
            break_even_only=key[1] not in case.densities,
            block=contender.block,
        )
        for key, contender in ours.items()
    ]


def _masks_to_measure(case: Case, setting: Setting) -> list[tuple[str, float]]:
    kinds = [kind for kind in case.mask_kinds if kind != "photo" or kind in setting.mask_kinds]
    pairs = [(kind, density) for kind in kinds for density in case.densities]
    if setting.break_even and "top-left" in kinds:
        pairs += [("top-left", d) for d in BREAK_EVEN_DENSITIES if d not in case.densities]
    return pairs


def contenders(
    case: Case, setting: Setting, stack: nn.Module, x: Tensor, mask: Tensor
) -> dict[str, Contender]:
    """{variant: contender}. "plain" is a mask and a dense map in, the active blocks out and zero elsewhere."""
    block = case.block or dynops.suggest_block_size(stack, x, mask)
    plan = BlockPlan.from_mask(mask, block)
    work = chain_work(stack, case.in_shape, plan.pixels())
    layer = SparseBlocks(stack, block, path=case.path)
    found = {"plain": Contender(bound(layer, x, mask), work, block, _capturable(layer, x, mask, plan))}
    if case.build is bottleneck and setting.variants:
        found["base=input"] = Contender(bound(layer, x, mask, base="input"), work, block)
    if case.group == "scattered":
        work = chain_work(stack, case.in_shape, PixelPlan.from_mask(mask))
        found[PIXELS] = Contender(bound(_on_pixels(stack), x, mask), work)
    if setting.backward:
        leaves = list(stack.parameters())
        return {k: Contender(with_backward(c.call, leaves), c.work, c.block) for k, c in found.items()}
    return found


def _capturable(layer: SparseBlocks, x: Tensor, mask: Tensor, plan: BlockPlan) -> Callable[[], Tensor]:
    return lambda: layer(x, BlockPlan.from_mask(mask, plan.block_size, capacity=plan.num_rows))


def _on_pixels(stack: nn.Module) -> nn.Module:
    """The layer that computes the pixels of a mask, on the same parameters."""
    sparse = SparseConv2d if isinstance(stack, nn.Conv2d) else SparseSequential
    return sparse.from_dense(stack)
