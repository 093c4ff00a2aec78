"""What every plan does with a mask: checks it, resizes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PIXELS = 2**31 - 1
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


def raising(op, *arguments, name: str = "mask"):
    """``op(*arguments)``, where a NaN in the mask is a ValueError instead of the op's RuntimeError."""
    try:
        return op(*arguments)
    except RuntimeError as error:
        if "NaN" in str(error):
            raise ValueError(f"{name}: expected numbers, got NaN in it") from None
        raise


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """``[N, H, W]`` to ``[N, *size]`` bool: true where any pixel under the output pixel is."""
    h, w = mask.shape[1:]
    if (h, w) == tuple(size):
        return mask != 0
    if h % size[0] == 0 and w % size[1] == 0:
        tiles = (mask != 0).view(mask.shape[0], size[0], h // size[0], size[1], w // size[1])
        return tiles.any(4).any(2)
    return F.adaptive_max_pool2d((mask != 0).float(), size) > 0


def check_mask_dtype(mask: Tensor, name: str, what: str) -> None:
    """Whether ``mask`` is a tensor whose nonzeros can be told; ``what``: the shapes that are expected."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a tensor {what}, got {type(mask).__name__}")
    if mask.dtype not in _MASK_DTYPES:
        raise TypeError(f"{name}: expected a bool, integer or floating dtype, got {mask.dtype}")
    if mask.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {mask.layout}")


def check_mask(mask: Tensor, name: str = "mask") -> Tensor:
    """``mask`` as ``[N, H, W]``, or an error that says what is wrong with it."""
    check_mask_dtype(mask, name, "[N, H, W] or [N, 1, H, W]")
    if mask.dim() == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.dim() != 3:
        raise ValueError(f"{name}: expected [N, H, W] or [N, 1, H, W], got shape {tuple(mask.shape)}")
    if mask.numel() > MAX_PIXELS:
        raise ValueError(f"{name}: expected at most {MAX_PIXELS} pixels, got {mask.numel()}")
    return mask.detach()
