"""Mixture of experts: one layer over token counts, against the implementations that transformers has."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynops import ExpertPlan, ops

from . import expert_loops, replay
from .expert_rows import ExpertRow
from .layers import Setting
from .timing import GRAPH, Budget, interleaved, progress

TOKENS = (1, 16, 128, 512)
ROUTINGS = 8  # that take turns, so that one token does not find its experts in the caches of the call before
BUILT_IN = ("eager", "grouped_mm", "batched_mm")


@dataclass(frozen=True)
class Layer:
    """SwiGLU experts: hidden and inner size, E experts of which each token takes K."""

    hidden: int
    inner: int
    experts: int
    topk: int

    @property
    def name(self) -> str:
        return f"H {self.hidden}, I {self.inner}, {self.experts} experts, top-{self.topk}"


LAYERS = (Layer(1024, 512, 64, 8), Layer(1024, 2048, 8, 2))
GEMM = Layer(1024, 1024, 64, 8)  # one grouped GEMM, I inputs to I outputs


# ------------------------------------------------------------------------------------ the roofline


READ, PRODUCT = "memory read", "peak product"


class Machine:
    """What this machine reaches: measured again in every run, because its memory speed moves from minute to minute.

    The fastest of a few passes over 512 MB, and of a few dense products and convolutions, chosen once.

    Args:
        side: of the matrices of the dense product; None: 8192 on a GPU, 1024 on a CPU.
        rows: of 32 KB, that are read.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, side: int | None = None, rows: int = 1 << 14
    ):
        data = torch.ones(rows, 1 << 13, device=device)
        reads = {
            "sum": data.sum,
            "sums of rows": _bound(data.sum, 1),
            "largest integer": data.view(torch.int32).amax,
        }
        products, gmacs = _products(dtype, device, side or (8192 if device.type == "cuda" else 1024))
        with torch.inference_mode():
            first = interleaved({**reads, **products}, device, Budget(3.0 if rows >= 1 << 14 else 0.0, 5))
        product = min(products, key=lambda name: first[name] / gmacs[name])
        self.calls = {READ: reads[min(reads, key=first.get)], PRODUCT: products[product]}
        self.megabytes, self.gmacs = data.numel() * 4 / 1e6, gmacs[product]
        self.dtype = str(dtype).removeprefix("torch.")
        self.runs: list[dict[str, float]] = []

    def roofline_ms(self, gmacs: float, megabytes: float, times: dict[str, float]) -> float:
        """The later of two times: of the MACs at the peak, of the bytes at the memory speed. ``times``: of the run."""
        return max(gmacs / self.gmacs * times[PRODUCT], megabytes / self.megabytes * times[READ])

    def __str__(self) -> str:
        peaks = sorted(2e3 * self.gmacs / times[PRODUCT] for times in self.runs)
        speeds = sorted(self.megabytes / times[READ] for times in self.runs)
        return (
            f"Measured in the runs: a peak of {peaks[0]:.0f} to {peaks[-1]:.0f} GFLOP/s in {self.dtype}, memory read "
            f"at {speeds[0]:.0f} to {speeds[-1]:.0f} GB/s."
        )


def _products(
    dtype: torch.dtype, device: torch.device, side: int
) -> tuple[dict[str, Callable], dict[str, float]]:
    """Calls of dense products, and billions of MACs of each."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    x = torch.randn(8, 256, 28, 28, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    calls, gmacs = {"mm": lambda: a @ b}, {"mm": side**3 / 1e9}
    for size in (1, 3):
        weight = torch.randn(256, 256, size, size, device=device).to(dtype)
        weight = weight.contiguous(memory_format=torch.channels_last)
        name = f"convolution {size}x{size}"
        calls[name] = _bound(F.conv2d, x, weight, None, 1, size // 2)
        gmacs[name] = 8 * 28 * 28 * 256 * 256 * size * size / 1e9
    return calls, gmacs


# ---------------------------------------------------------------------------------------- problems


@dataclass
class Routing:
    """The input of one call."""

    x: Tensor
    index: Tensor
    weight: Tensor

    @classmethod
    def random(cls, layer: Layer, tokens: int, inputs: int, setting: Setting, generator) -> Routing:
        x = torch.randn(tokens, inputs, generator=generator).to(setting.device, setting.dtype)
        scores = torch.randn(tokens, layer.experts, generator=generator).softmax(1)
        weight, index = scores.topk(layer.topk)
        weight = (weight / weight.sum(1, keepdim=True)).to(setting.device, setting.dtype)
        return cls(x, index.to(setting.device), weight)

    @property
    def experts(self) -> int:
        """How many experts have tokens."""
        return self.index.unique().numel()


def _bound(function: Callable, *arguments) -> Callable:
    return lambda: function(*arguments)


def _cycling(function: Callable[[Routing], object], routings: list[Routing]) -> Callable:
    turns = itertools.cycle(routings)
    return lambda: function(next(turns))


def available() -> bool:
    """Whether transformers is installed, whose implementations are the comparison."""
    return importlib.util.find_spec("transformers") is not None


def transformers_experts(layer: Layer, setting: Setting):
    """transformers' own module (Qwen3-MoE's experts) with random weights, and its implementations' names."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from dynops.integrations.transformers import register

    register()
    config = Qwen3MoeConfig(
        hidden_size=layer.hidden,
        moe_intermediate_size=layer.inner,
        num_experts=layer.experts,
        num_experts_per_tok=layer.topk,
        experts_implementation="eager",
    )
    module = Qwen3MoeExperts(config).to(setting.device, setting.dtype)
    torch.manual_seed(0)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[2] ** -0.5)
        weight.requires_grad_(setting.backward)
    return module


