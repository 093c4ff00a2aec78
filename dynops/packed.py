"""Packed rows as the input of a converted model."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_compiling

from .ops import checks, scatter_pixels
from .plans import PixelPlan
from .stack.maps import SparseMap


def packed(rows: Tensor, plan: PixelPlan) -> Tensor:
    """A map that is ``rows`` at the plan's pixels and zero elsewhere, as the input of a converted model::

        plan = dynops.PixelPlan.from_coordinates(coordinates, (1, 400, 400))
        with dynops.use_mask(plan):
            out = model(dynops.packed(rows, plan))

    Convolutions read the rows, so that no dense map is made. All other code sees a tensor ``[N, C, H, W]``. Functions that
    have no form on rows, and calls outside of ``dynops.use_mask``, read the dense map. The mask of the context may differ
    from the plan: it may be wider. Inside ``torch.compile`` the result is the dense map.

    Args:
        rows: floating ``[plan.num_rows, C]``, in the plan's order: ``plan.rows_of`` has it. They may need a gradient.

    Returns:
        A tensor ``[N, C, H, W]``.

    Raises:
        TypeError, ValueError: rows that are not those of the plan, or not floating.
    """
    checks.pixel_plan(plan, "plan")
    checks.packed_rows(rows, plan, "rows")
    if not rows.is_floating_point():
        raise TypeError(f"rows: expected a floating dtype, got {rows.dtype}")
    return scatter_pixels(rows, plan) if is_compiling() else SparseMap.of_rows(rows, plan, None)
