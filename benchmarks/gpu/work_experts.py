"""The work of a mixture of experts, and of the same with torch's ``grouped_mm``. See ``work.py``.

A shape is a :class:`benchmarks.experts.Layer` and a number of tokens; routing is uniform.
"""

from __future__ import annotations

from ..experts import Layer
from .work import INDEX, Step, expert_index, gather_rows

CHOICE = 8  # bytes of a token's choice, int64 as torch.topk returns it


def experts_with_tokens(layer: Layer, tokens: int) -> float:
    """How many experts are expected to have some: each token leaves one out with probability ``1 - topk / experts``."""
    return layer.experts * (1 - (1 - layer.topk / layer.experts) ** tokens)


def mlp_macs(layer: Layer, tokens: int) -> float:
    return 3 * tokens * layer.topk * layer.hidden * layer.inner


def mlp(layer: Layer, tokens: int, size: int) -> list[Step]:
    """SwiGLU experts from choices and weights to the weighted sum: plan, two products, combine."""
    pairs = tokens * layer.topk
    up, down = _products(layer, tokens, size, read_rows=tokens, activated=True)
    plan, combined = expert_index(pairs, layer.experts, CHOICE), _combine(layer, tokens, layer.hidden, size)
    return [*plan, up, down, *(combined if layer.topk > 1 else [])]


def grouped_mlp(layer: Layer, tokens: int, size: int) -> list[Step]:
    """The same by torch: sort, offsets, rows copied by expert, two ``grouped_mm``, the activation and the sum apart."""
    pairs = tokens * layer.topk
    up, down = _products(layer, tokens, size, read_rows=pairs, activated=False)
    inner = pairs * layer.inner * size
    activation = Step("activation", read=2 * inner, written=inner)
    sums = _combine(layer, tokens, layer.hidden, size)
    return [*_sorted(layer, tokens, layer.hidden, size), up, activation, down, *sums]


def linear(layer: Layer, tokens: int, size: int) -> list[Step]:
    """One product of ``inner`` inputs and outputs, from choices to the sum over a token's choices."""
    pairs = tokens * layer.topk
    plan, product = expert_index(pairs, layer.experts, CHOICE), _square(layer, tokens, size, tokens)
    return [
        *plan,
        product,
        *(_combine(layer, tokens, layer.inner, size, weighted=False) if layer.topk > 1 else []),
    ]


def grouped_linear(layer: Layer, tokens: int, size: int) -> list[Step]:
    """The same product by torch, which leaves its rows sorted by expert and unsummed."""
    rows = tokens * layer.topk
    return [*_sorted(layer, tokens, layer.inner, size), _square(layer, tokens, size, rows)]


def gather(layer: Layer, tokens: int, size: int) -> list[Step]:
    """Tokens copied to the rows of their experts."""
    pairs = tokens * layer.topk
    row = layer.hidden * size
    return [Step("gather pairs", read=tokens * row + INDEX * pairs, written=pairs * row)]


def combine(layer: Layer, tokens: int, size: int) -> list[Step]:
    return _combine(layer, tokens, layer.hidden, size)


def _products(layer: Layer, tokens: int, size: int, read_rows: int, activated: bool) -> tuple[Step, Step]:
    """Gate and up in one, and down; weights of experts without tokens are not read."""
    pairs, hit = tokens * layer.topk, experts_with_tokens(layer, tokens)
    h, i = layer.hidden, layer.inner
    up = (read_rows * h + hit * 2 * i * h) * size + INDEX * pairs
    down = (pairs * i + hit * h * i) * size
    written = pairs * i * (1 if activated else 2) * size
    return (
        Step("up", 4 * pairs * h * i, up, written, "matmul"),
        Step("down", 2 * pairs * h * i, down, pairs * h * size, "matmul"),
    )


def _square(layer: Layer, tokens: int, size: int, read_rows: int) -> Step:
    pairs, hit, i = tokens * layer.topk, experts_with_tokens(layer, tokens), layer.inner
    read = (read_rows * i + hit * i * i) * size + INDEX * pairs
    return Step("product", 2 * pairs * i * i, read, pairs * i * size, "matmul")


def _combine(layer: Layer, tokens: int, channels: int, size: int, weighted: bool = True) -> list[Step]:
    pairs = tokens * layer.topk
    read = pairs * (channels * size + INDEX + (size if weighted else 0))
    return [Step("combine", read=read, written=tokens * channels * size)]


def _sorted(layer: Layer, tokens: int, channels: int, size: int) -> list[Step]:
    """torch's sort of int64 choices, ``bincount`` and ``cumsum`` (which waits for the largest), and the copied rows."""
    pairs = tokens * layer.topk
    sort = Step("sort", read=CHOICE * pairs, written=2 * CHOICE * pairs, launches=3)
    offsets = Step("offsets", read=CHOICE * pairs, written=INDEX * layer.experts, launches=4, waits=1)
    return [sort, offsets, *gather_rows(pairs, channels * size)]
