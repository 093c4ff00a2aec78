"""``with active(mask):`` the mask that converted layers work on, at whatever resolution they have."""

from __future__ import annotations

import torch
from torch import Tensor

from . import modes
from .plans import BlockPlan, PixelPlan, check_mask, resize_mask, widen_mask
from .recompute import travels
from .scope import Scope

_scope = Scope("dynops.active")
travels(_scope)


class active:
    """Context manager: inside it, converted layers compute only the pixels of a mask.

    Args:
        mask_or_plan: a mask ``[N, H, W]`` or ``[N, 1, H, W]`` (nonzero = active), a
            :class:`PixelPlan` or a :class:`BlockPlan`, at any resolution, finer or coarser than a layer's.
            One for a batch of 1, or ``[H, W]``, holds for every sample of every layer's batch, also where
            a model works on several batch sizes.
        block_size: pixels of a block at the mask's own resolution, ``int`` or ``(height, width)``. With it
            the mask is first widened to whole blocks: one active pixel makes its block active.

    Each layer asks for the plan of its own output resolution: an output pixel is active if any mask
    pixel under it is; a layer at 1/s of the mask's resolution so computes blocks of ``block_size / s``.
    Plans are built once for each resolution and shared between the layers.

    The context nests (the innermost mask holds), may be entered again and by several threads at once, and
    is left when an exception passes through. Entered inside a compiled function, with the mask as its
    input, plans have the capacity form. It belongs to what enters it:

    - a thread: one that is started inside the block begins without a mask;
    - an asyncio task: a task that is made inside the block begins with its mask, and may enter others;
    - a generator: its mask holds while the generator runs, not for the caller while it waits at a
      ``yield``. A generator that is a context manager (``contextlib.contextmanager``) or a pytest fixture
      hands its mask to the caller;
    - what ``torch.utils.checkpoint`` runs: computed again in the backward pass, wherever that is called, it
      has the mask that it had in the forward pass.

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
        _scope.enter(self)
        return self

    def __exit__(self, *error) -> None:
        _scope.leave(self)

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
        if mask.shape[0] == 1 and n > 1:
            one = (1, *size)
            if one not in self._plans:
                self._plans[one] = self._make(one)
            return self._plans[one].expand(n)
        if mask.shape[0] not in (1, n):
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
    """The innermost ``active`` context that holds here."""
    return _scope.innermost()
