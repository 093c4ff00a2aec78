"""Tensors past 2**31 elements: only the end of each is compared. On a CPU the same, small."""

import pytest
import torch
from on_gpu import DEVICE, ON_GPU, assert_near, assert_same, sized

from dynops import BlockPlan, ChannelPlan, ExpertPlan, PixelPlan, SamplePlan, ops

GIGABYTES = 40
pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.usefixtures("roomy")]
C = 64
SIDE, IMAGES = sized((1024, 33), (16, 3))  # 33 * 64 * 1024 ** 2 > 2 ** 31
LAST = IMAGES - 1


@pytest.fixture
def roomy():
    if ON_GPU and torch.cuda.mem_get_info()[0] < GIGABYTES * 2**30:
        pytest.skip(f"needs {GIGABYTES} GB of memory")
    with torch.no_grad():
        yield
    if ON_GPU:
        torch.cuda.empty_cache()


def large_map() -> torch.Tensor:
    shape = (IMAGES, C, SIDE, SIDE)
    x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last)
    assert not ON_GPU or x.numel() > 2**31
    return x.uniform_(-1, 1)


def corner() -> torch.Tensor:
    """A mask of some pixels at either end of the batch."""
    mask = torch.zeros(IMAGES, SIDE, SIDE, dtype=torch.bool, device=DEVICE)
    mask[0, :2, :3] = mask[-1, -3:, -8:] = True
    return mask


def random(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).uniform_(-1, 1) * 0.1


def test_pixels():
    x, mask, weight = large_map(), corner(), random(C, C, 3, 3)
    plan = PixelPlan.from_mask(mask)
    assert int(plan.index[-1]) == mask.numel() - 1
    out = ops.sparse_conv2d(x, weight, None, plan, padding=1)
    expected = torch.nn.functional.conv2d(x[LAST:], weight, padding=1)
    assert_near(out[LAST, :, -3:, -8:], expected[0, :, -3:, -8:], "bfloat16")
    assert int((out != 0).any(1).sum()) == len(plan)
    rows = ops.gather_pixels(x, plan)
    assert_same(rows[-1], x[-1, :, -1, -1])
    assert_same(ops.scatter_pixels(rows, plan, x), x)


def test_gradients_of_pixels():
    x, plan, weight = large_map(), PixelPlan.from_mask(corner()), random(C, C, 3, 3).requires_grad_()
    x.requires_grad_()
    with torch.enable_grad():
        out = ops.sparse_conv2d(x, weight, None, plan, padding=1)
        dx, dw = torch.autograd.grad(
            out, (x, weight), torch.ones((), device=DEVICE, dtype=x.dtype).expand_as(out)
        )
        edge = x.detach()[LAST:, :, -16:, -16:].clone().requires_grad_()
        part = torch.nn.functional.conv2d(edge, weight, padding=1)[:, :, -3:, -8:].sum()
        (expected,) = torch.autograd.grad(part, edge)
    assert_near(dx[LAST:, :, -4:, -9:], expected[:, :, -4:, -9:], "bfloat16")
    assert bool(dw.isfinite().all())


def test_blocks():
    x, plan = large_map(), BlockPlan.from_mask(corner(), 8)
    tiles = ops.gather_blocks(x, plan, halo=1)
    assert_same(tiles[-1, :, :-1, :-1], x[-1, :, -9:, -9:])
    assert_same(ops.scatter_blocks(ops.gather_blocks(x, plan), plan, x), x)


def test_channels():
    x, weight = large_map(), random(C, C, 1, 1)
    mask = torch.rand(IMAGES, C, device=DEVICE) < 0.5
    plan = ChannelPlan.from_mask(mask)
    out = ops.channel_conv2d(x, weight, None, plan, plan)
    live = mask[LAST, :, None, None]
    expected = torch.nn.functional.conv2d(torch.where(live, x[LAST:, :, -2:], 0), weight)
    assert_near(out[LAST:, :, -2:], torch.where(live, expected, 0), "bfloat16")
    packed = ops.gather_channels(x, plan)
    assert_same(ops.scatter_channels(packed, plan)[LAST], torch.where(live, x[LAST], 0))


def test_samples():
    x = large_map()
    plan = SamplePlan.from_mask((torch.arange(IMAGES) != 1).to(DEVICE))
    rows = ops.gather_samples(x, plan)
    assert_same(rows[-1], x[-1])
    assert_same(ops.scatter_samples(rows, plan, x), x)


def test_experts():
    tokens, width = sized((2**21 + 200, 1024), (70, 64))  # past 2**31 in, and with two choices twice that out
    x = torch.empty(tokens, width, dtype=torch.bfloat16, device=DEVICE).uniform_(-1, 1)
    index = (torch.arange(tokens, device=DEVICE) % 3)[:, None]
    plan, weight = ExpertPlan.from_topk(index, 3), random(3, width, width)
    out = ops.grouped_linear(x, weight, plan)
    row = int(plan.order[-1])
    assert_near(out[-1], x[row] @ weight[2].T, "bfloat16")
    back = ops.combine_pairs(out, plan)
    assert_same(back[row], out[-1])
