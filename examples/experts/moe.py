"""Mixture of experts: each patch of an image runs 2 of 8 MLPs (Shazeer et al., ICLR 2017; V-MoE, NeurIPS 2021).

A mixer (Tolstikhin et al., NeurIPS 2021) whose channel MLPs are experts. The static network runs all experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynops.nn import MoE

from ..common import Digits, Length, fit
from ..measure import main

SIZE, STEPS = 16, 500
PATCH, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 4, 128, 128, 8, 2


def all_experts(moe: MoE, x: Tensor) -> Tensor:
    """Every expert as one MLP of E * I features, each expert's times its weight: zero for those not chosen."""
    routing, experts = moe.gate(x), moe.experts
    weight = torch.zeros_like(routing.probs).scatter(-1, routing.index, routing.weight)
    gate, up = (part.flatten(0, 1) for part in experts.gate_up_proj.chunk(2, 1))  # [E * I, H]
    hidden = F.silu(F.linear(x, gate)) * F.linear(x, up)
    hidden = (hidden.unflatten(-1, (EXPERTS, -1)) * weight[..., None]).flatten(-2)
    return F.linear(hidden, experts.down_proj.transpose(0, 1).flatten(1))


class Block(nn.Module):
    """Mixes the patches, then runs the experts on each."""

    def __init__(self, patches: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.mix = nn.Linear(patches, patches)
        self.moe = MoE.from_sizes(
            HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, losses={"load_balance": 0.01, "z": 1e-3}
        )

    def forward(self, x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
        x = x + F.gelu(self.mix(self.norm1(x).mT)).mT
        h = self.norm2(x)
        if mode != "dynamic":
            return x + all_experts(self.moe, h), x.new_zeros(())
        out, losses, _ = self.moe(h)
        return x + out, sum(losses.values(), x.new_zeros(()))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(1, HIDDEN, PATCH, PATCH)
        self.blocks = nn.ModuleList(Block((SIZE // PATCH) ** 2) for _ in range(2))
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
        """Logits, and the sum of the routers' losses (in training, with dynops' layers)."""
        x, total = self.embed(x).flatten(2).mT, 0.0  # [N, patches, HIDDEN]
        for block in self.blocks:
            x, loss = block(x, mode)
            total = total + loss
        return self.head(x.mean(1)), total


def build() -> nn.Module:
    return Mixer()


def train(model: nn.Module, data: Digits, length: Length) -> None:
    def loss(x: Tensor, y: Tensor, progress: float) -> Tensor:
        logits, routing = model(x, "dynamic")
        return F.cross_entropy(logits, y) + routing

    fit(model, data.train, loss, length)


def run(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    return model(x, mode)[0]  # "full" is "dense": the weights of the experts are part of the network


if __name__ == "__main__":
    main(__name__)
