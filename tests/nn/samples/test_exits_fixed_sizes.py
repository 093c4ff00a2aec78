"""Networks with exits where sizes may not depend on values: export, make_fx, vmap and meta tensors give what eager calls give."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx

from dynops.nn import Cascade, ConvExperts, EarlyExit, Halting, MaxSoftmax, Patience, Skip, TokenExit
from dynops.testing import random_tensor


def head() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def net(criterion, **options) -> EarlyExit:
    stages = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)]
    return EarlyExit(stages, [head() for _ in stages], criterion, **options).eval()


@pytest.fixture
def x() -> Tensor:
    return random_tensor(6, 16, 8, 8) + torch.linspace(-4, 4, 6).view(-1, 1, 1, 1)


def assert_same(got, want) -> None:
    assert torch.equal(got[1], want.exits)
    torch.testing.assert_close(got[0], want.logits)


def some(logits: Tensor, exit: int, state: Tensor) -> Tensor:
    """A criterion by which about half of the samples leave at each exit."""
    return state.flatten(1)[:, exit] > 0


NETS = {
    "exits": lambda: net(some),
    "cap": lambda: net(some, max_fraction=0.34),
    "confidence": lambda: net(MaxSoftmax(0.35)),
    "patience": lambda: net(Patience(1)),
    "cascade": lambda: Cascade([head(), head(), head()], some).eval(),
}


@pytest.mark.parametrize("name", NETS)
def test_export_and_make_fx(name, x):
    model = NETS[name]()
    want = model(x)
    assert len(set(want.exits.tolist())) > 1
    assert_same(torch.export.export(model, (x,)).module()(x), want)
    assert_same(make_fx(lambda a: tuple(model(a)))(torch.zeros_like(x))(x), want)
    assert model.to("meta")(x.to("meta")).logits.shape == want.logits.shape


def test_vmap(x):
    model = NETS["exits"]()
    assert_same(vmap(lambda sample: tuple(t[0] for t in model(sample[None])))(x), model(x))


def test_what_has_no_such_form_says_so(x):
    tokens = random_tensor(2, 6, 16)
    exits = TokenExit([nn.Identity(), nn.Identity()], [nn.Linear(16, 5)] * 2, MaxSoftmax(0.3)).eval()
    with pytest.raises(
        RuntimeError, match="TokenExit: without all_exits=True: expected a call whose sizes may depend"
    ):
        torch.export.export(exits, (tokens,))
    experts = ConvExperts([nn.Conv2d(16, 16, 1) for _ in range(3)])
    with pytest.raises(RuntimeError, match="ConvExperts: expected a call whose sizes may depend on values"):
        torch.export.export(experts, (x, torch.zeros(6, 1, dtype=torch.long)))
    with pytest.raises(RuntimeError, match=r"EarlyExit\.visits: expected a call"):
        model = NETS["exits"]()
        vmap(lambda sample: [v.logits for v in model.visits(sample[None])])(x)


def test_halting_runs_dense(x):
    class Step(nn.Linear):
        def forward(self, state, n):
            return super().forward(state)

    layer = Halting(Step(16, 16), nn.Linear(16, 1), 4).eval()
    rows = random_tensor(5, 16)
    want = layer(rows)
    got = torch.export.export(layer, (rows,)).module()(rows)
    torch.testing.assert_close(got[0], want[0])


@pytest.mark.parametrize("strict", [False, True])
def test_skip(strict, x):
    layer, gate = Skip(nn.Conv2d(16, 16, 3, padding=1)).eval(), torch.tensor([1.0, 0, 1, 0, 0, 1])
    exported = torch.export.export(layer, (x, gate), strict=strict).module()
    for g in (gate, 1 - gate, torch.zeros(6)):
        torch.testing.assert_close(exported(x, g), layer(x, g))
