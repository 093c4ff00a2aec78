"""Layers that treat samples, around modules that work in place: functions of values all the same."""

import itertools

import pytest
import torch
from exit_cases import Calls
from torch import nn

from dynops import backends
from dynops.nn import (
    Cascade,
    ConvExperts,
    EarlyExit,
    Experts,
    Halting,
    LearnedExit,
    MaxSoftmax,
    MoE,
    Skip,
    SparseBlocks,
    SparseConv2d,
    SpatialHalting,
    TokenExit,
    TokenSequential,
    TopKRouter,
)
from dynops.testing import random_tensor

MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)
N = 6


def conv(channels: int = 4) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, padding=1)


class Assigns(nn.Module):
    def forward(self, x):
        x[:, 0] = 1
        return x * 2


class Adds(nn.Module):
    def forward(self, x):
        x += 1
        return x * 2


class Delegates(nn.Module):
    def forward(self, x):
        return self.inner(x)

    def inner(self, x):
        return x.mul_(2) + 1


def outer(x):
    return inner(x)


def inner(x):
    return torch.relu_(x) * 3


WRITERS = {
    "relu, conv": lambda: nn.Sequential(nn.ReLU(inplace=True), conv()),
    "relu alone": lambda: nn.ReLU(inplace=True),
    "identity, dropout, relu": lambda: nn.Sequential(nn.Identity(), nn.Dropout(), nn.ReLU(True), conv()),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Identity(), nn.LeakyReLU(0.1, True)), conv()),
    "x[:, 0] =": Assigns,
    "+=": Adds,
    "method": Delegates,
    "function": lambda: outer,
    "attribute": lambda: Calls(torch.relu_),
    "lambda": lambda: Calls(lambda x: x.mul_(2)),
    "script": lambda: torch.jit.script(nn.Sequential(nn.ReLU(True), conv())),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("mode", ["residual", "replace"])
def test_skip_is_a_function_of_values(name, mode):
    module, x = WRITERS[name](), random_tensor(N, 4, 5, 5)
    if isinstance(module, nn.Module):
        module.eval()
    gates = (torch.zeros(N), torch.ones(N), torch.tensor([1.0, 0, 1, 1, 0, 0]), torch.rand(N))
    for shortcut, context, gate, dense in itertools.product((None, module), MODES, gates, (False, True)):
        with context():
            given, g = x.clone(), gate.view(-1, 1, 1, 1)
            made = Skip(module, shortcut, mode, dense=dense)(given, gate)
            below = x if shortcut is None else shortcut(x.clone())
            other = module(x.clone())
            exact = below + g * other if mode == "residual" else g * other + (1 - g) * below
        assert torch.equal(given, x)
        torch.testing.assert_close(made, exact)


@pytest.mark.parametrize("path", [None, "rows", "samples"])
def test_skip_in_place_on_every_path(path):
    block = nn.Sequential(nn.ReLU(True), conv(32), nn.BatchNorm2d(32), nn.ReLU(True), conv(32)).eval()
    x, gate = (
        random_tensor(4, 32, 8, 8).contiguous(memory_format=torch.channels_last),
        torch.tensor([1, 0, 1, 1]),
    )
    with torch.no_grad():
        exact = x + gate.view(-1, 1, 1, 1) * block(x.clone())
        for g, samples in ((gate, slice(None)), (torch.ones(4), [0, 2, 3])):
            given = x.clone()
            made = Skip(block, path=path).eval()(given, g)
            assert torch.equal(given, x)
            torch.testing.assert_close(made[samples], exact[samples])


def test_skip_trains_through_a_branch_that_works_in_place():
    block, gate = WRITERS["relu, conv"]().double(), torch.tensor([1.0, 0, 1, 1, 0, 1], dtype=torch.double)
    x = random_tensor(N, 4, 5, 5).double()
    grads = []
    for run in (lambda a: Skip(block)(a, gate), lambda a: a + gate.view(-1, 1, 1, 1) * block(a.clone())):
        leaf = x.clone().requires_grad_()
        loss = run(leaf).square().sum()
        grads.append(torch.autograd.grad(loss, [leaf, *block.parameters()]))
    for ours, exact in zip(*grads, strict=True):
        torch.testing.assert_close(ours, exact)


