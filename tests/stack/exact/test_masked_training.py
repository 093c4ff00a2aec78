"""Masked pretraining: SparK's ResNet and FCMAE's ConvNeXt V2 in training mode against dense layers and masks."""

import copy

import pytest
import torch
from masked_models import close, small_resnet
from torch import nn
from torch.utils.checkpoint import checkpoint

import dynops
from dynops.testing import MaskedPolicy
from examples.pixels import fcmae

MASK = torch.rand(2, 2, 3, generator=torch.Generator().manual_seed(1)) < 0.5
MASK[0, 0, 0] = MASK[1, 1, 2] = True


class Stages(nn.Module):
    """The maps of each stage of a ResNet, as SparK reads them. Stages may be checkpointed."""

    def __init__(self):
        super().__init__()
        self.body, self.call = small_resnet(), lambda stage, x: stage(x)

    def forward(self, x):
        m, maps = self.body, []
        x = m.maxpool(m.relu(m.bn1(m.conv1(x))))
        for stage in (m.layer1, m.layer2, m.layer3, m.layer4):
            x = self.call(stage, x)
            maps.append(x)
        return maps


class Encoder(nn.Sequential):
    """FCMAE's; ``call`` as in :class:`Stages`."""

    def __init__(self):
        torch.manual_seed(0)
        dense = fcmae.FCMAE().encoder
        dynops.revert_(dense)
        super().__init__(*dense)
        self.call = lambda stage, x: stage(x)
        for name, p in self.named_parameters():
            if "grn" in name:
                nn.init.normal_(p)

    def forward(self, x):
        for stage in self:
            x = self.call(stage, x)
        return [x]


MODELS = {
    "resnet": (Stages, torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator())),
    "convnext": (Encoder, torch.randn(2, 1, 32, 48, dtype=torch.float64, generator=torch.Generator())),
}


def converted(dense):
    model = copy.deepcopy(dense)
    dynops.convert_(model)
    return model


def step(model, x, context, autocast=False):
    """The maps, and the gradients of the input and the parameters, of a loss that weighs each value differently."""
    x = x.clone().requires_grad_()
    with context, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        maps = model(x)
    generator = torch.Generator().manual_seed(2)
    loss = sum((y * torch.randn(y.shape, dtype=torch.float64, generator=generator)).sum() for y in maps)
    parameters = [p for name, p in model.named_parameters() if "fc." not in name]
    loss.backward()
    return maps, [p.grad for p in (x, *parameters)]


@pytest.mark.parametrize("name", MODELS)
def test_values_gradients_and_statistics(name):
    make, x = MODELS[name]
    dense = make().double().train()
    model = converted(dense)
    for ours, theirs in zip(
        step(model, x, dynops.use_mask(MASK)), step(dense, x, MaskedPolicy(MASK)), strict=True
    ):
        for a, b in zip(ours, theirs, strict=True):
            close(a, b, 1e-9)
    for a, b in zip(model.buffers(), dense.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_change_nothing(name, reentrant):
    make, x = MODELS[name]
    model = converted(make().double().train())
    plain = step(copy.deepcopy(model), x, dynops.use_mask(MASK))
    model.call = lambda stage, x: checkpoint(stage, x, use_reentrant=reentrant)
    for ours, theirs in zip(step(model, x, dynops.use_mask(MASK)), plain, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_under_autocast_it_errs_as_dense_layers_do(name):
    make, x = MODELS[name]
    dense = make().double().train()
    (_, exact), single = step(dense, x, MaskedPolicy(MASK)), copy.deepcopy(dense).float()
    maps, ours = step(converted(single), x.float(), dynops.use_mask(MASK), autocast=True)
    dense_maps, theirs = step(single, x.float(), MaskedPolicy(MASK), autocast=True)
    assert [y.dtype for y in maps] == [y.dtype for y in dense_maps]
    errors = [
        sum((a.double() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True))
        for found in (ours, theirs)
    ]
    assert errors[0] < 2 * errors[1] < len(exact)
