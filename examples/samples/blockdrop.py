"""BlockDrop: a policy network looks at the image and drops blocks of a residual network (Wu et al., CVPR 2018).

Three phases: the residual network; the policy, by a policy gradient with the network frozen and a curriculum that frees
one block after the other, from the last; both together.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynops.gates import (
    PolicyNet,
    curriculum_mask,
    entropy,
    explore,
    log_probability,
    sample_actions,
    self_critical_loss,
    usage_reward,
)

from ..common import Digits, Length, fit
from ..measure import main
from .resnet import WIDTHS, ResNet

SIZE, STEPS = 16, 240
BLOCKS, PENALTY = len(WIDTHS), 1.0


def backbone() -> nn.Sequential:
    """The backbone of the policy: small beside the network, on the image at half its size."""
    return nn.Sequential(
        nn.AvgPool2d(2),
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
    )  # fmt: skip


class BlockDrop(nn.Module):
    def __init__(self):
        super().__init__()
        self.resnet = ResNet()
        self.policy = PolicyNet(backbone(), 32, BLOCKS)

    def forward(self, x: Tensor, mode: str, actions: Tensor | None = None) -> Tensor:
        """Logits. ``actions`` ``[N, 6]``: 1 where a block runs; None: those of the policy."""
        if mode != "full" and actions is None:
            actions = self.policy(x).mask
        return self.resnet(x, mode, lambda i, _: actions[:, i])


def build() -> nn.Module:
    return BlockDrop()


def train(model: nn.Module, data: Digits, length: Length) -> None:
    def pretrain(x: Tensor, y: Tensor, progress: float) -> Tensor:
        dropped = torch.rand(len(x), BLOCKS) < 0.3  # the network meets paths of all lengths
        return F.cross_entropy(model(x, "dense", 1.0 - dropped.float()), y)

    def finetune(x: Tensor, y: Tensor, progress: float) -> Tensor:
        loss, actions = policy_loss(model, x, y, curriculum_mask(BLOCKS, BLOCKS))
        return F.cross_entropy(model(x, "dense", actions), y) + 0.1 * loss

    def learn_policy(x: Tensor, y: Tensor, progress: float) -> Tensor:
        model.resnet.eval()  # frozen, its statistics too
        free = min(BLOCKS, 1 + math.floor(2 * BLOCKS * progress))
        return policy_loss(model, x, y, curriculum_mask(BLOCKS, free))[0]

    fit(model, data.train, pretrain, length.part(0.4), parameters=model.resnet.parameters())
    fit(model, data.train, learn_policy, length.part(0.35), rate=2e-2, parameters=model.policy.parameters())
    fit(model, data.train, finetune, length.part(0.25), rate=1e-3)


def policy_loss(model: BlockDrop, x: Tensor, y: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """REINFORCE with the greedy policy's reward as baseline; and the sampled actions ``[N, 6]``."""
    decision = model.policy(x)
    probability = explore(decision.score)
    actions = torch.where(free, sample_actions(probability), 1.0)
    greedy = torch.where(free, decision.mask.detach(), 1.0)
    rewards = []
    for taken in (actions, greedy):
        with torch.no_grad():  # no gradient passes the network: it may run the blocks taken only
            right = model(x, "dynamic", taken).argmax(1) == y
        rewards.append(usage_reward(taken, right, PENALTY))
    loss = self_critical_loss(log_probability(probability, actions), *rewards, mask=free)
    return loss - 0.01 * entropy(probability).mean(), actions


def run(model: nn.Module, x: Tensor, mode: str) -> Tensor:
    return model(x, mode)


if __name__ == "__main__":
    main(__name__)
