"""Losses that keep a mixture's experts in even use, and its router's logits small."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import modes


def _rows(value, name: str, like: Tensor | None = None) -> Tensor:
    """A tensor ``[..., C]`` as ``[T, C]``, of ``like``'s leading sizes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dim() == 0 or (like is not None and value.shape[:-1] != like.shape[:-1]):
        leading = "..." if like is None else ", ".join(map(str, like.shape[:-1]))
        raise ValueError(f"{name}: expected shape [{leading}, C], got {tuple(value.shape)}")
    return value.reshape(-1, value.shape[-1])


def _choices(index, num_experts: int, like: Tensor) -> Tensor:
    """int ``[T, K]``, checked; its values where looking at them waits for nothing."""
    if isinstance(index, Tensor) and (
        index.is_floating_point() or index.is_complex() or index.dtype == torch.bool
    ):
        raise TypeError(f"index: expected integers [..., K], got {index.dtype}")
    rows = _rows(index, "index", like)
    looks = rows.device.type == "cpu" and rows.numel() and not torch.compiler.is_compiling()
    if looks and not torch._C._are_functorch_transforms_active():
        low, high = (int(each) for each in rows.aminmax())
        if low < 0 or high > num_experts:
            raise ValueError(f"index: expected values in [0, {num_experts}], got {low} to {high}")
    return rows


def real_tokens(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """bool ``[T]``, false at padding, from a mask of T numbers (``[T]``, ``[B, S]``), nonzero = a token; None: all are real."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor or None, got {type(attention_mask).__name__}")
    if attention_mask.numel() != tokens:
        raise ValueError(
            f"attention_mask: expected one number for each of {tokens} tokens, got shape {tuple(attention_mask.shape)}"
        )
    if modes.may_look(attention_mask) and not bool((attention_mask >= 0).all()):
        raise ValueError(
            "attention_mask: expected 0 at padding and positive numbers at tokens, got a NaN or a negative number "
            "(a mask that is added to scores?)"
        )
    return (attention_mask != 0).reshape(-1)


def _sums(values: Tensor, index: Tensor, num_experts: int) -> Tensor:
    """``[E]``: the sum of ``values`` ``[T, K]`` over the pairs of each expert; pairs with index E count nowhere.

    Through ``[T, E + 1]``, so that no two tokens add to one element: the sum is the same in every run on a GPU too.
    """
    wide = values.new_zeros(values.shape[0], num_experts + 1)
    return wide.scatter_add(1, index.long(), values).sum(0)[:num_experts]


def _cv_squared(x: Tensor) -> Tensor:
    """The squared coefficient of variation, population variance / mean², of ``[E]``; 0 where all are zero."""
    return x.var(correction=0) / (x.mean().square() + 1e-10)


def load_balance_loss(probs: Tensor, index: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Switch's load balance: ``E * sum_e f_e * P_e``, 1 where probabilities and choices are even.

    ``f_e`` is the share of all pairs that chose expert e, ``P_e`` the mean of its probability over the tokens. The gradient
    goes through P. (With K choices transformers' ``load_balancing_loss_func`` is K times this.)

    Args:
        probs: ``[..., E]``, a distribution for each token.
        index: int ``[..., K]``; a pair with index E (dropped) chose no expert. A token all of whose pairs have index E
            counts nowhere, as padding does.
        attention_mask: bool or numbers ``[...]`` (or flat), nonzero = a token, 0 = padding, which counts nowhere; None: no
            padding.

    Papers: Switch Transformers (JMLR 2022), equations 4 to 6; GShard (ICLR 2021).
    """
    rows = _rows(probs, "probs")
    num_experts, real = rows.shape[1], real_tokens(attention_mask, rows.shape[0])
    index, probs = _choices(index, num_experts, probs), rows
    counted = (index < num_experts).any(1)
    counted = counted if real is None else counted & real
    tokens = counted.sum().clamp(min=1)
    ones = counted[:, None].expand(index.shape).to(probs.dtype)
    shares = _sums(ones, index, num_experts) / (tokens * max(index.shape[1], 1))
    return num_experts * (shares * (torch.where(counted[:, None], probs, 0).sum(0) / tokens)).sum()


def importance_loss(
    weight: Tensor, index: Tensor, num_experts: int, attention_mask: Tensor | None = None
) -> Tensor:
    """The squared coefficient of variation of the experts' importance, the sum of their routing weights.

    Args:
        weight: ``[..., K]``, the routing weights.
        index: int ``[..., K]``; pairs with index E (dropped, padding) count nowhere.
        num_experts: E.
        attention_mask: as in :func:`load_balance_loss`.

    Paper: Shazeer et al., sparsely-gated mixture of experts (ICLR 2017), equations 6 and 7.
    """
    rows = _rows(weight, "weight")
    index, weight = _choices(index, num_experts, weight), rows
    if weight.shape != index.shape:
        raise ValueError(f"index: expected weight's {tuple(weight.shape)}, got {tuple(index.shape)}")
    real = real_tokens(attention_mask, weight.shape[0])
    weight = weight if real is None else torch.where(real[:, None], weight, 0)
    return _cv_squared(_sums(weight, index, num_experts))


def load_loss(load: Tensor) -> Tensor:
    """The squared coefficient of variation of the experts' load ``[E]``, which a noisy router estimates smoothly.

    The load is a sum over tokens: ``router(x, attention_mask)`` leaves padding out of it.

    Paper: Shazeer et al., sparsely-gated mixture of experts (ICLR 2017), equations 10 and 11.
    """
    return _cv_squared(_rows(load, "load")[0])


def z_loss(logits: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The router's z-loss: the mean over the tokens of ``logsumexp(logits)²``, logits ``[..., E]``.

    Args:
        attention_mask: as in :func:`load_balance_loss`.

    Paper: Zoph et al., ST-MoE (2022), equation 5.
    """
    logits = _rows(logits, "logits")
    real = real_tokens(attention_mask, logits.shape[0])
    if real is None:
        return torch.logsumexp(logits, 1).square().sum() / max(logits.shape[0], 1)
    logits = torch.where(real[:, None], logits, 0)  # before the square: a NaN at padding has no gradient then
    return torch.where(real, torch.logsumexp(logits, 1).square(), 0).sum() / real.sum().clamp(min=1)
