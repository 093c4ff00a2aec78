"""Layers that treat samples: modules that work in place, dtypes under autocast, and the states of networks with exits."""

import copy
import dataclasses
import itertools
import warnings

import pytest
import torch
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
from dynops.nn.steps.cells import compacted_cell
from dynops.testing import random_tensor

MODES = (torch.enable_grad, torch.no_grad, torch.inference_mode)
N = 6


def same(a, b) -> bool:
    """Whether a value went on as it is: none of its rows left."""
    return torch.equal(a, b) if isinstance(b, torch.Tensor) else a is b


def conv(channels: int = 4) -> nn.Module:
    return nn.Conv2d(channels, channels, 3, padding=1)


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


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


def test_a_module_that_writes_nowhere_gets_the_tensor_itself():
    seen, x = [], random_tensor(N, 4, 5, 5)

    class Pure(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.relu(x) + 1

    layer = Skip(Pure())
    for _ in range(3):  # the first call tells
        layer(x, torch.ones(N))
    assert seen[0] is not x and seen[1] is x and seen[2] is x


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


# -------------------------------------------------------------------------------------- autocast


class Wide(nn.Module):
    """What ends in a norm under a GPU's autocast."""

    def forward(self, x):
        return x.float()


BRANCHES = {
    "conv": conv,
    "conv, wide": lambda: nn.Sequential(conv(), Wide()),
    "pool": lambda: nn.AvgPool2d(3, 1, 1),
}


@pytest.mark.parametrize("branch", ["conv", "conv, wide"])
@pytest.mark.parametrize("below", [None, *BRANCHES])
@pytest.mark.parametrize("mode", ["residual", "replace"])
def test_autocast_gives_a_dtype_that_no_gate_changes(branch, below, mode):
    module, shortcut = BRANCHES[branch](), below and BRANCHES[below]()
    for dtype, grad, dense in itertools.product(
        (torch.float32, torch.bfloat16), (False, True), (False, True)
    ):
        x = random_tensor(4, 4, 6, 6).to(dtype)
        for gate in ([0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0]):
            layer = Skip(module, shortcut, mode, dense=dense).eval()  # a new one: nothing has run before
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
                made, plain = layer(x, torch.tensor(gate)), x if shortcut is None else shortcut(x)
                exact = torch.promote_types(module(x).dtype, plain.dtype)
            skipped = [n for n in range(4) if not gate[n]]
            assert made.dtype == exact
            assert torch.equal(made[skipped], plain[skipped].to(exact))


def test_a_convolution_stack_under_autocast_rounds_no_skipped_sample():
    block = nn.Sequential(conv(32), nn.ReLU(), conv(32)).eval()
    x = random_tensor(4, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    for gate in ([1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out = Skip(block).eval()(x, torch.tensor(gate))
        assert out.dtype == torch.float32
        assert all(torch.equal(out[n], x[n]) for n in range(4) if not gate[n])


def test_asking_for_a_dtype_leaves_no_trace():
    norm = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    before, x = copy.deepcopy(norm.state_dict()), random_tensor(4, 4, 3, 3).bfloat16()
    layer, state = Skip(norm, nn.Conv2d(4, 4, 1)), torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x, torch.zeros(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_in_layers_with_exits_and_experts(dtype):
    x = random_tensor(N, 4, 6, 6).to(dtype)

    def head(*last):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), *last)

    def dtypes(calls):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return {call().dtype for call in calls}

    wide = BRANCHES["conv, wide"]
    for heads in ([head(), head(Wide())], [head(Wide()), head()]):
        exits = [EarlyExit([conv(), wide()], heads, MaxSoftmax(t)).eval() for t in (0.0, 0.26, 2.0)]
        cascades = [
            Cascade([nn.Sequential(conv(), h) for h in heads], MaxSoftmax(t)).eval() for t in (0.0, 0.26, 2.0)
        ]
        for models in (exits, cascades):
            assert len(dtypes([lambda m=m: m(x).logits for m in models])) == 1

    one, other = conv(), wide()
    for weighted in (True, False):
        layers = [
            Halting(lambda s, n: one(s) if n == 1 else other(s), score, 3, weighted=weighted, dense=dense)
            for dense in (False, True)
            for score in (lambda s: torch.ones(len(s)), lambda s: (torch.arange(len(s)) % 2) * 1.0)
        ]
        assert len(dtypes([lambda m=m: m(x).output for m in layers])) == 1
    choices = (torch.full((N,), 3), torch.zeros(N).long(), torch.arange(N) % 4)
    branches = [conv(), wide(), conv()]
    made = dtypes([lambda i=i: ConvExperts(branches)(x, i) for i in choices])
    assert made == {torch.float32}  # the widest of the branches
    tokens = random_tensor(7, 8).to(dtype)
    experts, dropped = Experts(4, 8, 6), torch.full((7, 2), 4)
    calls = [lambda t=t, i=i: experts(tokens[:t], i[:t]) for t in (0, 7) for i in (dropped, dropped - 2)]
    assert len(dtypes(calls)) == 1
    hidden = random_tensor(3, 5, 8).to(dtype)
    stages = [
        TokenSequential(nn.Linear(8, 8)),
        TokenSequential(nn.Linear(8, 8), Wide()),
    ]
    models = [
        TokenExit(stages, [nn.Linear(8, 4), nn.Sequential(nn.Linear(8, 4), Wide())], MaxSoftmax(t)).eval()
        for t in (0.0, 0.4, 2.0)
    ]
    assert len(dtypes([lambda m=m: m(hidden).logits for m in models])) == 1
    assert len(dtypes([lambda m=m: m(hidden).hidden for m in models])) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cell_keeps_the_dtype_of_its_state(dtype):
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 8)

        def forward(self, x, h):
            return self.linear(torch.cat([x, h.relu_()], 1))

    cell, x, state = Cell(), random_tensor(N, 8), random_tensor(N, 8).to(dtype)
    for dense, update in itertools.product((False, True), ([0] * N, [1] * N, [1, 0, 1, 0, 1, 0])):
        u, given = torch.tensor(update, dtype=torch.float32), state.clone()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            made = compacted_cell(cell, x.to(dtype), given, u, dense=dense)
            exact = torch.where(u[:, None] != 0, cell(x.to(dtype), state.clone()).to(dtype), state)
        assert torch.equal(given, state) and torch.equal(made, exact) and made.dtype == dtype


# ------------------------------------------------------------------------------- states of exits


class First(nn.Module):
    """Logits from the first tensor of a state, which must fit the others."""

    def forward(self, state):
        return state[0].flatten(1)[:, :4]


def exits_of(x):
    """Every second sample leaves at the first exit."""
    return lambda logits, exit, state: state[0].flatten(1)[:, 0] > 0


def states(check):
    class Stage(nn.Module):
        def forward(self, state):
            check(state)
            return (state[0] + 1, *state[1:])

    return [Stage(), Stage()]


def some(n, *shape):
    x = random_tensor(n, *shape)
    x.flatten(1)[:, 0] = torch.where(torch.arange(n) % 2 == 0, 3.0, -3.0)
    return x


SHARED = {
    "[1, T]": lambda n, t: torch.rand(1, t),
    "scalar": lambda n, t: torch.tensor(3.0),
    "[T, T]": lambda n, t: torch.ones(t, t),
    "[1, 1, T, T]": lambda n, t: torch.rand(1, 1, t, t) > 0.5,
    "[T, C]": lambda n, t: torch.rand(t, 8),
    "None": lambda n, t: None,
    "3": lambda n, t: 3,
}


@pytest.mark.parametrize("name", SHARED)
def test_what_all_samples_share_goes_on_as_it_is(name):
    value = SHARED[name](8, 5)
    model = EarlyExit(states(lambda s: seen.append(s[1])), [First()] * 2, exits_of(None)).eval()
    seen = []
    out = model((some(8, 5, 8), value))
    assert out.exits.tolist() == [0, 1] * 4 and all(same(each, value) for each in seen) and len(seen) == 2


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_pairs_is_not_cut_where_its_size_is_the_batch(dtype):
    mask, ids, seen = torch.ones(8, 8).tril().to(dtype), torch.arange(64).view(8, 8), []
    model = EarlyExit(states(lambda s: seen.append(s)), [First()] * 2, exits_of(None)).eval()
    x = some(8, 8, 8)
    with pytest.warns(UserWarning, match=r"state\[1\]: a tensor \[8, 8\] with 8 samples is taken as a mask"):
        model((x, mask, ids))
    assert same(seen[1][1], mask)
    assert torch.equal(seen[1][2], ids[1::2])  # ids are no mask
    for shared, rows in (({1: True}, slice(None)), ({1: False}, slice(1, None, 2)), ((1,), slice(None))):
        model.shared, seen[:] = (
            EarlyExit(states(None), [First()] * 2, exits_of(None), shared=shared).shared,
            [],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model((x, mask, ids))
        assert torch.equal(seen[1][1], mask[rows])


def test_a_name_in_shared_that_nothing_has_is_told():
    state = (some(8, 4), {"mask": torch.ones(8, 4)})
    model = EarlyExit([nn.Identity()] * 2, [First()] * 2, exits_of(None), shared=["msk"]).eval()
    with pytest.warns(UserWarning, match="^shared: no state of this call has 'msk' in it"):
        model(state)


def test_a_second_state_like_the_first_has_rows():
    seen = []
    model = EarlyExit(states(lambda s: seen.append(s)), [First()] * 2, exits_of(None)).eval()
    h, c = some(8, 8), random_tensor(8, 8)  # the states of an LSTM with as many units as samples
    model((h, c))
    assert torch.equal(seen[1][1], c[1::2])


def test_what_was_shared_stays_so_where_the_batch_comes_to_its_size():
    table, seen = torch.rand(4, 8), []
    model = EarlyExit(
        [*states(lambda s: seen.append(s)), *states(lambda s: seen.append(s))],
        [First()] * 4,
        lambda z, e, s: torch.arange(len(z)) >= len(z) // 2,
    ).eval()
    model((random_tensor(8, 5, 8), table))
    assert [len(s[0]) for s in seen] == [8, 4, 2, 1] and all(same(s[1], table) for s in seen)


@dataclasses.dataclass(frozen=True)
class State:
    hidden: torch.Tensor
    rest: dict


def test_states_of_every_make():
    class Stage(nn.Module):
        def forward(self, s):
            n = len(s.hidden)
            assert s.rest["maps"][0].shape == (n, 2, 3) and s.rest["maps"][1] is None
            assert (
                s.rest["again"] is s.rest["maps"][0] and s.rest["scale"].dim() == 0 and s.rest["kind"] == "x"
            )
            return dataclasses.replace(s, hidden=s.hidden + 1)

    class Head(nn.Module):
        def forward(self, s):
            return s.hidden

    maps = random_tensor(8, 2, 3)
    state = State(some(8, 4), {"maps": [maps, None], "again": maps, "scale": torch.tensor(2.0), "kind": "x"})
    model = EarlyExit([Stage(), Stage()], [Head()] * 2, lambda z, e, s: z[:, 0] > 0).eval()
    out = model(state)
    assert out.exits.tolist() == [0, 1] * 4
    assert torch.equal(out.logits[1::2], state.hidden[1::2] + 1 + 1)

    class Holder:
        def __init__(self):
            self.rows = maps

    plain = EarlyExit(states(lambda s: None), [First()] * 2, exits_of(None)).eval()
    with pytest.raises(TypeError, match=r"^state\[1\]: expected tensors, .* got Holder, which holds"):
        plain((state.hidden, Holder()))
    with pytest.raises(TypeError, match=r"^state\[1\]: expected padded sequences .* got a PackedSequence"):
        plain((state.hidden, nn.utils.rnn.pack_sequence([torch.ones(2, 3)] * 8)))
    with pytest.raises(TypeError, match=r"^shared: expected names"):
        EarlyExit([nn.Identity()], [First()], MaxSoftmax(0.5), shared="mask")


def test_heads_of_different_sizes_are_named():
    x = some(8, 8)
    heads, alike = [nn.Linear(8, 4), nn.Linear(8, 5)], lambda z, e, s: s[:, 0] > 0
    model = EarlyExit([nn.Identity()] * 2, heads, alike)
    assert [each.shape[1] for each in model(x)] == [4, 5]  # in training each has its own loss
    with pytest.raises(
        ValueError, match=r"^heads\[1\]: expected logits \[n, 4\], as heads\[0\] has them, got \[n, 5\]"
    ):
        model.eval()(x)
    with pytest.raises(ValueError, match=r"^models\[1\]: expected logits \[n, 4\], as models\[0\] has them"):
        Cascade(heads, alike).eval()(x)
    tokens = TokenExit([TokenSequential(nn.Linear(8, 8))] * 2, heads, MaxSoftmax(2.0)).eval()
    with pytest.raises(ValueError, match=r"^heads\[1\]: expected logits"):
        tokens(random_tensor(2, 3, 8))


def caches():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=3
    )
    static = transformers.StaticCache(config=config, max_cache_len=16)
    both = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    return {"dynamic": transformers.DynamicCache(), "static": static, "encoder, decoder": both}


@pytest.mark.parametrize("name", ["dynamic", "static", "encoder, decoder"])
def test_caches_lose_the_rows_of_those_who_left(name):
    class Attention(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.key, self.value = layer, nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, state):
            x, cache = state
            own = getattr(cache, "self_attention_cache", cache)
            k, v = (f(x).unflatten(2, (2, 4)).transpose(1, 2) for f in (self.key, self.value))
            k, v = own.update(k, v, self.layer)
            length = int(own.get_seq_length(self.layer))
            query = x.unflatten(2, (2, 4)).transpose(1, 2)
            out = nn.functional.scaled_dot_product_attention(query, k[:, :, :length], v[:, :, :length])
            if own is not cache:
                cross = cache.cross_attention_cache.layers[self.layer]
                out = out + nn.functional.scaled_dot_product_attention(query, cross.keys, cross.values)
            return x + out.transpose(1, 2).flatten(2), cache

    stages = [Attention(i) for i in range(3)]
    model = EarlyExit(stages, [First()] * 3, lambda z, e, s: torch.arange(len(z)) % 2 == e).eval()
    x = random_tensor(8, 3, 8)
    prefix = [random_tensor(2, 8, 2, 4, 4) for _ in range(3)]
    outs = []
    with torch.no_grad():
        for every in (True, False):
            cache = caches()[name]
            own = getattr(cache, "self_attention_cache", cache)
            for layer, (k, v) in enumerate(prefix):
                own.update(k, v, layer)
                if own is not cache:
                    cache.cross_attention_cache.update(v, k, layer)
            outs.append(model((x, cache), all_exits=every))
    every, out = torch.stack(outs[0]), outs[1]
    assert len(set(out.exits.tolist())) == 3
    torch.testing.assert_close(out.logits, every[out.exits, torch.arange(8)])
    assert all(layer.keys.shape[0] == 8 for layer in own.layers)  # the caller's cache keeps all rows
    assert int(own.layers[0].get_seq_length()) == 7  # four of before, three of this call


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        x, gate = torch.randn(2, 4, 8, 8), torch.ones(2)
        for module in (conv(), Adds()):
            assert Skip(module, dense=True)(x, gate).shape == x.shape
