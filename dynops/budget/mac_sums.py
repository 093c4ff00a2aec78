"""MACs of layers, sample by sample, as vectors times numbers.

Most layers cost the same for each row of a batch, and a gate treats all layers behind it alike. So the cost
of a layer is kept as numbers times vectors that many layers share (None: ones), and a gate costs one vector,
however many layers it closes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .row_maps import Same


def opened(gate: Tensor) -> Tensor:
    """float64: 1 where a gate is open (nonzero), else 0, with the gate's own gradient (straight-through)."""
    hard = (gate.detach() != 0).double()
    return hard + slope(gate) if gate.requires_grad else hard


def slope(value: Tensor) -> Tensor:
    """float64 zeros with the gradient of ``value``."""
    return (value - value.detach()).double()


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
