"""MacCounter: the MACs of every kind of layer against numbers counted by hand."""

import pytest
import torch
from counting import count
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import dynops
from dynops import ChannelPlan, ExpertPlan, PixelPlan
from dynops.budget import Cost, MacCounter
from dynops.nn import (
    ChannelConv2d,
    ChannelGatedConv2d,
    ChannelLinear,
    CondConv2d,
    DynamicConv2d,
    Experts,
    GroupedDynamicConv2d,
    MoE,
    SlimmableConv2d,
    SlimmableLinear,
    SparseBlocks,
    SparseConv2d,
    SparseConvTranspose2d,
    SparseSequential,
    TopKRouter,
)


@pytest.mark.parametrize(
    ("layer", "shape", "each"),
    [
        (nn.Conv1d(4, 6, 3, padding=1, groups=2), (3, 4, 10), 10 * 6 * 2 * 3),
        (nn.Conv2d(4, 6, (3, 1), stride=2), (3, 4, 9, 8), 4 * 4 * 6 * 4 * 3),
        (nn.Conv3d(2, 3, 2), (3, 2, 4, 4, 4), 27 * 3 * 2 * 8),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (3, 4, 5, 5), 25 * 4 * 6 * 4),
        (nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (3, 4, 5), 10 * 4 * 6 * 2),
        (nn.Linear(5, 7), (3, 5), 35),
        (nn.Linear(5, 7), (3, 4, 2, 5), 8 * 35),
        (nn.BatchNorm2d(4), (3, 4, 5, 5), 0),
    ],
)
def test_dense_layer(layer, shape, each):
    macs = count(layer, torch.randn(shape))
    assert macs.per_sample.tolist() == [each] * 3
    assert macs.per_sample.dtype == torch.float64
    assert (float(macs.total), macs.dense, float(macs.flops)) == (3 * each, 3 * each, 6 * each)


def test_bilinear():
    layer = nn.Bilinear(3, 4, 5)
    assert count(layer, torch.randn(2, 3), torch.randn(2, 4)).per_sample.tolist() == [5 * (3 * 4 + 4)] * 2


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers(kind, gates, batch_first):
    layer = kind(5, 7, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(3, 6, 5) if batch_first else torch.randn(6, 3, 5)
    step = 2 * gates * 7 * (5 + 7) + 2 * gates * 7 * (14 + 7)
    with MacCounter(layer, batch_dim=0 if batch_first else 1) as macs:
        layer(x)
    assert macs.per_sample.tolist() == [6 * step] * 3


def test_lstm_with_projection():
    layer = nn.LSTM(5, 7, proj_size=4, batch_first=True)
    assert count(layer, torch.randn(2, 3, 5)).per_sample.tolist() == [3 * (4 * 7 * (5 + 4) + 7 * 4)] * 2


def test_packed_sequences_cost_their_own_lengths():
    layer = nn.GRU(5, 7, batch_first=True)
    packed = pack_padded_sequence(torch.randn(3, 6, 5), torch.tensor([2, 6, 3]), True, enforce_sorted=False)
    step = 3 * 7 * (5 + 7)
    macs = count(layer, packed)
    assert macs.per_sample.tolist() == [2 * step, 6 * step, 3 * step]
    assert macs.dense == 18 * step


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_cells(kind, gates):
    assert count(kind(5, 7), torch.randn(3, 5)).per_sample.tolist() == [gates * 7 * 12] * 3


@pytest.mark.parametrize("training", [False, True])
def test_attention(training):
    layer = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True).train(training)
    q, k, v = torch.randn(3, 5, 8), torch.randn(3, 7, 6), torch.randn(3, 7, 4)
    each = 5 * 64 + 7 * 6 * 8 + 7 * 4 * 8 + 2 * 5 * 7 * 8 + 5 * 64
    with torch.no_grad():
        assert count(layer, q, k, v).per_sample.tolist() == [each] * 3


