"""MACs of layers, sample by sample, as vectors times numbers; and ways from the rows of a batch to another's.

Most layers cost the same for each row of a batch, and a gate treats all layers behind it alike. So the cost
of a layer is kept as numbers times vectors that many layers share (None: ones), and a gate costs one vector,
however many layers it closes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def opened(gate: Tensor) -> Tensor:
    """float64: 1 where a gate is open (nonzero), else 0, with the gate's own gradient (straight-through)."""
    hard = (gate.detach() != 0).double()
    return hard + slope(gate) if gate.requires_grad else hard


def slope(value: Tensor) -> Tensor:
    """float64 zeros with the gradient of ``value``."""
    return (value - value.detach()).double()


class Same:
    """Row n is row n."""

    full = 1.0  # rows below for each row above, with every gate open

    def vector(self, vector: Tensor | None) -> tuple[Tensor | None, float]:
        """A vector over the rows below (None: ones) as one over those above, and a factor."""
        return vector, 1.0

    def values(self, values: Tensor) -> Tensor | None:
        """Ints of the rows above, ``[N]``, for those below; -1 for rows of nobody. None: nobody knows."""
        return values


class Repeat(Same):
    """m rows below for each row above, in order: a batch that was flattened with another dimension."""

    def __init__(self, times: int):
        self.times = self.full = times

    def vector(self, vector):
        if vector is None:
            return None, float(self.times)
        return vector.reshape(-1, self.times).sum(1), 1.0

    def values(self, values):
        return values.repeat_interleave(self.times)


class Even(Same):
    """Nobody knows whose rows they are: each row above has an equal share of all."""

    def __init__(self, below: int, above: int):
        self.above, self.full = above, below / above if above else 0.0

    def vector(self, vector):
        if vector is None:
            return None, self.full
        return vector.sum().expand(self.above), 1.0 / max(self.above, 1)

    def values(self, values):
        return None


class Owners(Same):
    """Row k below belongs to row ``owner[k]`` above, or to none where that is -1.

    Args:
        owner: int64 ``[K]``.
        above: the rows above.
        full: the rows below for each row above if every gate were open.
        weight: ``[K]`` of each row below, or None: 1.
    """

    def __init__(self, owner: Tensor, above: int, full: float = 1.0, weight: Tensor | None = None):
        self.owner, self.above, self.full = owner, above, full
        self.dead = owner < 0
        self.slot = torch.where(self.dead, above, owner)
        self.weight = weight

    def vector(self, vector):
        if vector is None:
            vector = torch.ones(len(self.owner), dtype=torch.float64, device=self.owner.device)
        if self.weight is not None:
            vector = vector * self.weight
        return vector.new_zeros(self.above + 1).index_add(0, self.slot, vector)[:-1], 1.0

    def values(self, values):
        return torch.cat([values, values.new_full((1,), -1)])[self.slot]


class Gated(Same):
    """Marks what runs where a gate ``[N]`` is open: the gate's gradient has a price in the closed rows too.

    That is the mean of the open rows. (Of a vector; a number is the same for all.)

    Args:
        gate: float64 ``[N]``, 0 or 1, with a gradient.
        rows: from the rows that ran to those of the gate; None: all rows ran.
    """

    def __init__(self, gate: Tensor, rows: Owners | None):
        self.gate, self.rows = gate, rows

    def vector(self, vector):
        if vector is None:
            return self.gate, 1.0
        if not self.gate.requires_grad:
            return self.gate * (vector if self.rows is None else self.rows.vector(vector)[0]), 1.0
        if self.rows is None:
            return self.gate * vector, 1.0
        live = (~self.rows.dead).double()
        mean = ((vector.detach() * live).sum() / live.sum().clamp(min=1)).detach()
        priced = torch.where(self.gate.detach() != 0, self.rows.vector(vector)[0], mean)
        return self.gate * priced, 1.0

    def values(self, values):
        return values if self.rows is None else self.rows.values(values)


class Times(Same):
    """Each row times a number of its own, ``[N]``."""

    def __init__(self, factor: Tensor):
        self.factor = factor

    def vector(self, vector):
        return (self.factor if vector is None else vector * self.factor), 1.0


class Shares(Same):
    """Each row above has a share of all, ``[N]``: of the sums below only their sum is known."""

    full = 0.0

    def __init__(self, share: Tensor, below: int):
        self.share, self.below = share, below

    def vector(self, vector):
        return (self.share, float(self.below)) if vector is None else (self.share * vector.sum(), 1.0)

    def values(self, values):
        return None


class Chain(Same):
    """One way after another, from the rows below to those above."""

    def __init__(self, *ways: Same):
        self.ways = ways
        self.full = 1.0
        for way in ways:
            self.full *= way.full

    def vector(self, vector):
        number = 1.0
        for way in self.ways:
            vector, factor = way.vector(vector)
            number *= factor
        return vector, number

    def values(self, values):
        for way in reversed(self.ways):
            values = None if values is None else way.values(values)
        return values


class Sums:
    """The MACs of layers over the rows of one batch.

    Attributes:
        rows: of the batch.
        dense: for each layer the MACs of a row if every gate were open.
    """

    def __init__(self, rows: int, device: torch.device | str = "cpu"):
        self.rows, self.device = rows, device
        self.dense: dict[str, float] = {}
        self._terms: dict[str, dict[int, float]] = {}  # layer: {id of a vector, 0 for ones: number}
        self._vectors: dict[int, Tensor | None] = {0: None}

    def add(self, layer: str, number: float, vector: Tensor | None = None) -> None:
        """``number * vector`` more MACs."""
        key = 0 if vector is None else id(vector)
        self._vectors.setdefault(key, vector)
        terms = self._terms.setdefault(layer, {})
        terms[key] = terms.get(key, 0.0) + number

    def add_dense(self, layer: str, number: float) -> None:
        self.dense[layer] = self.dense.get(layer, 0.0) + number

    def take(self, below: Sums, way: Same, dense: float = 1.0) -> None:
        """Adds what was counted on other rows; ``dense``: a factor of what it costs with every gate open."""
        done: dict[int, tuple[Tensor | None, float]] = {}
        for layer, terms in below._terms.items():
            for key, number in terms.items():
                if key not in done:
                    done[key] = way.vector(below._vectors[key])
                vector, factor = done[key]
                self.add(layer, number * factor, vector)
        for layer, number in below.dense.items():
            self.add_dense(layer, number * way.full * dense)

    def per_row(self) -> Tensor:
        """float64 ``[rows]``."""
        numbers: dict[int, float] = {}
        for terms in self._terms.values():
            for key, number in terms.items():
                numbers[key] = numbers.get(key, 0.0) + number
        out = torch.full((self.rows,), numbers.pop(0, 0.0), dtype=torch.float64, device=self.device)
        for key, number in numbers.items():
            out = out + self._vectors[key] * number
        return out

    def of_layers(self) -> dict[str, Tensor]:
        """Returns each layer's MACs over all rows, float64 ``[]``."""
        sums = {key: None if v is None else v.sum() for key, v in self._vectors.items()}
        out = {}
        for layer, terms in self._terms.items():
            total = torch.tensor(terms.get(0, 0.0) * self.rows, dtype=torch.float64, device=self.device)
            for key, number in terms.items():
                total = total if key == 0 else total + sums[key] * number
            out[layer] = total
        return out
