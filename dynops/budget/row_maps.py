"""Maps from the rows of a smaller batch to those of the batch that it came from."""

from __future__ import annotations

import torch
from torch import Tensor


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
