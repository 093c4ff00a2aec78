"""``with active(mask):`` the mask that converted layers work on, at whatever resolution they have."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from . import modes
from .plans import BlockPlan, PixelPlan, check_mask, resize_mask, widen_mask


class _Local(threading.local):
    def __init__(self):  # runs once in each thread; an attribute (not a class default) is what Dynamo guards
        self.stack: tuple[active, ...] = ()


_local = _Local()


class active:
    """Context manager: inside it, converted layers compute only the pixels of a mask.

    Args:
        mask_or_plan: a mask ``[N, H, W]`` or ``[N, 1, H, W]`` (nonzero = active), a
            :class:`PixelPlan` or a :class:`BlockPlan`, at any resolution, finer or coarser than a layer's.
        block_size: pixels of a block at the mask's own resolution, ``int`` or ``(height, width)``. With it
            the mask is first widened to whole blocks: one active pixel makes its block active.

    Each layer asks for the plan of its own output resolution: an output pixel is active if any mask
    pixel under it is; a layer at 1/s of the mask's resolution so computes blocks of ``block_size / s``.
    Plans are built once for each resolution and shared between the layers.

    The context belongs to the thread that enters it. It nests (the innermost mask holds), may be
    entered again and by several threads at once, and is left when an exception passes through.
    Entered inside a compiled function, with the mask as its input, plans have the capacity form.

    Raises:
        TypeError, ValueError: what is passed is neither a mask nor a plan, or a block size below 1. A
            layer whose batch or device is not the mask's raises ValueError when it is called.
    """

    def __init__(
        self,
        mask_or_plan: Tensor | PixelPlan | BlockPlan,
        block_size: int | tuple[int, int] | None = None,
    ):
        self._capacity_form = False
        self._plans: dict[tuple[int, int, int], PixelPlan] = {}
        if isinstance(mask_or_plan, BlockPlan):
            mask_or_plan = mask_or_plan.pixels()
        if isinstance(mask_or_plan, PixelPlan):
            self._capacity_form = mask_or_plan.count is not None
            mask = mask_or_plan.mask()
            if block_size is None:
                self._plans[mask_or_plan.shape] = mask_or_plan
        else:
            mask = _without_nan(check_mask(mask_or_plan)) != 0
        if block_size is not None:
            mask = widen_mask(mask, block_size)
        self._masks = [mask]  # [N, H, W] bool: as passed, then each half that was asked for

    def __enter__(self) -> active:
        _local.stack = (*_local.stack, self)
        return self

    def __exit__(self, *error) -> None:
        _local.stack = _local.stack[:-1]

    def plan(self, shape: tuple[int, int, int], device: torch.device) -> PixelPlan:
        """The plan at ``shape = (N, H, W)`` for a layer on ``device`` (kept).

        Raises:
            ValueError: the mask has another batch or lies on another device.
        """
        plan = self._plans.get(shape)
        if plan is None:
            plan = self._plans[shape] = self._make(shape)
        if plan.index.device != device:
            raise ValueError(f"active: expected the mask on the layer's device {device}, got {plan.device}")
        return plan

    def _make(self, shape: tuple[int, int, int]) -> PixelPlan:
        n, *size = shape
        mask = self._masks[0]
        if mask.shape[0] != n:
            raise ValueError(
                f"active: expected a mask for the layer's batch of {n}, got one for {mask.shape[0]} "
                f"(shape {tuple(mask.shape)})"
            )
        if min(mask.shape[1:]) == 0 and n > 0:
            raise ValueError(f"active: expected a mask with pixels, got shape {tuple(mask.shape)}")
        if n == 0 or min(size) == 0:
            return PixelPlan.from_mask(mask.new_zeros(shape))
        return PixelPlan.from_mask(
            self._resized(tuple(size)), n * size[0] * size[1] if self._capacity_form else None
        )

    def _resized(self, size: tuple[int, int]) -> Tensor:
        """The mask at ``size``. Half of a mask already there takes 10 us; from 224x224 to 112 it is 100 at once."""
        if tuple(self._masks[0].shape[1:]) == size:
            return self._masks[0]
        for mask in self._masks:
            if mask.shape[1] == 2 * size[0] and mask.shape[2] == 2 * size[1]:
                rows = mask[:, ::2] | mask[:, 1::2]
                self._masks.append(rows[..., ::2] | rows[..., 1::2])
                return self._masks[-1]
        return resize_mask(self._masks[0], size)


def _without_nan(mask: Tensor) -> Tensor:
    """The mask, or an error where it has a NaN (not checked where checking would synchronise)."""
    checked = mask.is_floating_point() and modes.may_look(mask)
    if checked and bool(mask.isnan().any()):
        raise ValueError("mask: expected numbers, got NaN in it")
    return mask


def current() -> active | None:
    """The innermost ``active`` context of this thread."""
    stack = _local.stack
    return stack[-1] if stack else None
