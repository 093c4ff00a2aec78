"""Oracles of the expert ops in plain PyTorch and Python, which share no line with dynops.ops, and cases."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from pixel_cases import run, upstream
from torch import Tensor

from dynops import ExpertPlan
from dynops.testing import assert_within_budget, available_backends, random_tensor

# How the choices of a batch may fall.
KINDS = ("random", "distinct", "one", "dropped", "some dropped", "skewed")

POINTWISE = {
    None: lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "hardswish": F.hardswish,
    "relu2": lambda y: torch.relu(y) ** 2,
}


def choices(kind: str, tokens: int, topk: int, experts: int) -> Tensor:
    """int64 ``[T, K]``; E stands for a dropped choice, which only two of the kinds have."""
    if kind == "distinct":
        return torch.rand(tokens, experts).argsort(1)[:, :topk]
    if kind in ("one", "dropped"):
        return torch.full((tokens, topk), experts // 2 if kind == "one" else experts)
    index = torch.randint(0, experts + (kind == "some dropped"), (tokens, topk))
    if kind == "skewed":  # most to the first, the last has none
        index = torch.where(torch.rand(tokens, topk) < 0.7, 0, index.clamp(max=max(experts - 2, 0)))
    return index


def with_capacity(index: Tensor, experts: int, capacity: int | None) -> Tensor:
    """The choices where those that find no place became E: first choices first, then in the order of tokens."""
    kept, taken = index.clone(), [0] * (experts + 1)
    for k in range(index.shape[1]):
        for t in range(index.shape[0]):
            e = int(index[t, k])
            if capacity is not None and e < experts and taken[e] >= capacity:
                kept[t, k] = experts
            taken[e] += 1
    return kept


def sorted_pairs(index: Tensor) -> list[int]:
    """The pairs t * K + k by expert, in one expert by pair, the dropped ones last."""
    flat = index.flatten().tolist()
    return sorted(range(len(flat)), key=lambda pair: (flat[pair], pair))


def pairs_linear(
    pairs: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, transposed=False
) -> Tensor:
    """``[T * K, O]``: every expert for every pair, then the one that was chosen; dropped pairs are zero."""
    out = pairs.new_zeros(pairs.shape[0], weight.shape[2] if transposed else weight.shape[1])
    for e in range(weight.shape[0]):
        y = F.linear(pairs, weight[e].t() if transposed else weight[e], None if bias is None else bias[e])
        out = torch.where((index.flatten() == e)[:, None], y, out)
    return out


def to_pairs(x: Tensor, index: Tensor, packed: bool) -> Tensor:
    """``[T * K, C]`` in the order of the pairs, of a row for each token or packed ones."""
    if not packed:
        return x.repeat_interleave(index.shape[1], 0)
    return torch.zeros_like(x).index_copy(0, torch.tensor(sorted_pairs(index), dtype=torch.long), x)


def from_pairs(y: Tensor, index: Tensor, packed: bool) -> Tensor:
    """Packed, or summed over each token's choices."""
    if packed:
        return y[torch.tensor(sorted_pairs(index), dtype=torch.long)]
    return y.view(*index.shape, y.shape[1]).sum(1)


def weighted(y: Tensor, topk_weight: Tensor | None) -> Tensor:
    return y if topk_weight is None else (y * topk_weight.reshape(-1, 1)).to(y.dtype)


def linear_oracle(
    x, weight, bias=None, topk_weight=None, *, index, packed_in=False, packed_out=True, transposed=False,
    activation=None,
) -> Tensor:  # fmt: skip
    y = POINTWISE[activation](pairs_linear(to_pairs(x, index, packed_in), weight, bias, index, transposed))
    y = torch.where(
        (index.flatten() < weight.shape[0])[:, None], y, 0
    )  # no activation of this library, but a rule
    return from_pairs(weighted(y, topk_weight), index, packed_out)


