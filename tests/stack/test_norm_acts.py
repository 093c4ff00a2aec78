"""timm's BatchNormAct2d: a norm and an activation in one module, traced as both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynops
from dynops.testing import MaskedPolicy

MASK = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(3)) < 0.4


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, channels: int, act: nn.Module):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        training = self.training
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps
        )
        return self.act(self.drop(y))


def network(act: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    norm = BatchNormAct2d(8, act)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, nn.Conv2d(8, 4, 3, padding=1)).eval()


def both(dense: nn.Module, sparse: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with MaskedPolicy(MASK):
            expected = dense(x)
        with dynops.use_mask(MASK):
            return sparse(x), expected


@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.SiLU(inplace=True), nn.LeakyReLU(), nn.Identity(), nn.Sigmoid()], ids=repr
)
def test_equals_the_plain_policy(act):
    dense, sparse = network(act), network(act)
    report = dynops.convert_(sparse)
    torch.testing.assert_close(*both(dense, sparse))
    assert ("call" not in report.fused[""]) == (type(act) is not nn.Sigmoid)  # sigmoid(0) is not 0: called


def _hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, output: 2 * output)


CHANGES = {
    "another activation": lambda norm: setattr(norm, "act", nn.ReLU()),
    "an activation that moves zero": lambda norm: setattr(norm, "act", nn.Sigmoid()),
    "a drop that does something": lambda norm: setattr(norm, "drop", nn.Hardtanh(-0.1, 0.1)),
    "a hook of the activation": lambda norm: _hooked(norm.act),
    "a hook of the drop": lambda norm: _hooked(norm.drop),
    "another eps": lambda norm: setattr(norm, "eps", 0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_after_the_first_call_is_noticed(change):
    dense, sparse = network(nn.SiLU()), network(nn.SiLU())
    dynops.convert_(sparse)
    before, _ = both(dense, sparse)
    change(dense[1])
    change(sparse[1])
    after, expected = both(dense, sparse)
    torch.testing.assert_close(after, expected)
    assert (after - before).abs().max() > 1e-3


def test_training_takes_the_statistics_of_active_pixels():
    joined, apart = network(nn.SiLU()), network(nn.SiLU())
    norm = nn.BatchNorm2d(8)
    norm.load_state_dict(apart[1].state_dict())
    apart[1] = nn.Sequential(norm, nn.SiLU())
    for model in (joined, apart):
        dynops.convert_(model.train())
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    for model in (joined, apart):
        with dynops.use_mask(MASK):
            model(x).square().sum().backward()
    torch.testing.assert_close(joined[1].running_mean, norm.running_mean)
    torch.testing.assert_close(joined[0].weight.grad, apart[0].weight.grad)
    dynops.revert_(joined)
    assert type(joined[1]) is BatchNormAct2d
