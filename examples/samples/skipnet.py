"""SkipNet: one LSTM sees each block's input and decides whether a sample runs the block (Wang et al., ECCV 2018).

Its first phase of training: supervised, straight-through gates, and a price for each block that runs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dynops.budget import mask_l1_loss
from dynops.gates import RecurrentGate

from ..common import Digits, Length, fit
from ..measure import main
from .resnet import WIDTHS, ResNet

SIZE, STEPS, PRICE = 16, 160, 0.8


class SkipNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.resnet = ResNet()
        self.gate = RecurrentGate(WIDTHS, open_rate=0.6)

    def forward(self, x: Tensor, mode: str) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the gates ``[N]`` of the blocks."""
        gates, state = [], None

        def decide(i: int, x: Tensor) -> Tensor:
            nonlocal state
            decision, state = self.gate(x, state, i)
            gates.append(decision.mask)
            return decision.mask

        return self.resnet(x, mode, decide), gates


def build() -> nn.Module:
    return SkipNet()


def train(model: nn.Module, data: Digits, length: Length) -> None:
    """Trains the dense-masked form: a closed gate learns what it missed. The price rises, so that the blocks learn first."""

    def loss(x: Tensor, y: Tensor, progress: float) -> Tensor:
        logits, gates = model(x, "dense")
        return F.cross_entropy(logits, y) + PRICE * min(1, 2 * progress) * mask_l1_loss(gates)

    fit(model, data.train, loss, length, gates=model.gate.parameters())


def run(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    return model(x, mode)[0]


if __name__ == "__main__":
    main(__name__)
