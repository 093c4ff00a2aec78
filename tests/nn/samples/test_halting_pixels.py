"""Spatial halting, against the equations pixel by pixel and against the dense-masked form."""

import pytest
import torch
from halting_cases import gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynops.nn import SparseConv2d, SparseSequential
from dynops.nn.pixels.halting import SpatialHalting
from dynops.plans import PixelPlan
from dynops.testing import assert_within_budget, random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")

CHANNELS = 4


def unit(channels: int = CHANNELS) -> SparseSequential:
    return SparseSequential(
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
    )


def halt(channels: int = CHANNELS) -> nn.Sequential:
    """Scores so spread that pixels halt after different units."""
    conv = nn.Conv2d(channels, 1, 3, padding=1)
    with torch.no_grad():
        conv.weight.copy_(random_tensor(*conv.weight.shape))
        conv.bias.fill_(-1.0)
    return nn.Sequential(conv, nn.Sigmoid())


def stage(
    units: int = 4, first: nn.Module | None = None, channels: int = CHANNELS, **options
) -> SpatialHalting:
    count = units - (first is not None)
    return SpatialHalting(
        [unit(channels) for _ in range(count)],
        [halt(channels) for _ in range(units - 1)],
        first=first,
        **options,
    )


def reference(layer: SpatialHalting, x: Tensor, halts=None):
    """The equations, with each pixel on its own: a list of scores until it halts."""
    halts = layer.halts if halts is None else halts
    units = list(layer.units)
    if layer.first is not None:
        x = layer.first(x)
    shape, maps, scores = (len(x), *x.shape[2:]), [], []
    running = torch.ones(shape, dtype=torch.bool)
    total, steps = torch.zeros(shape, dtype=x.dtype), torch.zeros(shape, dtype=torch.int32)
    for n in range(1, len(halts) + 2):
        if n > 1 or layer.first is None:
            x = x + units[n - 1 - (layer.first is not None)](x) * running[:, None]
        maps.append(x)
        steps += running
        if n <= len(halts):
            scores.append(halts[n - 1](x)[:, 0])
            total = total + scores[-1].detach() * running
            running = running & (total < 1 - layer.epsilon)
    output, ponder = torch.zeros(shape + (x.shape[1],), dtype=x.dtype), torch.zeros(shape, dtype=x.dtype)
    output, ponder = list(output.flatten(0, 2)), list(ponder.flatten())
    for i, n in enumerate(steps.flatten().tolist()):
        b, y, z = i // (shape[1] * shape[2]), i // shape[2] % shape[1], i % shape[2]
        remainder = 1.0 - sum((s[b, y, z] for s in scores[: n - 1]), torch.zeros((), dtype=x.dtype))
        output[i] = sum((s[b, y, z] * m[b, :, y, z] for s, m in zip(scores[: n - 1], maps, strict=False)), 0)
        output[i] = output[i] + remainder * maps[n - 1][b, :, y, z]
        ponder[i] = n + remainder
    output = torch.stack(output).view(*shape, -1).permute(0, 3, 1, 2)
    return output, torch.stack(ponder).view(shape)[:, None], steps[:, None], maps[-1]


FIRSTS = {"none": lambda: None, "stride": lambda: nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1)}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("first", FIRSTS)
def test_values_and_gradients_are_those_of_the_equations(first, dense):
    layer = stage(first=FIRSTS[first](), dense=dense).double()
    x = random_tensor(2, CHANNELS if first == "none" else 3, 7, 6, dtype=torch.float64).requires_grad_()
    output, ponder, steps = layer(x)
    expected = reference(layer, x)
    assert len(steps.unique()) >= 3
    assert torch.equal(steps, expected[2]) and steps.dtype == torch.int32
    torch.testing.assert_close(output, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ponder, expected[1], rtol=1e-12, atol=0)
    inputs = [x, *layer.parameters()]
    both = gradients((output, ponder, steps), inputs), gradients(expected[:3], inputs)
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


