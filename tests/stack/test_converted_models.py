"""What a conversion must keep, its report, and masks and blocks of a context."""

import copy
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from masked_models import block, close, hold, layer_by_layer, mean, norm, random_mask, small_resnet
from torch import nn

import dynops
from benchmarks.resnet import BasicBlock, ResNet
from dynops.nn import SparseConv2d, SparseConvTranspose2d


@pytest.fixture
def inputs():
    return torch.randn(2, 3, 64, 48, dtype=torch.float64), random_mask((2, 64, 48))


def test_outside_the_context_the_model_is_the_dense_one(inputs):
    model = small_resnet()
    dense = copy.deepcopy(model)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    report = dynops.convert_(model)
    assert list(model.state_dict()) == keys
    assert len(report.replaced) == sum(cls in (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d) for cls in classes)
    assert all(model.get_parameter(name) is p for name, p in parameters.items())
    assert isinstance(model, ResNet) and isinstance(model.conv1, SparseConv2d)
    expected = dense(inputs[0])
    assert torch.equal(model(inputs[0]), expected)
    with dynops.active(inputs[1]):
        assert not torch.equal(model(inputs[0]), expected)
    assert torch.equal(model(inputs[0]), expected)
    dynops.revert_(model)
    assert [type(m) for m in model.modules()] == classes
    assert all(
        set(a.__dict__) == set(b.__dict__) for a, b in zip(model.modules(), dense.modules(), strict=True)
    )
    with dynops.active(inputs[1]):
        assert torch.equal(model(inputs[0]), expected)


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
def test_copies_are_models_of_their_own(clone, inputs):
    model = small_resnet()
    dynops.convert_(model)
    x, mask = inputs
    with dynops.active(mask), torch.no_grad():
        expected = model(x)
        other = clone(model)
        assert type(other) is type(model) and torch.equal(other(x), expected)
        assert torch.equal(copy.copy(model)(x), expected)
        other.layer1[0].conv1.weight.zero_()
        assert not torch.equal(other(x), expected) and torch.equal(model(x), expected)
    dynops.revert_(other)
    assert type(other) is ResNet and isinstance(model.conv1, SparseConv2d)


def test_hooks_run_and_replaced_modules_are_seen(inputs):
    model, (x, mask) = small_resnet(), inputs
    dynops.convert_(model)
    seen = []
    with dynops.active(mask), torch.no_grad():
        expected = model(x)
        handles = [
            m.register_forward_hook(lambda module, args, out: seen.append(out.shape))
            for m in (model.layer2, model.layer1[0].bn2, model.fc, model)
        ]
        close(model(x), expected)
        assert seen == [(2, 4, 16, 12), (2, 32, 8, 6), (2, 5), (2, 5)]
        for handle in handles:
            handle.remove()
        model.fc = nn.Linear(128, 2, dtype=torch.float64)
        assert model(x).shape == (2, 2)
        model.layer4 = nn.Identity()
        model.fc = nn.Identity()
        assert model(x).shape == (2, 64)


def test_report():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 3, 1),
            "up": nn.ConvTranspose2d(3, 3, 2),
            "conv1d": nn.Conv1d(3, 3, 1),
            "lazy": nn.LazyConv2d(3, 1),
            "sparse": SparseConv2d(3, 3, 1),
            "pool": nn.MaxPool2d(2, return_indices=True),
            "excluded": nn.Conv2d(3, 3, 3),
        }
    )
    report = dynops.convert_(model, lambda module, name: name != "excluded")
    assert report.replaced == {"conv": "SparseConv2d", "up": "SparseConvTranspose2d"}
    assert isinstance(model["up"], SparseConvTranspose2d) and type(model["excluded"]) is nn.Conv2d
    assert set(report.skipped) == {"conv1d", "lazy", "sparse", "pool", "excluded"}
    assert report.skipped["excluded"] == "filter_fn" and report.skipped["sparse"] == "already sparse"
    assert "\n  1 SparseConv2d\n" in str(report) and "skipped: 5" in str(report)
    dynops.revert_(model)
    assert type(model["conv"]) is nn.Conv2d and type(model["sparse"]) is SparseConv2d


