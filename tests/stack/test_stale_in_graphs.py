"""A module that was changed since its trace, and is compiled or exported before it runs again: never the old answer."""

import pytest
import torch
from torch import nn

import dynops
from dynops.nn import SparseBlocks, SparseSequential

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 8, 8, dtype=torch.bool)
MASK[:, :2] = False


def chain():
    return SparseSequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()).eval()


def blocks():
    return SparseBlocks(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()).eval(), 2)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("make", [chain, blocks])
def test_a_child_that_was_replaced(make):
    layer = make()
    inner = layer.module if isinstance(layer, SparseBlocks) else layer
    inner[0] = nn.Conv2d(3, 3, 1)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")(X, MASK)
    exported = torch.export.export(layer, (X, MASK)).module()(X, MASK)
    expected = layer(X, MASK)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(exported, expected)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.scale, self.more, self.flag = nn.Conv2d(3, 3, 3, padding=1), 2.0, [1.0, 3.0], False

    def forward(self, x):
        y = self.conv(x) * self.scale * self.more[0]
        return y - self.conv(x + 1) if self.flag else y


CHANGES = {
    "number": lambda n: setattr(n, "scale", 5.0),
    "switch": lambda n: setattr(n, "flag", True),
    "item": lambda n: n.more.__setitem__(0, 7.0),
    "forward": lambda n: setattr(n.conv, "forward", lambda x: x * 3),
    "padding": lambda n: setattr(n.conv, "padding", (0, 0)),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiled_before", [False, True])
@pytest.mark.parametrize("change", list(CHANGES))
def test_what_a_converted_forward_read(change, compiled_before):
    model = Scaled().eval()
    dynops.convert_(model)

    def run(x):
        with dynops.use_mask(MASK):
            return model(x)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    if compiled_before:
        compiled(X)
    CHANGES[change](model)
    torch.testing.assert_close(compiled(X), run(X))
