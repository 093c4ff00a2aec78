"""Values of gather_tiles and scatter_tiles against the reference: the cases and checks of every GPU backend.

Inputs and outputs lie between guards of NaN, and so do the tiles that a capacity plan does not use: what
reads past an end or writes there is seen. Run by ``interpreted_blocks.py`` and ``test_cuda_on_host.py``.
"""

from dataclasses import dataclass

import pytest
import torch
from guards import GUARD, between_guards, guarded_outputs, guards_are_whole

from dynops import BlockPlan, PixelPlan
from dynops.geometry import BlockGeometry
from dynops.ops import blocks as reference
from dynops.testing import assert_within_budget, random_mask, random_tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A map, the grid of its blocks and which are active."""

    c: int = 8
    n: int = 2
    h: int = 16
    w: int = 24
    block: tuple = (4, 8)
    halo: tuple = (0, 0, 0, 0)  # top, bottom, left, right
    stride: tuple | None = None
    padding: tuple = (0, 0)
    offset: tuple = (0, 0)
    kind: str = "random"
    capacity: int | None = None
    unaligned: int = 0  # elements by which the tensors' memory is off a multiple of 16 bytes

    @property
    def geometry(self) -> BlockGeometry:
        none = torch.zeros(self.n, self.h, self.w, dtype=torch.bool)
        steps = {"stride": self.stride, "padding": self.padding, "offset": self.offset}
        return BlockPlan.from_mask(none, self.block, **steps).geometry.widened(self.halo)


CASES = {
    "plain": Case(),
    "empty": Case(kind="empty"),
    "one": Case(kind="one"),
    "full": Case(kind="full"),
    "full-overlap": Case(kind="full", halo=(1, 1, 1, 1)),
    "ragged": Case(h=13, w=21),
    "halo": Case(halo=(1, 1, 1, 1)),
    "uneven-halo": Case(halo=(2, 0, 1, 3), h=13, w=21),
    "wide-halo": Case(halo=(9, 5, 17, 8)),  # many tiles over a pixel
    "overlap": Case(block=(6, 6), stride=(4, 3), padding=(2, 1), offset=(-1, 1)),
    "gaps": Case(block=(2, 3), stride=(5, 4), h=17, w=22),
    "offset": Case(block=(4, 4), offset=(3, 5)),
    "padding": Case(block=(4, 4), padding=(3, 9), kind="full"),  # blocks wholly outside the map
    "block-over-map": Case(h=5, w=6, block=(8, 16), kind="full"),
    "block-over-map-halo": Case(h=5, w=6, block=(8, 16), kind="full", halo=(3, 3, 3, 3)),
    "one-pixel-blocks": Case(block=(1, 1), h=5, w=7),
    "lines": Case(block=(1, 24)),
    "one-pixel-map": Case(h=1, w=1, block=(3, 3), halo=(1, 1, 1, 1), kind="full"),
    "one-channel": Case(c=1),
    "one-channel-halo": Case(c=1, h=13, w=21, halo=(1, 1, 1, 1)),
    "odd-channels": Case(c=13),
    "odd-channels-halo": Case(c=7, h=13, w=21, halo=(1, 1, 1, 1)),
    "6-channels": Case(c=6, halo=(1, 1, 1, 1)),
    "unaligned": Case(unaligned=1, halo=(0, 0, 8, 8)),
    "batch-7": Case(n=7, h=5, w=7, block=(2, 2), c=3),
    "capacity": Case(capacity=30, halo=(1, 1, 1, 1)),
    "capacity-plain": Case(capacity=30),
    "capacity-exceeded": Case(capacity=3, kind="full"),
    "capacity-empty": Case(capacity=4, kind="empty"),
    "capacity-0": Case(capacity=0),
    "no-images": Case(n=0),
    "no-pixels": Case(h=0),
    "no-pixels-capacity": Case(h=0, capacity=2),
}
HALF = ("plain", "uneven-halo", "overlap", "odd-channels-halo", "unaligned", "capacity")
EXAMPLES = [
    pytest.param(case, dtype, nchw, id=f"{name}-{str(dtype)[6:]}-{'nchw' if nchw else 'channels_last'}")
    for name, case in CASES.items()
    for dtype in (DTYPES if name in HALF else DTYPES[:1])
    for nchw in (False, True)
]
of_cases = pytest.mark.parametrize("case,dtype,nchw", EXAMPLES)


class Inputs:
    """The tensors of a case."""

    def __init__(self, case: Case, dtype: torch.dtype, nchw: bool, device: str = "cpu"):
        self.case, self.g, self.device = case, case.geometry, device
        blocks = random_mask(self.g.grid, 0.5, case.kind)
        plan = PixelPlan.from_mask(blocks, case.capacity)
        self.index, count = plan.index.to(device), plan.count
        self.count = None if count is None else count.to(device)
        layout = torch.contiguous_format if nchw else torch.channels_last

        def make(*shape):
            value = (random_tensor(*shape) * 100).to(dtype)
            like = torch.empty(shape, memory_format=layout)
            out = between_guards(shape, like.stride(), dtype, device, GUARD + case.unaligned)
            return out.copy_(value)

        tile = (self.g.tile_h, self.g.tile_w)
        self.x = make(case.n, case.c, case.h, case.w)
        self.base = make(case.n, case.c, case.h, case.w)
        self.tiles = make(len(plan.index), case.c, *tile)
        if dtype.is_floating_point:
            self.tiles[self.index < 0] = float("nan")  # must not be read
        self.clean = self.tiles.nan_to_num(0)  # the reference adds the unused ones to a pixel of its own


def check_gather(kernels, case, dtype, nchw, device="cpu"):
    t = Inputs(case, dtype, nchw, device)
    with guarded_outputs():
        tiles = kernels.gather_tiles(t.x, t.index, t.count, list(t.g))
    expected = reference._gather_tiles(t.x, t.index, t.count, list(t.g))
    assert torch.equal(tiles, expected) and tiles.stride() == expected.stride()
    assert guards_are_whole(t.x)


def check_scatter(kernels, case, dtype, nchw, device="cpu"):
    """With and without a base; adding, and, where tiles do not overlap, replacing."""
    t = Inputs(case, dtype, nchw, device)
    for base in (None, t.base):
        for add in (False, True)[t.g.overlaps :]:
            with guarded_outputs():
                out = kernels.scatter_tiles(t.tiles, t.index, t.count, list(t.g), base, add)
            expected = reference._scatter_tiles(t.clean, t.index, t.count, list(t.g), base, add)
            assert out.stride() == expected.stride()
            if not add:
                assert torch.equal(out, expected)
                continue
            double = None if base is None else base.double()
            exact = reference._scatter_tiles(t.clean.double(), t.index, t.count, list(t.g), double, add)
            assert_within_budget(out, exact, expected)
    assert guards_are_whole(t.tiles) and guards_are_whole(t.base)
