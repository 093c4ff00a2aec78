"""Maps as tensors: any Python of a model gives what the mask in plain PyTorch gives, however the model runs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from map_cases import SIZE, C, close, masks, rand
from torch import nn

import dynops
from dynops.stack.maps import SparseMap, entered
from dynops.testing import MaskedPolicy

WEIGHT, WIDE, DEPTHWISE = rand(C, C, 3, 3), rand(C, 2 * C, 1, 1), rand(C, 1, 3, 3)
SCALE, SHIFT = rand(C), rand(C, seed=1)


def shuffled(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def channels_last(x):
    y = F.layer_norm(x.permute(0, 2, 3, 1), (C,), SCALE, SHIFT)
    return (F.linear(y, WIDE[:, :C, 0, 0], SHIFT) * SCALE).permute(0, 3, 1, 2)


def convnext(x):
    y = F.conv2d(x, DEPTHWISE, padding=1, groups=C).permute(0, 2, 3, 1)
    y = F.linear(F.gelu(F.linear(F.layer_norm(y, (C,)), WIDE[:, :C, 0, 0])), WIDE[:, C:, 0, 0], SHIFT)
    return SCALE[:, None, None] * y.permute(0, 3, 1, 2) + x


def tokens(x):
    y = x.flatten(2).transpose(1, 2)
    return F.layer_norm(F.gelu(y), (C,)).transpose(1, 2).reshape(x.shape)


def attended(x, keys=None):
    """Attention in two heads, to all pixels or to other keys; what it makes of inactive pixels counts too."""
    y = x.flatten(2).transpose(1, 2).unflatten(2, (2, -1)).transpose(1, 2)
    keys, values = (2 * y, y.exp()) if keys is None else (keys, keys.cos())
    z = F.scaled_dot_product_attention(y, keys, values, scale=0.7).transpose(1, 2).flatten(2)
    return F.conv2d((z @ WEIGHT[:, :, 0, 0]).transpose(1, 2).reshape(x.shape), WEIGHT, padding=1) + x


def multi_query(x):
    """Two heads of queries to the keys of one."""
    y = x.flatten(2).transpose(1, 2)[:, None]  # [N, 1, H * W, C]
    queries = y.reshape(x.shape[0], -1, 2, C // 2).transpose(1, 2)
    z = F.scaled_dot_product_attention(queries, y[..., :3], y[..., 3:].exp())
    return z.transpose(1, 2).flatten(2).transpose(1, 2).reshape(x.shape)


def evolved_norm(x):
    """timm's EvoNorm2dS0."""
    y = x.reshape(x.shape[0], 3, C // 3, *x.shape[2:])
    std = y.float().double().var(dim=(2, 3, 4), unbiased=False, keepdim=True).add(1e-5).sqrt()
    return x * x.sigmoid() / std.expand(y.shape).reshape(x.shape)


def in_place(x, function):
    y = x.clone()
    function(y)
    return y


def part_in_place(x):
    y = x.clone()
    a, b = y.chunk(2, 1)
    a.relu_()
    b.mul_(2)
    return y + torch.cat([b, a], 1)


def whole_in_place(x):
    y = x.clone()
    part = y[:, 1:4]
    y.add_(1)
    return torch.cat([part, y[:, :3]], 1)


def set_part(x):
    y = x.clone()
    y[:, :2] = 1.5
    return y


def written_in_places(x):
    y = x.clone()
    y.select(1, 0).zero_()
    y[0].mul_(2)
    y.data.mul_(3)
    return y


def copied(x):
    n, c, h, w = x.shape
    y = x.clone()
    y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).relu_()
    return y


def into_others(x):
    y, dense = torch.empty_like(x), torch.empty(x.shape, dtype=x.dtype)
    with torch.no_grad():
        torch.mul(x, 2, out=y)
        torch.add(x, y, out=dense)
        torch.cat([y[:, :2], x[:, 2:]], 1, out=y)
    return dense + y


