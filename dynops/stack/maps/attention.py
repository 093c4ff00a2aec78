"""Attention of maps: the dense result, computed from the pixels of the mask.

Elsewhere queries, keys and values are zero. A zero query weighs all keys alike: its result is the mean of the values. Zero
keys have a score of zero, and their values add nothing: n of them are one key with a score of log n.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...modes import autocast_dtype
from ..layers.pool import has_slices, lengths, over_pixels
from .value import SparseMap

_TOKENS = ("n", "c", "s", "c")  # [N, heads, H * W, channels]


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """``F.scaled_dot_product_attention`` where the queries ``[N, heads, H * W, C]`` are a map: a dense tensor."""
    if not _is_map(query) or attn_mask is not None or dropout_p or is_causal or enable_gqa:
        return NotImplemented
    if autocast_dtype(query) not in (None, query.dtype):  # the result has another dtype
        return NotImplemented
    sparse = _is_map(key) and _is_map(value) and value.plan is key.plan
    if not sparse and any(type(x) is SparseMap for x in (key, value)):
        return NotImplemented
    (n, heads, tokens, _), plan = query.shape, query.plan
    width = value.shape[3]
    if sparse:
        sums = over_pixels("sum", value.rows().flatten(1), key.plan)
        mean = (sums / max(key.shape[2], 1)).view(n, value.shape[1], 1, width)
        keys = [x.rows().split(lengths(key.plan)) for x in (key, value)]
    else:
        mean, keys = value.mean(2, keepdim=True), [x.expand(n, -1, -1, -1) for x in (key, value)]
    out = mean.expand(n, heads, tokens, width).clone()
    index = (plan.index.long() - plan.index.long() // tokens * tokens).split(lengths(plan))
    for i, rows in enumerate(query.rows().split(lengths(plan))):
        if rows.shape[0]:
            k, v = (x[i].transpose(0, 1) if sparse else x[i] for x in keys)
            # [heads, keys, C]; one may be for all heads
            k, v = k.expand(heads, -1, -1), v.expand(heads, -1, -1)
            zeros = key.shape[2] - k.shape[1] if sparse else 0
            out[i, :, index[i]] = _attended(rows.transpose(0, 1), k, v, zeros, scale)
    return out


def _attended(query: Tensor, key: Tensor, value: Tensor, zeros: int, scale: float | None) -> Tensor:
    """The result ``[heads, L, C]`` with ``zeros`` keys and values of zero beside those that are given."""
    if not zeros:
        return F.scaled_dot_product_attention(query[None], key[None], value[None], scale=scale)[0]
    key, value = (F.pad(x, (0, 0, 0, 1))[None] for x in (key, value))
    bias = torch.zeros(key.shape[2], dtype=query.dtype, device=query.device)
    bias[-1] = math.log(zeros)
    bias = bias.expand(query.shape[1], -1)
    return F.scaled_dot_product_attention(query[None], key, value, bias, scale=scale)[0]


def _is_map(x) -> bool:
    return type(x) is SparseMap and not x.is_input and x.axes == _TOKENS and has_slices(x.plan)
