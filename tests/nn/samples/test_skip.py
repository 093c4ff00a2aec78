"""nn.Skip: against the dense-masked form in float64, on both paths; gradients, modes, caps, attacks."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynops import SamplePlan, active, backends
from dynops.nn import Skip, SparseConv2d
from dynops.stack import traced
from dynops.testing import assert_within_budget, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")

needs_binary = pytest.mark.skipif(not backends.has_binary(), reason="the binary is not built")

KEEPS = {"some": [1, 0, 1, 0, 1, 1], "one": [0, 0, 0, 1, 0, 0], "none": [0] * 6, "all": [1] * 6}
MODES = ("residual", "replace")


def branch(channels: int = 8, out: int | None = None, stride: int = 1) -> nn.Sequential:
    """Two convolutions with norms, as a residual block has them, whose statistics and weights are all random."""
    out = channels if out is None else out
    module = nn.Sequential(
        nn.Conv2d(channels, out, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
        nn.Conv2d(out, out, 3, 1, 1, bias=False),
        nn.BatchNorm2d(out),
    )
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if value.is_floating_point() and value.dim() == 1:
                value.copy_(
                    random_tensor(*value.shape).abs() if "var" in name else random_tensor(*value.shape)
                )
    return module.eval()


def reference(layer: Skip, x: Tensor, gate: Tensor) -> Tensor:
    """The definition, sample by sample: a sample that is skipped is never computed."""
    rows = []
    for sample, g in zip(x.split(1), gate.reshape(-1).tolist(), strict=True):
        below = layer.shortcut(sample)
        if layer.mode == "residual":
            rows.append(below + g * layer.module(sample) if g else below)
        else:
            rows.append(g * layer.module(sample) + (1 - g) * below if g else below)
    return torch.cat(rows)


def check(layer: Skip, x: Tensor, gate: Tensor, what: str) -> Tensor:
    """``layer(x, gate)`` within the error budget of the per-sample form in the same dtype."""
    actual = layer(x, gate)
    with torch.no_grad():
        exact = reference(copy.deepcopy(layer).double(), x.double(), gate)
        dense = reference(layer, x, gate).to(actual.dtype)
    assert_within_budget(actual, exact, dense, what)
    return actual


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shortcut", [None, "conv"])
@pytest.mark.parametrize("mode", MODES)
def test_values(mode, shortcut, dtype, form):
    shortcut = None if shortcut is None else nn.Conv2d(8, 8, 1)
    layer = Skip(branch(), shortcut, mode).to(dtype).eval()
    x = random_tensor(6, 8, 5, 7, dtype=dtype).contiguous(memory_format=form)
    for name, keep in KEEPS.items():
        for gate in (
            torch.tensor(keep).bool(),
            torch.tensor(keep).float()[:, None],
            torch.tensor(keep) * torch.rand(6),
        ):
            with torch.no_grad():
                out = check(layer, x, gate, f"{name} {gate.dtype}")
            assert out.is_contiguous(memory_format=form) and out.dtype == dtype
            if gate.dtype == torch.bool:
                assert layer(x, SamplePlan.from_mask(gate)).equal(layer(x, gate))


@needs_binary
@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
@pytest.mark.parametrize("mode", MODES)
def test_rows_path(mode, keep, monkeypatch):
    """3x3 convolutions of 32 channels run on the pixels of the kept samples: nothing is gathered."""
    layer, x = Skip(branch(32), None, mode).eval(), random_tensor(6, 32, 9, 8)
    calls = []
    layer.module[0].register_forward_hook(lambda *_: calls.append(1))
    gate = torch.tensor(keep).bool()
    with torch.no_grad():
        layer.path = "samples"
        gathered = layer(x, gate)
        assert len(calls) == any(keep)
        layer.path = None
        hooked = layer(x, gate)  # a hook wants the module to be called
        assert len(calls) == 2 * any(keep) and hooked.equal(gathered)
        layer.module[0]._forward_hooks.clear()
        taken, run = [], traced.run_rows
        monkeypatch.setattr(traced, "run_rows", lambda *a: taken.append(1) or run(*a))
        for form in (torch.contiguous_format, torch.channels_last):
            check(layer, x.contiguous(memory_format=form), gate, mode)
        assert len(taken) == 2 * any(keep)
        soft = gate * 0.5
        check(layer, x, soft, "soft gates are merged")
        assert len(taken) == 2 * any(keep)
        layer.train()
        layer(x, gate if sum(keep) > 1 else torch.ones(6))
        assert len(taken) == 2 * any(keep), "a norm in training mode wants its statistics"
    layer.eval()(x, gate)
    assert len(taken) == 2 * any(keep), "with gradients only on request"
    layer.path = "rows"
    dx = [
        torch.autograd.grad(f(x.requires_grad_(), gate).square().sum(), x)[0]
        for f in (layer, dense_of(layer))
    ]
    assert len(taken) == 3 * any(keep)
    assert (dx[0] - dx[1]).norm() <= 1e-5 * dx[1].norm()


def dense_of(layer: Skip) -> Skip:
    dense = copy.copy(layer)
    dense.dense = True
    return dense


@pytest.mark.parametrize("channels", [8, 32], ids=["folded", "rows"])
def test_what_is_kept_follows_changes_of_the_module(channels):
    layer, x = Skip(branch(channels)).eval(), random_tensor(4, channels, 8, 8)
    gate = torch.tensor([1, 0, 1, 0])
    with torch.no_grad():
        before = layer(x, gate)
        last = before
        for change in (
            lambda m: m[0].weight.mul_(2),
            lambda m: m[1].running_mean.add_(1),
            lambda m: m[1].running_var.mul_(3),
            lambda m: m[4].bias.sub_(1),
            lambda m: m[0].register_parameter("bias", nn.Parameter(random_tensor(channels))),
            lambda m: m[0].bias.neg_(),
        ):
            change(layer.module)
            now = check(layer, x, gate, "changed in place")
            assert not now.equal(last)
            last = now
        layer.module[3] = nn.Conv2d(channels, channels, 3, padding=1)
        check(layer, x, gate, "another convolution inside")
        layer.module = branch(channels)
        check(layer, x, gate, "another module")
        layer.mode = "replace"
        after = check(layer, x, gate, "another mode")
    assert not after.equal(before)


class Switched(nn.Module):
    """A forward that decides by an attribute."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv, self.twice = nn.Conv2d(channels, channels, 3, padding=1), False

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x)) if self.twice else self.conv(x)


