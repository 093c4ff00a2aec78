"""convert_ against models written out as dense layers and masks, and all that must survive the conversion."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynops
from benchmarks.resnet import BasicBlock, Bottleneck, ResNet, resnet50
from dynops.nn import MaskedBatchNorm2d, SparseConv2d, SparseConvTranspose2d

# ----------------------------------------------------------------------------------- oracle


def resized(mask, size):
    """[N, H, W] to [N, *size]: true where any pixel under the output pixel is; written as loops."""
    out = torch.zeros(mask.shape[0], *size, dtype=torch.bool)
    for i in range(size[0]):
        for j in range(size[1]):
            rows = slice(i * mask.shape[1] // size[0], -(-(i + 1) * mask.shape[1] // size[0]))
            columns = slice(j * mask.shape[2] // size[1], -(-(j + 1) * mask.shape[2] // size[1]))
            out[:, i, j] = (mask[:, rows, columns] != 0).flatten(1).any(1)
    return out


def halved(mask, size):
    """[N, H, W] to [N, *size] as layers of stride 2 move it: pixel i stands for pixels 2i and 2i + 1."""
    if mask.shape[1] < size[0]:
        return resized(mask, size)
    mask = mask != 0
    while tuple(mask.shape[1:]) != tuple(size):
        even = F.pad(mask, (0, mask.shape[2] % 2, 0, mask.shape[1] % 2))
        mask = even[:, ::2, ::2] | even[:, 1::2, ::2] | even[:, ::2, 1::2] | even[:, 1::2, 1::2]
    return mask


def hold(x, mask):
    """``x`` where the mask is, zero elsewhere."""
    return torch.where(halved(mask, x.shape[2:])[:, None], x, 0)


def norm(bn, x, mask):
    """A dense batch norm of the masked pixels; in training mode over their values only."""
    if not bn.training:
        return hold(
            F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps), mask
        )
    active = halved(mask, x.shape[2:])
    rows = x.permute(0, 2, 3, 1)[active]
    mean, var = rows.mean(0), rows.var(0, correction=0)
    with torch.no_grad():
        bn.running_mean.lerp_(mean, bn.momentum)
        bn.running_var.lerp_(rows.var(0), bn.momentum)
        bn.num_batches_tracked += 1
    view = (1, -1, 1, 1)
    y = (x - mean.view(view)) / (var + bn.eps).sqrt().view(view) * bn.weight.view(view) + bn.bias.view(view)
    return hold(y, mask)


def block(b, x, mask):
    names = ["1", "2", "3"] if isinstance(b, Bottleneck) else ["1", "2"]
    out = x
    for i in names:
        out = norm(getattr(b, "bn" + i), hold(getattr(b, "conv" + i)(out), mask), mask)
        out = F.relu(out) if i != names[-1] else out
    if b.downsample is not None:
        x = norm(b.downsample[1], hold(b.downsample[0](x), mask), mask)
    return F.relu(out + x)


def masked_resnet(m, x, mask):
    x = F.relu(norm(m.bn1, hold(m.conv1(x), mask), mask))
    x = hold(F.max_pool2d(x, 3, 2, 1), mask)
    for stage in (m.layer1, m.layer2, m.layer3, m.layer4):
        for b in stage:
            x = block(b, x, mask)
    return m.fc(x.mean((2, 3)))


# ---------------------------------------------------------------------------------- helpers


def close(a, b, tolerance=1e-11):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).norm() <= tolerance * max(b.norm().item(), 1e-30)


def randomised(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            with torch.no_grad():
                m.weight.uniform_(-1.5, 1.5, generator=generator)
                m.bias.normal_(generator=generator)
                m.running_mean.normal_(generator=generator)
                m.running_var.uniform_(0.5, 2, generator=generator)
    return model


def small_resnet(kind=Bottleneck, dtype=torch.float64):
    torch.manual_seed(0)
    return randomised(ResNet(kind, (2, 1, 2, 1), num_classes=5, width=4)).to(dtype).eval()


def random_mask(shape, density=0.02, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def layer_by_layer(model):
    """Keeps traced modules from running as a whole: a hook on every converted layer."""
    for m in model.modules():
        if isinstance(m, (SparseConv2d, MaskedBatchNorm2d)):
            m.register_forward_hook(lambda *_: None)
    return model


@pytest.fixture
def inputs():
    return torch.randn(2, 3, 64, 48, dtype=torch.float64), random_mask((2, 64, 48))


# ----------------------------------------------------------------------------------- values


@pytest.mark.parametrize("how", ["fused", "layers"])
@pytest.mark.parametrize("density", [0.0, 0.003, 0.05, 1.0])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_resnet_equals_the_masked_dense_one(kind, density, how, inputs):
    model = small_resnet(kind)
    x, mask = inputs[0], random_mask((2, 64, 48), density)
    expected = masked_resnet(copy.deepcopy(model), x, mask)
    dynops.convert_(model)
    model = layer_by_layer(model) if how == "layers" else model
    for grad in (True, False):
        with torch.set_grad_enabled(grad), dynops.active(mask):
            close(model(x), expected)
    with torch.no_grad(), dynops.active(dynops.PixelPlan.from_mask(mask)):
        close(model(x.contiguous(memory_format=torch.channels_last)), expected)
    with torch.no_grad(), dynops.active(dynops.PixelPlan.from_mask(mask, mask.numel())):
        close(model(x), expected)


@pytest.mark.parametrize("how", ["fused", "layers"])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_resnet_trains_like_the_masked_dense_one(kind, how, inputs):
    x, mask = inputs[0].requires_grad_(), random_mask((2, 64, 48), 0.01)
    dense = small_resnet(kind).train()
    model = copy.deepcopy(dense)
    dynops.convert_(model)
    model = layer_by_layer(model) if how == "layers" else model
    expected = masked_resnet(dense, x, mask)
    with dynops.active(mask):
        out = model(x)
    close(out, expected, 1e-9)
    for key, value in dense.state_dict().items():
        close(model.state_dict()[key].double(), value.double(), 1e-9)
    weights = torch.randn_like(out)
    ours = torch.autograd.grad((out * weights).sum(), (x, *model.parameters()))
    theirs = torch.autograd.grad((expected * weights).sum(), (x, *dense.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-7)


def test_gradients_in_eval_mode(inputs):
    x, mask = inputs[0].requires_grad_(), inputs[1]
    dense = small_resnet()
    model = copy.deepcopy(dense)
    dynops.convert_(model)
    with dynops.active(mask):
        ours = torch.autograd.grad(model(x).square().sum(), (x, *model.parameters()))
    theirs = torch.autograd.grad(masked_resnet(dense, x, mask).square().sum(), (x, *dense.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-10)


def test_float32_resnet50():
    torch.manual_seed(0)
    model = randomised(resnet50(10)).eval()
    x, mask = torch.randn(1, 3, 64, 64), random_mask((1, 64, 64), 0.01)
    with torch.no_grad():
        expected = masked_resnet(copy.deepcopy(model).double(), x.double(), mask)
        report = dynops.convert_(model)
        with dynops.active(mask):
            close(model(x).double(), expected, 1e-4)
    assert list(report.fused) == [""] and not report.unfused and not report.skipped
    kinds = [step.kind for step in model.__dict__["_dynops_trace"].steps]
    assert kinds == ["conv", "pool", *["conv"] * 52, "module", "function", "module"]


def test_mask_coarser_than_the_layers(inputs):
    model, mask = small_resnet(), random_mask((2, 4, 3), 0.3)
    expected = masked_resnet(copy.deepcopy(model), inputs[0], mask)
    dynops.convert_(model)
    with dynops.active(mask[:, None].float()):
        close(model(inputs[0]), expected)


def test_one_pixel_and_no_batch():
    model = small_resnet()
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    mask = torch.zeros(1, 32, 32)
    mask[0, 9, 30] = 1
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with dynops.active(mask):
        close(model(x), masked_resnet(dense, x, mask))
        assert model.train()(x).isfinite().all()
    with dynops.active(mask[:0]), torch.no_grad():
        assert model.eval()(x[:0]).shape == (0, 5)


def test_output_keeps_the_memory_format(inputs):
    stage = small_resnet().layer2
    dynops.convert_(stage)
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    with dynops.active(inputs[1]):
        assert stage(x).is_contiguous()
        assert stage(x.contiguous(memory_format=torch.channels_last)).is_contiguous(
            memory_format=torch.channels_last
        )


# ------------------------------------------------------------------- forwards that are hard


class Block(nn.Module):
    """Has what the models below need; each forward is one case."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.act, self.drop, self.channel_drop = nn.PReLU(4), nn.Dropout(0.5), nn.Dropout2d(0.5)
        self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.pool, self.gate = nn.AvgPool2d(2), nn.Conv2d(4, 4, 1)


