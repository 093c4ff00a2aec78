"""Errors of a model under a mask: inputs that it refuses, and the module's name in any other."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..layers.base import Layer

_OWN = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_LIBRARIES = tuple(os.path.join(folder, "") for folder in (_OWN, os.path.dirname(torch.__file__)))
_NAMED = "_dynops_named"


def check_inputs(module: nn.Module, args: tuple, kwargs: dict, active) -> None:
    """Refuses tensors of a sparse layout, and a mask that is finer than the images, where it is the first that runs.

    A mask that is finer by whole numbers is right: the model may be a part of another, or work on latents.

    Raises:
        TypeError, ValueError.
    """
    sizes = []
    for x in (
        args if not kwargs and all(type(x) is Tensor for x in args) else pytree.tree_leaves((args, kwargs))
    ):
        if isinstance(x, Tensor):
            check_layout(x)
            if x.dim() == 4 and x.is_floating_point() and min(x.shape[2:]) > 0:
                sizes.append((x.shape[2], x.shape[3]))
    if active.ran or not sizes:
        return
    size, mask = max(sizes), active.mask_size
    if all(_is_of_stride(n, m) for n, m in zip(size, mask, strict=True)):
        return
    (h, w), (mask_h, mask_w) = size, mask
    raise ValueError(
        f"use_mask: expected a mask no finer than the input of the model ({_kind(module)}), {h}x{w}, or a whole number of "
        f"times as fine, got one of {mask_h}x{mask_w}: resize it, "
        f"torch.nn.functional.adaptive_max_pool2d(mask.float(), ({h}, {w})) > 0"
    )


def _is_of_stride(size: int, mask: int) -> bool:
    """True where ``size`` pixels are at least those of the mask, or these at a stride."""
    return size >= mask or any(size in (mask // s, -(-mask // s)) for s in (mask // size, mask // size + 1))


def check_layout(x: Tensor) -> None:
    """Refuses a tensor of a sparse layout."""
    if x.layout != torch.strided and x.layout != torch._mkldnn:
        raise TypeError(
            f"input: expected a dense tensor, got layout {x.layout}: pass x.to_dense(), and its pixels as the mask"
        )


def name_module(error: Exception, root: nn.Module) -> None:
    """Adds to the message of an error from dynops or torch the name of the module, inside ``root``, that was running.

    A model's own errors keep their text, but for AssertionErrors: it may ask for what a map is not.
    """
    text = error.args[0] if error.args else "" if isinstance(error, AssertionError) else None
    if not isinstance(text, str) or getattr(error, _NAMED, False):
        return
    frames = list(_frames(error))
    raised_by = frames[-1].f_code.co_filename
    if not (raised_by.startswith(_LIBRARIES) or isinstance(error, (AssertionError, AttributeError))):
        return
    names = {id(module): name for name, module in root.named_modules()}
    name, kind = "", _kind(root)
    for frame in reversed(frames):
        module = frame.f_locals.get("self")
        if isinstance(layer := frame.f_locals.get("layer", module), Layer):  # of a trace, which it was at
            name, kind = layer.name, ""
            continue
        outer = getattr(module, "module", module) if name else module  # a Program's
        if id(outer) in names:
            kind = kind if name else _kind(outer)
            name = ".".join(part for part in (names[id(outer)], name) if part)
            break
    where = f"{name} ({kind})" if name and kind else name or f"the model ({kind})"
    advice = ""
    if not isinstance(error, (TypeError, ValueError)):
        advice = (
            ". If it runs without a mask, its forward does what no map can: convert the modules around it one by one, "
            "and not the whole model, so that it gets plain tensors"
        )
    text = f"{text}\n  " if text else ""
    error.args = (f"{text}in {where}, under a mask{advice}", *error.args[1:])
    setattr(error, _NAMED, True)


def _kind(module: nn.Module) -> str:
    """The class that a user knows."""
    return vars(type(module)).get("_dynops_base", type(module)).__name__


def _frames(error: Exception) -> Iterator:
    step = error.__traceback__
    while step is not None:
        yield step.tb_frame
        step = step.tb_next
