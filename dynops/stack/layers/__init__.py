"""The layers of a stack: one class for each type of layer. :func:`layer_of` makes them from recorded steps."""

from __future__ import annotations

from torch import nn

from ..activations import ELEMENTWISE, activation_type
from ..trace import Ref, Step, dense_type
from ..tracing import outputs
from .base import Layer, mapped, place
from .call import COPIES, WITH_CHANNELS, Call, Outputs, PerPixel
from .conv import Conv
from .elementwise import Activation, Add, Dropout
from .norm import GroupNorm, Norm
from .pool import AvgPool, GlobalPool, MaxPool, avg_pool, global_pool, max_pool
from .resample import PixelShuffle, Upsample, ZeroPad, interpolate, pad

_OF_KIND = {"conv": Conv, "norm": Norm, "act": Activation, "add": Add, "dropout": Dropout}

_OF_MODULE = {
    nn.MaxPool2d: MaxPool,
    nn.AvgPool2d: AvgPool,
    nn.Upsample: Upsample,
    nn.PixelShuffle: PixelShuffle,
    nn.ZeroPad2d: ZeroPad,
}
_OF_CONVERTED = {**_OF_MODULE, nn.GroupNorm: GroupNorm, nn.InstanceNorm2d: GroupNorm}

_AS_MODULE = {
    "torch.nn.functional:max_pool2d": max_pool,
    "torch:max_pool2d": max_pool,
    "torch.nn.functional:avg_pool2d": avg_pool,
    "torch.nn.functional:interpolate": interpolate,
    "torch.nn.functional:pixel_shuffle": nn.PixelShuffle,
    "torch.nn.functional:pad": pad,
}


def layer_of(step: Step, module: nn.Module, parameters: dict[int, str]) -> Layer:
    """The layer that a recorded step of ``module`` is.

    Args:
        parameters: the paths of the values that are parameters or buffers.
    """
    if step.kind == "add" and any(v in parameters for v in step.inputs):
        step = step._replace(kind="function", target="operator:add", args=tuple(Ref(v) for v in step.inputs))
    if step.kind in _OF_KIND:
        return _OF_KIND[step.kind](step, module)
    if step.target == outputs.NAME:
        return Outputs(step, module, parameters)
    if step.kind == "per_pixel":
        return PerPixel(step, module, parameters)
    inner = module.get_submodule(step.target) if step.kind in ("module", "pool", "layer") else None
    if step.kind in ("pool", "layer"):
        return _OF_CONVERTED[dense_type(inner)](place(step.target), step, inner)
    recorded, layer = Call(step, module, parameters), None
    if recorded.inputs and len(step.inputs) == 1:
        if activation_type(inner) in ELEMENTWISE:
            return Activation(step, module)
        if type(inner) in _OF_MODULE:
            layer = _OF_MODULE[type(inner)](recorded.name, step, inner)
        elif step.kind == "function" and step.target in _AS_MODULE:
            layer = _of_call(recorded, step)
        layer = layer or global_pool(recorded, step, inner)
    if layer is None:
        return recorded
    layer.recorded = recorded
    return layer


def _of_call(recorded: Call, step: Step) -> Layer | None:
    """The layer of a functional pool or interpolation."""
    kwargs = {k: v for k, v in step.kwargs if k != "input"}
    try:
        module = _AS_MODULE[step.target](*step.args[1:], **kwargs)
    except TypeError as error:
        recorded.refusal = f"{recorded.name}: expected arguments that blocks can take, got {error}"
        return None
    return _OF_MODULE[type(module)](recorded.name, step, module)


__all__ = ["COPIES", "WITH_CHANNELS", "Call", "GlobalPool", "Layer", "ZeroPad", "layer_of", "mapped"]
