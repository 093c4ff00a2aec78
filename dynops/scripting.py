"""Refusals of TorchScript: its tracer, its compiler and the ONNX exporter that is built on them."""

from __future__ import annotations

import functools
import inspect
import types

import torch

_tracing = torch._C._is_tracing


def refuse_tracing() -> None:
    """Raises RuntimeError while ``torch.jit.trace``, or the ONNX exporter that is built on it, runs: 0.04 us.

    It would keep the indices of its example for every input, and not record the kernels that fill an output.
    """
    if _tracing():
        raise RuntimeError(f"dynops: torch.jit.trace would freeze what this example computes; {INSTEAD}")


INSTEAD = (
    "use torch.export.export, which keeps the decision in its graph; a converted model can be scripted after "
    "dynops.revert_(model)"
)


def refuse_onnx() -> None:
    """Raises RuntimeError in an export by ``torch.onnx.export(dynamo=True)``, whose own error names ops alone."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "dynops: ONNX has no op for the pixels of a mask; export the model outside of dynops.use_mask and without masks, "
            "which gives the dense model, or package it by AOTInductor, which keeps the mask"
        )


def unscriptable(names: dict, exported: list[str]) -> None:
    """Gives the exports of a package the hook that ``torch.jit.script`` calls first: one that raises RuntimeError.

    Layers also take every argument by its place while they are traced, as the ONNX exporter passes defaults.
    """
    for name in exported:
        value = names[name]
        if isinstance(value, types.FunctionType):
            value.__prepare_scriptable__ = functools.partial(_refuse_script, None, name)
        elif isinstance(value, type) and issubclass(value, torch.nn.Module):
            value.__prepare_scriptable__ = functools.partialmethod(_refuse_script, name)
            value._slow_forward = _traced_forward


def _refuse_script(module, name: str):
    raise RuntimeError(f"dynops: torch.jit.script cannot compile {name}; {INSTEAD}")


def _traced_forward(module, *arguments, **named):
    parameters = inspect.signature(module.forward).parameters.values()
    if len(arguments) > sum(p.kind is not p.KEYWORD_ONLY for p in parameters):
        named |= dict(zip((p.name for p in parameters), arguments, strict=False))
        arguments = ()
    return torch.nn.Module._slow_forward(module, *arguments, **named)
