"""Buffers that keep their dtype: counts, thresholds and sums of small steps, which 8 bits of mantissa would ruin."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


class ExactBuffers(nn.Module):
    """A module some of whose buffers stay as exact as they are made: ``.to(dtype)``, ``.half()`` and a checkpoint of
    another dtype move and fill them, and do not round them."""

    def _exact(self) -> Iterable[str]:
        """Their names."""
        raise NotImplementedError

    def _apply(self, fn, recurse: bool = True):
        before = {name: self._buffers[name] for name in self._exact() if self._buffers[name] is not None}
        super()._apply(fn, recurse)
        for name, value in before.items():  # the new device, not the new dtype
            moved = self._buffers[name]
            if moved.dtype != value.dtype:
                self._buffers[name] = moved.to(value.dtype) if value.is_meta else value.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        before = {n: self._buffers[n].dtype for n in self._exact() if self._buffers[n] is not None}
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        for name, dtype in before.items():  # load_state_dict(assign=True) takes the checkpoint's tensors
            self._buffers[name] = self._buffers[name].to(dtype)
