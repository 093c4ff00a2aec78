"""The functions that have a state or options, as modules that follow ``self.training``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import functions
from .checks import check_int, check_noise, check_number
from .functions import Decision


class _Gumbel(nn.Module):
    """Base of both relaxations: a temperature and a noise switch, attributes that may be set at any time."""

    def __init__(self, temperature: float = 1.0, hard: bool = True, noise: bool | None = None):
        super().__init__()
        check_number("temperature", temperature, above=0)
        check_noise(noise)
        self.temperature, self.hard, self.noise = temperature, hard, noise

    def extra_repr(self) -> str:
        noise = "" if self.noise is None else f", noise={self.noise}"
        return f"temperature={self.temperature}, hard={self.hard}{noise}"


class GumbelSigmoid(_Gumbel):
    """:func:`gumbel_sigmoid` with noise in training mode unless ``noise`` is set.

    Args:
        temperature, hard, noise: as there; attributes that may be set (:func:`set_temperature`,
            :func:`set_noise`).

    Shape:
        - logits: floating, any shape. Output: :class:`Decision` of that shape.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
    """

    def forward(self, logits: Tensor) -> Decision:
        return functions.gumbel_sigmoid(logits, self.temperature, self.hard, self.training, self.noise)


class GumbelSoftmax(_Gumbel):
    """:func:`gumbel_softmax` over the last dimension, with noise in training mode unless ``noise`` is set.

    Args:
        temperature, hard, noise: as there; attributes that may be set (:func:`set_temperature`,
            :func:`set_noise`).

    Shape:
        - logits: floating ``[..., K]``. Output: :class:`Decision` of that shape.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
    """

    def forward(self, logits: Tensor) -> Decision:
        return functions.gumbel_softmax(logits, self.temperature, self.hard, self.training, -1, self.noise)


class ImprovedSemHash(nn.Module):
    """:func:`improved_semhash`, in training mode with noise and half of the samples discrete.

    Args:
        noise_std: the noise's standard deviation.

    Shape:
        - logits: floating ``[N, ...]``. Output: :class:`Decision` of that shape.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.
    """

    def __init__(self, noise_std: float = 1.0):
        super().__init__()
        check_number("noise_std", noise_std)
        if noise_std < 0:
            raise ValueError(f"noise_std: expected it at least 0, got {noise_std!r}")
        self.noise_std = noise_std

    def forward(self, logits: Tensor) -> Decision:
        return functions.improved_semhash(logits, self.training, self.noise_std)

    def extra_repr(self) -> str:
        return f"noise_std={self.noise_std}"


class NoisyTopK(nn.Module):
    """:func:`noisy_top_k`, with noise in training mode.

    Args:
        k: choices kept.

    Shape:
        - logits: floating ``[..., K]``; noise_std: a number or a tensor that broadcasts with it.
        - output: :class:`Decision`, its mask the k weights.

    Raises:
        ValueError: k that is no int above 0.
    """

    def __init__(self, k: int):
        super().__init__()
        check_int("k", k)
        self.k = k

    def forward(self, logits: Tensor, noise_std: float | Tensor) -> Decision:
        return functions.noisy_top_k(logits, noise_std, self.k, self.training)

    def extra_repr(self) -> str:
        return f"k={self.k}"


class Threshold(nn.Module):
    """:func:`threshold` with a threshold of its own: learned, or fixed.

    Args:
        initial: its first value.
        shape: its shape, which broadcasts to the scores': ``()`` for all, ``(C, 1, 1)`` for each channel.
        slope: of the surrogate's sigmoid; CGNet's is 2.
        learned: False: a buffer ``threshold`` instead of a parameter; it is float32 at least, and ``.to(dtype)`` does not round it.

    Shape:
        - score: floating, any shape that ``shape`` broadcasts to. Output: :class:`Decision` of that shape.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Paper: Hua et al., Channel gating neural networks (NeurIPS 2019).
    """

    def __init__(
        self,
        initial: float = 0.0,
        shape: tuple[int, ...] = (),
        slope: float = 2.0,
        learned: bool = True,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_number("initial", initial)
        check_number("slope", slope, above=0)
        self.slope = slope
        if not learned:
            dtype = torch.promote_types(dtype or torch.float32, torch.float32)
        value = torch.full(tuple(shape), float(initial), device=device, dtype=dtype)
        if learned:
            self.threshold = nn.Parameter(value)
        else:
            self.register_buffer("threshold", value)

    def _apply(self, fn, recurse: bool = True):
        before = self._buffers.get("threshold")
        super()._apply(fn, recurse)
        if before is not None and self.threshold.dtype != before.dtype:  # the new device, not the new dtype
            moved = self.threshold
            self.threshold = moved.to(before.dtype) if before.is_meta else before.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        dtype = self.threshold.dtype
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if "threshold" in self._buffers:  # load_state_dict(assign=True) takes the checkpoint's tensor
            self.threshold = self.threshold.to(dtype)

    def forward(self, score: Tensor) -> Decision:
        return functions.threshold(score, self.threshold, self.slope)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.threshold.shape)}, slope={self.slope}"


def _gumbels(module: nn.Module) -> list[_Gumbel]:
    found = [m for m in module.modules() if isinstance(m, _Gumbel)]
    if not found:
        raise ValueError(
            f"module: expected one with a Gumbel gate in it, got {type(module).__name__} without"
        )
    return found


def set_temperature(module: nn.Module, temperature: float) -> None:
    """Sets the temperature of every Gumbel gate in ``module``; annealing is a call of this in each epoch.

    Raises:
        ValueError: a temperature that is not above 0, or a module without Gumbel gates.
    """
    check_number("temperature", temperature, above=0)
    for gate in _gumbels(module):
        gate.temperature = temperature


def set_noise(module: nn.Module, noise: bool | None) -> None:
    """Sets the noise switch of every Gumbel gate in ``module``: None: as the mode has it, True: on, False: off.

    Raises:
        TypeError: another switch. ValueError: a module without Gumbel gates.
    """
    check_noise(noise)
    for gate in _gumbels(module):
        gate.noise = noise
