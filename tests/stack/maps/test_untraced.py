"""A model that no trace holds, on maps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from map_cases import SIZE, C, close, masks, rand
from torch import nn

import dynops
from dynops.testing import MaskedPolicy


class Model(nn.Module):
    """A model that no trace holds: data in its control flow, several outputs, functions of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C)
        self.body = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.SiLU())
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, 2, 1), nn.ReLU(), nn.Conv2d(2, C, 1), nn.Sigmoid()
        )
        self.norm, self.mlp, self.last = nn.LayerNorm(C), nn.Linear(C, C), nn.Conv2d(2 * C, 4, 1)
        self.gamma = nn.Parameter(torch.full((C,), 0.7))

    def forward(self, x, scale: float = 1.0, extra=None):
        if x.dtype.is_complex:  # which no trace knows
            raise TypeError
        x = F.relu(self.bn(self.stem(x)), inplace=True)
        y = self.body(x) * scale
        if extra is not None and float(extra.sum()) > 0:
            y = y + extra
        y = y + x
        z = (self.gamma * self.mlp(self.norm(y.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2) + y
        out = self.last(torch.cat([z * self.gate(z), x.sigmoid()], 1))
        return {"map": out, "pooled": z.mean((2, 3)), "parts": [x, y[:, :2]]}


def model_of(training=False):
    torch.manual_seed(0)
    model = Model().double().train(training)
    nn.init.normal_(model.bn.bias)
    return model


def leaves(out):
    return [out["map"], out["pooled"], *out["parts"]]


@pytest.mark.parametrize("how", ["as it is", "hooks"])
@pytest.mark.parametrize("extra", [False, True])
def test_a_model_that_no_trace_holds(how, extra):
    model, x, mask = model_of(), rand(2, 3, *SIZE), masks()
    extra = rand(2, C, *SIZE).abs() if extra else None
    with MaskedPolicy(mask):
        expected = copy.deepcopy(model)(x, 1.5, extra=extra)
    report = dynops.convert_(model)
    assert "" in report.unfused
    if how == "hooks":
        for module in model.modules():
            module.register_forward_hook(lambda *_: None)
    before = x.clone()
    with dynops.use_mask(mask):
        out = model(x, 1.5, extra=extra)
    for a, b in zip(leaves(out), leaves(expected), strict=True):
        assert type(a) is torch.Tensor
        close(a, b)
    assert torch.equal(x, before)


def test_gradients_of_a_model_that_no_trace_holds():
    x, mask = rand(2, 3, *SIZE), masks()
    grads = []
    for converted in (False, True):
        model, inputs = model_of(), x.clone().requires_grad_()
        if converted:
            dynops.convert_(model)
        with dynops.use_mask(mask) if converted else MaskedPolicy(mask):
            out = model(inputs)
        (out["map"].square().sum() + out["pooled"].sin().sum() + out["parts"][1].sum()).backward()
        grads.append([inputs.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*grads, strict=True):
        close(b, a, 1e-10)


def test_what_a_user_does_with_a_map():
    x, mask = rand(2, 3, *SIZE), masks()
    model, seen = model_of(), []
    dynops.convert_(model)
    model.body[0].register_forward_hook(lambda m, i, out: seen.append(out))
    with dynops.use_mask(mask), torch.no_grad():
        model(x)
    kept = seen[0]
    plain = kept.dense()
    assert isinstance(kept, torch.Tensor) and kept.shape == plain.shape and "tensor(" in repr(kept)
    assert kept.numpy().shape == tuple(plain.shape) and torch.equal(kept.cpu(), plain)
    assert torch.equal(copy.deepcopy(kept), plain) and kept.sum().item() == pytest.approx(plain.sum().item())
    assert (
        torch.equal(torch.stack([kept, kept])[1], plain)
        and len(kept) == 2
        and kept.is_contiguous(memory_format=torch.channels_last)
    )
    assert torch.equal(torch.ops.aten.relu(kept), plain.relu())
    out = torch.empty_like(plain)
    out.copy_(kept)
    assert torch.equal(out, plain)
    dense = torch.ones_like(plain)
    dense += kept
    assert torch.equal(dense, torch.where(plain != 0, plain + 1, 0))


class Parts(Model):
    def forward_features(self, x):
        return self.body(F.relu(self.bn(self.stem(x))))

    def forward_head(self, x):
        return x.mean((2, 3)) + self.gate(x)[:, :, 0, 0]

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def test_parts_have_the_answer_of_the_whole():
    torch.manual_seed(0)
    model, x, mask = Parts().double().eval(), rand(2, 3, *SIZE), masks()
    dynops.convert_(model)
    with dynops.use_mask(mask):
        whole = model(x)
        features = model.forward_features(x)
        parts = model.forward_head(features)
    close(parts if type(parts) is torch.Tensor else parts.dense(), whole)
    close(model.forward_head(model.forward_features(x)), model(x))
