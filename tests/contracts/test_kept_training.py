"""Whatever a training script does, a layer's output is that of a fresh copy of it, which keeps nothing yet."""

import copy
import functools
import inspect
import io
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from layer_cases import layer_of
from torch import nn

import dynops
from dynops.testing import random_mask

CHANNELS, SIZE, BATCH = 32, 10, 3


def block(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU(), *more
    )


class Masked(nn.Module):
    """A converted model inside its context."""

    def __init__(self):
        super().__init__()
        self.net = block(nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False))
        dynops.convert_(self.net)

    def forward(self, x, mask):
        with dynops.active(mask):
            return self.net(x)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = dynops.nn.SparseConv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm = dynops.nn.MaskedBatchNorm2d(CHANNELS)

    def forward(self, x, mask):
        return self.norm(self.conv(x, mask), mask)


class Channels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = (
            dynops.nn.ChannelConv2d(CHANNELS, CHANNELS, 3, padding=1),
            nn.BatchNorm2d(CHANNELS),
        )

    def forward(self, x, mask):
        live = mask.flatten(1)[:, :CHANNELS]
        return self.conv(x, None, live, norm=self.norm, activation="relu")


class Switches(nn.Module):
    def __init__(self):
        super().__init__()
        widths = [CHANNELS // 2, CHANNELS]
        self.conv = dynops.nn.SlimmableConv2d([CHANNELS] * 2, widths, 3, padding=1)
        self.norm = dynops.nn.SwitchableBatchNorm2d(widths)

    def forward(self, x, mask):
        width = torch.arange(len(x)) % 2
        return self.norm(self.conv(x, width), width)


class Samples(nn.Module):
    def __init__(self):
        super().__init__()
        self.skip = dynops.nn.Skip(block())

    def forward(self, x, mask):
        return self.skip(x, mask[:, 0, 0])


class Called(nn.Module):
    """A layer of the table: its first input has the values that come in, the others are its own."""

    def __init__(self, name):
        super().__init__()
        self.layer, inputs, _ = layer_of(name)
        self.inputs = inputs

    def forward(self, x, mask):
        first, *others = self.inputs
        return self.layer(x.flatten()[: first.numel()].view(first.shape), *others)


MODELS = {
    "layer": Layer,
    "convert_": Masked,
    "Skip": Samples,
    "ChannelConv2d": Channels,
    "switches": Switches,
    **{
        name: functools.partial(Called, name)
        for name in (
            "SparseSequential",
            "SparseBlocks",
            "EarlyExit",
            "ChannelGatedConv2d",
            "CondConv2d",
            "Experts",
        )
    },
}


def values(out) -> list[torch.Tensor]:
    """The tensors in what a model returns."""
    if isinstance(out, torch.Tensor):
        return [out]
    if not isinstance(out, (list, tuple, dict)):
        out = vars(out) if hasattr(out, "__dict__") else {f: getattr(out, f) for f in out.__slots__}
    out = out.values() if isinstance(out, dict) else out
    return [
        t
        for value in out
        if value is not None
        for t in (values(value) if not isinstance(value, (int, float, str)) else [])
    ]


def sample(dtype=torch.float32):
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE).to(memory_format=torch.channels_last)
    mask = random_mask((BATCH, SIZE, SIZE), 0.5)
    mask[0, 0, 0] = 1  # a sample that stays
    return x.to(dtype), mask


def assert_as_fresh(model: nn.Module, x, mask, inference: bool = False) -> None:
    mode = torch.inference_mode if inference else torch.no_grad
    with mode():
        got, fresh = values(model(x, mask)), values(copy.deepcopy(model)(x, mask))
    assert len(got) == len(fresh) > 0
    for a, b in zip(got, fresh, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def step(model: nn.Module, make, x, mask) -> None:
    optimizer = make(list(model.parameters()))

    def closure():
        optimizer.zero_grad()
        loss = sum(v.float().square().mean() for v in values(model(x, mask)) if v.requires_grad)
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def optimisers() -> dict:
    """Every class of torch.optim that takes convolutions' weights, in each of its implementations."""
    found = {}
    for name, kind in vars(torch.optim).items():
        if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)):
            continue
        if name in ("Optimizer", "SparseAdam", "Muon"):  # the base; sparse gradients; matrices only
            continue
        arguments = inspect.signature(kind).parameters
        for how in ({}, {"foreach": True}, {"fused": True}):
            if set(how) <= set(arguments):
                key = name + "".join(f"_{flag}" for flag in how)
                found[key] = lambda p, kind=kind, how=how: kind(p, lr=0.05, **how)
    return found


