"""Masks, and published models of channel layers, for their tests."""

import torch
import torch.nn.functional as F
from torch import nn

from dynops.testing import random_tensor

N, C, OUT = 3, 8, 16


def masks(n=N, c=C, o=OUT):
    """Input and output masks with an empty list, a full one, and others."""
    inputs, outputs = torch.rand(n, c) < 0.5, torch.rand(n, o) < 0.5
    inputs[0, 0] = outputs[0, 0] = True
    inputs[-1], outputs[-1] = True, False
    return inputs, outputs


def at(mask):
    return mask[:, :, None, None]


def double(*shape):
    return random_tensor(*shape, dtype=torch.float64)


def grouped_trick(x, weight, bias, **options):
    """The convolution with a weight ``[N, OUT, C/groups, kh, kw]`` for each sample, as published code has it."""
    n, groups = len(x), options.pop("groups", 1)
    out = F.conv2d(
        x.reshape(1, -1, *x.shape[2:]),
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(),
        groups=groups * n,
        **options,
    )
    return out.unflatten(1, (n, -1))[0]


class PublishedAttention(nn.Module):
    """attention2d of the published dynamic convolution: names, shapes and arithmetic."""

    def __init__(self, planes, ratio, kernels):
        super().__init__()
        hidden = kernels if planes == 3 else int(planes * ratio) + 1
        self.fc1, self.fc2 = nn.Conv2d(planes, hidden, 1, bias=False), nn.Conv2d(hidden, kernels, 1)

    def forward(self, x, temperature):
        x = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))).flatten(1)
        return F.softmax(x / temperature, 1)


class PublishedDynamicConv(nn.Module):
    """Dynamic_conv2d, the published dynamic convolution: names, shapes and arithmetic."""

    def __init__(self, planes, out, kernel, ratio=0.25, groups=1, bias=True, kernels=4):
        super().__init__()
        self.attention = PublishedAttention(planes, ratio, kernels)
        self.weight = nn.Parameter(torch.randn(kernels, out, planes // groups, kernel, kernel))
        self.bias = nn.Parameter(torch.randn(kernels, out)) if bias else None

    def forward(self, x, temperature, **options):
        attention = self.attention(x, temperature)
        weight = torch.einsum("nk,koihw->noihw", attention, self.weight)
        return grouped_trick(x, weight, None if self.bias is None else attention @ self.bias, **options)


class PublishedDGCHead(nn.Module):
    def __init__(self, channels, out, squeeze, kernel):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, bias=False)
        hidden = channels // (squeeze // 2 if channels < 80 else squeeze)
        self.fc1, self.fc2 = nn.Linear(channels, hidden, bias=False), nn.Linear(hidden, channels)


class PublishedDGC(nn.Module):
    """DynamicMultiHeadConv, the published dynamic group convolution: names, shapes and arithmetic."""

    def __init__(self, channels, out, kernel, heads=4, squeeze=16):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.register_buffer("_inactive_channels", torch.zeros(1))
        for i in range(heads):
            setattr(self, f"headconv_{i}", PublishedDGCHead(channels, out // heads, squeeze, kernel))
        self.heads = [getattr(self, f"headconv_{i}") for i in range(heads)]

    def forward(self, x, **options):
        x, outs, loss = F.relu(self.norm(x)), [], 0
        for head in self.heads:
            saliency = F.relu(head.fc2(F.relu(head.fc1(x.mean((2, 3))))))
            loss = loss + saliency.mean()
            lowest = saliency.detach().topk(int(self._inactive_channels), 1, largest=False).values
            if lowest.shape[1]:
                saliency = saliency.masked_fill(saliency.detach() <= lowest.amax(1, keepdim=True), 0)
            outs.append(F.conv2d(x * at(saliency), head.conv.weight, None, **options))
        return torch.stack(outs, 2).flatten(1, 2), loss


class StraightThrough(torch.autograd.Function):
    """One where the input is positive; the gradient passes, in the sparse form only there."""

    @staticmethod
    def forward(ctx, x, sparse):
        ctx.save_for_backward(x)
        ctx.sparse = sparse
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (grad.masked_fill(x < 0, 0) if ctx.sparse else grad), None


class PublishedCGConv(nn.Conv2d):
    """CGConv2d, the published channel gating: names, shapes and arithmetic."""

    def __init__(
        self, *arguments, p=4, use_group=False, shuffle=False, sparse_bp=False, alpha=2.0, **options
    ):
        super().__init__(*arguments, **options)
        self.p, self.shuffle, self.sparse_bp, self.alpha = p, shuffle, sparse_bp, alpha
        o, c = self.out_channels // p, self.in_channels // p
        mask = torch.zeros_like(self.weight, requires_grad=False)
        if use_group:
            for i in range(p):
                mask[i * o : (i + 1) * o, i * c : (i + 1) * c] = 1
        else:
            mask[:, :c] = 1
        self.mask = nn.Parameter(mask, requires_grad=False)
        self.bn = nn.BatchNorm2d(self.out_channels, affine=False)
        self.threshold = nn.Parameter(torch.zeros(1, self.out_channels, 1, 1))

    def forward(self, x):
        if self.shuffle:
            x = x.unflatten(1, (self.p, -1)).transpose(1, 2).flatten(1, 2)
        options = (self.bias, self.stride, self.padding, self.dilation, self.groups)
        partial = F.conv2d(x, self.weight * self.mask, *options)
        excess = torch.sigmoid(self.alpha * (self.bn(partial) - self.threshold)) - 0.5
        gate = StraightThrough.apply(excess, self.sparse_bp)
        return F.conv2d(x, self.weight, *options) * gate + partial * (1 - gate)