@pytest.mark.parametrize("channels", [8, 32], ids=["folded", "rows"])
def test_what_is_traced_follows_attributes(channels):
    layer, x = Skip(Switched(channels)).eval(), random_tensor(4, channels, 8, 8)
    gate = torch.tensor([1, 0, 1, 0])
    with torch.no_grad():
        once = check(layer, x, gate, "once")
        layer.module.twice = True
        assert not check(layer, x, gate, "twice").equal(once)
        layer.module.forward = lambda x: x * 0
        assert layer(x, gate).equal(x)


def test_a_stride_needs_a_shortcut():
    down = nn.Sequential(nn.Conv2d(8, 12, 1, 2), nn.BatchNorm2d(12))
    x, gate = random_tensor(6, 8, 6, 6), torch.tensor(KEEPS["some"])
    for mode in MODES:
        layer = Skip(branch(8, 12, 2), down, mode).eval()
        with torch.no_grad():
            assert check(layer, x, gate, mode).shape == (6, 12, 3, 3)
        for keep in ("some", "all"):
            with pytest.raises(ValueError, match=r"shortcut: expected samples of shape \(12, 3, 3\)"):
                Skip(branch(8, 12, 2)).eval()(x, torch.tensor(KEEPS[keep]))


def noting(module: nn.Module, sizes: list[int]) -> nn.Module:
    """Appends the number of samples of each call."""
    module.register_forward_hook(lambda module, inputs, out: sizes.append(len(out)))
    return module


