"""torch.func.vmap, its compositions with grad and jvp, and kernels under all of them, against slices and dense ops."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from launch_checks import torch_weight_grads
from mode_cases import Maker, cases, of_tensors
from torch import func, nn

import dynops
from dynops.testing import assert_within_budget

CASES = cases(Maker(torch.float64))
NARROW, PLAIN = cases(Maker(torch.float32)), cases(Maker(torch.float32, "reference"))


def close(actual, expected) -> None:
    """Equal up to rounding, as float64 has it."""
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_an_op_under_vmap_is_its_slices_stacked(name):
    """Over each floating argument alone, and over all of them, from another dimension than the first."""
    run, tensors = of_tensors(name, CASES[name])
    alone = [[i] for i in range(len(tensors))]
    for over in [*alone, list(range(len(tensors)))]:
        generator = torch.Generator().manual_seed(7)
        batch = [
            torch.randn(*t.shape, 3, generator=generator, dtype=t.dtype) if i in over else t
            for i, t in enumerate(tensors)
        ]
        in_dims = tuple(-1 if i in over else None for i in range(len(tensors)))
        slices = [run(*(b[..., k] if i in over else b for i, b in enumerate(batch))) for k in range(3)]
        actual = func.vmap(run, in_dims)(*batch)
        if isinstance(actual, tuple):
            for part, expected in zip(actual, zip(*slices, strict=True), strict=True):
                close(part, torch.stack(expected))
        else:
            close(actual, torch.stack(slices))


@pytest.mark.parametrize("name", NARROW)
def test_kernels_stay_within_the_budget_in_every_mode(name):
    """float32 on the kernels, against float64 and with the reference in float32 as the yardstick."""

    def modes_of(arguments):
        run, tensors = of_tensors(name, arguments)
        dtype = tensors[0].dtype

        def loss(*tensors, power: int = 1):
            out = run(*tensors)
            parts = out if isinstance(out, tuple) else (out,)
            return sum((part**power * part.detach().cos()).sum() for part in parts)

        generator = torch.Generator().manual_seed(3)
        tangents = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype) for t in tensors]
        every = tuple(range(len(tensors)))
        tangent = func.jvp(run, tuple(tensors), tuple(tangents))[1]
        # squares, and not the square of the sum: one number's error would be in every value
        hvp = func.jvp(func.grad(functools.partial(loss, power=2), every), tuple(tensors), tuple(tangents))[1]
        batch = [torch.stack([t, t + u]) for t, u in zip(tensors, tangents, strict=True)]
        each = func.vmap(func.grad(loss, every))(*batch)
        return [*(tangent if isinstance(tangent, tuple) else (tangent,)), *hvp, *each]

    actual, exact = modes_of(NARROW[name]), modes_of(CASES[name])
    with torch_weight_grads():
        plain = modes_of(PLAIN[name])
    # A few numbers are too few to be a yardstick, as one error of the loss is in all of them: that of the worst result is.
    worst = max(float((p - e).norm() / e.norm()) for p, e in zip(plain, exact, strict=True) if e.norm() > 0)
    for k, (ours, right, dense) in enumerate(zip(actual, exact, plain, strict=True)):
        yardsticks = [dense, dense + dense.abs().max() * 2e-7]  # one rounding of the largest
        if right.numel() < 32:
            yardsticks.append((right * (1 + worst)).to(dense.dtype))
        yardstick = max(yardsticks, key=lambda y, right=right: float((y - right).norm()))
        assert_within_budget(ours, right, yardstick, f"result {k}")


class Net(nn.Module):
    """A few convolutions on one plan, or dense ones and its mask."""

    def __init__(self, plan):
        super().__init__()
        self.a, self.b = dynops.nn.SparseConv2d(3, 8, 3, padding=1), dynops.nn.SparseConv2d(8, 4, 1)
        self.plan = plan

    def forward(self, x, dense: bool = False):
        if not dense:
            return self.b(F.silu(self.a(x, self.plan)), self.plan)
        mask = self.plan.mask()[:, None]
        return self.b(F.silu(self.a(x) * mask)) * mask


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net(dynops.PixelPlan.from_mask(torch.rand(2, 9, 8) < 0.4))


def in_both(net, run):
    """``run(forward, dtype)`` of the sparse net, of the dense one in float64, and of the dense one."""
    forwards = [lambda p, x, dense=dense: func.functional_call(net, p, (x, dense)) for dense in (False, True)]
    sparse = run(forwards[0], torch.float32)
    exact, dense = run(forwards[1], torch.float64), run(forwards[1], torch.float32)
    leaves = [torch.utils._pytree.tree_leaves(out) for out in (sparse, exact, dense)]
    assert len(leaves[0]) == len(leaves[1]) > 0
    for k, three in enumerate(zip(*leaves, strict=True)):
        assert_within_budget(*three, f"leaf {k}")


def parameters(net, dtype, copies: int = 0) -> dict:
    generator = torch.Generator().manual_seed(1)
    shape = (copies,) if copies else ()
    return {
        name: torch.randn(*shape, *p.shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, p in net.named_parameters()
    }


def inputs(dtype, *shape: int):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, 2, 3, 9, 8, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("over", ["x", "weights", "both"])
def test_ensembles_and_batches(net, over):
    def run(forward, dtype):
        p = parameters(net, dtype, 0 if over == "x" else 3)
        x = inputs(dtype, *(() if over == "weights" else (3,)))
        return func.vmap(forward, (None if over == "x" else 0, None if over == "weights" else 0))(p, x)

    in_both(net, run)


def test_per_sample_gradients(net):
    def run(forward, dtype):
        loss = func.grad(lambda p, x: forward(p, x).square().sum())
        return func.vmap(loss, (None, 0))(parameters(net, dtype), inputs(dtype, 3))

    in_both(net, run)


def test_hessian_vector_products_of_an_ensemble_and_nested_vmap(net):
    def run(forward, dtype):
        p, x = parameters(net, dtype, 2), inputs(dtype, 2)
        v = inputs(dtype)

        def hvp(p, x):
            return func.jvp(func.grad(lambda x: forward(p, x).square().sum()), (x,), (v,))[1]

        return func.vmap(func.vmap(hvp, (None, 0), chunk_size=1), (0, None), out_dims=1)(p, x)

    in_both(net, run)


def test_jvp_of_vmap_and_vmap_of_jvp(net):
    def run(forward, dtype):
        p, x, t = parameters(net, dtype), inputs(dtype, 3), inputs(dtype, 3).flip(0)
        one = func.jvp(lambda x: func.vmap(forward, (None, 0))(p, x), (x,), (t,))[1]
        other = func.vmap(lambda x, t: func.jvp(lambda x: forward(p, x), (x,), (t,))[1])(x, t)
        return one, other

    in_both(net, run)


def test_a_mask_under_vmap_takes_the_capacity_form(net):
    masks = torch.rand(3, 2, 9, 8, generator=torch.Generator().manual_seed(4)) < 0.4
    x = inputs(torch.float32)
    actual = func.vmap(lambda m: net.a(x, m))(masks)
    for out, mask in zip(actual, masks, strict=True):
        torch.testing.assert_close(out, net.a(x, mask))
    with pytest.raises(RuntimeError, match="depends on the values of the mask"):
        func.vmap(torch.ops.dynops.mask_to_index)(masks)


def test_batched_gradients_of_torch_autograd(net):
    x = inputs(torch.float32).requires_grad_()
    y, dense = net(x).flatten()[:40], net(x, True).flatten()[:40]
    eye = torch.eye(40)
    actual, expected = (torch.autograd.grad(o, x, eye, is_grads_batched=True)[0] for o in (y, dense))
    torch.testing.assert_close(actual, expected)


def test_a_plan_outlives_the_transform_that_used_it_first(net):
    """What a plan keeps must not be a transform's tensor."""
    net.requires_grad_(False)
    x = inputs(torch.float32)
    chain = dynops.nn.SparseSequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)
    )
    chain.requires_grad_(False)
    plan = net.plan
    expected = chain(x, dynops.PixelPlan(plan.index, plan.shape))
    func.jvp(lambda x: chain(x, plan), (x,), (x,))
    func.vmap(lambda x: chain(x, plan))(x[None])
    _, vjp = func.vjp(lambda x: chain(x, plan), x)
    cotangent = torch.randn_like(expected)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(vjp(cotangent)[0], torch.autograd.grad(chain(leaf, plan), leaf, cotangent)[0])
    torch.testing.assert_close(chain(x, plan), expected)


def test_experts_under_vmap():
    torch.manual_seed(0)
    layer = dynops.nn.Experts(4, 8, 6).double()
    x, index = torch.randn(3, 5, 8, dtype=torch.double), torch.rand(3, 5, 4).topk(2).indices
    p = dict(layer.named_parameters())

    def loss(p, x, index):
        return func.functional_call(layer, p, (x, index)).square().sum()

    actual = func.vmap(func.grad(loss), (None, 0, 0))(p, x, index)
    for k, name in itertools.product(range(3), p):
        close(actual[name][k], torch.autograd.grad(loss(p, x[k], index[k]), p[name])[0])