def test_a_write_that_no_code_shows():
    write = type("Unseen", (), {"__call__": lambda self, x: getattr(x, "mul" + chr(95))(2)})()
    x = random_tensor(N, 4)
    for context in MODES:
        with context():
            given = x.clone()
            torch.testing.assert_close(Skip(Calls(write))(given, torch.ones(N)), 3 * x)
            assert torch.equal(given, x)


def test_a_module_that_writes_later():
    class Sometimes(nn.Module):
        writes = False

        def forward(self, x):
            return x.mul_(2) if self.writes else x * 2

    module, x = Sometimes(), random_tensor(N, 4)
    layer = Skip(module)
    layer(x, torch.ones(N))
    module.writes = True
    with pytest.raises(RuntimeError, match="Sometimes: expected a module that leaves its input as it is"):
        layer(x.clone(), torch.ones(N))
    for _ in range(2):
        given = x.clone()
        torch.testing.assert_close(layer(given, torch.ones(N)), 3 * x)
        assert torch.equal(given, x)


def test_an_input_that_something_else_shares():
    """numpy, DLPack or a CUDA graph's static input see the caller's memory, whatever a module keeps."""

    class Remembers(nn.Module):
        last = None

        def forward(self, x):
            self.last = x
            return x * 2

    layer, x = Skip(Remembers()).eval(), torch.zeros(1, 4, 8, 8)
    frame = x.numpy()
    with torch.no_grad():
        for t in range(1, 5):
            frame[:] = t
            assert layer(x, torch.ones(1)).mean().item() == 3.0 * t
            x.mul_(1.0)


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"]
)
def test_a_kernel_reads_a_lazy_clone_where_it_lies(layout):
    layer, x = (
        SparseConv2d(16, 16, 3, padding=1).eval(),
        random_tensor(2, 16, 9, 9).contiguous(memory_format=layout),
    )
    clone, mask = torch._lazy_clone(x), torch.ones(2, 9, 9).tril()
    with torch.no_grad():
        torch.testing.assert_close(layer(clone, mask), layer(x.clone(), mask))
    if backends.has_binary():
        assert torch._C._is_cow_tensor(clone)


def stage():
    return nn.Sequential(nn.ReLU(True), conv(), nn.BatchNorm2d(4))


