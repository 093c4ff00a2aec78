"""Calls whose plan has the capacity form, and the masks that they meet: what a CUDA graph may capture.

Each builds its plan from the mask (or the choices) that is its first argument, so that a replay sees what the mask
then holds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import dynops
from dynops import BlockPlan, ChannelPlan, ExpertPlan, PixelPlan, SamplePlan, ops
from dynops.testing import random_mask, random_tensor

N, C, O, H, W = 2, 32, 48, 12, 10  # noqa: E741
CAPACITY = 90  # of 240 pixels: a full mask is over it


@dataclass
class Case:
    """``function(mask, *tensors)`` for each of the masks.

    ``library``: runs cuDNN or cuBLAS too, which may take another algorithm in a graph. ``hostless``: the backends
    ("reference", "triton") whose way of doing it can be followed on tensors without values.
    """

    function: Callable
    masks: list[Tensor]
    tensors: tuple = ()
    library: bool = False
    hostless: tuple[str, ...] = ("reference", "triton")
    modules: tuple[nn.Module, ...] = field(default=())


def trained(function: Callable) -> Callable:
    """The result and the gradients of every tensor: a training step's worth, in one call."""

    def run(mask: Tensor, *tensors: Tensor):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with torch.enable_grad():
            out = function(mask, *leaves)
            dy = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
            return out.detach(), *torch.autograd.grad(out, leaves, dy)

    return run


def pixel_masks(density: float = 0.3) -> list[Tensor]:
    shape = (N, H, W)
    kinds = [
        ("random", density),
        ("random", density / 3),
        ("empty", 0),
        ("full", 1),
        ("square", 0.2),
        ("one", 0),
    ]
    return [random_mask(shape, share, kind) for kind, share in kinds]


def channel_masks(*shape: int) -> list[Tensor]:
    return [torch.rand(shape) < density for density in (0.5, 0.2, -1.0, 2.0)]


def choices(tokens: int = 40, topk: int = 2, experts: int = 5) -> list[Tensor]:
    """Spread, all to one, all dropped, some dropped."""
    spread, some = (torch.randint(0, experts + i, (tokens, topk)) for i in (0, 1))
    return [spread, torch.full_like(spread, 3), torch.full_like(spread, experts), some]


def keeps() -> list[Tensor]:
    return [torch.arange(6) % 2 == 0, torch.zeros(6).bool(), torch.ones(6).bool(), torch.arange(6) == 5]


def plan_of(mask: Tensor) -> PixelPlan:
    return PixelPlan.from_mask(mask, CAPACITY)


def pixel_plan(mask):
    plan = plan_of(mask)
    needed = plan.needed(3, 2, 1, in_size=(2 * H, 2 * W))
    return plan.index, plan.count, plan.inverse(), plan.mask(), needed.index, needed.count


def pixel_rows(mask, x):
    plan = plan_of(mask)
    return ops.scatter_pixels(ops.gather_pixels(x, plan), plan, x.flip(0))


def pixel_conv(mask, x, weight, bias):
    return ops.sparse_conv2d(x, weight, bias, plan_of(mask), padding=1)


def pixel_conv_fused(mask, x, weight, bias, residual, gate):
    fused = {"residual": residual, "base": residual, "gate": gate, "scale": bias, "shift": bias}
    return ops.sparse_conv2d(x, weight, bias, plan_of(mask), padding=1, activation="silu", **fused)


def pixel_conv_depthwise(mask, x, weight):
    return ops.sparse_conv2d(x, weight, None, plan_of(mask), padding=1, groups=C)


def pixel_conv_transposed(mask, x, weight):
    return ops.sparse_conv_transpose2d(x, weight, None, plan_of(mask), stride=2)


def pixel_chain(mask, x, weight, point):
    """A packed chain: the inner layer wherever the outer one reads."""
    plan = plan_of(mask)
    inner = plan.needed(3, padding=1)
    rows = ops.packed_conv2d(x, point, None, None, inner, activation="relu")
    rows = ops.packed_conv2d(rows, weight, None, inner, plan, padding=1)
    return ops.scatter_pixels(rows, plan)


def maps(channels: int = C, h: int = H, w: int = W) -> Tensor:
    return random_tensor(N, channels, h, w).to(memory_format=torch.channels_last)