def _running(module, implementation: str, backward: bool) -> Callable[[Routing], object]:
    """One call of the module with this implementation; with ``backward`` its gradients too."""

    def run(r: Routing):
        module.config._experts_implementation = implementation
        if not backward:
            return module(r.x, r.index, r.weight)
        x, weight = r.x.detach().requires_grad_(), r.weight.detach().requires_grad_()
        out = module(x, r.index, weight)
        return torch.autograd.grad(out, [x, weight, *module.parameters()], torch.ones_like(out))

    return run


# ---------------------------------------------------------------------------------------- running


def run(setting: Setting, machine: Machine, quick: bool = False) -> list[ExpertRow]:
    """Rows of every layer; forward only: eight-bit weights and one grouped GEMM too."""
    rows: list[ExpertRow] = []
    tokens = (512,) if setting.backward else (1, 128) if quick else TOKENS
    for layer in progress(list(LAYERS[:1] if quick else LAYERS), "experts", "layer"):
        module = transformers_experts(layer, setting)
        rows += [_layer_row(layer, module, count, setting, machine) for count in tokens]
        if not setting.backward:
            rows += [_int8_row(layer, module, count, setting, machine) for count in tokens[:2]]
    if not setting.backward:
        rows += gemm_rows(tokens, setting, machine)
    return rows


def _routings(layer: Layer, tokens: int, inputs: int, setting: Setting) -> list[Routing]:
    generator = torch.Generator().manual_seed(tokens)
    count = ROUTINGS if tokens <= 16 else 2
    return [Routing.random(layer, tokens, inputs, setting, generator) for _ in range(count)]


def _times(contenders: dict, routings: list[Routing], setting: Setting, machine: Machine) -> dict[str, float]:
    calls = {name: _cycling(run, routings) for name, run in contenders.items()}
    with contextlib.nullcontext() if setting.backward else torch.no_grad():
        if setting.graph:
            return _replayed_times(calls, setting, machine)
        return interleaved({**calls, **machine.calls}, setting.device, setting.budget)


def _replayed_times(calls: dict[str, Callable], setting: Setting, machine: Machine) -> dict[str, float]:
    """Of each contender the faster of its calls from Python and its replays from a CUDA graph, where one can be captured."""
    failed: dict[str, str] = {}
    calls = replay.working(calls, failed)
    if "dynops" not in calls or len(calls) == 1:
        raise RuntimeError(f"nothing to compare: {failed}")
    graphs = {(GRAPH, name): replay.captured_or(call, name, failed) for name, call in calls.items()}
    graphs = {name: call for name, call in graphs.items() if call is not None}
    times = interleaved({**calls, **graphs, **machine.calls}, setting.device, setting.budget)
    fastest = {name: min(times[name], times.get((GRAPH, name), times[name])) for name in calls}
    return fastest | {name: times[name] for name in machine.calls}