def test_filtered_layers_run_dense(inputs):
    model, (x, mask) = small_resnet(BasicBlock), inputs
    dense = copy.deepcopy(model)
    report = dynops.convert_(model, lambda module, name: name.startswith(("layer1", "layer2.0.conv1")))
    assert type(model.conv1) is nn.Conv2d and "layer3.0.conv1" in report.skipped
    with dynops.active(mask):
        out = model(x)
    y = dense.maxpool(dense.relu(dense.bn1(dense.conv1(x))))
    first = dense.layer1[0]
    z = norm(
        first.bn2, hold(first.conv2(F.relu(norm(first.bn1, hold(first.conv1(y), mask), mask))), mask), mask
    )
    y = block(dense.layer1[1], F.relu(hold(z + y, mask)), mask)
    b = dense.layer2[0]
    z = b.bn2(b.conv2(F.relu(b.bn1(hold(b.conv1(y), mask)))))
    y = F.relu(z + b.downsample(y))
    close(out, dense.fc(dense.layer4(dense.layer3(y)).mean((2, 3))))


def test_a_single_layer_and_a_second_call():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    assert dynops.convert_(conv).replaced == {"": "SparseConv2d"}
    model = small_resnet()
    dynops.convert_(model)
    again = dynops.convert_(model)
    assert not again.replaced and not again.fused
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module"):
        dynops.convert_([model])


def test_context_nests_and_survives_errors(inputs):
    model, (x, mask) = small_resnet(), inputs
    dynops.convert_(model)
    other = random_mask((2, 64, 48), 0.2, seed=1)
    with torch.no_grad():
        dense = model(x)
        outer = dynops.active(mask)
        with outer:
            a = model(x)
            with dynops.active(other):
                b = model(x)
                with outer:
                    assert torch.equal(model(x), a)
            assert torch.equal(model(x), a) and not torch.equal(a, b)
        with pytest.raises(RuntimeError, match="stop"), dynops.active(mask):
            raise RuntimeError("stop")
        assert torch.equal(model(x), dense)


def test_masks_that_do_not_fit(inputs):
    model, (x, mask) = small_resnet(), inputs
    dynops.convert_(model)
    with dynops.active(torch.ones(3, 64, 48)), pytest.raises(ValueError, match="batch of 2, got one for 3"):
        model(x)
    with pytest.raises(ValueError, match="mask: expected numbers, got NaN"):
        dynops.active(torch.full((2, 64, 48), torch.nan))
    with pytest.raises(TypeError, match="mask: expected a tensor"):
        dynops.active([[1]])
    with pytest.raises(ValueError, match="mask: expected"):
        dynops.active(torch.ones(2, 3, 64, 48))
    with dynops.active(mask), pytest.raises(TypeError, match="x: expected the weight's dtype"):
        model(x.float())
    with dynops.active(mask), pytest.raises(ValueError, match="x: expected 3 channels"):
        model(x[:, :2])
    with dynops.active(mask), pytest.raises(ValueError, match="expected the mask on the layer's device"):
        model.to("meta")(x.to("meta"))


def test_unbatched_input_goes_layer_by_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)).double()
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    x, mask = torch.randn(3, 8, 8, dtype=torch.float64), random_mask((1, 8, 8), 0.3)
    with dynops.active(mask):
        out = model(x)
    expected = F.max_pool2d(F.relu(hold(dense[0](x[None]), mask)), 2)
    close(out[None], hold(expected, mask))


def widened(mask, block_size):
    """``mask`` with every block that holds an active pixel filled; written as loops."""
    high, wide = block_size
    out = torch.zeros(mask.shape, dtype=torch.bool)
    for y in range(0, mask.shape[1], high):
        for x in range(0, mask.shape[2], wide):
            blocks = (slice(None), slice(y, y + high), slice(x, x + wide))
            out[blocks] = (mask[blocks] != 0).flatten(1).any(1)[:, None, None]
    return out


