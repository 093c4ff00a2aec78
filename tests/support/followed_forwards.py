"""Forwards whose tensors are hard to follow: each takes a model with layers, and an image."""

import dataclasses
from collections import namedtuple

import torch
import torch.nn.functional as F

Pair = namedtuple("Pair", "a b")


@dataclasses.dataclass
class Record:
    a: torch.Tensor
    b: torch.Tensor


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
