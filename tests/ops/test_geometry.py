"""Every output-size formula of ``dynops.geometry`` against torch's own layers, on meta tensors."""

import itertools

import torch
import torch.nn.functional as F

from dynops.geometry import conv_geometry, transposed_size, window_count

WINDOWS = list(
    itertools.product((5, 6, 9), (1, 2, 3), (1, 2, 3), (0, 1), (1, 2))
)  # size, kernel, stride, padding, dilation


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def test_windows():
    for size, kernel, stride, padding, dilation in WINDOWS:
        out = F.conv1d(empty(1, 1, size), empty(1, 1, kernel), None, stride, padding, dilation)
        assert window_count(size, kernel, stride, padding, padding, dilation) == out.shape[2]
        if padding <= kernel // 2:
            out = F.max_pool1d(empty(1, 1, size), kernel, stride, padding, dilation, ceil_mode=True)
            assert window_count(size, kernel, stride, padding, padding, dilation, True) == out.shape[2]


def test_transposed():
    for size, kernel, stride, padding, dilation in WINDOWS:
        for extra in range(max(stride, dilation)):
            if (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra < 0:
                continue
            out = F.conv_transpose1d(
                empty(1, 1, size), empty(1, 1, kernel), None, stride, padding, extra, 1, dilation
            )
            assert transposed_size(size, kernel, stride, padding, dilation, extra) == out.shape[2]


def test_margins_pad_a_convolution_to_its_size():
    for size, kernel, stride, padding, dilation in WINDOWS:
        g = conv_geometry(
            (1, size, size), (kernel, 1), (stride, 1), (padding, 0), (dilation, 1), after=(padding + 1, 0)
        )
        x = F.pad(empty(1, 1, size, size), g.margins)
        out = F.conv2d(x, empty(1, 1, kernel, 1), None, (stride, 1), 0, (dilation, 1))
        assert tuple(out.shape[2:]) == (g.out_h, g.out_w)