def pixel_cases() -> dict[str, Case]:
    weight, bias = random_tensor(O, C, 3, 3), random_tensor(O)
    fused = (maps(), weight, bias, maps(O), random_tensor(N, 1, H, W))
    chain = (maps(), random_tensor(O, C, 3, 3), random_tensor(C, C, 1, 1))
    up = (maps(h=H // 2, w=W // 2), random_tensor(C, 16, 2, 2))
    cases = {
        "pixel plan": Case(pixel_plan, pixel_masks()),
        "pixel rows": Case(pixel_rows, pixel_masks(), (maps(),)),
        "pixel conv": Case(pixel_conv, pixel_masks(), (maps(), weight, bias)),
        "pixel conv, fused": Case(pixel_conv_fused, pixel_masks(), fused),
        "pixel conv, depthwise": Case(
            pixel_conv_depthwise, pixel_masks(), (maps(), random_tensor(C, 1, 3, 3))
        ),
        "pixel conv, transposed": Case(pixel_conv_transposed, pixel_masks(), up),
        "pixel chain": Case(pixel_chain, pixel_masks(), chain),
    }
    for name in (
        "pixel rows",
        "pixel conv",
        "pixel conv, depthwise",
        "pixel conv, transposed",
        "pixel chain",
    ):
        case = cases[name]
        cases[f"{name}, trained"] = Case(trained(case.function), case.masks, case.tensors)
    return cases


def block_plan(mask):
    plan = BlockPlan.from_mask(mask, 4, capacity=9)
    pixels = plan.pixels()
    return plan.index, plan.count, plan.mask(), plan.blocks(), pixels.index, pixels.count


def block_tiles(mask, x):
    plan = BlockPlan.from_mask(mask, 4, capacity=9)
    return ops.scatter_blocks(ops.gather_blocks(x, plan), plan, x.flip(0))


def block_sums(mask, x):
    """Tiles with a halo, whose gradients overlap."""
    plan = BlockPlan.from_mask(mask, 4, capacity=9)
    tiles = ops.gather_blocks(x, plan, halo=1)[:, :, 1:-1, 1:-1]
    return ops.scatter_blocks(tiles, plan, x, add=True)


def block_cases() -> dict[str, Case]:
    masks = pixel_masks(0.03)
    stack = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.ReLU(), nn.Conv2d(C, C, 3, padding=1)).eval()
    layer = dynops.nn.SparseBlocks(stack, 4)

    def run(mask, x):
        return layer(x, BlockPlan.from_mask(mask, 4, capacity=9))

    return {
        "block plan": Case(block_plan, masks),
        "block tiles": Case(block_tiles, masks, (maps(),)),
        "block tiles, trained": Case(trained(block_tiles), masks, (maps(),)),
        "block sums, trained": Case(trained(block_sums), masks, (maps(),)),
        "SparseBlocks": Case(run, masks, (maps(),), library=True, modules=(layer,)),
    }


def channel_plan(mask):
    plan, few = ChannelPlan.from_mask(mask), ChannelPlan.from_mask(mask, 7)
    return plan.index, plan.count, plan.mask(), few.index, few.count


def channel_conv(mask, x, weight, bias):
    """The live inputs of the mask, and as outputs those of its mirror image."""
    return ops.channel_conv2d(
        x, weight, bias, ChannelPlan.from_mask(mask), ChannelPlan.from_mask(mask.flip(1)), padding=1
    )


def channel_chain(mask, x, weight, bias):
    """Packed from one layer to the next, with a capacity."""
    plan = ChannelPlan.from_mask(mask, 12)
    rows = ops.packed_channel_conv2d(x, weight, bias, None, plan, padding=1, activation="relu")
    rows = ops.packed_channel_conv2d(rows, weight, bias, plan, plan, padding=1)
    return ops.scatter_channels(rows, plan)


def channel_heads(mask, x, weight):
    return ops.channel_conv2d(x, weight, None, ChannelPlan.from_mask(mask), padding=1)


def channel_linear(mask, x, weight):
    return ops.channel_linear(x, weight, None, ChannelPlan.from_mask(mask), ChannelPlan.from_mask(mask))


def sample_weights(mask, x, weight):
    """``mask``: any numbers ``[N, E]`` that mix the weights."""
    return ops.mixed_conv2d(x, weight, mask.to(x.dtype), padding=1)


def region_weights(mask, x, weights):
    return ops.region_conv2d(x, weights, mask.to(torch.int32), padding=1)


def filters_of_pixels(mask, x, kernels):
    return ops.local_conv2d(x, kernels * mask[:, None].to(x.dtype), 3, padding=1, groups=2)


def masked_outputs(mask, x, weight):
    return ops.masked_output_conv2d(x, weight, mask[:, None].expand(N, O, H, W), padding=1)


def channel_cases() -> dict[str, Case]:
    square, bias = random_tensor(C, C, 3, 3), random_tensor(C)
    tensors = (maps(), square, bias)
    linear = (random_tensor(N, 5, C), random_tensor(C, C))
    return {
        "channel plan": Case(channel_plan, channel_masks(N, C)),
        "channel conv": Case(channel_conv, channel_masks(N, C), tensors),
        "channel conv, trained": Case(trained(channel_conv), channel_masks(N, C), tensors),
        "channel chain": Case(channel_chain, channel_masks(N, C), tensors),
        "channel chain, trained": Case(trained(channel_chain), channel_masks(N, C), tensors),
        "channel heads": Case(channel_heads, channel_masks(N, 4, C), (maps(), random_tensor(64, C, 3, 3))),
        "channel linear": Case(channel_linear, channel_masks(N, C), linear),
        "mixed weights conv, trained": Case(
            trained(sample_weights),
            channel_masks(N, 4),
            (maps(), random_tensor(4, O, C, 3, 3)),
            library=True,
        ),
        "region weights conv, trained": Case(
            trained(region_weights), pixel_masks(), (maps(), random_tensor(2, O, C, 3, 3))
        ),
        "local conv, trained": Case(
            trained(filters_of_pixels), pixel_masks(), (maps(), random_tensor(N, 18, H, W))
        ),
        "masked outputs": Case(
            masked_outputs, pixel_masks(), (maps(), random_tensor(O, C, 3, 3)), library=True
        ),
    }


def expert_plan(index):
    plans = (ExpertPlan.from_topk(index, 5, capacity) for capacity in (None, 6))
    return [(plan.order, plan.offsets, plan.position, plan.counts, plan.expert) for plan in plans]


def expert_linear(index, x, weight, bias):
    return ops.grouped_linear(x, weight, ExpertPlan.from_topk(index, 5), bias, packed_out=False)


def expert_mlp(index, x, up, down, share):
    return ops.experts_mlp(x, up, down, ExpertPlan.from_topk(index, 5), share)


def expert_mlp_capacity(index, x, up, down, share):
    return ops.experts_mlp(x, up, down, ExpertPlan.from_topk(index, 5, 9), share)


def expert_cases() -> dict[str, Case]:
    x, share = random_tensor(40, C), torch.rand(40, 2)
    linear = (x, random_tensor(5, O, C), random_tensor(5, O))
    mlp = (x, random_tensor(5, 64, C), random_tensor(5, C, 32), share)
    cases = {
        "expert plan": Case(expert_plan, choices()),
        "expert linear": Case(expert_linear, choices(), linear),
        "expert MLP": Case(expert_mlp, choices(), mlp),
        "expert MLP with a capacity": Case(expert_mlp_capacity, choices(), mlp),
        "expert linear, trained": Case(trained(expert_linear), choices(), linear),
        "expert MLP, trained": Case(trained(expert_mlp), choices(), mlp),
    }
    for case in cases.values():  # the reference asks the host where each expert's rows end
        case.hostless = ("triton",)
    return cases


def sample_plan(keep):
    plan = SamplePlan.from_mask(keep, 4)
    return plan.index, plan.count, plan.mask(), plan.dropped().index, plan.pixels((2, 3)).index


def sample_rows(keep, x):
    plan = SamplePlan.from_mask(keep, 4)
    return ops.scatter_samples(ops.gather_samples(x, plan), plan, x.flip(0))


def sample_sums(keep, x, share):
    plan = SamplePlan.from_mask(keep, 4)
    return ops.scatter_samples(ops.gather_samples(x, plan) * 2, plan, x, add=True, scale=share)


def sample_cases() -> dict[str, Case]:
    x, share = random_tensor(6, 8, 5, 4), torch.rand(4)
    return {
        "sample plan": Case(sample_plan, keeps()),
        "sample rows": Case(sample_rows, keeps(), (x,)),
        "sample rows, trained": Case(trained(sample_rows), keeps(), (x,)),
        "sample sums, trained": Case(trained(sample_sums), keeps(), (x, share)),
    }


def layer_cases() -> dict[str, Case]:
    chain = dynops.nn.SparseSequential(
        nn.Conv2d(C, O, 1),
        nn.BatchNorm2d(O),
        nn.ReLU(),
        nn.Conv2d(O, O, 3, padding=1, groups=O),
        nn.Conv2d(O, C, 1),
    ).eval()
    moe = dynops.nn.MoE.from_sizes(C, 48, num_experts=5, top_k=2).eval()
    skip = dynops.nn.Skip(nn.Conv2d(8, 8, 3, padding=1), max_fraction=0.7).eval()
    replaced = dynops.nn.Skip(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), "replace", max_fraction=0.7).eval()  # fmt: skip
    gated = dynops.nn.SparseConv2d(C, O, 3, padding=1)

    def routed(flip, x):
        return moe(torch.where(flip[:, None], x.flip(0), x)).output

    return {
        "SparseSequential": Case(lambda mask, x: chain(x, plan_of(mask)), pixel_masks(), (maps(),), modules=(chain,)),
        "SparseConv2d": Case(lambda mask, x: gated(x, plan_of(mask)), pixel_masks(), (maps(),), modules=(gated,)),
        "MoE": Case(
            routed, [torch.arange(40) % k == 0 for k in (1, 2, 50)], (random_tensor(40, C),), library=True,
            hostless=("triton",), modules=(moe,),
        ),
        "Skip": Case(
            lambda keep, x: skip(x, keep), keeps(), (random_tensor(6, 8, 5, 4),), library=True, hostless=(),
            modules=(skip,),
        ),  # its plan has the capacity form on a GPU alone
        "Skip, replaced": Case(
            lambda keep, x: replaced(x, keep), keeps(), (random_tensor(6, 8, 5, 4),), library=True, hostless=(),
            modules=(replaced,),
        ),
    }  # fmt: skip


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    every = (pixel_cases, block_cases, channel_cases, expert_cases, sample_cases, layer_cases)
    return {name: case for make in every for name, case in make().items()}
