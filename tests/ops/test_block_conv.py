"""block_conv: the op and its gradients at the blocks of a plan, against those at the pixels that the blocks cover."""

import pytest
import torch

from dynops import BlockPlan, ops
from dynops.geometry import conv_geometry, conv_transpose_geometry
from dynops.ops.block_conv import block_conv
from dynops.ops.epilogue import NOTHING
from dynops.testing import random_mask, random_tensor

OPTIONS = {
    "3x3": {"padding": 1},
    "dilation": {"padding": (2, 1), "dilation": (2, 1)},
    "far": {"kernel": (5, 2), "padding": (0, 3), "dilation": (1, 3)},
    "no-padding": {},
    "transposed": {"padding": 1, "transposed": True},
    "transposed-dilation": {"kernel": (2, 3), "padding": (0, 1), "dilation": (3, 1), "transposed": True},
}


@pytest.mark.parametrize("capacity", [None, 9], ids=["compact", "capacity"])
@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_are_those_of_the_pixels(name, capacity):
    options = {"kernel": (3, 3), "padding": 0, "dilation": 1, "transposed": False} | OPTIONS[name]
    kernel, transposed = options.pop("kernel"), options.pop("transposed")
    pad, dil = ((v, v) if isinstance(v, int) else v for v in (options["padding"], options["dilation"]))
    make = conv_transpose_geometry if transposed else conv_geometry
    g = make((2, 11, 13), kernel, (1, 1), pad, dil)
    plan = BlockPlan.from_mask(random_mask(g.out_shape, 0.03), (4, 5), offset=(-1, 2), capacity=capacity)
    shape = (3, 4) if transposed else (4, 3)
    x, base, upstream = (
        random_tensor(2, c, *size, dtype=torch.float64)
        for c, size in ((3, (11, 13)), *[(4, g.out_shape[1:])] * 2)
    )
    weight, bias = random_tensor(*shape, *kernel, dtype=torch.float64), random_tensor(4, dtype=torch.float64)
    at_pixels = ops.sparse_conv_transpose2d if transposed else ops.sparse_conv2d
    results = []
    for run in (
        lambda x, w, b, base: block_conv(x, w, b, plan, g, NOTHING, base),
        lambda x, w, b, base: at_pixels(x, w, b, plan.pixels(), base=base, **options),
    ):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, base)]
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_other_strides_and_the_gradient_of_an_epilogue_are_refused():
    x, weight = random_tensor(1, 4, 8, 8), random_tensor(4, 4, 3, 3)
    plan = BlockPlan.from_mask(torch.ones(1, 4, 4), 4)
    strided = conv_geometry((1, 8, 8), (3, 3), (2, 2), (1, 1))
    with pytest.raises(RuntimeError, match="strides of 1"):
        block_conv(x, weight, None, plan, strided, NOTHING, None)
    plan, g = BlockPlan.from_mask(torch.ones(1, 8, 8), 4), conv_geometry((1, 8, 8), (3, 3), before=(1, 1))
    with pytest.raises(RuntimeError, match="no gradient"):
        block_conv(x.requires_grad_(), weight, None, plan, g, NOTHING._replace(activation="relu"), None)
