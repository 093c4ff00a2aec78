"""What the CPU's kernels refuse: lists and sizes that would leave an output as the allocator gave it."""

import pytest
import torch

from dynops import ExpertPlan, backends, ops
from dynops.geometry import ConvGeometry
from dynops.testing import random_tensor

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(not backends.has_binary(), reason="the binary is not built"),
]


def _winograd_call(quads_of):
    """cpu_conv as Winograd on a full 12 x 12 map, with the tiles that ``quads_of`` makes of the right ones."""
    g = ConvGeometry(1, 12, 12, 12, 12, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0)
    x = random_tensor(1, 32, 12, 12).contiguous(memory_format=torch.channels_last)
    packed = torch.ops.dynops.cpu_pack_winograd(random_tensor(32, 32, 3, 3))
    index = torch.arange(144, dtype=torch.int32)
    quads = quads_of(torch.ops.dynops.cpu_winograd_quads(index, None, g))
    out = torch.empty(144, 32)
    torch.ops.dynops.cpu_conv(
        x, packed, None, index, None, None, g, 0, None, None, None, None, None, False, quads, out
    )
    return out


def _without_a_row(quads):
    quads = quads.clone()
    quads[3, 2] = -1
    return quads


def test_tiles_that_miss_a_row_are_refused():
    """An output that no tile holds would be what the allocator gave."""
    assert _winograd_call(lambda quads: quads).isfinite().all()
    wrong = [
        lambda quads: quads[:-1].contiguous(),
        lambda quads: quads[:0],
        _without_a_row,
        lambda quads: torch.cat([quads[:1], quads[:-1]]),
        lambda quads: quads + 1,
        lambda quads: quads.flip(0).contiguous(),
        lambda quads: torch.cat([quads, quads], 1)[:, :5],
    ]
    for quads_of in wrong:
        with pytest.raises(RuntimeError, match="quads"):
            _winograd_call(quads_of)


def test_sizes_that_do_not_fit_are_refused():
    g = ConvGeometry(1, 6, 7, 6, 7, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0)
    weight = torch.ops.dynops.cpu_pack_weight(random_tensor(8, 4, 1, 1), 1, False, False, False, False)
    index = torch.arange(0, 42, 2, dtype=torch.int32)
    x = random_tensor(1, 4, 6, 7).contiguous(memory_format=torch.channels_last)
    last = {"memory_format": torch.channels_last}

    def call(x=x, source=None, gate=None, residual=None, base=None, out=None):
        out = torch.empty(1, 8, 6, 7, **last) if out is None else out
        torch.ops.dynops.cpu_conv(
            x, weight, None, index, None, source, g, 0, None, None, gate, residual, base, False, None, out
        )
        return out

    assert call().isfinite().all()
    for wrong, name in (
        ({"x": x[:, :, :5]}, "x:"),
        ({"source": torch.zeros(1, 6, 6, dtype=torch.int32), "x": random_tensor(3, 4)}, "x:"),
        ({"out": torch.empty(20, 8)}, "out:"),
        ({"out": torch.empty(1, 8, 7, 7, **last)}, "out:"),
        ({"gate": torch.ones(20)}, "gate"),
        ({"residual": torch.ones(20, 8)}, "residual"),
        ({"base": torch.ones(1, 8, 5, 7)}, "base"),
    ):
        with pytest.raises(RuntimeError, match=name):
            call(**wrong)
    for rows in (torch.empty(20, 4), torch.empty(21, 3)):
        with pytest.raises(RuntimeError, match="rows"):
            torch.ops.dynops.cpu_gather(x, index, None, rows)
        with pytest.raises(RuntimeError, match="rows"):
            torch.ops.dynops.cpu_gather_planes(x, index, None, rows)
        for scatter in (torch.ops.dynops.cpu_scatter, torch.ops.dynops.cpu_scatter_planes):
            with pytest.raises(RuntimeError, match="rows"):
                scatter(rows, index, None, None, torch.empty(1, 4, 6, 7))


def test_a_position_of_a_row_that_no_expert_computes_is_refused():
    """A dropped pair's row is written by no product."""
    plan = ExpertPlan.from_topk(torch.tensor([[0, 2], [1, 2], [0, 1]]), 2)  # 2: dropped
    rows, x = int(plan.offsets[-1]), random_tensor(3, 8)
    up, down = random_tensor(2, 16, 8), random_tensor(2, 8, 16)
    assert rows == 4 and plan.position.max() < rows
    wrong = plan.position.clone()
    wrong[0, 1] = 5
    plan.position = wrong
    with pytest.raises(RuntimeError, match="position"):
        ops.experts_mlp(x, up, down, plan, torch.ones(3, 2), gated=False, activation="relu")
