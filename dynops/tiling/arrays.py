"""Images, masks and results that may be larger than memory: tensors, numpy arrays, and whatever has a shape and slices."""

from __future__ import annotations

import torch
from torch import Tensor


class Image:
    """``[C, H, W]`` or ``[N, C, H, W]``, or with the channels last; only slices of it are read.

    Attributes:
        batched: whether it has N. samples, channels, height, width: its shape.
    """

    def __init__(self, source, channels_last: bool):
        shape = _shape(source, "image")
        if len(shape) not in (3, 4):
            form = "[H, W, C] or [N, H, W, C]" if channels_last else "[C, H, W] or [N, C, H, W]"
            raise ValueError(f"image: expected {form}, got shape {shape}")
        self.source, self.last, self.batched = source, channels_last, len(shape) == 4
        self.samples = shape[0] if self.batched else 1
        sizes = shape[-3:]
        self.channels, self.height, self.width = (sizes[2], *sizes[:2]) if channels_last else sizes
        if min(sizes) < 1:
            raise ValueError(f"image: expected pixels and channels, got shape {shape}")

    def part(self, sample: int, rows: slice, columns: slice) -> Tensor:
        """``[C, h, w]`` as it is stored."""
        where = (rows, columns, slice(None)) if self.last else (slice(None), rows, columns)
        found = as_tensor(self.source[(sample, *where) if self.batched else where])
        return found.movedim(2, 0) if self.last else found


class Mask:
    """``[H, W]`` or ``[N, H, W]``, nonzero = active, of any resolution; None: all is active."""

    def __init__(self, source, samples: int):
        self.source = source
        if source is None:
            return
        shape = _shape(source, "mask")
        if len(shape) == 4 and shape[1] == 1:
            self.source, shape = source[:, 0], (shape[0], *shape[2:])
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"mask: expected [H, W] or [N, H, W] with pixels, got shape {shape}")
        if len(shape) == 3 and shape[0] not in (1, samples):
            wanted = "1" if samples == 1 else f"1 or {samples}"
            raise ValueError(f"mask: expected [H, W], or [N, H, W] with N = {wanted}, got shape {shape}")
        self.batched, self.one, self.size = len(shape) == 3, shape[0] == 1, shape[-2:]

    def at(self, sample: int, sizes: tuple[int, int], rows: slice, columns: slice) -> Tensor:
        """bool ``[h, w]``: the pixels of a map of ``sizes`` under which a mask pixel is active."""
        if self.source is None:
            return torch.ones(
                rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool, device="cpu"
            )
        spans = [
            under(part, size, own) for part, size, own in zip((rows, columns), sizes, self.size, strict=True)
        ]
        found = self.part(sample, *[slice(int(first[0]), int(end[-1])) for first, end in spans])
        return any_in(found, *[(first - first[0], end - first[0]) for first, end in spans])

    def any(self, sample: int, sizes: tuple[int, int], rows: slice, columns: slice) -> bool:
        """True where :meth:`at` is anywhere."""
        if self.source is None:
            return True
        where = []
        for part, size, own in zip((rows, columns), sizes, self.size, strict=True):
            if part.start >= part.stop:
                return False
            where.append(slice(part.start * own // size, -(-part.stop * own // size)))
        return bool(self.part(sample, *where).any())

    def part(self, sample: int, rows: slice, columns: slice) -> Tensor:
        where = (0 if self.one else sample, rows, columns) if self.batched else (rows, columns)
        return as_tensor(self.source[where]).to("cpu") != 0


def under(part: slice, size: int, own: int) -> tuple[Tensor, Tensor]:
    """The first and the end of the mask's pixels under each pixel of a part of an axis."""
    at = torch.arange(part.start, part.stop, device="cpu")
    return at * own // size, ((at + 1) * own + size - 1) // size


def any_in(mask: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> Tensor:
    """bool ``[h, w]``: whether any pixel of ``mask`` is true in the rectangles of these first and end rows and columns."""
    sums = torch.zeros(mask.shape[0] + 1, mask.shape[1] + 1, dtype=torch.int64, device=mask.device)
    sums[1:, 1:] = mask.long().cumsum(0).cumsum(1)
    of_rows = sums[rows[1]] - sums[rows[0]]
    return (of_rows[:, columns[1]] - of_rows[:, columns[0]]) > 0


def put(out, sample: int | None, rows: slice, columns: slice, values: Tensor, keep: Tensor) -> None:
    """Writes ``values`` ``[C, h, w]`` into a part of ``out`` where ``keep`` is true."""
    where = (slice(None), rows, columns) if sample is None else (sample, slice(None), rows, columns)
    if isinstance(out, Tensor):
        part = out[where]
        part.copy_(torch.where(keep.to(part.device), values.to(part.device, part.dtype), part))
        return
    if bool(keep.all()):
        out[where] = _for_numpy(values)
        return
    old = as_tensor(out[where])
    out[where] = _for_numpy(torch.where(keep, values.to(old.device, old.dtype), old))


def check_out(outs: list, shapes: list[tuple[int, ...]]) -> None:
    """``outs`` are tensors or arrays of these shapes."""
    if len(outs) != len(shapes):
        raise ValueError(
            f"out: expected {len(shapes)} tensors or arrays, one for each output of the model, got {len(outs)}"
        )
    for out, shape in zip(outs, shapes, strict=True):
        if _shape(out, "out") != shape:
            raise ValueError(f"out: expected shape {shape}, got {_shape(out, 'out')}")
        if not hasattr(out, "__setitem__"):
            raise TypeError(
                f"out: expected a tensor or an array that can be written, got {type(out).__name__}"
            )


def _for_numpy(values: Tensor):
    values = values.cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def as_tensor(part) -> Tensor:
    """What was sliced, as a tensor of its own."""
    if isinstance(part, Tensor):
        return part
    import numpy as np

    part = np.asarray(part)
    return torch.from_numpy(np.array(part, dtype=part.dtype.newbyteorder("=")))


def _shape(source, name: str) -> tuple[int, ...]:
    shape = getattr(source, "shape", None)
    if not isinstance(shape, (tuple, list)) or not hasattr(source, "__getitem__"):
        raise TypeError(
            f"{name}: expected a tensor or an array with a shape and slices, got {type(source).__name__}"
        )
    return tuple(int(size) for size in shape)
