"""Every op with Triton kernels at the sizes of real layers, forward and backward, on the stand-in for a GPU.

What the stand-in checks of every launch is in its docstring; here are the calls, and the launches that they may take.
"""

import functools
import math

import capacity_cases
import contract_cases
import pytest
import torch
from driver.machine import GPUS
from driver.watch import watch
from gpu_calls import CALLS, check
from on_gpu import DTYPES, moved, products
from torch import nn

from dynops import BlockPlan, PixelPlan, ops
from dynops.kernels.triton import tiling
from dynops.nn import SparseBlocks
from dynops.testing import random_mask

H200, A100, B200 = range(3)  # of GPUS
ROUNDS = (("capacity", "bfloat16"), ("exact", "float16"), ("capacity", "tf32"), ("exact", "ieee"))
# Chosen so that most kernels, each form, each kind of product and each GPU are there. The rest is slow.
QUICK = {
    ("sparse_conv2d", "capacity", "bfloat16", H200),
    ("sparse_conv2d, depthwise", "exact", "float16", A100),
    ("sparse_conv2d, stem", "capacity", "bfloat16", H200),
    ("packed_conv2d, same rows", "capacity", "bfloat16", H200),
    ("packed_conv_transpose2d", "exact", "tf32", A100),
    ("gather_pixels, scatter_pixels", "capacity", "float16", B200),
    ("gather_blocks, scatter_blocks", "exact", "bfloat16", H200),
    ("SparseBlocks of a convolution", "capacity", "bfloat16", H200),
    ("channel_conv2d", "capacity", "bfloat16", H200),
    ("gather_channels, scatter_channels", "exact", "tf32", B200),
    ("experts_mlp, 16 tokens", "capacity", "bfloat16", H200),
    ("local_conv2d", "exact", "float16", A100),
    ("gather_pairs, combine_pairs", "capacity", "ieee", A100),
    ("expert_activation", "exact", "float16", H200),
    ("gather_samples, scatter_samples", "capacity", "tf32", H200),
    ("scatter_samples, added", "capacity", "ieee", H200),
}


def launches():
    """Every call in both forms, all kinds of product and on all GPUs, not in every combination."""
    for i, name in enumerate(CALLS):
        wanted = {(name, *what, (i + r) % len(GPUS) if r else H200) for r, what in enumerate(ROUNDS)}
        for case in sorted(wanted | {quick for quick in QUICK if quick[0] == name}):
            marks = [] if case in QUICK else [pytest.mark.slow]
            yield pytest.param(*case, id="-".join((*case[:3], GPUS[case[3]].name)), marks=marks)


@pytest.mark.parametrize("name,form,kind,gpu", list(launches()))
def test_launches_are_legal_and_few(name, form, kind, gpu):
    with torch.cuda.device(gpu), products(kind):
        check(name, form, DTYPES[kind], gpu)


def quick_of(names, quick) -> list:
    """The names as parameters, all but the quick ones slow."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize(
    "name",
    quick_of(capacity_cases.cases(), ("Skip", "Skip, replaced", "SparseConv2d", "expert plan", "block plan")),
)
def test_capacity_plans_can_be_captured(name):
    """From the mask to the gradients, no step asks the host."""
    case = capacity_cases.cases()[name]
    for module in case.modules:
        module.to("cuda")
    mask, tensors = moved((case.masks[0], case.tensors), "cuda")
    with torch.no_grad(), watch.fresh(), watch.capture():
        case.function(mask, *tensors)


@pytest.mark.parametrize(
    "gpu,dtype,boxes",
    [(H200, torch.bfloat16, True), (H200, torch.float32, False), (A100, torch.bfloat16, False)],
    ids=("H200", "float32", "A100"),
)
def test_the_kernel_of_a_convolution_at_blocks(gpu, dtype, boxes):
    """Two launches from the plan to the output; where there is no TMA a list of pixels is made."""
    conv = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()).eval()
    layer = SparseBlocks(conv.to(f"cuda:{gpu}", dtype), 16)
    x = torch.empty(1, 64, 400, 704, dtype=dtype, device=f"cuda:{gpu}", memory_format=torch.channels_last)
    mask = random_mask((1, 400, 704), 0.1, "square")
    for capacity in (None, 25 * 44) if boxes else (25 * 44,):
        plan = BlockPlan.from_mask(mask, 16, capacity=capacity).to(x.device)
        with torch.cuda.device(gpu), torch.no_grad():
            layer(x, plan)  # packs the weight
            with watch.fresh() as seen:
                layer(x, plan)
        assert seen.counts["block_conv_kernel"] == boxes and seen.counts["conv_kernel"] == (not boxes)
        assert not boxes or (seen.counts["kernels"], seen.counts["torch"]) == (2, 0), seen.counts


@functools.cache
def small_calls(gpu: int) -> dict[str, list]:
    """The arguments of every op of the contracts by its name, on a GPU."""
    every: dict[str, list] = {}
    for name, arguments in contract_cases.samples(("triton",)):
        every.setdefault(name, []).append(moved(arguments, f"cuda:{gpu}"))
    return every


@pytest.mark.slow
@pytest.mark.parametrize("gpu", (H200, A100), ids=("H200", "A100"))
@pytest.mark.parametrize("name", contract_cases.NAMES)
def test_small_and_ragged_calls(name, gpu):
    """Every way of calling every op of the contracts: few channels, odd sizes, both memory formats."""
    for arguments in small_calls(gpu).get(name, ()):
        with torch.cuda.device(gpu), watch.fresh():
            out = getattr(torch.ops.dynops, name).default(*arguments)
            leaves = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
            outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
            if outs:
                torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs], allow_unused=True)


@pytest.mark.slow
def test_more_elements_than_32_bits_count():
    """8 GB in and out, of which no page is touched."""
    x = torch.empty(1, 64, 8192, 8192, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    at = torch.randint(0, 8192, (4096, 2), device="cuda")
    plan = PixelPlan.from_coordinates(torch.cat([torch.zeros_like(at[:, :1]), at], 1), (1, 8192, 8192))
    weight = torch.empty(64, 64, 3, 3, dtype=torch.bfloat16, device="cuda")
    with watch.fresh() as seen:
        out = ops.sparse_conv2d(x, weight, None, plan, padding=1)
        ops.gather_pixels(out, plan)
    assert seen.counts["conv_kernel"] == seen.counts["gather_rows_kernel"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("bfloat16", "tf32"))
def test_tensors_at_odd_addresses(kind):
    """Views that begin one element after a multiple of 16 bytes."""

    def odd(*shape):
        flat = torch.empty(math.prod(shape) + 1, dtype=DTYPES[kind], device="cuda")
        return flat[1:].view(shape).requires_grad_()

    plan = PixelPlan.from_mask(random_mask((4, 28, 28), 0.3)).to("cuda")
    x, weight, bias = (
        odd(4, 28, 28, 128).permute(0, 3, 1, 2),
        odd(128, 3, 3, 128).permute(0, 3, 1, 2),
        odd(128),
    )
    with products(kind), watch.fresh():
        out = ops.sparse_conv2d(x, weight, bias, plan, padding=1)
        torch.autograd.grad(out, [x, weight, bias], torch.empty_like(out))


def test_the_devices_differ():
    """The tiles of a call follow the GPU that it runs on."""
    facts = {tiling.device_facts(torch.device("cuda", i)) for i in range(len(GPUS))}
    assert facts == {(90, 132), (80, 108), (100, 148)}