class Preactivation(Block):
    def forward(self, x):
        out = self.conv1(self.relu(self.bn(x)))
        return out + self.conv2(F.relu(self.bn2(out)))

    def oracle(self, x, mask):
        out = hold(self.conv1(F.relu(norm(self.bn, x, mask))), mask)
        return out + hold(self.conv2(F.relu(norm(self.bn2, out, mask))), mask)


class InPlace(Block):
    def forward(self, x):
        y = self.conv1(x)
        z = self.conv2(y)
        w = self.relu(y)  # y changes after conv2 read it
        z += w
        z.relu_()
        return torch.add(z, y)

    def oracle(self, x, mask):
        y = hold(self.conv1(x), mask)
        return F.relu(hold(self.conv2(y), mask) + F.relu(y)) + F.relu(y)


class SqueezeExcite(Block):
    def forward(self, x):
        x = F.gelu(self.bn(self.conv1(x)), approximate="tanh")
        return self.conv2(x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))) + x.mean(
            (2, 3), keepdim=True
        )

    def oracle(self, x, mask):
        x = F.gelu(norm(self.bn, hold(self.conv1(x), mask), mask), approximate="tanh")
        gate = torch.sigmoid(hold(self.gate(x.mean((2, 3), keepdim=True)), mask))
        return hold(self.conv2(x * gate), mask) + x.mean((2, 3), keepdim=True)


