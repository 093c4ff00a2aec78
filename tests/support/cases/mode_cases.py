"""A small call of every op of ``torch.ops.dynops`` that has a derivative, in any dtype, for tests of all of them."""

import torch

import dynops
from dynops.geometry import ConvGeometry

# ops that must raise rather than give a tensor without its derivative, and those without floating results
REFUSING = {"experts_mlp", "expert_activation_grad"}


class Maker:
    """Makes the random tensors of a case, the same ones in every dtype."""

    def __init__(self, dtype: torch.dtype, backend: str = ""):
        self.generator, self.dtype, self.backend = torch.Generator().manual_seed(0), dtype, backend

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)


def _pixels(capacity: bool = False):
    mask = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(1)) < 0.6
    plan = dynops.PixelPlan.from_mask(mask, 20 if capacity else None)
    return plan.index, plan.count


def _source(rows: int = 9):
    mask = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(2)) < 0.4
    plan = dynops.PixelPlan.from_mask(mask)
    return plan.inverse(), plan.num_rows


def _geometry(groups: int = 1, transposed: int = 0) -> list[int]:
    return list(ConvGeometry(2, 4, 3, 4, 3, 3, 3, 1, 1, 1, 1, 1, 1, groups, transposed))


def _blocks():
    plan = dynops.BlockPlan.from_mask(torch.tensor([[[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]]] * 2), 2)
    return plan.index, plan.count, list(plan.geometry.widened((1, 1, 1, 1))), list(plan.geometry)


def _lists(channels: int, seed: int):
    mask = torch.rand(2, channels, generator=torch.Generator().manual_seed(seed)) < 0.6
    plan = dynops.ChannelPlan.from_mask(mask)
    return plan.index, plan.count, plan.width


def _experts():
    index = torch.tensor([[0, 2], [1, 0], [2, 3], [3, 0], [2, 1]])  # 3: dropped
    plan = dynops.ExpertPlan.from_topk(index, 3)
    return plan.order, plan.offsets, plan.position


