"""Residual networks written out as dense layers and masks, and masks of their tests."""

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.resnet import Bottleneck, ResNet
from dynops.nn import MaskedBatchNorm2d, SparseConv2d


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


def mean(x, mask):
    """``[N, C, 1, 1]``: over the pixels of a mask; of a map that is zero elsewhere."""
    pixels = hold(torch.ones_like(x[:, :1]), mask).sum((2, 3), keepdim=True)
    return x.sum((2, 3), keepdim=True) / pixels.clamp(min=1)


def masked_resnet(m, x, mask):
    x = F.relu(norm(m.bn1, hold(m.conv1(x), mask), mask))
    x = hold(F.max_pool2d(x, 3, 2, 1), mask)
    for stage in (m.layer1, m.layer2, m.layer3, m.layer4):
        for b in stage:
            x = block(b, x, mask)
    return m.fc(mean(x, mask).flatten(1))


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