def selected_paths(x):
    """timm's selective kernels."""
    paths = torch.stack([F.conv2d(x, WEIGHT, padding=1), x + 1], dim=1)
    attention = paths.sum(1).mean((2, 3), keepdim=True).view(x.shape[0], 2, C // 2, 1, 1)
    return (paths * torch.softmax(attention, 1).repeat(1, 1, 2, 1, 1)).sum(dim=1)


def border_changed(x):
    y = F.pad(x, (1, 1, 1, 1), mode="reflect")
    z = F.conv2d(y, WEIGHT)
    y.mul_(2)
    return z + F.conv2d(y, WEIGHT)


UNARY = {
    "places in place": written_in_places,
    "copied": copied,
    "out": into_others,
    "named": lambda x: torch.add(other=x, input=torch.cat(torch.chunk(input=x, chunks=2, dim=1), dim=1)),
    "mean of a dtype": lambda x: x + x.mean((2, 3), keepdim=True, dtype=x.dtype),
    "formats": lambda x: x.to(memory_format=torch.channels_last) + x.clone(memory_format=torch.channels_last),
    "relu": F.relu,
    "relu_": lambda x: in_place(x, lambda y: F.relu(y, inplace=True)),
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "plus one": lambda x: 1 + x,
    "minus": lambda x: 2 - x,
    "new": lambda x: x * x.new_full((x.shape[0], 1, 1, 1), 2.0) + x.new_ones(x.shape),
    "power": lambda x: (x.abs() + 1) ** 0.5,
    "clamp": lambda x: x.clamp(-0.5, 1.0),
    "channels": lambda x: x * SCALE[:, None, None] + SHIFT.view(1, -1, 1, 1),
    "samples": lambda x: x * rand(x.shape[0], C, 1, 1),
    "position": lambda x: x + rand(1, C, *x.shape[2:]),
    "conv": lambda x: F.conv2d(x, WEIGHT, SHIFT, padding=1),
    "same": lambda x: F.conv2d(x, WEIGHT, padding="same", dilation=2),
    "depthwise": lambda x: F.conv2d(x, DEPTHWISE, SHIFT, padding=1, groups=C),
    "padded": lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1)), WEIGHT),
    "stacked": lambda x: torch.stack([x, 1 + x], 1).sum(1) + torch.stack([x, x.cos()], dim=-1).amax(-1).mean((2, 3), keepdim=True),
    "selected paths": selected_paths,
    "one channel": lambda x: x + (x[:, 0] + x.select(1, 1)).unsqueeze(1) + (x.cos()[:, 2:3].squeeze(1) + 1)[:, None],
    "unbound": lambda x: torch.stack([y + i for i, y in enumerate(x.unbind(1))], 1) + sum(torch.unbind(x, dim=1))[:, None],
    "moved": lambda x: (1 + F.layer_norm(x.movedim(1, -1), (C,)) @ WEIGHT[:, :, 0, 0]).moveaxis(3, 1),
    "expanded": lambda x: (1 + x[:, :1]).expand(-1, C, -1, -1) + x[:, 1:2].expand_as(x) + (1 + x[:, :2]).repeat(1, C // 2, 1, 1),
    "new axes": lambda x: (1 + x[:, None, :, :, :, None].view(x.shape[0], 2, C // 2, *x.shape[2:], 1))[:, 0, ..., 0].repeat(1, 2, 1, 1),
    "variance": lambda x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + x.std(1, keepdim=True) + 1),
    "evolved norm": evolved_norm,
    "attention": attended,
    "attention of one key for all heads": lambda x: multi_query(x) + x,
    "attention to others": lambda x: attended(x, rand(x.shape[0], 2, 5, C // 2)) + attended(x, rand(1, 2, 5, C // 2)),
    "of pixels and channels": lambda x: x * x.mean((1, 2, 3), keepdim=True) + x.std(dim=(2, 3), keepdim=True) + x.amax((1, 2, 3))[:, None, None, None] + x.var((-1, -2))[..., None, None] + (x + 1).sum((1, 2, 3), keepdim=True),
    "more channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2), value=2)[:, 1 : C + 1] + F.pad(x.permute(0, 2, 3, 1), (0, C), value=1).permute(0, 3, 1, 2)[:, C:],
    "every second pixel": lambda x: F.interpolate(1 + F.conv2d(x[:, :, ::2, ::2] + x[..., 1::2, 1::2], WEIGHT, padding=1), scale_factor=2),
    "borders": lambda x: F.conv2d(F.pad(x, (2, 0, 1, 1), mode="replicate"), WEIGHT) + F.conv2d(F.pad(x, (1, 1, 2, 0), mode="circular"), WEIGHT),
    "a border that is changed": border_changed,
    "moved by a padding": lambda x: x + F.pad(x, (-1, 1, 2, -2)),
    "reflected": lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), WEIGHT),
    "norm": lambda x: F.batch_norm(x, SHIFT, SCALE.abs() + 1, SCALE, SHIFT),
    "norm, relu": lambda x: F.relu(F.batch_norm(F.conv2d(x, WEIGHT, padding=1), SHIFT, SCALE.abs() + 1, SCALE, SHIFT)),
    "group norm": lambda x: F.group_norm(x, 3, SCALE, SHIFT, 1e-5),
    "norms of pixels in one axis": lambda x: (F.group_norm(x.flatten(2), 3, SCALE, SHIFT) + F.instance_norm(x.flatten(2))).view(x.shape),
    "squeeze": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True) @ torch.ones(1, 1, dtype=x.dtype)),
    "pooled": lambda x: x + F.adaptive_avg_pool2d(x, 1),
    "pooled by a window": lambda x: x + F.avg_pool2d(x, x.shape[2:]) * F.avg_pool2d(x, kernel_size=list(x.shape[2:]), padding=0),
    "channel attention": lambda x: x * torch.sigmoid(x.mean(1, keepdim=True) + x.amax(1, keepdim=True)),
    "softmax": lambda x: F.softmax(x, 1),
    "max pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "mean pool": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "down, up": lambda x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2),
    "bilinear": lambda x: F.interpolate(F.avg_pool2d(x, 2), size=x.shape[2:], mode="bilinear"),
    "shuffle": shuffled,
    "space": lambda x: F.pixel_shuffle(F.pixel_unshuffle(x, 2), 2),
    "last": channels_last,
    "tokens": tokens,
    "convnext": convnext,
    "parts": lambda x: torch.cat([x[:, 3:], x[:, :3]], 1),
    "split": lambda x: torch.cat([y * (i + 1) for i, y in enumerate(x.split([1, 2, 3], 1))], 1),
    "part in place": part_in_place,
    "whole in place": whole_in_place,
    "set": set_part,
    "unknown": lambda x: torch.cumsum(x, 1),
    "flip": lambda x: x.flip(1),
    "detached": lambda x: x.detach() + x.data,
    "norm of pixels": lambda x: x / (torch.norm(x, p=2, dim=(2, 3), keepdim=True) + 1),
    "prelu": lambda x: F.prelu(x, SCALE),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
}  # fmt: skip
BINARY = {
    "sum": lambda x, y: x + y,
    "sum_": lambda x, y: in_place(x, lambda z: z.add_(y)),
    "iadd": lambda x, y: in_place(x, lambda z: z.__iadd__(y)),
    "product": lambda x, y: x * y,
    "difference": lambda x, y: torch.sub(x, y, alpha=2),
    "maximum": torch.maximum,
    "join": lambda x, y: F.conv2d(torch.cat([x, y], 1), WIDE),
    "residual": lambda x, y: F.relu(F.conv2d(x, WEIGHT, padding=1) + y),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
}  # fmt: skip