def cases(t: Maker) -> dict[str, list]:
    """Arguments by the op's name, with a suffix where an op has several; floating ones are to be differentiated."""
    index, count = _pixels()
    full, valid = _pixels(capacity=True)
    source, rows = _source()
    b = t.backend
    none4 = (None, None, None, None)
    blocks, no_count, wide, narrow = _blocks()
    li, lo = _lists(4, 3), _lists(6, 4)
    lists = (*li[:2], *lo[:2])
    region = torch.randint(0, 2, (2, 4, 3), generator=torch.Generator().manual_seed(5), dtype=torch.int32)
    plan = _experts()
    samples, dropped = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([1, 3, -1], dtype=torch.int32)
    two = torch.tensor([2], dtype=torch.int32)
    live = torch.rand(2, 6, 4, 3, generator=torch.Generator().manual_seed(6)) < 0.5
    g = _geometry()
    # fmt: off
    return {
        "gather_rows": [t(2, 3, 4, 3), index, count],
        "gather_rows/capacity": [t(2, 3, 4, 3), full, valid],
        "scatter_rows": [t(len(index), 3), index, count, [2, 4, 3], t(2, 3, 4, 3)],
        "scatter_rows/capacity": [t(20, 3), full, valid, [2, 4, 3], None],
        "scatter_planes": [t(len(index), 3), index, count, [2, 4, 3], t(2, 3, 4, 3)],
        "scatter_planes/capacity": [t(20, 3), full, valid, [2, 4, 3], None],
        "merge_rows": [t(2, 3), samples, None, t(4, 3), t(2), True],
        "merge_rows/add": [t(3, 3), dropped, two, t(4, 3), t(3), False],
        "merge_rows/plain": [t(2, 3), samples, None, t(4, 3), None, False],
        "pixel_conv": [t(2, 4, 4, 3), t(6, 4, 3, 3), t(6), index, count, None, g, "", *none4, t(2, 6, 4, 3), False, None, True, False, b],
        "pixel_conv/rows": [t(rows, 4), t(6, 2, 3, 3), t(6), full, valid, source, _geometry(2), "", *none4, None, True, None, True, False, b],
        "pixel_conv/transposed": [t(2, 4, 4, 3), t(4, 3, 3, 3), None, index, count, None, _geometry(2, 1), "", *none4, None, False, None, True, False, b],
        "pixel_conv_input_grad": [t(2, 6, 4, 3), t(6, 4, 3, 3), index, count, None, 0, g, False, b],
        "pixel_conv_input_grad/rows": [t(20, 6), t(6, 4, 3, 3), full, valid, source, rows, g, True, b],
        "pixel_conv_weight_grad": [t(2, 6, 4, 3), t(2, 4, 4, 3), index, count, None, [6, 4, 3, 3], g, False, True, b],
        "pixel_conv_weight_grad/rows": [t(len(index), 6), t(rows, 4), index, count, source, [6, 2, 3, 3], _geometry(2), True, False, b],
        "block_conv": [t(2, 4, 3, 4), t(6, 4, 3, 3), t(6), blocks, no_count, None, None, narrow, list(ConvGeometry(2, 3, 4, 3, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0)), "", None, None, None, t(2, 6, 3, 4)],
        "gather_tiles": [t(2, 3, 3, 4), blocks, no_count, wide],
        "scatter_tiles": [t(len(blocks), 3, 2, 2), blocks, no_count, narrow, t(2, 3, 3, 4), False],
        "scatter_tiles/add": [t(len(blocks), 3, 4, 4), blocks, no_count, wide, t(2, 3, 3, 4), True],
        "gather_channels": [t(2, 4, 2, 3), *li],
        "scatter_channels": [t(2, li[2], 2, 3), *li[:2], 4, t(2, 4, 2, 3)],
        "channel_conv": [t(2, 4, 4, 3), t(6, 4, 3, 3), t(6), *lists, g, 1, "", None, t(2, 6, 4, 3), False, -1, b],
        "channel_conv/packed": [t(2, li[2], 4, 3), t(6, 4, 3, 3), t(6), *lists, g, 1, "", None, None, True, lo[2], b],
        "channel_conv_input_grad": [t(2, 6, 4, 3), t(6, 4, 3, 3), *lists, g, 1, -1, False, b],
        "channel_conv_weight_grad": [t(2, lo[2], 4, 3), t(2, 4, 4, 3), *lists, [6, 4, 3, 3], g, 1, False, True, True, b],
        "weighted_conv": [t(2, 4, 4, 3), t(2, 1, 6, 4, 3, 3), t(1, 1, 6), None, g, "", b],
        "weighted_conv/regions": [t(2, 4, 4, 3), t(1, 2, 6, 4, 3, 3), t(1, 2, 6), region, g, "", b],
        "weighted_conv_input_grad": [t(2, 6, 4, 3), t(1, 2, 6, 4, 3, 3), region, g, b],
        "weighted_conv_weight_grad": [t(2, 6, 4, 3), t(2, 4, 4, 3), region, [2, 2, 6, 4, 3, 3], g, True, b],
        "weighted_conv_weight_grad/one": [t(2, 6, 4, 3), t(2, 4, 4, 3), None, [1, 1, 6, 4, 3, 3], g, False, b],
        "mixed_conv": [t(2, 4, 4, 3), t(3, 6, 4, 3, 3), t(2, 3), t(1, 1, 6), g, "", b],
        "masked_output_conv": [t(2, 7, 4, 3), t(6, 4, 3, 3), t(6), live, t(2, 6, 4, 3), 2, g, b],
        "local_conv": [t(2, 4, 4, 3), t(2, 18, 8, 6), _geometry(2), 2, b],
        "local_conv_input_grad": [t(2, 4, 4, 3), t(2, 18, 4, 3), _geometry(2), 1, b],
        "local_conv_kernel_grad": [t(2, 4, 8, 6), t(2, 4, 4, 3), _geometry(2), 2, b],
        "gather_pairs": [t(5, 3), t(5, 2), *plan, b],
        "gather_pairs/plain": [t(5, 3), None, *plan, b],
        "combine_pairs": [t(10, 3), t(5, 2), *plan, b],
        "pair_dots": [t(5, 3), t(10, 3), False, *plan, b],
        "pair_dots/packed": [t(10, 3), t(10, 3), True, *plan, b],
        "expert_activation": [t(4, 6), "silu", True, False, 1.7, 7.0, b],
        "expert_activation/clamped": [3 * t(4, 6), "clamped_swiglu", True, True, 1.7, 2.0, b],
        "expert_activation/hardswish": [3 * t(4, 6), "hardswish", False, False, 1.7, 7.0, b],
        "expert_activation/gelu": [t(4, 6), "gelu", True, True, 1.7, 7.0, b],
        "expert_activation/gelu_tanh": [t(4, 6), "gelu_tanh", False, False, 1.7, 7.0, b],
        "expert_activation/relu2": [t(4, 6), "relu2", True, False, 1.7, 7.0, b],
        "grouped_linear": [t(5, 4), t(3, 6, 4), None, t(3, 6), t(5, 2), *plan, False, False, False, "", b],
        "grouped_linear/packed": [t(10, 4), t(3, 4, 6), None, t(3, 6), t(5, 2), *plan, True, True, True, "", b],
        "grouped_weight_grad": [t(5, 6), t(5, 4), t(5, 2), *plan, False, False, False, True, b],
        "grouped_weight_grad/packed": [t(10, 6), t(10, 4), t(5, 2), *plan, True, True, True, False, b],
    }
    # fmt: on


def differentiable_ops() -> set[str]:
    """The names of the ops of this package with a kernel under the Autograd key."""
    names = (n for n in torch._C._dispatch_get_all_op_names() if n.startswith("dynops::"))
    return {
        n.removeprefix("dynops::")
        for n in names
        if torch._C._dispatch_has_kernel_for_dispatch_key(n, "Autograd")
    }


def overload(name: str):
    return getattr(torch.ops.dynops, name.partition("/")[0]).default


def of_tensors(name: str, arguments: list):
    """The op as a function of its floating arguments alone, and these."""
    at = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.is_floating_point()]

    def run(*tensors):
        full = list(arguments)
        for i, tensor in zip(at, tensors, strict=True):
            full[i] = tensor
        out = overload(name)(*full)
        if isinstance(out, tuple):  # the second is empty where nobody asks for it
            out = tuple(part for part in out if part.numel())
            return out if len(out) > 1 else out[0]
        return out

    return run, [arguments[i] for i in at]