OPTIMISERS = optimisers()


@pytest.mark.parametrize("name", MODELS)
def test_train_and_validate(name):
    """Running statistics move without a step, weights by a fused one, in an ordinary loop."""
    model = MODELS[name]()
    x, mask = sample()
    for epoch in range(3):
        model.train()
        step(model, OPTIMISERS["AdamW_fused"], 5 * x + epoch, mask)
        model.eval()
        assert_as_fresh(model, x, mask, inference=epoch % 2 == 1)
        model.train()
        with torch.no_grad():
            model(3 * x - 1, mask)
        model.eval()
        assert_as_fresh(model, x, mask)


class Script(RuleBasedStateMachine):
    """A training script: random interleavings of what such scripts do."""

    @initialize(name=st.sampled_from(sorted(MODELS)), seed=st.integers(0, 9))
    def build(self, name, seed):
        torch.manual_seed(seed)
        self.model = MODELS[name]().eval()
        self.x, self.mask = sample()
        self.saved = copy.deepcopy(self.model.state_dict())

    @rule(inference=st.booleans())
    def evaluate(self, inference):
        self.model.eval()
        assert_as_fresh(self.model, self.x, self.mask, inference)

    # LBFGS views gradients flat, which those in channels_last do not allow
    @rule(name=st.sampled_from(sorted(OPTIMISERS.keys() - {"LBFGS"})), train=st.booleans())
    def train(self, name, train):
        self.model.train(train)
        step(self.model, OPTIMISERS[name], self.x, self.mask)
        self.model.eval()

    @rule()
    def move_statistics(self):
        self.model.train()
        with torch.no_grad():
            self.model(2 * self.x + 1, self.mask)
        self.model.eval()

    @rule(how=st.sampled_from(["data.mul_", "data =", "numpy", "no_grad", "inference_mode"]))
    def write(self, how):
        for p in self.model.parameters():
            if how == "data.mul_":
                p.data.mul_(0.5).add_(0.01)
            elif how == "data =":
                p.data = p.data * 0.5 + 0.01
            elif how == "numpy":
                p.detach().numpy()[...] *= 0.5
            else:
                with torch.no_grad() if how == "no_grad" else torch.inference_mode():
                    p.mul_(0.5)

    @rule(assign=st.booleans())
    def load(self, assign):
        self.model.load_state_dict(copy.deepcopy(self.saved), assign=assign)
        for p in self.model.parameters():
            p.requires_grad_()

    @rule()
    def save(self):
        self.saved = copy.deepcopy(self.model.state_dict())

    @rule(layout=st.sampled_from([torch.channels_last, torch.contiguous_format]))
    def to_format(self, layout):
        self.model.to(memory_format=layout)

    @rule()
    def there_and_back(self):
        self.model.bfloat16().float()

    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def replace_by_a_copy(self, how):
        if how == "deepcopy":
            self.model = copy.deepcopy(self.model)
        elif how == "pickle":
            self.model = pickle.loads(pickle.dumps(self.model))
        else:
            buffer = io.BytesIO()
            torch.save(self.model, buffer)
            buffer.seek(0)
            self.model = torch.load(buffer, weights_only=False)

    @precondition(lambda self: isinstance(self.model, (Layer, Masked)))
    @rule()
    def run_compiled(self):
        compiled = torch.compile(self.model, backend="eager")
        with torch.no_grad():
            compiled(self.x, self.mask)

    @rule(frozen=st.booleans())
    def freeze(self, frozen):
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(not frozen)

    def teardown(self):
        if hasattr(self, "model"):
            self.model.eval()
            assert_as_fresh(self.model, self.x, self.mask)


Script.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
TestScript = Script.TestCase
