"""Selected steps of sequences (frames, clips, tokens), gathered before an encoder runs and put back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...geometry import is_int
from .cells import alive_steps, check_lengths


class StepSelection:
    """S slots for each of B sequences of T steps; a slot holds a step, or nothing.

    Attributes:
        index: int64 ``[B, S]``, the step in each slot, -1 where there is none. A step may repeat.
        steps: T.

    ``rows`` of a selection are its P filled slots, sequence by sequence. An encoder that runs on selected
    frames only::

        selection = StepSelection.from_topk(scores, k=8)
        features = selection.pad(encoder(selection.gather(frames)))     # [B, S, ...], see encode_steps

    On a GPU, building one from a mask and its first use each read a count back to the host.
    """

    def __init__(self, index: Tensor, steps: int):
        self.index, self.steps = index, steps
        self._slots = None  # of the rows; None: not asked for yet

    @classmethod
    def from_index(cls, index: Tensor, steps: int) -> StepSelection:
        """``index``: integers ``[B, S]`` in [-1, T); values are looked at on a CPU only."""
        if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
            raise TypeError(
                f"index: expected integers [B, S], got {getattr(index, 'dtype', type(index).__name__)}"
            )
        if index.dim() != 2:
            raise ValueError(f"index: expected [B, S], got shape {tuple(index.shape)}")
        if index.device.type == "cpu" and index.numel():
            low, high = int(index.min()), int(index.max())
            if low < -1 or high >= steps:
                raise ValueError(f"index: expected values in [-1, {steps}), got {low} to {high}")
        return cls(index.long(), steps)

    @classmethod
    def from_mask(cls, mask: Tensor) -> StepSelection:
        """``mask``: ``[B, T]``, nonzero = selected. Slots are in the order of time; S is the largest number
        of any sequence.

        Raises:
            TypeError, ValueError: no mask ``[B, T]``, or NaN in it.
        """
        _check_steps_of(mask, "mask")
        if mask.is_floating_point() and bool(mask.isnan().any()):
            raise ValueError("mask: expected numbers, got NaN")
        keep = mask.detach() != 0
        batch, steps = keep.shape
        most = int(keep.sum(1).max()) if keep.numel() else 0
        index = torch.full((batch, most + 1), -1, device=mask.device)
        # what is not selected goes to a slot that is cut off
        slot = torch.where(keep, keep.cumsum(1) - 1, most)
        index.scatter_(1, slot, torch.arange(steps, device=mask.device).expand(batch, steps))
        return cls(index[:, :most], steps)

    @classmethod
    def from_topk(cls, scores: Tensor, k: int, lengths: Tensor | list[int] | None = None) -> StepSelection:
        """The k steps of each sequence that score best, in the order of time; S = min(k, T).

        Args:
            scores: floating ``[B, T]``, for example of a salience classifier on cheap features (SCSampler,
                ICCV 2019). NaN is never selected. For their gradient multiply by
                ``selection.pad(selection.gather(scores))``.
            k: at least 0.
            lengths: integers ``[B]``; later steps are not selected.
        """
        _check_steps_of(scores, "scores")
        if not scores.is_floating_point():
            raise TypeError(f"scores: expected a floating tensor [B, T], got {scores.dtype}")
        if not is_int(k, 0):
            raise ValueError(f"k: expected an int >= 0, got {k!r}")
        batch, steps = scores.shape
        alive = alive_steps(check_lengths(lengths, batch, steps, scores.device), steps)
        valid = ~scores.detach().isnan()
        valid = valid if alive is None else valid & alive
        ranked = torch.where(valid, scores.detach(), -torch.inf)
        # valid ones first, then by score: a valid -inf must beat a NaN
        order = ranked.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, valid.gather(1, order).long().argsort(dim=1, descending=True, stable=True))
        chosen = order[:, : min(k, steps)]
        chosen = torch.where(valid.gather(1, chosen), chosen, steps).sort(1).values
        return cls(torch.where(chosen < steps, chosen, -1), steps)

    @property
    def batch(self) -> int:
        """B."""
        return self.index.shape[0]

    @property
    def slots(self) -> int:
        """S."""
        return self.index.shape[1]

    @property
    def filled(self) -> Tensor:
        """bool ``[B, S]``."""
        return self.index >= 0

    @property
    def counts(self) -> Tensor:
        """int64 ``[B]``: filled slots of each sequence."""
        return self.filled.sum(1)

    def row_slots(self) -> Tensor:
        """int64 ``[P]``: the slot ``b * S + s`` of each row."""
        if self._slots is None:
            self._slots = self.filled.flatten().nonzero().squeeze(1)
        return self._slots

    def gather(self, x: Tensor) -> Tensor:
        """The selected steps of ``x`` ``[B, T, ...]`` as rows ``[P, ...]``; no other is read. Has a
        gradient."""
        if tuple(x.shape[:2]) != (self.batch, self.steps):
            raise ValueError(f"x: expected [{self.batch}, {self.steps}, ...], got shape {tuple(x.shape)}")
        slots = self.row_slots()
        sequence = slots // max(self.slots, 1)
        at = sequence * self.steps + self.index.flatten()[slots]
        return x.flatten(0, 1).index_select(0, at)

    def pad(self, rows: Tensor) -> Tensor:
        """Rows ``[P, ...]`` in their slots, ``[B, S, ...]``, zero in the empty ones. Has a gradient."""
        slots = self.row_slots()
        if rows.dim() == 0 or rows.shape[0] != slots.shape[0]:
            raise ValueError(f"rows: expected [{slots.shape[0]}, ...], got shape {tuple(rows.shape)}")
        out = rows.new_zeros(self.batch * self.slots, *rows.shape[1:])
        return out.index_copy(0, slots, rows).unflatten(0, (self.batch, self.slots))

    def __repr__(self) -> str:
        return f"StepSelection({self.slots} slots of {self.steps} steps, {self.batch} sequences)"


def gather_steps(x: Tensor, index: Tensor) -> Tensor:
    """Steps of sequences: ``out[b, s] = x[b, index[b, s]]``, zero where the index is -1.

    Args:
        x: ``[B, T, ...]``, any dtype.
        index: integers ``[B, S]`` in [-1, T), in any order.

    Returns:
        ``[B, S, ...]``. ``x`` gets its gradient.

    Raises:
        TypeError, ValueError: an argument that does not fit; values are looked at on a CPU only.
    """
    if x.dim() < 2:
        raise ValueError(f"x: expected [B, T, ...], got shape {tuple(x.shape)}")
    selection = StepSelection.from_index(index, x.shape[1])
    if index.shape[0] != x.shape[0]:
        raise ValueError(f"index: expected [{x.shape[0]}, S], as x has sequences, got {tuple(index.shape)}")
    return selection.pad(selection.gather(x))


def encode_steps(encoder: Callable[[Tensor], Tensor], x: Tensor, selection: StepSelection) -> Tensor:
    """``[B, S, ...]``: the encoder's output for the selected steps, zero in empty slots.

    Args:
        encoder: ``[P, ...] -> [P, ...]``, which treats each row by itself. It runs once, on the selected
            steps of all sequences; where nothing is selected, on two rows of zeros for the shape of its
            output.
        x: ``[B, T, ...]``.
        selection: a :class:`StepSelection` of B sequences and T steps.

    Papers: Korbar et al., SCSampler (ICCV 2019); Wu et al., AdaFrame (CVPR 2019).
    """
    rows = selection.gather(x)
    return selection.pad(encode_rows(encoder, rows))


def encode_rows(encoder: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``encoder(rows)``, of no rows too. Buffers stay as they are then."""
    if len(rows):
        return encoder(rows)
    shape_rows = rows.new_zeros(2, *rows.shape[1:])
    with torch.no_grad():
        if isinstance(encoder, torch.nn.Module):
            buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
            return torch.func.functional_call(encoder, buffers, (shape_rows,))[:0]
        return encoder(shape_rows)[:0]


def _check_steps_of(value, name: str) -> None:
    if not isinstance(value, Tensor) or value.is_complex():
        raise TypeError(
            f"{name}: expected a tensor [B, T], got {getattr(value, 'dtype', type(value).__name__)}"
        )
    if value.dim() != 2:
        raise ValueError(f"{name}: expected [B, T], got shape {tuple(value.shape)}")