def test_a_transformer_layer_in_eval_mode_is_not_on_the_path_that_skips_its_modules():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.inference_mode():
        each = 4 * 5 * 64 + 2 * 25 * 8 + 2 * 5 * 8 * 16
        assert count(layer, torch.randn(3, 5, 8)).per_sample.tolist() == [each] * 3


def test_sparse_conv_and_its_gradient():
    layer = SparseConv2d(4, 6, 3, padding=1)
    mask = (torch.rand(3, 1, 5, 5) < 0.5).float().requires_grad_()
    macs = count(layer, torch.randn(3, 4, 5, 5), mask)
    each = 9 * 4 * 6
    assert macs.per_sample.tolist() == (mask.flatten(1).sum(1) * each).tolist()
    assert macs.dense == 3 * 25 * each
    macs.total.backward()
    assert mask.grad.unique().tolist() == [each]  # closed pixels too


def test_a_soft_mask_counts_as_open():
    mask = torch.zeros(2, 4, 4)
    mask[0, :2] = 0.25
    assert count(SparseConv2d(1, 1, 1), torch.randn(2, 1, 4, 4), mask).per_sample.tolist() == [8, 0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("capacity", [None, 40])
def test_sparse_conv_with_a_plan_and_a_gate(packed, capacity):
    layer = SparseConv2d(4, 6, 3, padding=1)
    mask = torch.rand(3, 5, 5) < 0.5
    plan = PixelPlan.from_mask(mask, capacity)
    gate = torch.ones(plan.num_rows if packed else mask.shape, requires_grad=True)
    macs = count(layer, torch.randn(3, 4, 5, 5), plan, gate=gate)
    assert macs.per_sample.tolist() == (mask.flatten(1).sum(1) * 216).tolist()
    macs.total.backward()
    if packed:
        assert gate.grad.tolist() == [216] * int(mask.sum()) + [0] * (plan.num_rows - int(mask.sum()))
    else:
        assert torch.equal(gate.grad, mask * 216.0)


@pytest.mark.parametrize("masked", [False, True])
def test_sparse_transposed_conv(masked):
    layer = SparseConvTranspose2d(4, 6, 4, stride=2, padding=1)
    mask = torch.rand(2, 10, 10) < 0.3
    macs = count(layer, torch.randn(2, 4, 5, 5), *([mask] if masked else []))
    pixels = mask.flatten(1).sum(1) if masked else torch.tensor([100, 100])
    assert macs.per_sample.tolist() == (pixels * 4 * 4 * 6).tolist()
    assert macs.dense == 2 * 100 * 4 * 4 * 6


def test_the_active_mask_counts():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, 2, 1))
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, :3, :2] = True
    dynops.convert_(model)
    with MacCounter(model) as macs, dynops.active(mask):
        model(torch.randn(2, 3, 8, 8))
    assert macs.per_sample.tolist() == [6 * 27 * 4 + 2 * 36 * 5, 0]
    assert macs.dense == 2 * (64 * 27 * 4 + 16 * 36 * 5)


def test_a_chain_counts_where_later_layers_read():
    chain = SparseSequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)
    ).eval()
    x, mask = torch.randn(2, 3, 6, 6), torch.zeros(2, 6, 6)
    mask[0, 2, 2] = mask[0, 0, 5] = 1  # halos of 9 and of 4 pixels
    mask.requires_grad_()
    macs = count(chain, x, mask)
    inner, outer = 3 * 4, 9 * 4 * 5
    assert macs.per_sample.tolist() == [13 * inner + 2 * outer, 0]
    assert macs.dense == 2 * 36 * (inner + outer)
    macs.total.backward()
    assert mask.grad[0].unique().tolist() == [(13 * inner + 2 * outer) / 2]
    assert mask.grad[1].unique().tolist() == [inner + outer]
    assert count(chain, x).per_sample.tolist() == [36 * (inner + outer)] * 2


