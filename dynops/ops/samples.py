"""gather_samples and scatter_samples: the kept samples of a batch as a smaller batch, and back to their slots.

The mathematics, for the plan's i-th sample n::

    gather_samples:   rows[i] = x[n]
    scatter_samples:  out[n] = rows[i]                              elsewhere base, or zero
        add           out[n] = base[n] + scale[i] * rows[i]
        scale, base   out[n] = (1 - scale[i]) * base[n] + scale[i] * rows[i]

A sample is a row of a map of one pixel: the copies, their gradients and their kernels are those of ``ops/pixels/rows.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import backends, modes
from ..kernels import cpu
from ..plans import SamplePlan
from . import checks
from .dispatch import triton_module
from .observers import observers
from .pixels.rows import gather_rows, memory_format_of, merge_rows, scatter_rows


class SampleLayout(NamedTuple):
    """Views of samples ``[N, ...]`` as rows ``[N, F]`` and back, which copy neither memory format."""

    shape: torch.Size  # of a sample
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor) -> SampleLayout:
        return cls(x.shape[1:], x.dim() == 4 and memory_format_of(x) == torch.channels_last)

    def rows(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1) if self.channels_last else x
        return x.reshape(x.shape[0], self.shape.numel())

    def samples(self, rows: Tensor) -> Tensor:
        if not self.channels_last:
            return rows.reshape(rows.shape[0], *self.shape)
        c, h, w = self.shape
        return rows.reshape(rows.shape[0], h, w, c).permute(0, 3, 1, 2)


def gather_samples(x: Any, plan: SamplePlan) -> Any:
    """The kept samples as a smaller batch.

    Args:
        x: ``[N, ...]`` of any rank and dtype, or a pytree (tuples, lists, dicts …) of such tensors and other leaves,
            which stay as they are.
        plan: a :class:`~dynops.SamplePlan` of N samples.

    Returns:
        ``[plan.num_rows, ...]``, in the memory format of ``x``, or the same tree of them; in the capacity form samples
        past the count are zero.

    Raises:
        TypeError, ValueError: no plan; a tensor without a batch, of another batch or on another device.
    """
    if not isinstance(plan, SamplePlan):
        checks.plan(plan, SamplePlan, "plan")
    if isinstance(x, Tensor):
        rows = _gather(x, plan, "x")
    else:
        rows = pytree.tree_map_only(Tensor, lambda leaf: _gather(leaf, plan, "x"), x)
    for observer in observers():
        observer.gathered(x, plan, rows)
    return rows


def scatter_samples(
    rows: Any,
    plan: SamplePlan,
    base: Any = None,
    *,
    add: bool = False,
    scale: Tensor | None = None,
) -> Any:
    """The whole batch with ``rows`` in the slots of the kept samples and ``base`` (or zero) elsewhere.

    Args:
        rows: ``[plan.num_rows, ...]``, or a pytree of such tensors and other leaves, which stay as they are.
        plan: a :class:`~dynops.SamplePlan` of N samples.
        base: ``[N, ...]`` of the same dtype, or a tree like ``rows``; None: zero.
        add: adds the rows to the base.
        scale: floating ``[plan.num_rows]``, times the rows. Without ``add`` the base is taken times ``1 - scale`` there;
            where the scale is 1 the row stands alone.

    Returns:
        ``[N, ...]`` in the memory format of ``rows``, or the same tree of them. Sums are float32 at least.

    Raises:
        TypeError, ValueError: no plan; ``add`` without a base; shapes, dtypes or devices that do not fit.
    """
    if not isinstance(plan, SamplePlan):
        checks.plan(plan, SamplePlan, "plan")
    if add and base is None:
        raise ValueError("base: expected a tensor [N, ...] to add to, got None")
    if scale is not None:
        _check_scale(scale, plan)
    if isinstance(rows, Tensor):
        return _scatter(rows, plan, base, add, scale)
    leaves, tree = pytree.tree_flatten(rows)
    below = [None] * len(leaves)
    if base is not None:
        below, base_tree = pytree.tree_flatten(base)
        if base_tree != tree:
            raise ValueError(f"base: expected a tree like rows, {tree}, got {base_tree}")
    done = [
        _scatter(leaf, plan, under, add, scale) if isinstance(leaf, Tensor) else leaf
        for leaf, under in zip(leaves, below, strict=True)
    ]
    return pytree.tree_unflatten(done, tree)


def scatter_over(rows: Any, plan: SamplePlan, made: Any) -> Any:
    """``scatter_samples(rows, plan, made)``, where ``made`` is new and nobody else reads it.

    On a GPU it is written in place where no gradient is needed, and the copy of the whole batch is saved. Works in a
    CUDA graph.
    """
    if not isinstance(rows, Tensor) or not _in_place(rows, made):
        return scatter_samples(rows, plan, made)
    layout = SampleLayout.of(made)
    triton_module("rows").scatter_into(layout.rows(made), layout.rows(rows), plan.index)
    return made


def _in_place(rows: Tensor, made: Tensor) -> bool:
    """True if a kernel may write ``rows`` into ``made``, in the memory format that ``scatter_samples`` would return."""
    if backends.choose(None, rows.device, rows.dtype) != "triton" or not modes.plain(rows, made):
        return False
    same = rows.dtype == made.dtype and SampleLayout.of(rows) == SampleLayout.of(made)
    return (
        same and not modes.differentiated(rows, made) and made.is_contiguous(memory_format=_format_of(made))
    )


def _gather(x: Tensor, plan: SamplePlan, name: str) -> Tensor:
    _check_batch(x, plan.batch, plan, name)
    if _is_direct(x):  # in one call: as rows of a map it takes ten, and 13 us instead of 5
        return cpu.samples.gather(x, plan.index, plan.count, _format_of(x))
    layout = SampleLayout.of(x)
    return layout.samples(_gather_flat(layout.rows(x), plan))


def _gather_flat(flat: Tensor, plan: SamplePlan) -> Tensor:
    return gather_rows(flat[:, :, None, None], plan.index, plan.count)


def _scatter(rows: Tensor, plan: SamplePlan, base: Tensor | None, add: bool, scale: Tensor | None) -> Tensor:
    _check_batch(rows, plan.num_rows, plan, "rows")
    if base is not None:
        _check_base(base, rows, plan)
    if not add and scale is None and _is_direct(rows, base):
        return cpu.samples.scatter(rows, plan.index, plan.count, plan.batch, base, _format_of(rows))
    layout = SampleLayout.of(rows)
    flat = layout.rows(rows)
    if base is not None:
        base = layout.rows(base)
    if add or (scale is not None and base is not None):
        return layout.samples(merge_rows(flat, plan.index, plan.count, base, scale, not add))
    if scale is not None:
        flat = flat * scale.to(flat.dtype)[:, None]
    base = None if base is None else base[:, :, None, None]
    out = scatter_rows(flat, plan.index, plan.count, [plan.batch, 1, 1], base)
    return layout.samples(out.flatten(1))


def _is_direct(*tensors: Tensor) -> bool:
    """True if the C++ copies, which take any dtype, may be called by themselves."""
    return tensors[0].device.type == "cpu" and backends.has_binary() and modes.plain(*tensors)


def _format_of(x: Tensor) -> torch.memory_format:
    return memory_format_of(x) if x.dim() == 4 else torch.contiguous_format


# -------------------------------------------------------------------------------------- checks


def _check_batch(x: Tensor, batch: int, plan: SamplePlan, name: str) -> None:
    if x.dim() == 0 or x.shape[0] != batch:
        raise ValueError(f"{name}: expected [{batch}, ...] for {plan}, got shape {tuple(x.shape)}")
    checks.on_plan(x, plan, name)


def _check_base(base: Tensor, rows: Tensor, plan: SamplePlan) -> None:
    if not isinstance(base, Tensor):
        raise TypeError(f"base: expected a tensor, as rows has there, got {type(base).__name__}")
    _check_batch(base, plan.batch, plan, "base")
    if base.shape[1:] != rows.shape[1:]:
        raise ValueError(
            f"base: expected samples of shape {tuple(rows.shape[1:])}, as rows has, got {tuple(base.shape[1:])}"
        )
    if base.dtype != rows.dtype:
        raise TypeError(f"base: expected the dtype of rows {rows.dtype}, got {base.dtype}")


def _check_scale(scale: Tensor, plan: SamplePlan) -> None:
    if not isinstance(scale, Tensor) or not scale.is_floating_point():
        what = scale.dtype if isinstance(scale, Tensor) else type(scale).__name__
        raise TypeError(f"scale: expected a floating tensor [{plan.num_rows}], got {what}")
    if tuple(scale.shape) != (plan.num_rows,) or scale.device != plan.device:
        raise ValueError(
            f"scale: expected [{plan.num_rows}] on {plan.device}, got shape {tuple(scale.shape)} on {scale.device}"
        )
