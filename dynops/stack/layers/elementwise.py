"""Layers that read each pixel at its own place: activations, sums, dropouts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...geometry import BlockGeometry
from ...kernels.cpu.prepared import StepKind
from ...ops.epilogue import ACTIVATIONS
from ..activations import activation_type
from ..trace import Step, find
from .base import Layer, Rows, called, place

_STEP_KINDS = {nn.Sigmoid: StepKind.SIGMOID, nn.Hardsigmoid: StepKind.HARDSIGMOID}


class Activation(Layer):
    """One elementwise function that nothing before it could take."""

    packs = True

    def __init__(self, step: Step, module: nn.Module):
        super().__init__(place(step.target), step.inputs, step.out)
        self.x, self.kwargs = step.inputs[0], dict(step.kwargs)
        self.copies, self.called = False, None
        self.activation = step.activation if step.kind == "act" else ""
        self.step_kind = StepKind.EACH if self.activation else None
        if step.kind == "act" and step.activation:
            self.function, self.kwargs = ACTIVATIONS[step.activation], {}
        elif step.args == ("function",):
            self.function = find(step.target)
        else:
            self.function, self.kwargs = module.get_submodule(step.target), {}
            self.copies = getattr(self.function, "inplace", False)  # the value may have other readers
            self.step_kind = _STEP_KINDS.get(activation_type(self.function), self.step_kind)
            self.called = (module, step.target) if step.kind == "module" else None
        self.joins = self.step_kind is not None

    def rows(self, run):
        if (waiting := run.waiting(self.x)) is not None:
            return self._apply(waiting)
        plan = run.shared_plan(self)
        if plan is None:
            return self._apply(run.map(self.x) if run.maps else run.dense(self.x))
        return Rows(self._apply(run.at(self.x, plan)), plan)

    def join(self, bound) -> None:
        size, channels = bound.same(self.inputs)
        if self.called is not None:
            bound.calls(*self.called, self.function)
        if self.activation:
            bound.multiply(self, size, channels, activation=self.activation)
        else:
            bound.step(self.step_kind, self, size, channels)

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        return self._apply(inputs[0])

    def _apply(self, x: Tensor) -> Tensor:
        return self.function(x.clone() if self.copies else x, **self.kwargs)


class Add(Layer):
    """The sum of two values."""

    packs = joins = True

    def __init__(self, step: Step, module: nn.Module):
        super().__init__(called(step), step.inputs, step.out)

    def rows(self, run):
        if any(run.waiting(v) is not None for v in self.inputs):
            return run.map(self.inputs[0]) + run.map(self.inputs[1])
        plan, (a, b) = run.together(self)
        if plan is not None:
            return Rows(a + b, plan)
        if run.maps:
            return run.map(self.inputs[0]) + run.map(self.inputs[1])
        return run.masked_as(self, a + b)

    def join(self, bound) -> None:
        bound.add(self, *self.inputs)

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        return inputs[0] + inputs[1]


class Dropout(Layer):
    """Draws for the rows that exist. A dropout of whole channels or samples needs dense maps in training mode."""

    packs = joins = True

    def __init__(self, step: Step, module: nn.Module):
        super().__init__(place(step.target), step.inputs, step.out)
        self.dropout = module.get_submodule(step.target)

    def check(self) -> None:
        if self.dropout.training and getattr(self.dropout, "p", 1) != 0:
            raise TypeError(
                f"{self.name}: expected a dropout in eval mode, got {self.dropout} in training mode"
            )

    def rows(self, run):
        dropout, x = self.dropout, self.inputs[0]
        if not dropout.training:
            return run.env[x]
        if type(dropout) is not nn.Dropout:
            return dropout(run.map(x) if run.maps else run.dense(x))

        plan = run.shared_plan(self)
        if plan is None:
            return F.dropout(run.map(x) if run.maps else run.dense(x), dropout.p, True)
        return Rows(F.dropout(run.at(x, plan), dropout.p, True), plan)

    def join(self, bound) -> None:
        bound.idles(self, self.dropout)
