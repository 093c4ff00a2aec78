"""Fused: a convolution with the norm, sum and activation after it, run as one kernel without maps between.

The same steps run one by one on maps (``frame``), where this does not fit. On ResNet-50 of 512x512 pixels the maps take
10 ms of 75.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...ops.epilogue import Epilogue
from ...ops.pixels.conv import _pixel_conv, convolve_into
from ...plans import PixelPlan
from ..maps.layout import NCHW
from .rules import BatchNorm, Convolution, PixelByPixel
from .stored import Stored
from .tape import Step, Value
from .views import Statistics

_ACTIVATIONS = {name: name for name in ("relu", "silu", "hardswish", "relu6")} | {
    "relu_": "relu",
    "silu_": "silu",
}
_SUMS = ("add", "add_", "__add__", "__radd__", "__iadd__")


class Fused(NamedTuple):
    """Steps that end in the one that they belong to."""

    conv: Step
    norm: Step | None
    residual: Value | None
    activation: str

    def into(self, frame, out: Stored, plan: PixelPlan) -> bool:
        """Writes the rows of a plan into the map that is kept; False where that cannot be."""
        given = self._given(frame, plan)
        return given is not None and convolve_into(out.dense, *given)

    def rows(self, frame, plan: PixelPlan) -> Tensor | None:
        """The rows ``[P, C]`` at a plan, or None."""
        given = self._given(frame, plan)
        if given is None:
            return None
        x, weight, bias, plan, in_plan, g, epilogue = given
        return _pixel_conv(x, weight, bias, plan, in_plan, g, epilogue, None, True, None, False)

    def _given(self, frame, plan: PixelPlan):
        """The arguments of the op, or None."""
        step, rule = self.conv, self.conv.rule
        x, g, in_plan = step.inputs[0], rule.geometry, None
        values = frame.whole_or_none(x)
        if values is None:
            in_plan = plan if rule.pointwise else plan.needed_by(g)
            values = frame.rows_at(x, in_plan)
        if frame.autocasts(values) or values.dtype != rule.weight.dtype:
            return None
        scale = shift = residual = None
        if self.norm is not None and (found := self.norm.rule.affine(self.norm)) is not None:
            scale, shift = found
        elif self.norm is not None:
            return None
        if self.residual is not None:
            residual = frame.whole_or_none(self.residual)
            if residual is None:
                residual = frame.rows_at(self.residual, plan)
            if residual.dtype != values.dtype:
                return None
        bias = None if rule.bias is None else step.plains[rule.bias]
        return (
            values,
            rule.weight,
            bias,
            plan,
            in_plan,
            g,
            Epilogue(self.activation, scale, shift, None, residual),
        )


def fused_of(step: Step) -> Fused | None:
    """The convolution that a step ends, with what lies between; None where it ends none."""
    activation, residual, norm = "", None, None
    if _is_identity(step):
        step = _maker(step.inputs[0])
    if step is not None and step.name in _ACTIVATIONS and len(step.inputs) == 1:
        activation = _ACTIVATIONS[step.name]
        step = _maker(step.inputs[0])
    if step is not None and step.name in _SUMS and len(step.inputs) == 2 and _plain_sum(step):
        a, b = step.inputs
        if a.size != b.size or a.shape != b.shape or a.dtype != b.dtype:
            return None
        made = [_ends_in_conv(v) for v in (a, b)]
        if not any(made):
            return None
        first = 0 if made[0] else 1
        step, residual = _maker(step.inputs[first]), step.inputs[1 - first]
    if step is not None and isinstance(step.rule, (BatchNorm, Statistics)):
        if step.rule.compares or (isinstance(step.rule, Statistics) and not step.rule.fits()):
            return None
        norm, step = step, _maker(step.inputs[0])
    if step is None or not isinstance(step.rule, Convolution):
        return None
    return Fused(step, norm, residual, activation)


def _maker(value: Value) -> Step | None:
    """The step that made a value which is not kept: it is computed where the value is read. Identities are passed over."""
    while value.stored is None and value.axes == NCHW:
        if not _is_identity(value.step):
            return value.step
        value = value.step.inputs[0]
    return None


def _is_identity(step: Step) -> bool:
    """True for a dropout in eval mode and a division by 1, which stand in the blocks of diffusers."""
    if not isinstance(step.rule, PixelByPixel) or step.draws or len(step.inputs) != 1:
        return False
    by = step.key[1][1][1:]
    return step.name == "dropout" or (step.name in ("div", "__truediv__") and by == ((None, 1.0),))


def _ends_in_conv(value: Value) -> bool:
    step = _maker(value)
    if step is not None and isinstance(step.rule, (BatchNorm, Statistics)):
        step = _maker(step.inputs[0])
    return step is not None and isinstance(step.rule, Convolution)


def _plain_sum(step: Step) -> bool:
    args, kwargs = step.key[1][1], step.key[2][1]
    return len(args) == 2 and not kwargs