class UpAndDown(Block):
    def forward(self, x):
        y = self.drop(self.act(self.reflect(F.leaky_relu(self.pool(self.conv1(x)), 0.2))))
        return torch.cat([self.up(self.channel_drop(y)).tanh(), self.conv2(x).relu()], 1)

    def oracle(self, x, mask):
        y = hold(F.avg_pool2d(hold(self.conv1(x), mask), 2), mask)
        y = self.act(hold(self.reflect(F.leaky_relu(y, 0.2)), mask))
        return torch.cat([hold(self.up(y), mask).tanh(), F.relu(hold(self.conv2(x), mask))], 1)


class Untraceable(Block):
    def forward(self, x):
        x = self.relu(self.bn(self.conv1(x)))
        return self.conv2(x) if x.sum() > -1 else x

    def oracle(self, x, mask):
        return hold(self.conv2(F.relu(norm(self.bn, hold(self.conv1(x), mask), mask))), mask)


class Nested(Block):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(self.conv1, self.bn, nn.SiLU(), nn.Identity(), nn.Sequential(self.conv2))

    def forward(self, x):
        return self.inner(x) * self.act.weight[0]

    def oracle(self, x, mask):
        y = F.silu(norm(self.bn, hold(self.conv1(x), mask), mask))
        return hold(self.conv2(y), mask) * self.act.weight[0]


CASES = [Preactivation, InPlace, SqueezeExcite, UpAndDown, Untraceable, Nested]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", ["fused", "layers"])
@pytest.mark.parametrize("case", CASES)
def test_forward_equals_its_oracle(case, how, training):
    torch.manual_seed(0)
    model = randomised(case()).double().train(training and case is not UpAndDown)  # dropout has its own test
    dense = copy.deepcopy(model)
    report = dynops.convert_(model)
    assert list(report.unfused) == ([""] if case is Untraceable else [])
    model = layer_by_layer(model) if how == "layers" else model
    x, mask = torch.randn(2, 4, 8, 6, dtype=torch.float64), random_mask((2, 16, 12), 0.08)
    kept = x.clone()
    expected = dense.oracle(x, mask)
    with dynops.active(mask):
        close(model(x), expected)
        close(model(x=x) if not training else expected, expected)
    assert torch.equal(x, kept)


def test_dropout_draws_for_the_rows():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5), nn.Conv2d(4, 64, 1, bias=False))
    nn.init.ones_(model[2].weight)
    dynops.convert_(model)
    x, mask = torch.randn(1, 4, 8, 8), random_mask((1, 8, 8), 0.5)
    with dynops.active(mask):
        a, b = model(x), model(x)
        assert not torch.equal(a, b) and not hold(a, ~mask).any()
        assert torch.equal(model.eval()(x), model(x))