class Scores(nn.Module):
    """A halt whose score is given."""

    def __init__(self, score: Tensor):
        super().__init__()
        self.score = score

    def forward(self, x: Tensor) -> Tensor:
        return self.score.to(x.dtype)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 2),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([None, 0.0, 0.4, 1.0]),
    st.integers(0, 2**31),
)
def test_any_pattern_of_halting(n, height, width, units, weighted, max_fraction, seed):
    generator = torch.Generator().manual_seed(seed)
    x = random_tensor(n, CHANNELS, height, width, dtype=torch.float64, generator=generator).requires_grad_()
    choices = torch.tensor([0.0, 0.2, 0.6, 1.0, float("nan")], dtype=torch.float64)
    scores = [
        choices[torch.randint(0, 5, (n, 1, height, width), generator=generator)].requires_grad_()
        for _ in range(units - 1)
    ]
    layer = SpatialHalting(
        [unit() for _ in range(units)],
        [Scores(s) for s in scores],
        weighted=weighted,
        max_fraction=max_fraction,
    ).double()
    inputs = [x, *scores] if weighted else [x]
    results = []
    for dense in (False, True):
        layer.dense = dense
        out = layer(x)
        assert out.output.shape == x.shape and out.ponder.shape == out.steps.shape == (n, 1, height, width)
        loss = out.output.square().sum() + out.ponder.square().sum()
        results.append((out, torch.autograd.grad(loss, inputs, allow_unused=True)))
    (ours, mine), (theirs, others) = results
    assert torch.equal(ours.steps, theirs.steps)
    torch.testing.assert_close(ours.ponder, theirs.ponder, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.output, theirs.output, rtol=1e-11, atol=1e-12)
    for given_, a, b in zip(inputs, mine, others, strict=True):  # None: nobody was left to be scored
        a, b = (torch.zeros_like(given_) if grad is None else grad for grad in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    if max_fraction is not None:
        after = (ours.steps > 1).sum()
        assert after <= max_fraction * n * height * width


class Recording(nn.Module):
    """A unit that notes what it is asked for."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.asked = inner, []

    def forward(self, x: Tensor, plan: PixelPlan | None = None) -> Tensor:
        self.asked.append(None if plan is None else plan.mask())
        return self.inner(x) if plan is None else self.inner(x, plan)


def test_a_unit_computes_the_pixels_that_run():
    layer = stage(4)
    layer.units = nn.ModuleList(Recording(unit) for unit in layer.units)
    x = random_tensor(2, CHANNELS, 9, 7)
    steps = layer(x).steps[:, 0]
    for n, module in enumerate(layer.units):
        wanted = steps > n
        assert [mask.tolist() for mask in module.asked] == ([wanted.tolist()] if wanted.any() else [])
    assert len(layer.units[1].asked) == len(layer.units[2].asked) == 1
    layer.dense = True
    layer(x)
    assert all(module.asked[-1] is None for module in layer.units)


def test_what_a_unit_leaves_elsewhere_is_not_read():
    class Dirty(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, plan=None):
            if plan is None:
                return self.inner(x)
            return self.inner(x, plan, base=torch.full_like(x, float("nan")))

    layer = stage(4)
    x = random_tensor(2, CHANNELS, 9, 7)
    expected = layer(x)
    layer.units = nn.ModuleList(Dirty(unit) for unit in layer.units)
    assert torch.equal(layer(x).output, expected.output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_within_the_budget_of_the_masked_form(memory_format, dtype):
    scores = [torch.randint(0, 5, (2, 1, 8, 6)) / 4 for _ in range(3)]
    layer = SpatialHalting([unit() for _ in range(4)], [Scores(s) for s in scores]).to(dtype)
    x = random_tensor(2, CHANNELS, 8, 6, dtype=dtype).to(memory_format=memory_format)
    with torch.no_grad():
        out = layer(x)
        layer.dense = True
        dense = layer(x)
        layer.dense = False
        exact = layer.double()(x.double())
    assert out.output.is_contiguous(memory_format=memory_format) and out.output.dtype == dtype
    assert len(out.steps.unique()) == 4 and torch.equal(out.steps, exact.steps)
    assert_within_budget(out.output, exact.output, dense.output)


def test_other_units_and_the_last_value_as_output():
    """SparseConv2d is a unit; with hard scores and ``weighted=False`` pixels keep their value."""
    x = random_tensor(2, CHANNELS, 8, 8, dtype=torch.float64)
    scores = [(torch.rand(2, 1, 8, 8) < 0.4).double() for _ in range(2)]
    units = [SparseConv2d(CHANNELS, CHANNELS, 3, padding=1), unit(), SparseConv2d(CHANNELS, CHANNELS, 1)]
    layer = SpatialHalting(units, [Scores(s) for s in scores], weighted=False).double()
    output, ponder, steps = layer(x)
    expected = reference(layer, x)
    torch.testing.assert_close(output, expected[3], rtol=1e-12, atol=1e-12)
    assert torch.equal(steps, expected[2]) and torch.equal(ponder, steps + 1.0)


@pytest.mark.parametrize("dense", [False, True])
def test_the_cap_takes_the_pixels_that_are_furthest_from_halting(dense):
    score = torch.tensor([[0.5, 0.1, 0.3], [0.3, 0.2, 0.9]])[None, None]
    layer = SpatialHalting([unit(), unit()], [Scores(score)], max_fraction=0.5, dense=dense)
    assert layer(random_tensor(1, CHANNELS, 2, 3)).steps.tolist() == [[[[1, 2, 2], [1, 2, 1]]]]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("value, steps", [(1.0, 1), (0.0, 3), (float("nan"), 3)])
@pytest.mark.parametrize("shape", [(2, 5, 4), (1, 1, 1), (0, 5, 4)])
def test_all_halt_at_once_or_never(shape, value, steps, dense):
    n, h, w = shape
    halts = [Scores(torch.full((n, h, w), value)) for _ in range(2)]  # [N, H, W] is taken too
    layer = SpatialHalting([unit() for _ in range(3)], halts, dense=dense)
    x = random_tensor(n, CHANNELS, h, w)
    out = layer(x)
    expected = x
    for module in layer.units[:steps]:
        expected = expected + module(expected)
    torch.testing.assert_close(out.output, expected)
    assert (out.steps == steps).all() and (out.ponder == steps + 1).all()


def test_batchnorm_in_training_takes_computed_pixels_and_with_dense_the_whole_map():
    score = torch.ones(1, 1, 6, 6)
    score[..., 2, 3] = 0
    x = random_tensor(1, CHANNELS, 6, 6)
    for dense in (False, True):
        second = SparseSequential(
            nn.BatchNorm2d(CHANNELS, momentum=1.0), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        )
        layer = SpatialHalting([unit(), second], [Scores(score)], dense=dense)
        layer(x)
        seen = (x + layer.units[0](x)).detach()
        seen = seen if dense else seen[:, :, 1:4, 2:5]  # one pixel and the reach of a 3x3
        torch.testing.assert_close(second[0].running_mean, seen.mean((0, 2, 3)))


def test_wrong_arguments():
    x = random_tensor(2, CHANNELS, 6, 6)
    for arguments, match in (
        (([], []), "units: expected at least one module"),
        (([unit(), unit()], []), "halts: expected 1 modules, one for each of 2 units but the last, got 0"),
        (([unit()], [halt()]), "halts: expected 0 modules"),
    ):
        with pytest.raises(ValueError, match=match):
            SpatialHalting(*arguments)
    for options in ({"epsilon": -1}, {"max_fraction": 2}):
        with pytest.raises(ValueError, match=next(iter(options))):
            stage(2, **options)
    with pytest.raises(TypeError, match=r"x: expected a floating tensor \[N, C, H, W\]"):
        stage(2)(x[0])
    with pytest.raises(ValueError, match=r"units: expected a residual \(2, 4, 6, 6\), got \(2, 5, 6, 6\)"):
        SpatialHalting([SparseConv2d(4, 5, 1)], [])(x)
    with pytest.raises(
        ValueError, match=r"halts\[0\]: expected it to return \[2, 1, 6, 6\], got shape \(2, 4, 6, 6\)"
    ):
        SpatialHalting([unit(), unit()], [nn.Identity()])(x)
