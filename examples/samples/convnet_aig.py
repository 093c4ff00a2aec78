"""ConvNet-AIG: a gate before each residual block decides whether a sample runs it (Veit and Belongie, ECCV 2018).

The gate pools the block's input and draws by Gumbel-softmax; a loss pulls each gate's rate to its target.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dynops.budget import target_rate_loss
from dynops.gates import PooledGate, set_noise

from ..common import Digits, Length, fit
from ..measure import main
from .resnet import WIDTHS, ResNet

SIZE, STEPS = 16, 160
TARGETS = (1.0, 0.4, 0.4, 1.0, 0.4, 0.4)  # the first block of each width stays open


class ConvNetAIG(nn.Module):
    def __init__(self):
        super().__init__()
        self.resnet = ResNet()
        self.gates = nn.ModuleList(PooledGate(width, open_rate=0.6) for width in WIDTHS)

    def forward(self, x: Tensor, mode: str) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the gates ``[N]`` of the blocks."""
        gates = []

        def decide(i: int, x: Tensor) -> Tensor:
            gates.append(self.gates[i](x).mask)
            return gates[-1]

        return self.resnet(x, mode, decide), gates


def build() -> nn.Module:
    return ConvNetAIG()


def train(model: nn.Module, data: Digits, length: Length) -> None:
    """Trains the dense-masked form: a closed gate learns what it missed. The second half is without noise, as evaluation is."""

    def loss(x: Tensor, y: Tensor, progress: float) -> Tensor:
        set_noise(model, progress < 0.5)
        logits, gates = model(x, "dense")
        return F.cross_entropy(logits, y) + 2 * target_rate_loss(gates, TARGETS)

    fit(model, data.train, loss, length, gates=model.gates.parameters())


def run(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    return model(x, mode)[0]


if __name__ == "__main__":
    main(__name__)
