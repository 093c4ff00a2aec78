"""A model inside a stream is the dense model: random graphs, random edits."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from edits import frames_of, model_of, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import dynops
from dynops.stack.changed.frame import Frame

LAST = torch.channels_last


@pytest.fixture(autouse=True, params=["rows", "either"])
def ways(request, monkeypatch):
    """Small maps are faster dense: here a step computes rows, or rows and all by turns, whatever its times say."""
    turns = itertools.cycle([False, True, False, False])
    monkeypatch.setattr(Frame, "_dense_is_faster", lambda *_: request.param == "either" and next(turns))


class Block(nn.Module):
    """One step of a random graph. ``same`` keeps the size."""

    def __init__(self, kind: str, c: int, k: int, stride: int, dilation: int):
        super().__init__()
        self.kind = kind
        pad = dilation * (k // 2)
        if kind == "conv":
            self.conv = nn.Conv2d(c, c, k, stride, pad, dilation, groups=1)
        elif kind == "grouped":
            self.conv = nn.Conv2d(c, c, k, stride, pad, dilation, groups=2, bias=False)
        elif kind == "depthwise":
            self.conv = nn.Conv2d(c, c, k, stride, pad, dilation, groups=c, padding_mode="zeros")
        elif kind == "transposed":
            self.conv = nn.ConvTranspose2d(c, c, k, stride, k // 2, output_padding=stride - 1)
        elif kind == "reflected":
            self.conv = nn.Conv2d(c, c, k, stride, k // 2, padding_mode="reflect")
        elif kind == "excited":
            self.conv, self.down, self.up = (
                nn.Conv2d(c, c, k, 1, k // 2),
                nn.Conv2d(c, 2, 1),
                nn.Conv2d(2, c, 1),
            )
        elif kind == "shuffled":
            self.conv = nn.Conv2d(c, 4 * c, k, stride=2 if stride == 2 else 1, padding=k // 2)
        self.norm = nn.BatchNorm2d(c)
        self.stride = stride

    def forward(self, x):
        if self.kind in ("maximum", "mean"):
            pool = F.max_pool2d if self.kind == "maximum" else F.avg_pool2d
            return pool(x, 3, self.stride, 1)
        if self.kind == "padded":
            return F.pad(x, (1, 0, 2, 1), value=0.5)
        if self.kind in ("nearest", "bilinear"):
            corners = None if self.kind == "nearest" else self.stride == 2
            return F.interpolate(
                x, scale_factor=2 if self.stride == 2 else 1.5, mode=self.kind, align_corners=corners
            )
        if self.kind == "joined":
            a, b = x.chunk(2, 1)
            return torch.cat([F.silu(b), a * torch.sigmoid(b)], 1)
        y = self.conv(x)
        if self.kind == "excited":
            return y * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))
        if self.kind == "shuffled":
            y = F.pixel_shuffle(y, 2)
        return F.relu(self.norm(y), inplace=True)


KINDS = [
    *("conv", "conv", "grouped", "depthwise", "transposed", "reflected", "excited", "shuffled"),
    *("maximum", "mean", "padded", "nearest", "bilinear", "joined"),
]


class Graph(nn.Module):
    """A stem, then blocks: each reads the last map, or adds or concatenates an earlier one of its size."""

    def __init__(self, steps):
        super().__init__()
        self.stem, self.steps = nn.Conv2d(3, 4, 3, padding=1), steps
        self.blocks = nn.ModuleList(Block(*step[:1], 4, *step[1:4]) for step in steps)
        self.mix = nn.ModuleList(nn.Conv2d(8, 4, 1) for _ in steps)

    def forward(self, x):
        made = [self.stem(x)]
        for block, mix, (*_, join, back) in zip(self.blocks, self.mix, self.steps, strict=True):
            y = block(made[-1])
            other = made[max(0, len(made) - 1 - back)]
            if join != "none" and min(y.shape[2:]) > 3:
                other = other if other.shape == y.shape else F.interpolate(other, size=y.shape[2:])
                y = y + other if join == "add" else mix(torch.cat([y, other], 1))
            made.append(y)
            if min(y.shape[2:]) < 4:
                break
        return made[-1], made[len(made) // 2]


STEP = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from([1, 3, 3, 5]),
    st.sampled_from([1, 1, 2]),
    st.sampled_from([1, 1, 2]),
    st.sampled_from(["none", "none", "add", "cat"]),
    st.integers(0, 3),
)


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    steps=st.lists(STEP, min_size=2, max_size=6),
    size=st.sampled_from([(12, 13), (17, 11), (16, 16)]),
    batch=st.sampled_from([1, 2, 3]),
    last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_graphs_equal_dense_after_every_edit(steps, size, batch, last, seed):
    torch.manual_seed(seed)
    graph = Graph(steps)
    model = model_of(lambda m, x: m.graph(x), graph=graph)
    x = torch.randn(batch, 3, *size).contiguous(memory_format=LAST if last else torch.contiguous_format)
    run(model, frames_of(x, 9))


def test_fifty_frames_leave_no_drift():
    steps = [
        ("conv", 3, 2, 1, "none", 0),
        ("grouped", 3, 1, 2, "add", 1),
        ("maximum", 3, 1, 1, "cat", 2),
        ("transposed", 3, 2, 1, "none", 0),
        ("bilinear", 3, 1, 1, "add", 3),
    ]
    model = model_of(lambda m, x: m.graph(x), graph=Graph(steps))
    run(model, frames_of(torch.randn(2, 3, 15, 14), 50))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_keep_the_dense_error(dtype):
    steps = [("conv", 3, 2, 1, "none", 0), ("excited", 3, 1, 1, "add", 1), ("nearest", 3, 2, 1, "cat", 2)]
    model = model_of(lambda m, x: m.graph(x), graph=Graph(steps)).to(dtype)
    run(model, frames_of(torch.randn(2, 3, 14, 13).to(dtype), 8))


@pytest.mark.parametrize(
    "options", [{"block": 4}, {"block": (3, 5)}, {"refresh": 2}, {"keep": []}, {"relative": True}]
)
@pytest.mark.parametrize("kind", ["conv", "depthwise", "bilinear", "joined", "shuffled", "padded", "mean"])
def test_options_that_lose_nothing_are_exact(kind, options):
    steps = [("conv", 3, 1, 1, "none", 0), (kind, 3, 2, 1, "none", 0), ("conv", 1, 1, 1, "none", 0)]
    model = model_of(lambda m, x: m.graph(x), graph=Graph(steps))
    run(model, frames_of(torch.randn(2, 3, 12, 15), 6), **options)


@pytest.mark.parametrize(
    "resize",
    [
        lambda x: F.interpolate(x, size=(9, 20)),
        lambda x: F.interpolate(x, size=(20, 9), mode="bilinear"),
        lambda x: F.interpolate(x, size=(7, 5), mode="bilinear", align_corners=True),
        lambda x: F.interpolate(x, size=(7, 5), mode="bilinear", antialias=True),
        lambda x: F.interpolate(x, scale_factor=0.37),
        lambda x: F.interpolate(x, scale_factor=(1.7, 0.6), mode="bilinear", recompute_scale_factor=True),
        lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
        lambda x: F.interpolate(x, scale_factor=1.3, mode="nearest-exact"),
        lambda x: F.interpolate(x, size=(9, 9), mode="area"),
        lambda x: F.adaptive_avg_pool2d(x, (5, 4)),
        lambda x: F.adaptive_max_pool2d(x, (5, 4)),
        lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
        lambda x: F.max_pool2d(x, (2, 3), 1, (1, 1), 2) if min(x.shape[2:]) > 4 else x,
        lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
        lambda x: F.max_pool2d(x, 2, return_indices=True),
        lambda x: F.lp_pool2d(x, 2, 3),
        lambda x: F.pad(x, (-1, 2, 3, -2)),
        lambda x: F.pad(x, (2, 1, 1, 2), mode="replicate"),
        lambda x: F.pad(x, (2, 1, 1, 2), mode="circular"),
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 1), value=2.0),
        lambda x: x[:, :, ::2, 1:-1],
        lambda x: torch.roll(x, (1, -2), (2, 3)),
        lambda x: x.transpose(2, 3),
        lambda x: F.pixel_unshuffle(x[:, :, :10, :12], 2),
        lambda x: F.local_response_norm(x, 3),
        lambda x: F.grid_sample(
            x,
            F.affine_grid(torch.eye(2, 3, dtype=x.dtype)[None].repeat(len(x), 1, 1), x.shape, False),
            align_corners=False,
        ),
    ],
)
def test_functions_of_places(resize):
    model = model_of(lambda m, x: resize(m.conv(x)), conv=nn.Conv2d(3, 4, 3, padding=1))
    run(model, frames_of(torch.randn(2, 3, 11, 13), 5))


@pytest.mark.parametrize("channels", [1, 2])
def test_maps_of_one_channel(channels):
    layers = {"c": nn.Conv2d(1, channels, 3, padding=1), "d": nn.Conv2d(channels, 1, 1)}
    run(model_of(lambda m, x: m.d(m.c(x)), **layers), frames_of(torch.randn(2, 1, 9, 8), 5))


def attention(m, x, causal=False):
    n, c, h, w = x.shape
    tokens = m.norm(m.conv(x).flatten(2).transpose(1, 2))
    q, k, v = (z.view(n, h * w, 2, 4).transpose(1, 2) for z in m.qkv(tokens).chunk(3, -1))
    made = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return tokens + m.out(made.transpose(1, 2).reshape(n, h * w, 8))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_exact(causal):
    layers = {"conv": nn.Conv2d(3, 8, 3, padding=1), "norm": nn.LayerNorm(8)}
    layers |= {"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8)}
    model = model_of(lambda m, x: attention(m, x, causal), **layers)
    run(model, frames_of(torch.randn(2, 3, 7, 6), 6))


def test_tokens_that_attend_to_a_text_change_alone():
    def forward(m, x, text):
        tokens = m.conv(x).flatten(2).transpose(1, 2)
        q, k, v = (z.unflatten(-1, (2, 4)).transpose(1, 2) for z in (m.q(tokens), m.k(text), m.v(text)))
        made = F.scaled_dot_product_attention(q, k, v)
        return tokens + m.out(made.transpose(1, 2).flatten(2))

    layers = {name: nn.Linear(8, 8) for name in "qkv"} | {"out": nn.Linear(8, 8)}
    model = model_of(forward, conv=nn.Conv2d(3, 8, 1), **layers)
    text, frames = torch.randn(2, 5, 8), frames_of(torch.randn(2, 3, 8, 8), 5)
    stream = run(model, [(x, text) for x in frames])
    assert max(r.share for r in stream.report().rows if "scaled_dot" in r.name) < 0.5
    run(model, [(frames[-1], text * 2)], stream)


@pytest.mark.parametrize(
    "layer", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm([4, 9, 8])]
)
def test_norms_over_the_map_are_exact(layer):
    model = model_of(
        lambda m, x: m.after(F.silu(m.norm(m.conv(x)))),
        conv=nn.Conv2d(3, 4, 3, padding=1),
        norm=layer,
        after=nn.Conv2d(4, 4, 3, padding=1),
    )
    run(model, frames_of(torch.randn(2, 3, 9, 8), 6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"threshold": 1e-6}, {"block": 4}])
def test_what_is_not_finite_leaves_with_its_frame(bad, options):
    model = model_of(
        lambda m, x: m.d(F.relu(m.norm(m.c(x)))) + m.e(F.max_pool2d(x, 3, 1, 1)),
        c=nn.Conv2d(3, 4, 3, padding=1),
        d=nn.Conv2d(4, 4, 3, padding=1),
        e=nn.Conv2d(3, 4, 1),
        norm=nn.BatchNorm2d(4),
    )
    x = torch.randn(2, 3, 16, 16)
    broken = x.clone()
    broken[1, 1, 5, 6] = bad
    for frames in ([x, broken, broken, x, broken, x], [broken, x, broken]):
        stream = dynops.Stream(**options)
        for frame in frames:
            with stream:
                y = model(frame)
            torch.testing.assert_close(y, model(frame), atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 3, 1, 1), (1, 3, 1, 7), (2, 3, 2, 2)])
def test_sizes_at_the_edge(shape):
    model = model_of(lambda m, x: F.relu(m.conv(x)), conv=nn.Conv2d(3, 4, 3, padding=1))
    x = torch.randn(shape)
    run(model, [x, x, torch.randn(shape), x])