def head():
    return nn.Sequential(nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


@pytest.mark.parametrize("equilibrium", [False, True])
def test_exits_are_functions_of_values(equilibrium):
    parts = [stage() for _ in range(3)], [head() for _ in range(3)]
    model = EarlyExit(*parts, MaxSoftmax(0.0), gradient_equilibrium=equilibrium).eval()
    x = random_tensor(N, 4, 6, 6)
    with torch.no_grad():
        state, exact = x.clone(), []
        for one, other in zip(*parts, strict=True):
            state = one(state.clone())
            exact.append(other(state.clone()))
    exact = torch.stack(exact)
    middle = float(exact.softmax(2).amax(2).median())
    for context, threshold in itertools.product(MODES, (0.0, middle, 2.0)):
        model.criterion.set_threshold(threshold)
        with context():
            given = x.clone()
            out, every = model(given), torch.stack(model(given, all_exits=True))
        assert torch.equal(given, x)
        torch.testing.assert_close(every, exact)
        torch.testing.assert_close(out.logits, exact[out.exits, torch.arange(N)])


def test_cascades_and_criteria_are_functions_of_values():
    x = random_tensor(N, 4, 6, 6)
    models = [nn.Sequential(stage(), head()).eval() for _ in range(3)]
    exact = torch.stack([model(x.clone()) for model in models])
    learned = LearnedExit([nn.Sequential(nn.ReLU(True), nn.Flatten(), nn.Linear(144, 1)) for _ in range(2)])
    for criterion in (MaxSoftmax(0.25), learned, lambda z, e, s: z.mul_(9).softmax(1).amax(1) > 0.6):
        given = x.clone()
        out = Cascade(models, criterion).eval()(given)
        assert torch.equal(given, x)
        torch.testing.assert_close(out.logits, exact[out.exits, torch.arange(N)])


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = conv(), nn.ReLU(True)

    def forward(self, x, n):
        return self.conv(self.relu(x))


@pytest.mark.parametrize("weighted", [True, False])
def test_halting_is_a_function_of_values(weighted):
    def halt(x):
        return x.abs_().flatten(1).mean(1).clamp(max=0.9)

    step, x = Step(), random_tensor(N, 4, 5, 5)
    with torch.no_grad():
        state, total, average, last, runs = x.clone(), torch.zeros(N), 0, x, torch.ones(N, dtype=torch.bool)
        for n in range(1, 5):
            state = step(state.clone(), n)
            score = halt(state.clone()) if n < 4 else torch.ones(N)
            halts = (total + score >= 0.99) | (n == 4)
            weight = torch.where(halts, 1 - total, score) * runs
            average = average + weight.view(-1, 1, 1, 1) * state
            last = torch.where(runs.view(-1, 1, 1, 1), state, last)
            total, runs = total + score, runs & ~halts
    for context, dense in itertools.product(MODES, (False, True)):
        with context():
            given = x.clone()
            out = Halting(step, halt, 4, weighted=weighted, dense=dense)(given)
        assert torch.equal(given, x)
        torch.testing.assert_close(out.output, average if weighted else last)


def test_tokens_and_pixels_are_functions_of_values():
    x = random_tensor(3, 5, 8)
    parts = (
        [TokenSequential(nn.ReLU(True), nn.Linear(8, 8)) for _ in range(3)],
        [nn.Sequential(nn.ReLU(True), nn.Linear(8, 4)) for _ in range(3)],
    )
    model, state, exact = TokenExit(*parts, MaxSoftmax(0.4)).eval(), x.clone(), []
    for one, other in zip(*parts, strict=True):
        state = one(state.clone())
        exact.append((other(state.clone()), state))
    for context in MODES:
        with context():
            given = x.clone()
            out, every = model(given), model(given, all_exits=True)
        assert torch.equal(given, x)
        for exit in range(3):
            at = out.exits == exit
            torch.testing.assert_close(every[exit], exact[exit][0])
            torch.testing.assert_close(out.logits[at], exact[exit][0][at])
            torch.testing.assert_close(out.hidden[at], exact[exit][1][at])

    class Unit(nn.Module):
        def forward(self, x, plan=None):
            return x.relu_() * 0.5

    maps = random_tensor(2, 4, 5, 5)
    halts = [nn.Sequential(nn.ReLU(True), nn.Conv2d(4, 1, 1), nn.Sigmoid()) for _ in range(2)]
    outs = []
    for dense in (False, True):
        given = maps.clone()
        outs.append(SpatialHalting([Unit()] * 3, halts, dense=dense)(given).output)
        assert torch.equal(given, maps)
    torch.testing.assert_close(*outs)


def test_experts_and_blocks_are_functions_of_values():
    class Gate(nn.Module):
        def forward(self, x):
            x.relu_()
            return torch.arange(N)[:, None] % 3, torch.ones(N, 1)

    branches, x, tokens = (
        [nn.Sequential(nn.ReLU(True), conv()) for _ in range(3)],
        random_tensor(N, 4, 5, 5),
        random_tensor(9, 8),
    )
    exact = torch.cat([branches[i % 3](x[i : i + 1].clone()) for i in range(N)])
    given = x.clone().requires_grad_()
    made = ConvExperts(branches, Gate())(given)
    torch.testing.assert_close(made, exact)
    made.sum().backward()  # the branches' parts are tensors of their own
    assert torch.equal(given, x)
    shared, gate = (nn.Sequential(nn.ReLU(True), nn.Linear(8, out)) for out in (8, 1))
    moe, given = MoE(TopKRouter(8, 4, 2), Experts(4, 8, 6), shared, shared_gate=gate), tokens.clone()
    made, routing = moe(given).output, moe.gate(tokens)
    exact = moe.experts(tokens, routing.index, routing.weight)
    exact = exact + torch.sigmoid(gate(tokens.clone())) * shared(tokens.clone())
    torch.testing.assert_close(made, exact)
    assert torch.equal(given, tokens)
    maps = random_tensor(2, 4, 8, 8)
    blocks = SparseBlocks(nn.Sequential(nn.ReLU(True), conv()), 4).eval()
    for density, path in itertools.product((0.3, 1.0), (None, "rows", "tiles")):
        blocks.path, given = path, maps.clone()
        with torch.no_grad():
            blocks(given, torch.rand(2, 8, 8) < density)
        assert torch.equal(given, maps)


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        x, gate = torch.randn(2, 4, 8, 8), torch.ones(2)
        for module in (conv(), Adds()):
            assert Skip(module, dense=True)(x, gate).shape == x.shape