@pytest.mark.parametrize(("path", "inner"), [("rows", 16 + 9), ("tiles", 2 * 16)])
def test_blocks(path, inner):
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1)).eval()
    layer = SparseBlocks(module, 2, path)
    mask = torch.zeros(2, 8, 8)
    mask[0, 3, 3] = mask[0, 0, 6] = 1  # with their halo 16 pixels, and 9 inside the map of 16 in the corner
    macs = count(layer, torch.randn(2, 3, 8, 8), mask)
    assert macs.per_sample.tolist() == [inner * 27 * 4 + 8 * 36 * 5, 0]
    assert macs.dense == 2 * 64 * (27 * 4 + 36 * 5)
    assert count(layer, torch.randn(2, 3, 8, 8)).total == macs.dense
    layer(torch.randn(2, 3, 8, 8), mask)  # no hook is left inside


@pytest.mark.parametrize(("mode", "each"), [("gaussian", 2 * 5 * (3 + 1) * 36), ("nearest", 0)])
def test_fills_count(mode, each):
    class Filled(nn.Module):
        def forward(self, x, mask):
            return dynops.ops.interpolate_pixels(x, PixelPlan.from_mask(mask), mode, kernel_size=5)

    macs = count(Filled(), torch.randn(2, 3, 6, 6), torch.rand(2, 6, 6) < 0.5)
    assert macs.per_sample.tolist() == [each] * 2
    assert list(macs.layers) == (["interpolate_pixels"] if each else [])


