"""The arguments of functions of torch that a rule knows: their names, order and defaults."""

from __future__ import annotations

import inspect

import torch


def _conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1): ...


def _conv_transpose2d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
): ...


def _interpolate(
    input,
    size=None,
    scale_factor=None,
    mode="nearest",
    align_corners=None,
    recompute_scale_factor=None,
    antialias=False,
): ...


def _pad(input, pad, mode="constant", value=None): ...


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5, *rest): ...


def _instance_norm(
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
    *rest,
): ...


def _batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5, *rest
): ...


def _scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
): ...


_SIGNATURES = {
    function.__name__[1:]: inspect.signature(function)
    for function in (
        *(_conv2d, _conv_transpose2d, _interpolate, _pad, _group_norm, _instance_norm, _batch_norm),
        _scaled_dot_product_attention,
    )
}


def of_step(step) -> dict | None:
    """A step's arguments by name; None where they are others. Tensors are ``Ref`` and ``Plain``, others themselves."""
    args, kwargs = step.key[1][1], dict(step.key[2][1])
    try:
        given = _SIGNATURES[step.name].bind(*args, **kwargs)
    except TypeError:
        return None
    given.apply_defaults()
    return {name: plainly(value) for name, value in given.arguments.items()}


def plainly(value):
    """A frozen argument as it was, where it holds no tensor; a dict or a slice stays frozen."""
    if type(value) is tuple and len(value) == 2 and value[0] in (tuple, list, torch.Size):
        return tuple(plainly(x) for x in value[1])
    return value[1] if type(value) is tuple and len(value) == 2 and value[0] is None else value


def tensors(step, given: dict, *names: str) -> list:
    """The step's own tensors of these names; None where an argument is None."""
    return [None if given[name] is None else step.plains[given[name].place] for name in names]