FORMS = {
    "mask": lambda mask: mask,
    "float mask": lambda mask: -mask[:, None].float(),
    "plan": dynops.PixelPlan.from_mask,
    "capacity plan": lambda mask: dynops.PixelPlan.from_mask(mask, mask.numel()),
    "block plan": lambda mask: dynops.BlockPlan.from_mask(mask, 1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block_size", [(16, 16), (8, 20), (1, 48), (1, 1), (1000, 2)])
def test_blocks_equal_the_widened_mask(block_size, form, inputs):
    model, x, mask = small_resnet(), inputs[0], random_mask((2, 64, 48), 0.002)
    dynops.convert_(model)
    assert not widened(mask, block_size).all()
    assert block_size == (1, 1) or not torch.equal(widened(mask, block_size), mask)
    with torch.no_grad():
        with dynops.active(widened(mask, block_size)):
            expected = model(x)
        with dynops.active(FORMS[form](mask), block_size) as context:
            close(model(x), expected)
    assert torch.equal(context.plan((2, 64, 48), x.device).mask(), widened(mask, block_size))
    assert (context.plan((2, 64, 48), x.device).count is None) == (form != "capacity plan")


def test_a_layer_computes_blocks_of_its_own_resolution(inputs):
    context = dynops.active(random_mask((2, 64, 48), 0.002), 16)
    for scale in (2, 4, 8):
        mask = context.plan((2, 64 // scale, 48 // scale), inputs[0].device).mask()
        assert mask.any() and not mask.all() and torch.equal(mask, widened(mask, (16 // scale,) * 2))


def test_a_block_plan_is_a_mask_of_its_blocks():
    mask = random_mask((2, 64, 48), 0.002)
    plan = dynops.BlockPlan.from_mask(mask, 16)
    context = dynops.active(plan)
    assert torch.equal(context.plan((2, 64, 48), plan.device).mask(), widened(mask, (16, 16)))


def test_empty_masks_have_no_blocks():
    for mask in (torch.zeros(2, 9, 7), torch.ones(0, 9, 7)):
        assert dynops.active(mask, 4).plan(tuple(mask.shape), mask.device).num_rows == 0


@pytest.mark.parametrize("block_size", [0, -4, (4, 0), (4, 4, 4), 2.0, "8"])
def test_block_sizes_that_are_none(block_size, inputs):
    with pytest.raises(ValueError, match="block_size: expected an int or a pair of ints >= 1, got"):
        dynops.active(inputs[1], block_size)


def test_blocks_of_a_mask_with_nan():
    with pytest.raises(ValueError, match="mask: expected numbers, got NaN"):
        dynops.active(torch.full((1, 8, 8), torch.nan), 4)


# ------------------------------------------------------------------------------------- errors


class Inner(nn.Module):
    """A module whose forward is ``function`` of its convolution."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(4, 4, 3, padding=1), function

    def forward(self, x):
        return self.function(self.conv(x))


def model_around(function):
    model = nn.Sequential(
        OrderedDict(first=nn.Conv2d(3, 4, 3, padding=1), body=nn.Sequential(Inner(function)))
    )
    dynops.convert_(model)
    return model


def refuses(y):
    assert type(y) is torch.Tensor, "a plain tensor"
    return y


def stops(y):
    raise RuntimeError("stop")


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda y: y.view(5, -1), r"(?s)invalid for input.*in body\.0\.view, under.*one by one"),
        (lambda y: y.no_such_method(), r"(?s)no attribute.*in body\.0\.no_such_method, under"),
        (refuses, r"(?s)a plain tensor.*body\.0 \(Inner\)"),
        (stops, "^stop$"),
    ],
)
def test_an_error_names_its_module(function, message):
    model, x = model_around(function), torch.randn(1, 3, 6, 6)
    with dynops.use_mask(torch.ones(1, 6, 6)), pytest.raises(Exception, match=message):
        model(x)


def test_an_error_of_a_mask_names_the_layer():
    model, x = model_around(torch.relu), torch.randn(2, 3, 6, 6)
    for hooked in (False, True):
        with (
            dynops.use_mask(torch.ones(3, 6, 6)),
            pytest.raises(ValueError, match=r"(?s)2, got one for 3.*first"),
        ):
            model(x)
        if not hooked:
            layer_by_layer(model)


def test_masks_finer_than_the_input():
    model, x = model_around(torch.relu), torch.randn(1, 3, 16, 24)
    for mask in (
        torch.ones(1, 20, 24),
        torch.ones(1, 16, 25),
        dynops.PixelPlan.from_mask(torch.ones(1, 40, 36)),
    ):
        with (
            dynops.use_mask(mask),
            pytest.raises(ValueError, match=r"the model \(Sequential\), 16x24, .*adaptive_max_pool2d"),
        ):
            model(x)
    for size in ((16, 24), (31, 47), (48, 24), (2, 3), (7, 7)):  # at one stride or another, or coarser
        with dynops.use_mask(torch.ones(1, *size)):
            model(x)
            model(x[:, :, 3:, 3:])  # a part, after the model


def test_sparse_tensors_as_input():
    x, mask = torch.randn(2, 3, 8, 8).to_sparse(), torch.ones(2, 8, 8)
    for layers in ([nn.Conv2d(3, 4, 3)], [nn.MaxPool2d(2), nn.Conv2d(3, 4, 3)]):
        model = nn.Sequential(*layers)
        dynops.convert_(model)
        for module in (model, model[-1]):
            with (
                dynops.use_mask(mask),
                pytest.raises(TypeError, match=r"expected a dense tensor.*sparse_coo.*to_dense\(\)"),
            ):
                module(x)


@pytest.mark.parametrize("layer", [nn.Linear(3, 3), nn.Conv3d(3, 3, 1), nn.Sequential(nn.ReLU())])
def test_models_without_a_convolution(layer):
    with pytest.raises(ValueError, match=f"model: expected .*convolution.*got {type(layer).__name__}"):
        dynops.convert_(layer)


def test_functional_convolutions_are_converted():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.weight, padding=1)

    model, x, mask = Own(), torch.randn(1, 3, 6, 6), random_mask((1, 6, 6))
    expected = hold(model(x), mask)
    dynops.convert_(model)
    with dynops.use_mask(mask):
        close(model(x), expected, 1e-6)


def test_the_report_names_all_that_was_left():
    left = [nn.LPPool2d(2, 2), nn.LocalResponseNorm(2), nn.AdaptiveAvgPool2d(3), nn.MaxPool1d(2)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *left, nn.AdaptiveAvgPool2d(1))
    report = dynops.convert_(model)
    assert list(report.skipped) == ["1", "2", "3", "4"]
    assert all("runs dense" in report.skipped[name] for name in "123")
    with warnings.catch_warnings(), dynops.use_mask(torch.ones(1, 8, 8)):
        warnings.simplefilter("error")
        model[:4](torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("how", ["fused", "layers"])
@pytest.mark.parametrize("pool", [F.avg_pool2d, F.max_pool2d, nn.AvgPool2d, nn.MaxPool2d])
def test_a_pool_of_the_whole_map_is_over_the_mask(pool, how):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.Identity()
            if isinstance(pool, type):
                self.pool = pool((6, 4))

        def forward(self, x):
            y = self.conv(x)
            y = self.pool(y) if isinstance(pool, type) else pool(y, (6, 4))
            return y.flatten(1)

    model, x, mask = Model().double(), torch.randn(2, 3, 6, 4).double(), random_mask((2, 6, 4), 0.4)
    mask[0], y = False, model.conv(x)
    mean_of_all = "avg" in pool.__name__.lower()
    expected = mean(hold(y, mask), mask) if mean_of_all else y.masked_fill(~mask[:, None], -9).amax((2, 3))
    dynops.convert_(model)
    model = layer_by_layer(model) if how == "layers" else model
    with dynops.use_mask(mask):
        out = model(x)
    assert out[0].count_nonzero() == 0
    close(out[1], expected.flatten(1)[1])