@pytest.mark.parametrize("as_plan", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_channel_conv(as_plan, packed):
    layer = ChannelConv2d(6, 8, 3, padding=1)
    inputs, outputs = torch.rand(3, 6) < 0.6, torch.rand(3, 8) < 0.6
    live = [ChannelPlan.from_mask(m) if as_plan else m for m in (inputs, outputs)]
    x = torch.randn(3, 6, 4, 4)
    if packed and as_plan:
        x = dynops.ops.gather_channels(x, live[0])
    elif packed:
        live[0] = None
        inputs = torch.ones(3, 6)
    macs = count(layer, x, *live, packed=packed)
    assert macs.per_sample.tolist() == (inputs.sum(1) * outputs.sum(1) * 16 * 9).tolist()
    assert macs.dense == 3 * 48 * 16 * 9


def test_channel_masks_have_gradients():
    layer, each = ChannelConv2d(6, 8, 1), 16
    inputs = (torch.rand(3, 6) < 0.6).float().requires_grad_()
    outputs = (torch.rand(3, 8) < 0.6).float().requires_grad_()
    count(layer, torch.randn(3, 6, 4, 4), inputs, outputs).total.backward()
    assert torch.equal(inputs.grad, (outputs.sum(1, keepdim=True) * each).detach().expand(3, 6))
    assert torch.equal(outputs.grad, (inputs.sum(1, keepdim=True) * each).detach().expand(3, 8))


def test_a_scale_has_a_gradient_at_live_channels():
    layer, mask = ChannelConv2d(6, 8, 1), torch.rand(3, 8) < 0.5
    scale = torch.rand(3, 8, requires_grad=True)
    macs = count(layer, torch.randn(3, 6, 4, 4), None, ChannelPlan.from_mask(mask), scale=scale)
    assert macs.per_sample.tolist() == (mask.sum(1) * 6 * 16).tolist()
    macs.total.backward()
    assert torch.equal(scale.grad, mask * 96.0)


def test_groups_and_shared_lists():
    layer = ChannelConv2d(6, 8, 1, groups=2)
    inputs, outputs = torch.rand(3, 6) < 0.6, torch.rand(8) < 0.6
    expected = sum(inputs[:, 3 * g : 3 * g + 3].sum(1) * outputs[4 * g : 4 * g + 4].sum() for g in (0, 1))
    macs = count(layer, torch.randn(3, 6, 2, 2), inputs, outputs)
    assert macs.per_sample.tolist() == (4 * expected).tolist()
    assert macs.dense == 3 * 4 * 6 * 8 / 2


def test_heads():
    layer, inputs = ChannelConv2d(6, 8, 1), torch.rand(3, 2, 6) < 0.6
    macs = count(layer, torch.randn(3, 6, 2, 2), inputs)
    assert macs.per_sample.tolist() == (4 * 4 * inputs.flatten(1).sum(1)).tolist()


def test_channel_linear():
    layer, outputs = ChannelLinear(6, 8), torch.rand(3, 8) < 0.6
    macs = count(layer, torch.randn(3, 5, 6), None, outputs)
    assert macs.per_sample.tolist() == (5 * 6 * outputs.sum(1)).tolist()
    assert count(layer, torch.randn(3, 5, 6)).per_sample.tolist() == [240] * 3


@pytest.mark.parametrize("depthwise", [False, True])
def test_slimmable_conv(depthwise):
    lists = ([4, 8], [4, 8]) if depthwise else ([3, 6], [4, 8])
    layer = SlimmableConv2d(*lists, 3, padding=1, groups_list=lists[0] if depthwise else [1])
    switch = [4 * 9 * 25, 8 * 9 * 25] if depthwise else [12 * 9 * 25, 48 * 9 * 25]
    macs = count(layer, torch.randn(2, lists[0][0], 5, 5), 0)
    assert macs.per_sample.tolist() == [switch[0]] * 2
    assert macs.dense == 2 * switch[1]
    macs = count(layer, torch.randn(3, lists[0][1], 5, 5), torch.tensor([1, 0, 1]))
    assert macs.per_sample.tolist() == [switch[1], switch[0], switch[1]]


def test_slimmable_linear():
    layer = SlimmableLinear([3, 6], [4, 8])
    assert count(layer, torch.randn(2, 3), 0).per_sample.tolist() == [12] * 2
    assert count(layer, torch.randn(2, 6), torch.tensor([0, 1])).per_sample.tolist() == [12, 48]


def test_grouped_dynamic_conv():
    layer = GroupedDynamicConv2d(16, 8, 3, padding=1, heads=4, squeeze_rate=4).eval()
    layer.inactive_channels = 12
    macs = count(layer, torch.randn(3, 16, 5, 5))
    head = layer.headconv_0
    gates = 4 * 2 * 16 * head.fc1.out_features
    live = (macs.per_sample - gates) / (25 * 9 * 2)
    assert ((live >= 0) & (live <= 4 * 4)).all() and live.sum() > 0
    assert torch.equal(live, live.round())
    assert macs.dense == 3 * (gates + 25 * 9 * 8 * 16)
    layer.inactive_channels = 0
    with torch.no_grad():  # every saliency is positive
        for i in range(4):
            getattr(layer, f"headconv_{i}").fc2.weight.zero_()
    assert count(layer, torch.randn(3, 16, 5, 5)).total == macs.dense


@pytest.mark.parametrize("use_group", [False, True])
def test_channel_gated_conv(use_group):
    layer = ChannelGatedConv2d(8, 8, 3, padding=1, p=4, th=0.0, use_group=use_group).eval()
    macs = count(layer, torch.randn(3, 8, 5, 5))
    open_ = layer._open.flatten(1).sum(1)
    assert 0 < int(open_.sum()) < layer._open.numel()
    assert macs.per_sample.tolist() == (9 * (8 * 25 * 2 + open_ * 6)).tolist()
    assert macs.dense == 3 * 9 * 8 * 25 * 8


def test_mixed_convolutions_count_the_mixing():
    layer = CondConv2d(4, 6, 3, bias=True, num_experts=5, routing=True)
    each = 25 * 9 * 24 + 5 * (9 * 24 + 6) + 4 * 5
    assert count(layer, torch.randn(2, 4, 5, 5)).per_sample.tolist() == [each] * 2
    layer = DynamicConv2d(4, 6, 3, padding=1, K=3)
    hidden = layer.attention.fc1.out_channels
    each = 25 * 9 * 24 + 3 * (9 * 24 + 6) + 4 * hidden + hidden * 3
    assert count(layer, torch.randn(2, 4, 5, 5)).per_sample.tolist() == [each] * 2


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("as_plan", [True, False])
def test_experts(gated, as_plan):
    layer = Experts(4, 8, 6, gated=gated)
    index = torch.randint(0, 5, (12, 2))  # 4 means dropped
    each = 8 * 6 * (3 if gated else 2)
    choice = ExpertPlan.from_topk(index, 4) if as_plan else index
    macs = count(layer, torch.randn(3, 4, 8), choice, torch.rand(12, 2))
    assert macs.per_sample.tolist() == ((index < 4).view(3, -1).sum(1) * each).tolist()
    assert macs.dense == 3 * 4 * 4 * each


def test_capacity_drops():
    macs = count(Experts(4, 8, 6), torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.int64), capacity=2)
    assert macs.per_sample.tolist() == [144, 144, 0]


