"""suggest_block_size: measures which block size is fastest for a module, an input and a mask, and remembers it."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .geometry import is_int
from .nn import SparseBlocks
from .plans import BlockPlan, check_mask

_SECONDS = 0.3  # for all candidates together, after one call of each
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 50
_remembered: weakref.WeakKeyDictionary[nn.Module, dict[tuple, int]] = weakref.WeakKeyDictionary()


def suggest_block_size(
    module: nn.Module, x: Tensor, mask: Tensor, candidates: Sequence[int] = (4, 8, 16, 32)
) -> int:
    """The block size with which ``nn.SparseBlocks(module, block_size)(x, mask)`` is fastest here.

    Small blocks follow a mask closely; large ones have less halo and fewer calls. The best size depends on the
    layers, the mask and the machine, so it is measured. The candidates take turns for about 0.3 s, longer if a
    call takes more than 25 ms, and the lowest median wins. The answer is kept while the module lives, and another
    call returns it at once. It holds for this shape, dtype, memory format, device, number of threads and density
    of the mask (of its pixels and of its blocks, to 5 %).

    The module is run in inference mode as it is; its training flags and torch's random state stay.

    Args:
        module: any stack of layers that :class:`dynops.nn.SparseBlocks` takes.
        x: ``[N, C, H, W]``, a typical input.
        mask: ``[N, out_H, out_W]`` or ``[N, 1, out_H, out_W]``, a typical mask of the output.
        candidates: block sizes to try. One that the module does not fit is left out.

    Raises:
        TypeError: an argument of another type; a layer that SparseBlocks cannot trace.
        ValueError: no candidates, one below 1, or none that fits, with each one's reason.

    Paper: Ren et al., SBNet (CVPR 2018). Its authors tune the block size for every problem.
    """
    sizes = _check(module, x, mask, candidates)
    key = _key(x, check_mask(mask), sizes)
    known = _remembered.setdefault(module, {})
    if key not in known:
        known[key] = _fastest(module, x, mask, sizes)
    return known[key]


def _check(module, x, mask, candidates) -> tuple[int, ...]:
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor [N, C, H, W], got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"x: expected [N, C, H, W], got shape {tuple(x.shape)}")
    check_mask(mask)
    listed = isinstance(candidates, Sequence) and len(candidates) > 0
    if not listed or not all(is_int(size, 1) for size in candidates):
        raise ValueError(f"candidates: expected block sizes, ints >= 1, got {candidates!r}")
    return tuple(dict.fromkeys(candidates))


def _key(x: Tensor, mask: Tensor, sizes: tuple[int, ...]) -> tuple:
    """The key of an answer. Scattered and clustered masks of one density differ in their largest blocks."""
    densities = tuple(round(BlockPlan.from_mask(mask, size).density * 20) for size in (1, max(sizes)))
    layout = x.is_contiguous(memory_format=torch.channels_last)
    return tuple(x.shape), x.dtype, str(x.device), layout, densities, torch.get_num_threads(), sizes


@torch.inference_mode()
def _fastest(module: nn.Module, x: Tensor, mask: Tensor, sizes: tuple[int, ...]) -> int:
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices):  # dropout may draw
        calls = _callable(module, x, mask, sizes)
        if len(calls) == 1:
            return next(iter(calls))
        times = _interleaved(calls, x.device)
    return min(times, key=times.get)


def _callable(module: nn.Module, x: Tensor, mask: Tensor, sizes: tuple[int, ...]) -> dict[int, Callable]:
    """A call for each size that fits; each was made once, so that weights are packed."""
    calls, reasons = {}, {}
    for size in sizes:
        try:
            layer = SparseBlocks(module, size)
            layer(x, mask)
        except ValueError as reason:
            reasons.setdefault(str(reason), []).append(size)
        else:
            calls[size] = lambda layer=layer: layer(x, mask)
    if not calls:
        text = "; ".join(f"{', '.join(map(str, tried))}: {reason}" for reason, tried in reasons.items())
        raise ValueError(f"candidates: expected a block size that fits the module, got {text}")
    return calls


def _interleaved(calls: dict[int, Callable], device: torch.device) -> dict[int, float]:
    """Median seconds of each call; they take turns, so that a slow moment of the machine hits all of them."""
    times: dict[int, list[float]] = {size: [] for size in calls}
    end = time.perf_counter() + _SECONDS
    for done in range(_MOST_ROUNDS):
        if done >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
        for size, call in calls.items():
            times[size].append(_seconds(call, device))
    return {size: statistics.median(values) for size, values in times.items()}


def _seconds(call: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
