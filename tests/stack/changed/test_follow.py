"""What follows a tensor through a model's own Python is never attached to the wrong one."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from edits import edited, frames_of, model_of, run
from followed_forwards import CASES
from torch import nn

import dynops
from dynops.stack.changed.frame import Frame


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.setattr(Frame, "_dense_is_faster", lambda *_: False)


DENSE = {"a_part_in_place", "a_view_in_place", "in_place_under_a_view", "data_set"}  # with one warning


def layers():
    return {
        "c": nn.Conv2d(3, 4, 3, padding=1),
        "d": nn.Conv2d(4, 4, 3, padding=1),
        "e": nn.Conv2d(4, 3, 3, padding=1),
        "f": nn.Conv2d(3, 8, 3, padding=1),
        "heads": nn.MultiheadAttention(8, 2, batch_first=True),
    }


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", CASES)
def test_a_forward_is_followed(name, last):
    model = model_of(CASES[name], **layers())
    layout = torch.channels_last if last else torch.contiguous_format
    frames = [x.contiguous(memory_format=layout) for x in frames_of(torch.randn(2, 3, 9, 8), 7)]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run(model, frames)
    assert len(seen) == (name in DENSE), [str(w.message) for w in seen]


def test_an_input_that_the_model_writes_is_written_for_the_caller_too():
    model = model_of(lambda m, x: m.c(F.relu(x, inplace=True)), c=nn.Conv2d(3, 4, 1))
    stream, x = dynops.Stream(), torch.randn(2, 3, 8, 8)
    for frame in (x, x, edited(x)):
        mine, theirs = frame.clone(), frame.clone()
        with stream:
            y = model(mine)
        torch.testing.assert_close(y, model(theirs))
        assert torch.equal(mine, theirs)


def test_what_the_caller_writes_is_the_callers():
    model = model_of(lambda m, x: (F.relu(m.c(x)), x, x[:, :1]), c=nn.Conv2d(3, 4, 3))
    stream, x = dynops.Stream(), torch.randn(2, 3, 8, 8)
    for _ in range(5):
        x[0, :, 3:5, 2:4] = torch.randn(3, 2, 2)
        run(model, [x], stream)
        with stream:
            made = model(x)
        for y in made:
            y.fill_(float("nan"))
        assert x.isfinite().all()


def test_a_tensor_that_leaks_is_a_copy():
    def forward(m, x):
        m.leaked = m.c(x)
        return m.leaked.relu()

    model = model_of(forward, c=nn.Conv2d(3, 4, 3))
    stream, x = dynops.Stream(), torch.randn(2, 3, 8, 8)
    for _ in range(3):
        with stream:
            model(x)
        leaked, then = model.leaked, model.leaked + 0
        assert type(then) is torch.Tensor
        run(model, [x := edited(x)], stream)
        assert torch.equal(leaked + 0, then)
        leaked.zero_()
        run(model, [x := edited(x)], stream)


@pytest.mark.parametrize("same", [False, True])
def test_a_tensor_of_the_call_before_is_one_of_its_own(same):
    def forward(m, x):
        y = m.c(x)
        out, m.before = y if m.before is None else y + m.before, y
        return out

    model = model_of(forward, c=nn.Conv2d(3, 4, 3, padding=1))
    model.before = before = None
    stream, x = dynops.Stream(), torch.randn(2, 3, 8, 8)
    for _ in range(5):
        with stream:
            y = model(x)
        now = model.c(x)
        torch.testing.assert_close(y, now if before is None else now + before)
        before, x = now, x if same else edited(x)


def test_two_inputs_change_apart():
    model = model_of(lambda m, a, b, s: m.c(a) * s + m.c(b), c=nn.Conv2d(3, 4, 3))
    a, b, s = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 1, 1, 1)
    c, d = edited(a), edited(b)
    run(model, [(a, b, s), (c, b, s), (c, d, s), (c, d, s * 2), (b, a, s), (a, a, s), (d, a, s)])


def test_inputs_that_are_no_maps():
    def forward(m, pixels, index, mask, z):
        y = m.c(pixels.to(m.c.weight.dtype) / 255) + m.table(index)[:, :, None, None] + mask
        return y + torch.view_as_real(z)[..., 0].to(y.dtype)

    model = model_of(forward, c=nn.Conv2d(3, 4, 3, padding=1), table=nn.Embedding(5, 4))
    x, i = torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8), torch.tensor([1, 2])
    mask, z, y = torch.ones(8, 8, dtype=torch.bool), torch.randn(2, 1, 8, 8, dtype=torch.complex64), x.clone()
    y[0, :, 3:5, 4] = 7
    run(model, [(x, i, mask, z), (x, i, mask, z), (y, i, mask, z), (y, i + 1, mask, z), (y, i, ~mask, z * 2)])


def test_an_attribute_or_argument_that_changes_is_seen_with_the_same_frame():
    model = model_of(lambda m, x, factor: m.c(x) * factor * m.scale, c=nn.Conv2d(3, 4, 3))
    stream, x = dynops.Stream(), torch.randn(2, 3, 8, 8)
    for scale, factor in ((2.0, 1), (2.0, 1), (2.0, 1), (3.0, 1), (3.0, 2), (4.0, 2), (4.0, 2)):
        model.scale = scale
        run(model, [(x, factor)], stream)
        run(model, [(edited(x), factor)], stream)


def test_a_counter_counts_each_call():
    def forward(m, x):
        m.calls += 1
        return m.c(x) * m.calls

    model = model_of(forward, c=nn.Conv2d(3, 4, 3))
    model.calls, stream, x = 0, dynops.Stream(), torch.randn(2, 3, 8, 8)
    for i in range(4):
        with stream:
            y = model(x)
        torch.testing.assert_close(y, model.c(x) * (i + 1))


@pytest.mark.parametrize(
    "noise", [torch.randn_like, torch.rand_like, lambda y: F.dropout(y, 0.5), lambda y: torch.rand(y.shape)]
)
def test_noise_is_drawn_in_each_call(noise):
    model = model_of(lambda m, x: noise(m.c(x)) + m.d(m.c(x)), c=nn.Conv2d(3, 4, 3), d=nn.Conv2d(4, 4, 1))
    stream, x = dynops.Stream(), torch.randn(2, 3, 8, 8)
    made = []
    for frame in (x, x, edited(x), x):
        with stream:
            made.append(model(frame))
    assert all((a != b).float().mean() > 0.4 for a, b in itertools.pairwise(made))


def test_hooks_are_called_and_their_results_used():
    model = model_of(lambda m, x: F.relu(m.d(m.c(x))), c=nn.Conv2d(3, 4, 3), d=nn.Conv2d(4, 4, 3))
    frames, seen = frames_of(torch.randn(2, 3, 9, 9), 4), []
    stream = run(model, [*frames, frames[-1]])
    model.c.register_forward_hook(lambda module, args, out: out * 2)
    run(model, [frames[-1], *frames], stream)
    model.d.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.register_forward_hook(lambda module, args, out: out - 1)
    run(model, [frames[-1], *frames], stream)
    model.d.register_forward_hook(lambda module, args, out: seen.append(out))
    for frame in (frames[0], frames[0], frames[1]):
        with stream:
            model(frame)
    assert len(seen) == 3
    torch.testing.assert_close(seen[1] + 0, model.d(model.c(frames[0])))