def test_moe_counts_router_and_shared_expert():
    layer = MoE.from_sizes(8, 6, 4, 2, shared_intermediate=5, shared_gate=True)
    macs = count(layer, torch.randn(3, 7, 8))
    assert macs.per_sample.tolist() == [7 * (8 * 4 + 2 * 8 * 6 * 3 + 3 * 8 * 5 + 8)] * 3


def test_a_noisy_router_has_two_products():
    router = TopKRouter(8, 4, 2, noise=True)
    assert count(router, torch.randn(3, 8)).per_sample.tolist() == [64] * 3
    assert count(router.eval(), torch.randn(3, 8)).per_sample.tolist() == [32] * 3


def test_own_rules_and_names():
    class Product(nn.Module):
        def forward(self, x):
            return x @ x.mT

    model = nn.Sequential(nn.Linear(4, 4), Product())
    rule = lambda module, args, kwargs, out: Cost(len(out), 4.0 * out[0].numel())  # noqa: E731
    with MacCounter(model, rules={Product: rule}) as macs:
        model(torch.randn(2, 3, 4))
    assert macs.per_sample.tolist() == [3 * 16 + 36] * 2
    assert {n: (float(m.computed), m.dense) for n, m in macs.layers.items()} == {"0": (96, 96), "1": (72, 72)}


def test_a_layer_that_is_called_twice_and_one_that_sees_no_samples():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.table = nn.Linear(4, 4), nn.Linear(2, 3)

        def forward(self, x):
            return self.fc(self.fc(x)) + self.table(torch.randn(5, 2)).sum()

    macs = count(Twice(), torch.randn(4, 4))
    assert macs.layers["fc"].dense == 2 * 4 * 16
    assert macs.per_sample.tolist() == [2 * 16 + 5 * 6 / 4] * 4  # 5 rows for 4 samples: an equal share


def test_flattened_rows_belong_to_their_samples():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = ChannelLinear(4, 5)

        def forward(self, x, mask):
            return self.fc(x.flatten(0, 1), None, mask)

    mask = torch.rand(6, 5) < 0.5
    macs = count(Flat(), torch.randn(2, 3, 4), mask)
    assert macs.per_sample.tolist() == (4 * mask.sum(1).view(2, 3).sum(1)).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_counts_are_exact_in_every_dtype(dtype):
    layer = SparseConv2d(64, 64, 3, padding=1).to(dtype)
    mask = torch.ones(1, 64, 65, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        macs = count(layer, torch.randn(1, 64, 64, 65).to(dtype), mask)
    assert macs.per_sample.tolist() == [64 * 65 * 9 * 64 * 64]


def test_empty_batches():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(1), nn.Linear(4, 2))
    macs = count(model, torch.randn(0, 3, 3, 3))
    assert macs.per_sample.shape == (0,) and float(macs.total) == macs.dense == 0
