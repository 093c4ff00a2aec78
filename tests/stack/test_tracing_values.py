"""What a forward does with a map's value while it is traced: C++ never reads a stand-in as a tensor."""

import builtins
import copy

import pytest
import torch
from torch import Tensor, nn

import dynops

CALLS = {
    "where": lambda h: torch.where(h > 0, h, 1.0),
    "pow": lambda h: torch.pow(h, 2),
    "clamp": lambda h: torch.clamp(h, h.mean((2, 3), keepdim=True), torch.ones(1)),
    "full": lambda h: h + torch.full((1,), h.amax((1, 2, 3)).sum()),
    "arange": lambda h: h + torch.arange(0, float(h.detach().abs().amax((1, 2, 3)).sum()) + 1, 4).sum(),
    "isin": lambda h: h * ~torch.isin(h, 1.0),
    "result_type": lambda h: h.to(torch.result_type(h, 1.0)),
    "asarray": lambda h: torch.asarray(h) * 2,
    "as_tensor": lambda h: torch.as_tensor(h) * 2,
    "tensor": lambda h: h + torch.tensor(h.detach().amax((1, 2, 3)).sum()),
    "scalar_tensor": lambda h: h * torch.scalar_tensor(h.detach().amax((1, 2, 3)).sum()),
    "FloatTensor": lambda h: h + torch.FloatTensor(h.detach().amax((2, 3)).flatten()[:1]),
    "isinstance": lambda h: h * 2 if isinstance(h, Tensor) and isinstance(h, (int, Tensor)) else None,
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(self.call(self.conv(x)))


def model_of(name):
    torch.manual_seed(0)
    return type("Model", (Model,), {"call": staticmethod(CALLS[name])})().eval()


@pytest.mark.filterwarnings("ignore:To copy construct")
@pytest.mark.parametrize("name", CALLS)
def test_a_value_that_cpp_unpacks(name):
    model, x = model_of(name), torch.randn(2, 3, 6, 6)
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    with torch.no_grad(), dynops.use_mask(torch.ones(2, 6, 6)):
        torch.testing.assert_close(model(x), dense(x))


def test_isinstance_is_pythons_again():
    before = builtins.isinstance
    assert "" in dynops.convert_(model_of("isinstance")).fused
    assert builtins.isinstance is before and "built-in" in repr(before)


class Hooks(nn.Module):
    """It hooks its layer in the first call, as transformers' models do that return hidden states."""

    def __init__(self):
        super().__init__()
        self.conv, self.last, self.seen = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1), []

    def forward(self, x):
        if not self.conv._forward_hooks:
            self.conv.register_forward_hook(lambda module, inputs, output: self.seen.append(output))
        return self.last(self.conv(x))


def test_a_trace_leaves_no_hook():
    model = Hooks()
    assert "changes its modules" in dynops.convert_(model).unfused[""]
    assert not model.conv._forward_hooks
    with dynops.use_mask(torch.ones(2, 6, 6)):
        model(torch.randn(2, 3, 6, 6))
    assert len(model.seen) == 1