class Hostile(nn.Module):
    """A forward that changes its module: it must be left as it was, and run layer by layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.calls, self.last = nn.Conv2d(3, 3, 1), 0, None
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.last = x
        return self.conv(x)


class BufferChanger(Hostile):
    def forward(self, x):
        self.seen.add_(1)
        return self.conv(x)


@pytest.mark.parametrize("case", [Hostile, BufferChanger])
def test_side_effects_are_not_traced(case):
    model = case()
    assert "" in dynops.convert_(model).unfused
    assert model.calls == 0 and model.last is None and model.seen == 0
    pickle.dumps(model)


class TwoModes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x) if self.training else self.conv(x) * 2


def test_forward_that_depends_on_the_mode():
    model = TwoModes().eval()
    assert "differs between training and eval" in dynops.convert_(model).unfused[""]
    assert not model.training
    x, mask = torch.randn(1, 3, 4, 4), torch.ones(1, 4, 4)
    with dynops.active(mask):
        close(model(x), model.train()(x) * 2, 1e-6)


# --------------------------------------------------------------- what conversion must keep


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


def test_folded_norms_follow_their_parameters(inputs):
    model, (x, mask) = small_resnet(), inputs
    other = randomised(small_resnet(), seed=1)
    dynops.convert_(model)
    with dynops.active(mask), torch.no_grad():
        model(x)
        model.load_state_dict(other.state_dict())
        close(model(x), masked_resnet(other, x, mask))
        model.bn1.bias.add_(1)
        other.bn1.bias.add_(1)
        close(model(x), masked_resnet(other, x, mask))
        model.bn1.running_var = other.bn1.running_var = torch.rand(4, dtype=torch.float64) + 1
        close(model(x), masked_resnet(other, x, mask))


def test_an_optimiser_step_is_seen(inputs):
    model, (x, mask) = small_resnet(), inputs
    dynops.convert_(model)
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    with dynops.active(mask):
        model.train()(x).square().sum().backward()
        optimiser.step()
        with torch.no_grad():
            close(model.eval()(x), masked_resnet(dynops_reverted(model), x, mask))


def dynops_reverted(model):
    model = copy.deepcopy(model)
    dynops.revert_(model)
    return model


# ------------------------------------------------------------------------ report and filter


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
    assert "conv: SparseConv2d" in str(report) and "skipped: 5" in str(report)
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
    y = block(dense.layer1[1], F.relu(z + hold(y, mask)), mask)
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


# ---------------------------------------------------------------------------------- context


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


def test_plans_are_shared(inputs):
    model = small_resnet()
    dynops.convert_(model)
    context = dynops.active(inputs[1])
    with context, torch.no_grad():
        model(inputs[0])
        plans = dict(context._plans)
        model(inputs[0])
    assert {shape[1:] for shape in plans} == {(32, 24), (16, 12), (8, 6), (4, 3), (2, 2)}
    assert all(context._plans[shape] is plan for shape, plan in plans.items())


@pytest.mark.parametrize("size", [(64, 48), (50, 31), (5, 7)])
def test_resized_plans(size):
    mask = random_mask((2, *size), 0.05)
    context = dynops.active(mask)
    for shape in ((64, 48), (32, 24), (16, 12), (8, 12), (4, 3), (3, 5), (1, 1), (25, 31)):
        plan = context.plan((2, *shape), mask.device)
        assert torch.equal(plan.mask(), resized(mask, shape))


def test_threads_have_their_own_masks(inputs):
    model, x = small_resnet(), inputs[0]
    dynops.convert_(model)
    masks = [random_mask((2, 64, 48), 0.05, seed=i) for i in range(4)]
    with torch.no_grad():
        expected = []
        for mask in masks:
            with dynops.active(mask):
                expected.append(model(x))
    results, barrier = {}, threading.Barrier(5)

    def work(i):
        barrier.wait()
        with torch.no_grad(), dynops.active(masks[i]):
            results[i] = [model(x) for _ in range(3)]

    def work_dense():
        barrier.wait()
        with torch.no_grad():
            results["dense"] = [model(x) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)] + [
        threading.Thread(target=work_dense)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, out in enumerate(expected):
        for result in results[i]:
            close(result, out)
    with torch.no_grad():
        close(results["dense"][-1], model(x))


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


# ----------------------------------------------------------------------------------- blocks


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


# ----------------------------------------------------------------------- compile and autocast


@pytest.mark.parametrize("block_size", [None, (8, 4)])
def test_compiles_in_the_context(block_size):
    model = small_resnet(BasicBlock, torch.float32)
    x, mask = torch.randn(2, 3, 32, 32), random_mask((2, 32, 32), 0.05)
    with torch.no_grad():
        dense = model(x)
        dynops.convert_(model)

        @torch.compile(fullgraph=True, backend="aot_eager")
        def run(x, mask):
            with dynops.active(mask, block_size):
                return model(x)

        for seed in range(2):
            mask = random_mask((2, 32, 32), 0.02, seed)
            with dynops.active(mask, block_size):
                expected = model(x)
            close(run(x, mask), expected, 1e-5)
        with dynops.active(mask, block_size):  # a context around the call of a compiled (copy of a) model
            compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
            close(compiled(x), expected, 1e-5)
        close(compiled(x), dense, 1e-5)


def test_autocast():
    model = small_resnet(BasicBlock, torch.float32)
    x, mask = torch.randn(2, 3, 64, 64), random_mask((2, 64, 64), 0.05)
    with torch.no_grad():
        expected = masked_resnet(copy.deepcopy(model), x, mask)
        dynops.convert_(model)
        with torch.autocast("cpu", torch.bfloat16), dynops.active(mask):
            out = model(x)
    assert out.dtype == torch.bfloat16
    close(out.float(), expected, 0.1)
