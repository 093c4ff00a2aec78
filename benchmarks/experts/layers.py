"""Mixture of experts: one layer over token counts, against the implementations that transformers has."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynops import ExpertPlan, ops

from ..harness.compare import compare
from ..harness.roofline import Roofline
from ..harness.rows import Row
from ..harness.setting import Setting
from . import loops

TOKENS = (1, 16, 128, 512)
ROUTINGS = 8  # take turns, so that one token does not find its experts in the caches of the call before
DYNOPS = "dynops"
BUILT_IN = ("eager", "grouped_mm", "batched_mm")
SWIGLU, ONE_GEMM, MODEL = "SwiGLU", "one GEMM", "model"  # groups of rows


@dataclass(frozen=True)
class Layer:
    """SwiGLU experts: hidden and inner size, E experts of which each token takes K."""

    hidden: int
    inner: int
    experts: int
    topk: int

    @property
    def elements(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.inner

    @property
    def name(self) -> str:
        return f"H {self.hidden}, I {self.inner}, {self.experts} experts, top-{self.topk}"


LAYERS = (Layer(1024, 512, 64, 8), Layer(1024, 2048, 8, 2))
GEMM = Layer(1024, 1024, 64, 8)  # one grouped GEMM, I inputs to I outputs


# ---------------------------------------------------------------------------------------- problems


@dataclass
class Routing:
    """The input of one call."""

    x: Tensor
    index: Tensor
    weight: Tensor

    @classmethod
    def random(cls, layer: Layer, tokens: int, inputs: int, setting: Setting, generator) -> Routing:
        x = torch.randn(tokens, inputs, generator=generator).to(**setting.options)
        scores = torch.randn(tokens, layer.experts, generator=generator).softmax(1)
        weight, index = scores.topk(layer.topk)
        weight = (weight / weight.sum(1, keepdim=True)).to(**setting.options)
        return cls(x, index.to(setting.device), weight)

    @property
    def experts(self) -> int:
        """The number of experts that have tokens."""
        return self.index.unique().numel()


def _cycling(function: Callable[[Routing], object], routings: list[Routing]) -> Callable:
    turns = itertools.cycle(routings)
    return lambda: function(next(turns))


def available() -> bool:
    """True where transformers is installed: its implementations are the comparison."""
    return importlib.util.find_spec("transformers") is not None


def transformers_experts(layer: Layer, setting: Setting) -> nn.Module:
    """transformers' own module (Qwen3-MoE's experts) with random weights."""
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
    module = Qwen3MoeExperts(config).to(**setting.options)
    torch.manual_seed(0)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[2] ** -0.5)
        weight.requires_grad_(setting.backward)
    return module


def running(module: nn.Module, implementation: str, backward: bool) -> Callable[[Routing], object]:
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


def all_cases(quick: bool = False) -> list[tuple[Layer, tuple[int, ...]]]:
    """Each layer with its tokens, and one grouped GEMM; none without transformers."""
    tokens = (1, 128) if quick else TOKENS
    return [(layer, tokens) for layer in (*LAYERS[: 1 if quick else None], GEMM)] if available() else []


def measure(case: tuple[Layer, tuple[int, ...]], setting: Setting) -> list[Row]:
    """Rows over tokens; forward only: eight-bit weights and the GEMM too. The setting has a roofline."""
    layer, tokens = case
    if layer == GEMM:
        return [] if setting.backward else gemm_rows(tokens, setting)
    module = transformers_experts(layer, setting)
    if setting.backward:
        return [_layer_row(layer, module, 512, setting)]
    rows = [_layer_row(layer, module, count, setting) for count in tokens]
    return rows + [_int8_row(layer, module, count, setting) for count in tokens[:2]]


def _routings(layer: Layer, tokens: int, inputs: int, setting: Setting) -> list[Routing]:
    generator = torch.Generator().manual_seed(tokens)
    count = ROUTINGS if tokens <= 16 else 2
    return [Routing.random(layer, tokens, inputs, setting, generator) for _ in range(count)]


def _row(
    layer: Layer,
    routings: list[Routing],
    setting: Setting,
    contenders: dict[str, Callable[[Routing], object]],
    elements: int,
    group: str = SWIGLU,
    weights: str = "",
) -> Row:
    """The row of dynops among ``contenders``; ``elements`` are the weights of one expert, each in one product a pair.

    The roofline is of peaks measured in turns with them: the speed of memory moves from minute to minute.
    """
    if setting.graph:  # which replays one routing; there every call finds the caches flushed
        routings = routings[:1]
    tokens, passes = len(routings[0].x), 3 if setting.backward else 1
    gmacs = passes * tokens * layer.topk * elements / 1e9
    hit = sum(r.experts for r in routings) / len(routings)
    # backward reads each weight once more and writes its gradient
    megabytes = passes * hit * elements * (1 if weights == "int8" else setting.dtype.itemsize) / 1e6
    others = {name: _cycling(run, routings) for name, run in contenders.items()}
    ours = {DYNOPS: others.pop(DYNOPS)}
    roofline: Roofline = setting.roofline
    with contextlib.nullcontext() if setting.backward else torch.no_grad():
        times = compare(others, ours, setting, replays=ours, beside=roofline.calls)
    roofline.runs.append(times.beside)
    return times.row(
        DYNOPS,
        megabytes=megabytes,
        roofline_ms=roofline.ms(gmacs, megabytes, times.beside),
        suite="experts",
        group=group,
        case=layer.name,
        mask="random routing",
        density=layer.topk / layer.experts,
        gmacs=gmacs,
        computed_gmacs=gmacs,
        tokens=tokens,
        weights=weights or setting.dtype_name,
    )


def _layer_row(layer: Layer, module: nn.Module, tokens: int, setting: Setting) -> Row:
    routings = _routings(layer, tokens, layer.hidden, setting)
    built_in = BUILT_IN if tokens == 1 else BUILT_IN[:2]  # batched_mm copies the weights of every pair
    contenders = {name: running(module, name, setting.backward) for name in (*built_in, DYNOPS)}
    return _row(layer, routings, setting, contenders, layer.elements)


def plain_rows(layer: Layer, tokens: tuple[int, ...], setting: Setting) -> Iterator[Row]:
    """The layer against PyTorch alone, without transformers: grouped_mm, and a loop over the experts."""
    generator = torch.Generator(setting.device).manual_seed(0)

    def weights(*shape: int) -> Tensor:
        found = torch.randn(shape, generator=generator, device=setting.device)
        return found.mul_(shape[2] ** -0.5).to(setting.dtype)

    up = weights(layer.experts, 2 * layer.inner, layer.hidden)
    down = weights(layer.experts, layer.hidden, layer.inner)

    def ours(r: Routing):
        return ops.experts_mlp(r.x, up, down, ExpertPlan.from_topk(r.index, layer.experts), r.weight)

    contenders = {DYNOPS: ours}
    for name, function in (("torch grouped_mm", loops.grouped), ("loop", loops.loop)):
        contenders[name] = lambda r, function=function: function(r.x, r.index, r.weight, up, down)
    for count in tokens:
        yield _row(layer, _routings(layer, count, layer.hidden, setting), setting, contenders, layer.elements)


def _int8_row(layer: Layer, module: nn.Module, tokens: int, setting: Setting) -> Row:
    """Eight-bit weights against the same layer's own: "built-in" is dynops in the dtype of the run."""
    routings = _routings(layer, tokens, layer.hidden, setting)
    up, down = (ops.quantize_experts(w) for w in (module.gate_up_proj, module.down_proj))

    def int8(r: Routing):
        return ops.experts_mlp(r.x, up, down, ExpertPlan.from_topk(r.index, layer.experts), r.weight)

    contenders = {DYNOPS: int8, f"dynops {setting.dtype_name}": running(module, DYNOPS, False)}
    return _row(layer, routings, setting, contenders, layer.elements, weights="int8")


def gemm_rows(tokens: tuple[int, ...], setting: Setting) -> list[Row]:
    """One grouped GEMM of rows that lie by expert already, as torch's grouped_mm wants them."""
    layer = GEMM
    shape = (layer.experts, layer.inner, layer.inner)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * layer.inner**-0.5
    weight = weight.to(**setting.options)

    def ours(r: Routing):
        return ops.grouped_linear(r.x, weight, ExpertPlan.from_topk(r.index, layer.experts))

    def torch_grouped(r: Routing):
        order, ends = loops.by_expert(r.index, layer.experts)
        return F.grouped_mm(r.x[order // layer.topk], weight.mT, offs=ends)

    contenders = {DYNOPS: ours, "torch grouped_mm": torch_grouped}
    each = (_routings(layer, count, layer.inner, setting) for count in tokens)
    return [_row(layer, routings, setting, contenders, layer.inner**2, ONE_GEMM) for routings in each]
