"""Skip RNN: an LSTM reads an image row by row, and learns which rows to skip (Campos et al., ICLR 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynops.nn import SkipRNN

from ..common import Digits, Length, fit
from ..measure import main

SIZE, STEPS = 32, 300
HIDDEN, PRICE = 128, 0.3


class RowReader(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = SkipRNN(SIZE, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
        """Logits, and the share of rows that were read."""
        rows = x[:, 0]  # [N, rows, columns]
        if mode == "full":
            zero = x.new_zeros(1, len(x), HIDDEN)
            _, h, _ = torch.lstm(rows, (zero, zero), self.rnn._flat_weights, True, 1, 0.0, False, False, True)
            return self.head(h[0]), x.new_ones(())
        self.rnn.dense = mode == "dense"
        output, _, updates = self.rnn(rows)
        return self.head(output[:, -1]), updates.mean()


def build() -> nn.Module:
    return RowReader()


def train(model: nn.Module, data: Digits, length: Length) -> None:
    """Trains the dense-masked form, where a skipped step learns what it missed."""

    def loss(x: Tensor, y: Tensor, progress: float) -> Tensor:
        logits, read = model(x, "dense")
        return F.cross_entropy(logits, y) + PRICE * read

    fit(model, data.train, loss, length)


def run(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    return model(x, mode)[0]


if __name__ == "__main__":
    main(__name__)
