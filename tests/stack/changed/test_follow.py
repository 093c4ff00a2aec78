"""What follows a tensor through a model's own Python is never attached to the wrong one."""

import dataclasses
import itertools
import warnings
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from edits import edited, frames_of, model_of, run
from torch import nn

import dynops
from dynops.stack.changed.frame import Frame

Pair = namedtuple("Pair", "a b")


@dataclasses.dataclass
class Record:
    a: torch.Tensor
    b: torch.Tensor


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.setattr(Frame, "_dense_is_faster", lambda *_: False)


CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


@case
def relu_in_place(m, x):
    return m.c(x).relu_()


@case
def sum_in_place(m, x):
    y = m.c(x)
    z = m.d(y)
    z += y
    z.mul_(2)
    return z, y


@case
def clone_of_the_input(m, x):
    y = x.clone()
    y.add_(1)
    return m.c(y) + m.c(x)


@case
def clone_then_in_place(m, x):
    y = m.c(x)
    z = y.clone()
    y.relu_()
    return y, z


@case
def activation_in_place_beside_its_input(m, x):
    y = m.c(x)
    z = F.relu(y, inplace=True)
    return y + z


@case
def augmented(m, x):
    y = m.c(x)
    y -= 0.5
    y *= 2
    y /= 3
    y **= 2
    return y


@case
def filled(m, x):
    y = m.c(x)
    z = y.clone()
    z.zero_().add_(y)
    y.fill_(2)
    return z, y


@case
def shapes_in_place(m, x):
    y = m.c(x)
    y.unsqueeze_(0)
    y.squeeze_(0)
    y.transpose_(2, 3)
    return y + 1


@case
def plain_tensor_written_after_it_was_read(m, x):
    y = m.c(x)
    z = torch.ones(y.shape, dtype=y.dtype)
    w = y * z
    z.add_(y)
    return w + z


@case
def plain_tensor_written_in_part(m, x):
    y = m.c(x)
    z = torch.zeros(y.shape, dtype=y.dtype)
    z[:, :2] = y[:, :2]
    return z, y


@case
def copied_into_plain(m, x):
    y = m.c(x)
    z = torch.empty(y.shape, dtype=y.dtype)
    z.copy_(y)
    torch.add(y, 1, out=y.new_empty(y.shape))
    return F.relu(z)


@case
def copied_into_new(m, x):
    y = m.c(x)
    z, w, v = torch.empty_like(y), torch.zeros_like(y), y.new_zeros(y.shape)
    z.copy_(y)
    w += y
    return z, w * 2, v.add_(y)


@case
def a_module_twice(m, x):
    return m.c(m.e(m.c(x))) + m.c(x.flip(3))


@case
def one_result_thrice(m, x):
    y = m.c(x)
    return y, y, {"again": y}


@case
def the_input_itself(m, x):
    return x


@case
def views_of_the_input(m, x):
    return x[:, 1:], x.transpose(2, 3)


@case
def chunks(m, x):
    a, b = m.c(x).chunk(2, 1)
    c, d = m.c(x).split([1, 3], 1)
    return a * torch.sigmoid(b), torch.cat([b, a], 1), d, c, torch.unbind(a, 1)


@case
def several_results(m, x):
    y = m.c(x)
    return (
        y.max(1),
        y.flatten(2).max(2),
        y.topk(2, 1),
        y.sort(1),
        torch.var_mean(y, 1),
        torch.aminmax(y, dim=1),
    )


@case
def integers(m, x):
    k = (m.c(x) * 10).round().to(torch.int64)
    return k, k.to(x.dtype).relu(), F.one_hot(k.clamp(0, 3), 4), m.c(x).argmax(1)


@case
def booleans(m, x):
    y = m.c(x)
    k = y > 0
    some = k.all(1, keepdim=True)
    return torch.where(k, y, y * 0.1), k, y.masked_fill(k, 0.0), y * some, (~some).to(y.dtype)


@case
def parts(m, x):
    y = m.c(x)
    return y[:, :, ::2, 1:], y[..., 1], y[:, [0, 2]], y[:, :0], y[:0], torch.cat([y[:, :0], y], 1)


@case
def sizes_that_follow_from_data(m, x):
    y = m.c(x)
    return y[y > 0].mean() + y.relu(), torch.nonzero(y > 1).shape[0]


@case
def numbers(m, x):
    y = m.c(x)
    return y * y.abs().max().item() + len(y.shape), y + torch.tensor(y.detach().double().numpy().mean()).to(
        y.dtype
    )


@case
def a_branch_on_content(m, x):
    y = m.c(x)
    return (F.relu(y) + 1 if y[0, 0, 0, 0] > 0 else F.gelu(m.d(y))) * 2


@case
def in_a_namedtuple(m, x):
    y = m.c(x)
    pair = Pair(y, y.relu())
    return pair.a + pair.b, pair


@case
def in_a_dataclass(m, x):
    record = Record(m.c(x), m.c(x).relu())
    record.a += 1
    return record.a + record.b


@case
def positions(m, x):
    y = m.c(x)
    h, w = (torch.arange(s, dtype=x.dtype) * 0.1 for s in y.shape[2:])
    return y + w + h[:, None] + torch.tensor([1, 2, 3, 4], dtype=x.dtype).view(1, 4, 1, 1)


@case
def drawn_from_a_seed(m, x):
    y = m.c(x)
    return y + torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)


@case
def over_the_map(m, x):
    y = m.c(x)
    t = y.flatten(2)
    return (
        t @ t.transpose(1, 2),
        y.softmax(3),
        y.cumsum(2),
        y.mean((2, 3)),
        torch.einsum("nchw,ndhw->ncd", y, y),
    )


@case
def over_channels(m, x):
    y = m.c(x)
    return (
        y.softmax(1),
        F.normalize(y, dim=1),
        torch.einsum("nchw,nchw->nhw", y, y),
        y.mean(1, keepdim=True) * y,
    )


@case
def turned(m, x):
    y = m.c(x)
    return y.flip(2), torch.roll(y, 1, 3), y.rot90(1, (2, 3)), torch.stack([y, y.relu()], 1).sum(1)


@case
def operators(m, x):
    y = m.c(x)
    return -y, abs(y), y**2, 1 - y, 2 / (y.abs() + 1), y.sign(), y % 0.3, y // 0.3


@case
def batches_mixed(m, x):
    y = m.c(x)
    return y.flip(0), y.sum(0), y[torch.arange(len(x) - 1, -1, -1)], torch.cat([y, y]), y.repeat(2, 1, 1, 1)


@case
def heads(m, x):
    tokens = m.f(x).flatten(2).transpose(1, 2)
    return m.heads(tokens, tokens, tokens, need_weights=False)[0], m.heads(tokens, tokens, tokens)


@case
def spectrum(m, x):
    return torch.fft.irfft2(torch.fft.rfft2(m.c(x)) * 0.5, s=x.shape[2:])


@case
def a_part_in_place(m, x):
    y = m.c(x)
    y[:, 0] = 0
    return y


@case
def a_view_in_place(m, x):
    y = m.c(x)
    v = y[:, :2]
    v.add_(1)
    return y


@case
def in_place_under_a_view(m, x):
    y = m.c(x)
    v = y.permute(0, 2, 3, 1)
    y.add_(1)
    return y, v


@case
def data_set(m, x):
    y = m.c(x)
    y.data = y * 2
    return y


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