def _row(layer, tokens, setting, machine, routings, macs, elements, times, mode, weights=None) -> ExpertRow:
    """``macs``, ``elements``: of one pair, of one expert's weights."""
    dtype = str(setting.dtype).removeprefix("torch.")
    passes = 3 if setting.backward else 1
    gmacs = passes * tokens * layer.topk * macs / 1e9
    hit = sum(r.experts for r in routings) / len(routings)
    element = 1 if weights == "int8" else setting.dtype.itemsize
    # backward reads each weight once more and writes its gradient
    megabytes = passes * hit * elements * element / 1e6
    roofline = machine.roofline_ms(gmacs, megabytes, times)
    machine.runs.append(times)
    built_in = {name: ms for name, ms in times.items() if name not in ("dynops", *machine.calls)}
    return ExpertRow(
        layer.name,
        tokens,
        dtype,
        weights or dtype,
        mode,
        gmacs,
        megabytes,
        roofline,
        built_in,
        times["dynops"],
    )


def _layer_row(layer: Layer, module, tokens: int, setting: Setting, machine: Machine) -> ExpertRow:
    routings = _routings(layer, tokens, layer.hidden, setting)
    built_in = BUILT_IN if tokens == 1 else BUILT_IN[:2]  # batched_mm copies the weights of every pair
    contenders = {name: _running(module, name, setting.backward) for name in (*built_in, "dynops")}
    elements = 3 * layer.hidden * layer.inner
    times = _times(contenders, routings, setting, machine)
    return _row(layer, tokens, setting, machine, routings, elements, elements, times, setting.mode)


def plain_rows(layer: Layer, tokens, setting: Setting, machine: Machine) -> list[ExpertRow]:
    """The layer against what is written in PyTorch alone, without transformers: grouped_mm, and a loop over the experts."""
    generator = torch.Generator(setting.device).manual_seed(0)

    def weights(*shape: int) -> Tensor:
        found = torch.randn(shape, generator=generator, device=setting.device)
        return found.mul_(shape[2] ** -0.5).to(setting.dtype)

    up = weights(layer.experts, 2 * layer.inner, layer.hidden)
    down = weights(layer.experts, layer.hidden, layer.inner)

    def ours(r: Routing):
        return ops.experts_mlp(r.x, up, down, ExpertPlan.from_topk(r.index, layer.experts), r.weight)

    contenders = {"dynops": ours}
    for name, function in (("torch grouped_mm", expert_loops.grouped), ("loop", expert_loops.loop)):
        contenders[name] = lambda r, function=function: function(r.x, r.index, r.weight, up, down)
    elements, rows = 3 * layer.hidden * layer.inner, []
    for count in tokens:
        routings = _routings(layer, count, layer.hidden, setting)
        times = _times(contenders, routings, setting, machine)
        rows.append(_row(layer, count, setting, machine, routings, elements, elements, times, setting.mode))
    return rows


def _int8_row(layer: Layer, module, tokens: int, setting: Setting, machine: Machine) -> ExpertRow:
    """Eight-bit weights against the same layer's own: "built-in" is dynops in the dtype of the run."""
    routings = _routings(layer, tokens, layer.hidden, setting)
    up, down = (ops.quantize_experts(w) for w in (module.gate_up_proj, module.down_proj))

    def int8(r: Routing):
        return ops.experts_mlp(r.x, up, down, ExpertPlan.from_topk(r.index, layer.experts), r.weight)

    contenders = {"dynops": int8, f"dynops {str(setting.dtype)[6:]}": _running(module, "dynops", False)}
    elements = 3 * layer.hidden * layer.inner
    times = _times(contenders, routings, setting, machine)
    return _row(layer, tokens, setting, machine, routings, elements, elements, times, setting.mode, "int8")


def gemm_rows(tokens, setting: Setting, machine: Machine) -> list[ExpertRow]:
    """One grouped GEMM of rows that lie by expert already, as torch's grouped_mm wants them."""
    layer = GEMM
    shape = (layer.experts, layer.inner, layer.inner)
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * layer.inner**-0.5).to(
        setting.device, setting.dtype
    )
    rows = []
    for count in tokens:
        routings = _routings(layer, count, layer.inner, setting)

        def ours(r: Routing):
            return ops.grouped_linear(r.x, weight, ExpertPlan.from_topk(r.index, layer.experts))

        def torch_grouped(r: Routing):
            order, ends = expert_loops.by_expert(r.index, layer.experts)
            return F.grouped_mm(r.x[order // layer.topk], weight.mT, offs=ends)

        times = _times({"dynops": ours, "torch grouped_mm": torch_grouped}, routings, setting, machine)
        elements = layer.inner**2
        rows.append(_row(layer, count, setting, machine, routings, elements, elements, times, "GEMM"))
    return rows
