"""Masks and indices of every plan: checks, resizing, positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import is_int, known

MAX_PIXELS = 2**31 - 1
_INDEX_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MASK_DTYPES = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
}


def named(name: str, own: str, make, *arguments, **options):
    """``make(*arguments, **options)``, whose errors about its argument ``own`` name the caller's, ``name``."""
    try:
        return make(*arguments, **options)
    except (TypeError, ValueError) as error:
        text = str(error)
        if not text.startswith(f"{own}: "):
            raise
        raise type(error)(name + text[len(own) :]) from None


def as_plan(kind: type, mask_or_plan, name: str, *options, batch: int | None = None):
    """A plan of this kind: itself, or that of a mask (``kind.from_mask(mask, *options)``).

    One for a single sample is that of every sample of ``batch``.
    """
    if isinstance(mask_or_plan, Tensor):
        mask_or_plan = named(name, "mask", kind.from_mask, mask_or_plan, *options)
    if not isinstance(mask_or_plan, kind):
        hint = " (pass its .mask)" if isinstance(getattr(mask_or_plan, "mask", None), Tensor) else ""
        raise TypeError(
            f"{name}: expected a {kind.__name__} or a mask tensor, got {type(mask_or_plan).__name__}{hint}"
        )
    if batch is not None and mask_or_plan.shape[0] == 1:
        return mask_or_plan.expand(batch)
    return mask_or_plan


