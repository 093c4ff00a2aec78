"""Property tests: any convolution, any mask, any layout is the dense one and the mask."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pixel_cases import check, compare
from pixel_strategies import SETTINGS, activations, close_to_dense, convs, flags, layouts, masks, names, seeds

from dynops import PixelPlan
from dynops.testing import available_backends, dense_from_rows, in_layout, random_mask, random_tensor, rows_at

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),  # torch's, about its own copy
]

BACKENDS = available_backends()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_dense_in_dense_out(transposed, backend):
    @SETTINGS
    @given(convs(transposed), masks, layouts, names, activations, flags, seeds)
    def property_holds(conv, mask_kind, layout, epilogue, activation, flags, seed):
        bias, capacity, training = flags
        torch.manual_seed(seed)
        mask = random_mask(conv.out_shape(), *mask_kind)
        plan = PixelPlan.from_mask(mask, int(mask.sum()) + seed % 5 if capacity else None)
        tensors = conv.tensors(bias=bias) | {k: v for k, v in conv.epilogue().items() if k in epilogue}
        tensors["x"] = in_layout(tensors["x"], layout)
        grads = tuple(k for k, v in tensors.items() if v is not None and training)
        close_to_dense(lambda: check(conv, backend, mask, tensors, grads, plan, activation=activation))

    property_holds()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_rows_to_rows(transposed, backend):
    @SETTINGS
    @given(convs(transposed), masks, masks, flags, seeds)
    def property_holds(conv, in_kind, kind, flags, seed):
        bias, capacity, training = flags
        torch.manual_seed(seed)
        in_mask, mask = random_mask((conv.n, conv.h, conv.w), *in_kind), random_mask(conv.out_shape(), *kind)
        in_plan = PixelPlan.from_mask(in_mask)
        plan = PixelPlan.from_mask(mask, int(mask.sum()) + seed % 5 if capacity else None)
        tensors = conv.tensors(bias=bias)
        tensors["x"] = rows_at(tensors["x"], in_mask)
        active = int(mask.sum())

        def ours(x, weight, bias):
            return conv.packed_op(x, weight, bias, in_plan, plan, backend=backend)[:active]

        def oracle(x, weight, bias):
            return rows_at(conv.oracle(dense_from_rows(x, in_mask), weight, bias, mask), mask)

        grads = tuple(k for k, v in tensors.items() if v is not None and training)
        close_to_dense(lambda: compare(ours, oracle, tensors, grads))

    property_holds()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_plan_decides_which_pixels_and_nothing_else(backend):
    """An output pixel has the same bits whatever other pixels are computed beside it."""

    @settings(SETTINGS, max_examples=40)
    @given(convs(False), st.sampled_from([torch.float32, torch.bfloat16]), seeds)
    def property_holds(conv, dtype, seed):
        torch.manual_seed(seed)
        tensors = conv.tensors(dtype)
        some, more = random_mask(conv.out_shape(), 0.3), random_mask(conv.out_shape(), 0.5)
        few = conv.op(**tensors, plan=PixelPlan.from_mask(some), backend=backend)
        many = conv.op(**tensors, plan=PixelPlan.from_mask(some | more), backend=backend)
        assert torch.equal(few, many * some[:, None])

    property_holds()


def test_needed_is_enough_and_no_more():
    """Outputs depend on every needed input and on no other."""

    @settings(SETTINGS, max_examples=60)
    @given(convs(False), st.sampled_from([0.05, 0.3]), seeds)
    def property_holds(conv, density, seed):
        assume(conv.padding != "same" and conv.n > 0)
        torch.manual_seed(seed)
        mask = random_mask(conv.out_shape(), density)
        plan = PixelPlan.from_mask(mask)
        needed = plan.needed(conv.kernel, conv.stride, conv.padding, conv.dilation, (conv.h, conv.w))
        x = random_tensor(conv.n, conv.c, conv.h, conv.w).requires_grad_()
        weight = random_tensor(*conv.layer().weight.shape).abs()
        (grad,) = torch.autograd.grad(conv.op(x, weight, None, plan).sum(), x)
        assert torch.equal((grad != 0).any(1), needed.mask())

    property_holds()
