"""The elementwise activations, and which of them an op can apply itself."""

from __future__ import annotations

from torch import nn

_FUSED = {nn.GELU: "gelu", nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}

# f(0) = 0: on a map that is zero outside a mask these leave it so
ZERO_PRESERVING = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.SiLU,
    nn.GELU,
    nn.Mish,
    nn.Hardswish,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Tanh,
    nn.Softsign,
)
ELEMENTWISE = (*ZERO_PRESERVING, nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid, nn.LogSigmoid, nn.Softplus)


# timm's, with an argument ``inplace`` each; all but a sigmoid's result is torch's bit for bit
_TIMMS = {
    "Swish": nn.SiLU,
    "Mish": nn.Mish,
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "HardSwish": nn.Hardswish,
    "HardSigmoid": nn.Hardsigmoid,
    "GELU": nn.GELU,
}


def activation_type(module: nn.Module) -> type:
    """The class of torch that computes what an activation of timm does; of other modules their own."""
    kind = type(module)
    return _TIMMS.get(kind.__name__, kind) if kind.__module__ == "timm.layers.activations" else kind


def is_norm_act(module: nn.Module) -> bool:
    """True for timm's BatchNormAct2d with an activation that leaves zero as it is: a BatchNorm2d and the module ``act``.

    Known by its name: its forward is BatchNorm2d's, then ``drop``, which does nothing, then ``act``.
    """
    named = isinstance(module, nn.BatchNorm2d) and _own_forward(type(module)) == "BatchNormAct2d"
    drop, act = (module._modules.get(name) for name in ("drop", "act")) if named else (None, None)
    return type(drop) is nn.Identity and activation_type(act) in (nn.Identity, *ZERO_PRESERVING)


def _own_forward(kind: type) -> str:
    """The name of the class that defines the forward; a converted module has a class of its own around it."""
    return next(k.__name__ for k in kind.__mro__ if "forward" in vars(k) and "_dynops_base" not in vars(k))


def fused_name(module: nn.Module) -> str:
    """The name that an op knows this activation by (ops.epilogue.ACTIVATIONS), or ""."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _FUSED.get(activation_type(module), "")