def raising(op, *arguments, name: str = "mask"):
    """``op(*arguments)``, where a NaN in the mask is a ValueError instead of the op's RuntimeError.

    Never in inference mode, so that a plan that an evaluation built may serve training.
    """
    try:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return op(*arguments)
        with torch.inference_mode(False):
            return op(*arguments)
    except RuntimeError as error:
        if "NaN" in str(error):
            raise ValueError(f"{name}: expected numbers, got NaN in it") from None
        raise


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """``[N, H, W]`` to ``[N, *size]`` bool: true where any pixel under the output pixel is."""
    h, w = mask.shape[1:]
    if known(h == size[0]) and known(w == size[1]):
        return mask != 0
    if known(h % size[0] == 0) and known(w % size[1] == 0):
        tiles = (mask != 0).view(mask.shape[0], size[0], h // size[0], size[1], w // size[1])
        return tiles.any(4).any(2)
    if known(size[0] % max(h, 1) == 0) and known(size[1] % max(w, 1) == 0) and known(h > 0) and known(w > 0):
        repeated = (mask != 0)[:, :, None, :, None].expand(-1, -1, size[0] // h, -1, size[1] // w)
        return repeated.reshape(mask.shape[0], *size)  # 20 us of 7x7 to 224x224, where the pool takes 400
    if torch.compiler.is_compiling():  # of any sizes
        return _resized(_resized(mask != 0, 1, size[0]), 2, size[1])
    return F.adaptive_max_pool2d((mask != 0).float(), size) > 0


def _resized(mask: Tensor, dim: int, size: int) -> Tensor:
    """A bool mask in another size along one dimension, from the number of pixels before each."""
    old, at = mask.shape[dim], torch.arange(size, device=mask.device)
    before = F.pad(mask.cumsum(dim, dtype=torch.int32), (0, 0) * (mask.dim() - 1 - dim) + (1, 0))
    first, end = at * old // size, -(-(at + 1) * old // size)
    return before.index_select(dim, end) > before.index_select(dim, first)


def check_index(index: Tensor, count: Tensor | None, size: int, rows: str, hint: str = "") -> None:
    """Checks an index that somebody else made, of ``size`` positions. Only on a CPU its values are looked at.

    Args:
        rows, hint: the expected shape and a hint, for the message.
    """
    if not isinstance(index, Tensor) or index.dtype != torch.int32 or index.dim() != 1:
        what = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index: expected int32 {rows}, got {what}")
    if count is not None and (count.dtype != torch.int32 or tuple(count.shape) != (1,)):
        raise TypeError(f"count: expected int32 [1] or None, got {count.dtype} {tuple(count.shape)}")
    looks = index.device.type == "cpu" and type(index) is Tensor and not torch.compiler.is_compiling()
    if not looks or torch._C._are_functorch_transforms_active():
        return
    valid = index.shape[0] if count is None else int(count)
    if not 0 <= valid <= index.shape[0]:
        raise ValueError(f"count: expected 0 to {index.shape[0]}, got {valid}")
    if bool((index[valid:] != -1).any()):
        raise ValueError(f"index: expected -1 from position {valid} on, got {index[valid:].tolist()[:4]}")
    index = index[:valid]
    if valid == 0 or (int(index[0]) >= 0 and int(index[-1]) < size and bool((index[1:] > index[:-1]).all())):
        return
    outside = index[(index < 0) | (index >= size)]
    if outside.numel():
        raise ValueError(f"index: expected positions in [0, {size}), got {int(outside[0])}")
    at = int((index[1:] <= index[:-1]).nonzero()[0])
    raise ValueError(
        f"index: expected strictly ascending positions, got {int(index[at + 1])} after {int(index[at])}{hint}"
    )


def check_shape(shape, name: str = "shape") -> tuple[int, int, int]:
    """``shape`` as ``(N, H, W)`` of at most 2**31 - 1 pixels."""
    if not isinstance(shape, (tuple, list)) or len(shape) != 3 or not all(is_int(n, 0) for n in shape):
        raise ValueError(f"{name}: expected (N, H, W), got {shape!r}")
    if known(shape[0] * shape[1] * shape[2] > MAX_PIXELS):
        raise ValueError(f"{name}: expected at most {MAX_PIXELS} pixels, got {tuple(shape)}")
    return tuple(shape)


def flat_index(coordinates: Tensor, shape: tuple[int, int, int], looks: bool) -> Tensor:
    """int64 ``[P]``: the flat position of each (n, y, x) or (y, x), or -1 outside of ``shape``.

    Args:
        looks: whether to raise for one outside of ``shape`` where this synchronises; elsewhere it always does.
    """
    if not isinstance(coordinates, Tensor) or coordinates.dtype not in _INDEX_DTYPES:
        what = coordinates.dtype if isinstance(coordinates, Tensor) else type(coordinates).__name__
        raise TypeError(f"coordinates: expected a tensor of ints [P, 3] or [P, 2], got {what}")
    if coordinates.dim() != 2 or coordinates.shape[1] not in (2, 3):
        raise ValueError(
            f"coordinates: expected [P, 3] (n, y, x) or [P, 2] (y, x), got shape {tuple(coordinates.shape)}"
        )
    if coordinates.shape[1] == 2 and shape[0] != 1:
        raise ValueError(
            f"coordinates: expected [P, 3] (n, y, x) for a batch of {shape[0]}, got [P, 2] (y, x)"
        )
    wide = coordinates.long()
    columns = list(zip(wide.unbind(1), shape[-wide.shape[1] :], strict=True))
    inside = torch.ones_like(wide[:, 0], dtype=torch.bool)
    for column, size in columns:
        inside = inside & (column >= 0) & (column < size)
    looks = looks or wide.device.type == "cpu"
    if looks and not torch.compiler.is_compiling() and not bool(inside.all()):
        at = int((~inside).nonzero()[0])
        raise ValueError(
            f"coordinates: expected (n, y, x) inside of {shape}, got {wide[at].tolist()} at {at}"
        )
    flat = torch.zeros_like(wide[:, 0])
    for column, size in columns:
        flat = flat * size + column
    return torch.where(inside, flat, -1)


def check_expand(plan, batch: int, size: int) -> None:
    """Checks that a plan of ``size`` pixels (or blocks) may stand for ``batch`` samples."""
    if not is_int(batch, 0):
        raise ValueError(f"batch: expected an int >= 0, got {batch!r}")
    if plan.shape[0] != 1:
        raise ValueError(
            f"batch: expected {plan.shape[0]}, as the plan is of more than one sample, got {batch}"
        )
    if known(batch * size > MAX_PIXELS):
        raise ValueError(
            f"batch: expected at most {MAX_PIXELS} pixels in the batch, got {batch} times {size}"
        )


def check_expected(expected: int | None) -> None:
    if expected is not None and not is_int(expected, 0):
        raise ValueError(f"expected: expected an int >= 0 or None, got {expected!r}")


def repeat_index(index: Tensor, batch: int, size: int) -> Tensor:
    """The index of ``batch`` samples of ``size`` pixels, all with that of the one."""
    first = torch.arange(batch, dtype=torch.int32, device=index.device) * size
    return (first[:, None] + index).view(-1)


def check_mask_dtype(mask: Tensor, name: str, what: str) -> None:
    """Checks that ``mask`` is a tensor whose nonzeros can be told; ``what``: the shapes that are expected."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor {what}, got {type(mask).__name__}")
    if mask.dtype not in _MASK_DTYPES:
        raise TypeError(f"{name}: expected a bool, integer or floating dtype, got {mask.dtype}")
    if mask.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {mask.layout}")


def check_mask(mask: Tensor, name: str = "mask") -> Tensor:
    """``mask`` as ``[N, H, W]``, detached and checked.

    Two dimensions are always ``[H, W]``: one mask, as ``[1, H, W]`` is. One mask holds for any batch: see
    :meth:`dynops.PixelPlan.expand`.
    """
    check_mask_dtype(mask, name, "[N, H, W], [N, 1, H, W] or [H, W]")
    if mask.dim() == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.dim() == 2:
        mask = mask[None]
    if mask.dim() != 3:
        raise ValueError(f"{name}: expected [N, H, W], [N, 1, H, W] or [H, W], got shape {tuple(mask.shape)}")
    if known(mask.numel() > MAX_PIXELS):
        raise ValueError(f"{name}: expected at most {MAX_PIXELS} pixels, got {mask.numel()}")
    return mask.detach()
