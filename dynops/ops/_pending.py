"""Stand-ins."""

import torch
import torch.nn.functional as F


def masked_output_conv2d(x, weight, mask, partial=None, bias=None, *, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros", in_channels=None, backend=None):  # fmt: skip
    if in_channels is not None:
        x = x[:, slice(*in_channels)]
    if padding_mode != "zeros":
        layer = torch.nn.Conv2d(
            x.shape[1],
            weight.shape[0],
            weight.shape[2:],
            padding=padding,
            groups=groups,
            padding_mode=padding_mode,
        )
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=padding_mode), 0
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    partial = torch.zeros_like(y) if partial is None else partial
    return torch.where(mask, y + partial, partial)


def mixed_conv2d(x, weights, mix, bias=None, *, stride=1, padding=0, dilation=1, groups=1, padding_mode="zeros", backend=None):  # fmt: skip
    w = torch.einsum("ne,eoikl->noikl", mix, weights)
    b = None if bias is None else (mix @ bias if bias.dim() == 2 else bias.expand(len(x), -1))
    if padding_mode != "zeros":
        layer = torch.nn.Conv2d(
            x.shape[1], w.shape[1], w.shape[3:], padding=padding, groups=groups, padding_mode=padding_mode
        )
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=padding_mode), 0
    outs = [
        F.conv2d(x[n : n + 1], w[n], None if b is None else b[n], stride, padding, dilation, groups)
        for n in range(len(x))
    ]
    return torch.cat(outs)