def both(function, x, mask):
    """The result of a function of a first map: with maps, and in plain PyTorch."""
    with MaskedPolicy(mask):
        expected = function(F.conv2d(x, WEIGHT, padding=1))
    with dynops.use_mask(mask) as active, entered():
        out = function(F.conv2d(SparseMap.of_input(x, active), WEIGHT, padding=1))
        active._used = True
        return (out.dense() if type(out) is SparseMap else out), expected


@pytest.mark.parametrize("name", UNARY)
def test_each_function(name):
    for seed in range(3):
        out, expected = both(UNARY[name], rand(2, C, *SIZE, seed=seed), masks(seed=seed))
        close(out, expected)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from([*UNARY, *BINARY]), st.integers(0, 9), st.integers(0, 9)),
        min_size=2,
        max_size=7,
    ),
    st.integers(0, 4),
)
def test_any_sequence_of_functions(program, seed):
    def run(x):
        values = [x]
        for name, i, j in program:
            a, b = values[i % len(values)], values[j % len(values)]
            y = UNARY[name](a) if name in UNARY else BINARY[name](a, b)
            values.append(y / (1 + y.abs().amax((1, 2, 3), keepdim=True)))
        return sum(values[1:], values[0])

    out, expected = both(
        run, rand(2, C, *SIZE, seed=seed), masks(share=(0.1, 0.4, 0.9, 1.0, 0.0)[seed], seed=seed)
    )
    close(out, expected, 1e-10)