def activation_oracle(
    z, activation="silu", *, gated=True, interleaved=False, alpha=1.702, limit=7.0
) -> Tensor:
    if not gated:
        return POINTWISE[activation](z)
    inner = z.shape[1] // 2
    gate, up = (z[:, 0::2], z[:, 1::2]) if interleaved else (z[:, :inner], z[:, inner:])
    if activation == "clamped_swiglu":  # as gpt-oss has it
        gate, up = gate.clamp(min=None, max=limit), up.clamp(min=-limit, max=limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    return POINTWISE[activation](gate) * up


def mlp_oracle(
    x, up, down, topk_weight=None, up_bias=None, down_bias=None, *, index, activation="silu", transposed=False,
    **options,
) -> Tensor:  # fmt: skip
    z = pairs_linear(to_pairs(x, index, False), up, up_bias, index, transposed)
    h = activation(z) if callable(activation) else activation_oracle(z, activation, **options)
    y = pairs_linear(h, down, down_bias, index, transposed)
    return from_pairs(weighted(y, topk_weight), index, False)


def assert_close(
    actual: Tensor, exact: Tensor, dense: Tensor, what: str, dtype=torch.float32, few: bool = False
) -> None:
    """Within twice the dense op's error; few numbers, whose error may be zero by luck, within 1e-5 or 4 roundings.

    ``few``: what the numbers are computed from is few, so that all of them have its error. ``dtype``: that of the
    layer; the gradient of a float32 routing weight is computed from its rows.
    """
    size, little = exact.norm(), max(1e-5, 4 * torch.finfo(dtype).eps)
    few = (few or exact.numel() < 500) and actual.shape == exact.shape
    if dense.dtype == torch.float64:
        assert (actual - exact).norm() <= 1e-12 * size, what
    elif not few or (actual.double() - exact).norm() > little * size:
        assert_within_budget(actual, exact, dense, what)
    assert actual.dtype == dense.dtype and actual.shape == dense.shape, what


def compare(ours, oracle, tensors: dict[str, Tensor], grads=None, few: bool = False) -> Tensor:
    """Checks the value of ``ours``, with and without gradients, and those of all tensors or of ``grads``."""
    grads, dtype = tuple(tensors) if grads is None else grads, tensors["x"].dtype
    dy_of = upstream(dtype)
    exact, exact_grads = run(oracle, tensors, grads, dy_of, torch.float64)
    dense, dense_grads = run(oracle, tensors, grads, dy_of)
    actual, actual_grads = run(ours, tensors, grads, dy_of)
    assert_close(actual, exact, dense, "output", dtype, few)
    for name in grads:
        found = (actual_grads[name], exact_grads[name], dense_grads[name])
        assert_close(*found, f"gradient of {name}", dtype, few)
    if grads:  # the fused way
        fused = run(ours, tensors, (), dy_of)[0]
        assert_close(fused, exact, dense, "output without gradients", dtype, few)
    return actual


@dataclass(frozen=True)
class Case:
    """The sizes of a layer of experts and of its batch."""

    tokens: int = 7
    topk: int = 2
    experts: int = 4
    inputs: int = 24
    outputs: int = 40
    kind: str = "random"
    capacity: int | None = None

    def index(self) -> Tensor:
        return choices(self.kind, self.tokens, self.topk, self.experts)

    def rows(self, columns: int, packed: bool = False, dtype=torch.float32) -> Tensor:
        return random_tensor(self.tokens * (self.topk if packed else 1), columns, dtype=dtype)

    def weight(self, outputs: int, inputs: int, transposed=False, dtype=torch.float32) -> Tensor:
        """Scaled so that outputs have the size of inputs."""
        size = (inputs, outputs) if transposed else (outputs, inputs)
        return random_tensor(self.experts, *size, dtype=dtype) * max(inputs, 1) ** -0.5

    def linear_tensors(self, packed_in=False, transposed=False, dtype=torch.float32) -> dict[str, Tensor]:
        return {
            "x": self.rows(self.inputs, packed_in, dtype),
            "weight": self.weight(self.outputs, self.inputs, transposed, dtype),
            "bias": random_tensor(self.experts, self.outputs, dtype=dtype),
            "topk_weight": random_tensor(self.tokens, self.topk),
        }

    def mlp_tensors(self, gated=True, transposed=False, dtype=torch.float32) -> dict[str, Tensor]:
        ups = self.outputs * (2 if gated else 1)
        return {
            "x": self.rows(self.inputs, dtype=dtype),
            "up": self.weight(ups, self.inputs, transposed, dtype),
            "down": self.weight(self.inputs, self.outputs, transposed, dtype),
            "topk_weight": random_tensor(self.tokens, self.topk),
            "up_bias": random_tensor(self.experts, ups, dtype=dtype),
            "down_bias": random_tensor(self.experts, self.inputs, dtype=dtype),
        }


CASES = {
    "few rows": Case(),
    "one token": Case(tokens=1, topk=3, experts=6),
    "one row": Case(tokens=1, topk=1, experts=2, inputs=70, outputs=101),
    "many rows": Case(tokens=90, experts=3, inputs=40, outputs=50),
    "blocks of rows": Case(tokens=230, topk=2, experts=2, inputs=33, outputs=35, kind="skewed"),
    "odd": Case(tokens=33, topk=3, experts=5, inputs=37, outputs=19),
    "wide": Case(tokens=9, experts=2, inputs=300, outputs=130),
    "one input": Case(inputs=1, outputs=17),
    "one output": Case(inputs=70, outputs=1),
    "K = 1": Case(tokens=20, topk=1),
    "K = E": Case(tokens=11, topk=4, kind="distinct"),
    "one expert": Case(experts=1, tokens=30, topk=1),
    "more experts than rows": Case(tokens=3, topk=2, experts=40, kind="distinct"),
    "all to one": Case(tokens=40, kind="one"),
    "some dropped": Case(tokens=25, kind="some dropped"),
    "all dropped": Case(kind="dropped"),
    "capacity": Case(tokens=30, topk=3, experts=3, kind="skewed", capacity=9),
    "no token": Case(tokens=0),
}  # fmt: skip


BACKENDS = available_backends()
HALVES = (torch.bfloat16, torch.float16)
FEW = {k: CASES[k] for k in ("few rows", "many rows", "odd", "one token", "some dropped")}
ACTIVATIONS = tuple(POINTWISE)

backends = pytest.mark.parametrize("backend", BACKENDS)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)
transposes = pytest.mark.parametrize("transposed", [False, True], ids=["EOI", "EIO"])


def each(cases: dict):
    return pytest.mark.parametrize("case", list(cases.values()), ids=list(cases))


def plan_of(case: Case) -> tuple[ExpertPlan, torch.Tensor]:
    """A plan, and the choices that it keeps."""
    index = case.index()
    return ExpertPlan.from_topk(index, case.experts, case.capacity), with_capacity(
        index, case.experts, case.capacity
    )
