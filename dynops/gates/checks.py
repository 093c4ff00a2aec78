"""Checks of arguments that the gates share; each raises and names what came."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_floating(name: str, value) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating tensor, got {getattr(value, 'dtype', type(value).__name__)}"
        )


def check_int(name: str, value, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")


def check_number(name: str, value, above: float = -math.inf) -> None:
    """A finite number over ``above``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not above < value < math.inf:  # math.isfinite cannot be compiled with a value that changes
        over = "finite" if above == -math.inf else f"finite and above {above:g}"
        raise ValueError(f"{name}: expected it {over}, got {value!r}")


def check_rate(name: str, value) -> None:
    """A number between 0 and 1, both excluded."""
    check_number(name, value)
    if not 0 < value < 1:
        raise ValueError(f"{name}: expected it in (0, 1), got {value!r}")


def check_noise(value) -> None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"noise: expected a bool or None, got {type(value).__name__}")


def check_features(x, channels: int, dims: int | None = None) -> None:
    """Features ``[N, C, ...]`` of ``channels`` channels, and of ``dims`` dimensions where that is given."""
    check_floating("x", x)
    if x.dim() < 2 or x.shape[1] != channels or (dims is not None and x.dim() != dims):
        expected = f"[N, {channels}, ...]" if dims is None else f"[N, {channels}, H, W]"
        raise ValueError(f"x: expected {expected}, got shape {tuple(x.shape)}")


def check_broadcasts(name: str, value: Tensor, shape: torch.Size) -> None:
    """A shape that broadcasts to ``shape`` without making it larger."""
    sizes = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.dim() > len(shape) or any(size not in (1, whole) for size, whole in sizes):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to {tuple(shape)}, got {tuple(value.shape)}"
        )


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: noise of 8 bits would be coarse, and log(0) is likely in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