def test_a_map_is_used_twice_and_computed_once(monkeypatch):
    from dynops.stack.maps import convolution

    calls = []
    real = convolution._pixel_conv
    monkeypatch.setattr(convolution, "_pixel_conv", lambda *args: calls.append(1) or real(*args))
    x, mask = rand(2, C, *SIZE), masks()

    def before_its_norm(x):  # as a pre-activation network has it
        y = F.conv2d(x, WEIGHT, padding=1)
        z = F.relu(F.batch_norm(y, SHIFT, SCALE.abs() + 1, SCALE, SHIFT))
        return F.conv2d(z, WEIGHT, padding=1) + y

    out, expected = both(before_its_norm, x, mask)
    close(out, expected)
    assert len(calls) == 3


def test_a_new_tensor_of_its_dtype_reads_no_map():
    with dynops.use_mask(masks()) as active, entered():
        y = F.conv2d(SparseMap.of_input(rand(2, C, *SIZE), active), WEIGHT, padding=1)
        for _ in range(2):
            y = F.conv2d(y, WEIGHT, padding=1)
            share = y.new_empty((2, 1, 1, 1))
            assert type(share) is torch.Tensor and share.dtype == y.dtype and y.convolution() is not None


def test_gradient_modes_are_those_of_the_call():
    x, mask = rand(1, C, *SIZE), masks(1)
    weight = WEIGHT.clone().requires_grad_()
    with dynops.use_mask(mask) as active, entered():
        active._used = True
        first = F.conv2d(SparseMap.of_input(x, active), weight, padding=1)
        with torch.no_grad():
            frozen = F.conv2d(first, weight, padding=1)
        assert first.requires_grad and not frozen.requires_grad
        assert not frozen.dense().requires_grad and first.dense().requires_grad


def test_errors_come_with_the_call():
    x, mask = rand(2, C, *SIZE), masks()
    with dynops.use_mask(mask) as active, entered():
        active._used = True
        first = F.conv2d(SparseMap.of_input(x, active), WEIGHT, padding=1)
        with pytest.raises(ValueError, match="channels"):
            F.conv2d(first[:, :2], WEIGHT)
        with pytest.raises(TypeError, match="dtype"):
            F.conv2d(first, WEIGHT.float())
        with pytest.raises(RuntimeError):
            first + rand(2, C, 3, 5)


def test_a_weight_that_a_layer_computes_is_never_stale():
    class Standardised(nn.Conv2d):
        eps = 1e-6

        def __init__(self, *args):
            super().__init__(*args)
            self.gain, self.extra = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1)), 1.0

        def forward(self, x):
            var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True)
            weight = (self.weight - mean) * (var + self.eps).rsqrt() * self.gain * self.extra
            return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, C, 3, 1, 1), Standardised(C, C, 3, 1, 1), nn.ReLU()).double().eval()
    dense, x, mask = copy.deepcopy(model), rand(2, 3, *SIZE), masks()
    dynops.convert_(model)

    def scale_by_data(m):
        m[1].weight.data.mul_(1.7)
        m[1].gain.data.add_(0.1)

    changes = (
        lambda m: None,
        lambda m: nn.init.normal_(m[1].weight),
        scale_by_data,
        lambda m: m[1].gain.data.mul_(2),
        lambda m: setattr(m[1], "extra", 3.0),
        lambda m: setattr(m[1], "eps", 0.5),
        lambda m: setattr(m[1], "stride", (2, 2)),
        lambda m: setattr(m[1], "bias", None),
        lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    )
    for change in changes:
        for m in (model, dense):
            torch.manual_seed(1)
            change(m)
        with torch.no_grad(), dynops.use_mask(mask):
            out = model(x)
        with torch.no_grad(), MaskedPolicy(mask):
            expected = dense(x)
        close(out, expected)
