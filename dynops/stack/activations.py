"""The elementwise activations, and which of them an op can apply itself."""

from __future__ import annotations

from torch import nn

_FUSED = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish"}

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


def fused_name(module: nn.Module) -> str:
    """The name that an op knows this activation by (ops.epilogue.ACTIVATIONS), or ""."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _FUSED.get(type(module), "")