def test_replace_runs_the_shortcut_on_the_skipped_samples_only():
    sizes = []
    shortcut, x = noting(nn.Conv2d(8, 8, 1), sizes), random_tensor(6, 8, 4, 4)
    layer = Skip(branch(), shortcut, "replace").eval()
    with torch.no_grad():
        for keep in KEEPS.values():
            layer(x, torch.tensor(keep).bool())
    assert sizes == [2, 5, 6]  # of 4, 1, 0 kept ones; none where all are kept


def test_what_costs_nothing():
    layer, x = Skip(branch()).eval(), random_tensor(6, 8, 4, 4)
    assert layer(x, torch.zeros(6)) is x
    layer.mode = "replace"
    assert layer(x, torch.zeros(6)) is x
    seen = []
    layer.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for _ in range(2):  # a hook may write: the first call tells
        layer(x, torch.ones(6))
    assert seen[1] is x


def test_trees():
    class Both(nn.Module):
        def forward(self, state):
            return {"map": state["map"] * 2, "count": state["count"] + 1}

    state = {"map": random_tensor(4, 2, 3, 3), "count": torch.arange(4)}
    out = Skip(Both(), mode="replace")(state, torch.tensor([1, 0, 0, 1]))
    assert out["count"].tolist() == [1, 1, 2, 4]
    assert out["map"][1:3].equal(state["map"][1:3]) and out["map"][::3].equal(state["map"][::3] * 2)
    out = Skip(Both())(state, torch.tensor([1, 0, 0, 1]).bool())
    assert out["count"].tolist() == [1, 1, 2, 7]


