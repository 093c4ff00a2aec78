"""What an op must do at least: its steps, and what plans and moved rows cost. Layers: ``work_<noun>.py``.

FLOPs are 2 x MACs. Bytes are the fewest that can pass through device memory: in each step, every input that is read is read once
and every output is written once, indices and the filling of outputs included. A real kernel may move more (rows read for
several tiles), and, where everything fits in the second-level cache and was there before, less.

Launches are counted from ``csrc/cuda`` and ``dynops/kernels``.
"""

from __future__ import annotations

from typing import NamedTuple

INDEX = 4  # bytes of an index, of an entry of an inverse, of an offset


class Step(NamedTuple):
    """Kernels that run one after the other and together do one thing, after the step before it."""

    name: str
    flops: float = 0.0
    read: float = 0.0  # bytes
    written: float = 0.0
    unit: str = "vector"  # see ``datasheets.Sheet.rate``
    launches: int = 1
    waits: int = 0  # how often the host waits for the device

    @property
    def bytes(self) -> float:
        return self.read + self.written


def fill(size: float) -> Step:
    """``size`` bytes of one value."""
    return Step("fill", written=size)


def copy(size: float) -> Step:
    return Step("copy", read=size, written=size)


# ------------------------------------------------------------------------------------------ plans


def mask_to_index(pixels: int, active: float, capacity: bool = False) -> list[Step]:
    """A plan of a bool mask, ``active`` of whose ``pixels`` are set.

    Both count the parts of the mask first and write from there, the compact form after the host has waited for the counts;
    the capacity form, with room for every pixel, writes -1 past them.
    """
    count = Step("count", read=pixels, waits=0 if capacity else 1)
    return [count, Step("select", read=pixels, written=INDEX * (pixels if capacity else active))]


def inverse_index(pixels: int, rows: float) -> list[Step]:
    """The row of each of ``pixels``, or -1."""
    return [fill(INDEX * pixels), Step("inverse", read=INDEX * rows, written=INDEX * rows)]


def needed_mask(in_pixels: int, rows: float, needed: float) -> list[Step]:
    """A bool mask of the input pixels that ``rows`` outputs read, ``needed`` of them."""
    return [fill(in_pixels), Step("mark needed", read=INDEX * rows, written=needed)]


def expert_index(pairs: int, experts: int, index_size: int = 8) -> list[Step]:
    """The pairs sorted by expert; ``index_size`` bytes of a choice: counted, then placed (up to 1024 experts)."""
    return [
        Step("count", read=index_size * pairs),
        Step("place", read=index_size * pairs, written=INDEX * (2 * pairs + experts + 1)),
    ]


def channel_lists(samples: int, channels: int) -> list[Step]:
    """The lists of a bool mask ``[samples, channels]``."""
    mask = samples * channels
    return [Step("lists", read=mask, written=INDEX * (mask + samples))]


def prefix_lists(samples: int, channels: int) -> list[Step]:
    """The lists of a width for each sample."""
    return [Step("prefixes", read=INDEX * samples, written=INDEX * samples * channels, launches=3)]


# ------------------------------------------------------------------------------------------- rows


def gather_rows(rows: float, row_size: float) -> list[Step]:
    """``rows`` rows of ``row_size`` bytes, from where an index says."""
    return [Step("gather rows", read=rows * (row_size + INDEX), written=rows * row_size)]


def scatter_rows(rows: float, out_rows: int, row_size: float, base: bool = False) -> list[Step]:
    """Rows to their places among ``out_rows``, over zero or a copy of ``base``."""
    below = copy(out_rows * row_size) if base else fill(out_rows * row_size)
    return [below, Step("scatter rows", read=rows * (row_size + INDEX), written=rows * row_size)]


def merge_rows(rows: float, out_rows: int, row_size: float, add: bool) -> list[Step]:
    """Rows to their places over ``base``, ``add``: summed with it; every output is written once."""
    base = out_rows if add else out_rows - rows
    read = (rows + base) * row_size + INDEX * out_rows
    return [*inverse_index(out_rows, rows), Step("merge rows", read=read, written=out_rows * row_size)]
