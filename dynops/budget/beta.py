"""The cumulative distribution function of the Beta distribution, with a gradient, on the tensor's device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TERMS = 60  # of the continued fraction: 1e-12 for alpha and beta up to about 100
_EDGE = 1e-6  # the density may be infinite at 0 and at 1


def beta_cdf(x: Tensor, alpha: float, beta: float) -> Tensor:
    """``P(X <= x)`` for X ~ Beta(alpha, beta), x floating.

    Computed in float64, returned in the dtype of ``x`` (float32 at least).
    The gradient is the density, at the edges that at a distance of 1e-6 from them.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return _BetaCdf.apply(x.double(), alpha, beta).to(dtype)


def _log_beta(alpha: float, beta: float) -> float:
    return math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)


class _BetaCdf(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, alpha: float, beta: float) -> Tensor:
        x = x.clamp(0, 1)
        mirrored = x > (alpha + 1) / (alpha + beta + 2)  # there the fraction of the other tail converges
        at = torch.where(mirrored, 1 - x, x)
        a = torch.where(mirrored, beta, alpha).to(x.dtype)
        tail = _incomplete(at, a, alpha + beta - a, _log_beta(alpha, beta))
        return torch.where(mirrored, 1 - tail, tail)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, *ctx.parameters = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,), (alpha, beta) = ctx.saved_tensors, ctx.parameters
        at = x.clamp(_EDGE, 1 - _EDGE)
        log = (alpha - 1) * at.log() + (beta - 1) * (-at).log1p() - _log_beta(alpha, beta)
        return grad * log.exp() * ((x >= 0) & (x <= 1)), None, None


def _incomplete(x: Tensor, a: Tensor, b: Tensor, log_beta: float) -> Tensor:
    """The regularised incomplete beta function by its continued fraction (Lentz's method)."""
    front = (a * x.log() + b * (-x).log1p() - log_beta).exp() / a
    c, d = torch.ones_like(x), 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, _TERMS):
        for top in (m * (b - m) / (a + 2 * m - 1), -(a + m) * (a + b + m) / (a + 2 * m + 1)):
            top = top * x / (a + 2 * m)
            d = 1 / (1 + top * d)
            c = 1 + top / c
            fraction = fraction * c * d
    return torch.where(x == 0, 0.0, front * fraction)