@pytest.mark.parametrize("shortcut", [None, "conv"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_gradients_are_those_of_the_dense_form(keep, mode, shortcut):
    shortcut = None if shortcut is None else nn.Conv2d(8, 8, 1)
    layer = Skip(branch(), shortcut, mode).double().eval()
    x, dy = torch.randn(6, 8, 4, 4).double().requires_grad_(), torch.randn(6, 8, 4, 4).double()
    gate = torch.tensor(keep).double().requires_grad_()
    inputs = [x, gate, *layer.parameters()]
    kept = {"allow_unused": True, "materialize_grads": True}
    sparse = torch.autograd.grad(layer(x, gate), inputs, dy, **kept)
    dense = torch.autograd.grad(dense_of(layer)(x, gate), inputs, dy, **kept)
    for i, (a, b) in enumerate(zip(sparse, dense, strict=True)):
        if i == 1:  # what a skipped sample would have given is not known
            b = b * gate
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), inputs[i].shape
    assert layer(x, gate).requires_grad


def test_the_dense_form_gives_every_gate_its_exact_gradient():
    layer = Skip(nn.Linear(3, 3), mode="replace", dense=True).double()
    x, gate = torch.randn(4, 3).double(), torch.tensor([1.0, 0, 0, 1]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda g: layer(x, g), (gate,))
    (dgate,) = torch.autograd.grad(layer(x, gate).sum(), gate)
    assert torch.allclose(dgate, (layer.module(x) - x).sum(1))


def test_norms_in_training_mode():
    layer = Skip(branch()).train()
    x = random_tensor(6, 8, 4, 4)
    gate = torch.tensor(KEEPS["some"]).bool()
    out = layer(x, gate)
    statistics = copy.deepcopy(layer.module)(x[gate])  # of the kept samples
    assert torch.allclose(out[gate], x[gate] + statistics, atol=1e-5)
    assert layer(x, torch.tensor(KEEPS["one"])).isfinite().all()  # one sample of a map has statistics
    small = Skip(nn.BatchNorm1d(5)).train()
    with pytest.raises(ValueError, match="more than 1 value"):
        small(random_tensor(6, 5), torch.tensor(KEEPS["one"]))
    small.dense = True
    assert small(random_tensor(6, 5), torch.tensor(KEEPS["one"])).isfinite().all()


@pytest.mark.parametrize("dense", [False, True])
def test_max_fraction_caps_the_batch(dense):
    sizes, x = [], random_tensor(6, 5)
    layer = Skip(noting(nn.Linear(5, 5), sizes), max_fraction=0.5, dense=dense)
    for gate in (torch.tensor([0, 1, 1, 1, 0, 1]), torch.tensor([0, 1, 1, 1, 0, 1]).float()):
        out = layer(x, gate)
        assert (out != x).any(1).tolist() == [False, True, True, True, False, False]
    assert sizes == [6, 6] if dense else sizes == [3, 3]
    assert layer.plan(torch.ones(7)).num_rows == 3
    assert Skip(nn.Linear(5, 5), max_fraction=0)(x, torch.ones(6)) is x
    assert Skip(nn.Linear(5, 5), max_fraction=1).plan(torch.ones(6)).is_full


@pytest.mark.parametrize("mode", MODES)
def test_capacity_plans_run(mode):
    keep = torch.tensor(KEEPS["some"])
    for layer, x in (
        (Skip(nn.Linear(5, 5), mode=mode), random_tensor(6, 5)),
        (Skip(branch(8), mode=mode).eval(), random_tensor(6, 8, 6, 7)),  # folded
        (Skip(branch(32), mode=mode).eval(), random_tensor(6, 32, 6, 7)),  # on rows
    ):
        with torch.no_grad():
            for capacity in (4, 6):
                out = layer(x, SamplePlan.from_mask(keep, capacity))
                assert (out - layer(x, keep)).norm() <= 1e-6 * out.norm()


def test_an_active_mask_reaches_the_layers_inside():
    """A converted layer computes the active pixels only, in a Skip as anywhere."""
    layer, x = (
        Skip(nn.Sequential(SparseConv2d(32, 32, 3, padding=1)), mode="replace"),
        random_tensor(4, 32, 8, 8),
    )
    mask, gate = torch.zeros(4, 8, 8), torch.tensor([1, 0, 1, 1])
    mask[:, 2:5] = 1
    with torch.no_grad(), active(mask[gate.bool()]):
        out = layer(x, gate)
    assert out[1].equal(x[1]) and out[0, :, 2:5].all() and not out[0, :, :2].any()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda s, x: s(x, torch.ones(3)), ValueError, r"gate: expected \[4\] .*got shape \(3,\)"),
        (lambda s, x: s(x, torch.ones(4, 2)), ValueError, "gate: expected"),
        (lambda s, x: s(x, [1, 0, 1, 0]), TypeError, "gate: expected a tensor"),
        (lambda s, x: s(x, torch.ones(4, device="meta")), ValueError, "gate: expected it on x's device cpu"),
        (lambda s, x: s(x, torch.tensor([1, 0, float("nan"), 1])), ValueError, "NaN"),
        (lambda s, x: s(x, SamplePlan.full(3)), ValueError, "gate: expected a plan of 4 samples"),
        (lambda s, x: s(None, torch.ones(4)), TypeError, "x: expected a tensor"),
        (lambda s, x: Skip(s, mode="both"), ValueError, "mode: .*'both'"),
        (lambda s, x: Skip(s, path="tiles"), ValueError, "path: .*'tiles'"),
        (lambda s, x: Skip(s, max_fraction=1.5), ValueError, "max_fraction: .*1.5"),
        (lambda s, x: Skip(s, max_fraction="0.5"), ValueError, "max_fraction: expected a number .*'0.5'"),
        (lambda s, x: Skip(None), TypeError, "module: expected a module"),
        (lambda s, x: Skip(s, shortcut=3), TypeError, "shortcut: expected a module"),
    ],
)
def test_refuses(call, error, says):
    with pytest.raises(error, match=says):
        call(Skip(nn.Linear(5, 5)), random_tensor(4, 5))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=1, max_size=6),
    st.sampled_from(MODES),
    st.booleans(),
    st.sampled_from([8, 32]),
    st.sampled_from([(1, 1), (4, 5), (6, 2)]),
)
def test_any_gate(gate, mode, shortcut, channels, size):
    layer = Skip(branch(channels), nn.Conv2d(channels, channels, 1) if shortcut else None, mode).eval()
    x = random_tensor(len(gate), channels, *size)
    with torch.no_grad():
        check(layer, x, torch.tensor(gate), f"{gate}")
