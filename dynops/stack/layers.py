"""The layers that run on blocks: what each reads (``nn.reach``), and how it computes a batch of tiles.

A layer gets tiles that hold exactly the pixels that its output tiles read, and computes them without
padding: what lies outside the map is in the tiles, as ``outside`` asks for it.
"""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import modes
from ..geometry import BlockGeometry, pair
from ..ops.epilogue import ACTIVATIONS
from ..plans import PixelPlan
from .module_geometry import geometry_of
from .norm import norm_rows, uses_batch_statistics
from .receptive_field import Enlarged, Same, Span, Transposed, Window
from .run_rows import FusedConv
from .trace import Ref, Step, find

_SAME = (Same(), Same())
_MAX_FACTOR = 40  # from 41 on torch's float32 index of "nearest" is off by one


def spans_of(g: BlockGeometry) -> tuple[Span, Span]:
    """What its blocks cover along y and x."""
    return Span(g.first_h, g.tile_h, g.step_h), Span(g.first_w, g.tile_w, g.step_w)


def place(path: str) -> str:
    """The name of a layer in an error: its path in the module that was passed, "module" for itself."""
    return path.removeprefix("module.")


def called(step: Step) -> str:
    """The name of a call in an error: the module whose forward makes it, and the function."""
    function = step.target.rpartition(":")[2] or step.kind
    where = place(step.scope)
    return f"{where}.{function}" if where else function


class Layer:
    """A layer that reads maps.

    Attributes:
        name: its path, for errors.
        inputs, out: the values that it reads and makes.
        reaches: for each input the reach along y and x.
        outside: what its first input must be where it lies outside the map: "zero", "-inf" (below
            every value), "edge" (the nearest pixel inside), or "" where it makes no difference.
        rows: whether it can run on packed rows.
    """

    outside = ""
    rows = False
    fused: FusedConv | None = None  # of a convolution: how it runs on rows

    def __init__(self, name: str, inputs: tuple[int, ...], out: int, reaches=None):
        self.name, self.inputs, self.out = name, inputs, out
        self.reaches = reaches or (_SAME,) * len(inputs)

    def check(self) -> None:
        """Raises TypeError where the layer, as it is now, cannot run on blocks."""

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        """The tiles ``[B, C, out.tile_h, out.tile_w]``; ``blocks.at(axis)`` are their places in the grid."""
        raise NotImplementedError

    def on_rows(self, inputs: list[Tensor], plan: PixelPlan) -> Tensor:
        """The rows ``[P, O]``, of rows at the same plan (where ``rows`` says that it can)."""
        raise NotImplementedError


class Conv(Layer):
    """A convolution, with the norm, residual sum and activation after it."""

    outside = "zero"
    rows = True

    def __init__(self, step: Step, conv: nn.Module, norm: nn.BatchNorm2d | None):
        self.conv, self.norm, self.activation = conv, norm, step.activation
        self.norm_name = place(step.norm or "")
        self.transposed = isinstance(conv, nn.ConvTranspose2d)
        self.residual = step.residual is not None
        name = place(step.target)
        if conv.padding_mode != "zeros":
            raise TypeError(f"{name}: expected padding_mode='zeros', got {conv.padding_mode!r}")
        reach = tuple(self._reach(i) for i in (0, 1))
        super().__init__(name, step.inputs, step.out, (reach, _SAME))
        self.fused = FusedConv(conv, norm, step.activation)
        _need_statistics(self.norm_name, norm)

    def _reach(self, i: int) -> Window | Transposed:
        c = self.conv
        if self.transposed:
            return Transposed(c.kernel_size[i], c.stride[i], c.padding[i], c.dilation[i], c.output_padding[i])
        pads = (c.padding[i],) * 2
        if isinstance(c.padding, str):
            pads = c._reversed_padding_repeated_twice[2 - 2 * i : 4 - 2 * i]
        return Window(c.kernel_size[i], c.stride[i], *pads, c.dilation[i])

    def check(self) -> None:
        if self.norm is not None:
            _check_norm(self.norm_name, self.norm)

    def geometry(self, in_shape: tuple[int, int, int]):
        return geometry_of(self.conv, in_shape)

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        x, c = inputs[0], self.conv
        self.fused.check(x)
        if self.transposed:
            y = self._transposed(x, out)
        else:
            y = F.conv2d(x, c.weight, c.bias, c.stride, 0, c.dilation, c.groups)
        if self.norm is not None:
            y = _norm(self.norm, y)
        return finish(y, inputs[1] if self.residual else None, self.activation)

    def _transposed(self, x: Tensor, out: BlockGeometry) -> Tensor:
        """All that the tiles reach, cut to the output's tile (or filled up, where strides leave gaps)."""
        c, pads, short = self.conv, [], False
        for i, span in reversed(list(enumerate(spans_of(out)))):  # F.pad wants x first
            reach = self.reaches[0][i]
            before = reach.span(span).first * reach.stride - reach.padding - span.first
            pads += [before, span.size - before - ((x.shape[2 + i] - 1) * reach.stride + reach.extent)]
            short |= pads[-2] > 0 or pads[-1] > 0
        bias = None if short else c.bias
        y = F.conv_transpose2d(x, c.weight, bias, c.stride, 0, 0, c.groups, c.dilation)
        if short:  # first: F.pad refuses to cut more than there is, though it also fills
            y = F.pad(y, [max(p, 0) for p in pads])
        y = F.pad(y, [min(p, 0) for p in pads]) if min(pads) < 0 else y
        return y if c.bias is None or bias is not None else y + c.bias.to(y.dtype).view(-1, 1, 1)


def finish(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """``activation(y + residual)``, in place where nothing else needs ``y``."""
    free = not modes.differentiated(y)
    if residual is not None:
        residual = residual.to(y.dtype)  # differs under autocast only, where rows have it so too
        own = free and residual.shape == y.shape and not residual.requires_grad
        y = y.add_(residual) if own else y + residual
        free = free and not y.requires_grad
    if activation == "relu" and free:
        return y.relu_()
    return ACTIVATIONS[activation](y)


def _check_norm(name: str, norm: nn.BatchNorm2d) -> None:
    """Raises TypeError for statistics that are those of the batch."""
    if uses_batch_statistics(norm):
        raise TypeError(f"{name}: expected a norm in eval mode, got {norm} in training mode")


def _need_statistics(name: str, norm: nn.BatchNorm2d | None) -> None:
    if norm is not None and norm.running_mean is None:
        raise TypeError(f"{name}: expected a norm with running statistics, got {norm}")


def _norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


class Norm(Layer):
    """A norm in eval mode that no convolution precedes, with the residual sum and activation after it."""

    rows = True

    def __init__(self, step: Step, norm: nn.BatchNorm2d):
        self.norm, self.activation = norm, step.activation
        self.residual = step.residual is not None
        super().__init__(place(step.target), step.inputs, step.out)
        _need_statistics(self.name, norm)

    def check(self) -> None:
        _check_norm(self.name, self.norm)

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        return finish(_norm(self.norm, inputs[0]), inputs[1] if self.residual else None, self.activation)

    def on_rows(self, inputs: list[Tensor], plan: PixelPlan) -> Tensor:
        return norm_rows(self.norm, inputs[0], plan, inputs[1] if self.residual else None, self.activation)


class MaxPool(Layer):
    outside = "-inf"

    def __init__(self, name: str, inputs: tuple[int, ...], out: int, pool: nn.MaxPool2d):
        if pool.return_indices:
            raise TypeError(f"{name}: expected return_indices=False, got {pool}")
        self.kernel, self.dilation = (
            pair(pool.kernel_size, "kernel_size", 1),
            pair(pool.dilation, "dilation", 1),
        )
        self.stride, pad = pair(pool.stride, "stride", 1), pair(pool.padding, "padding", 0)
        reach = tuple(
            Window(self.kernel[i], self.stride[i], pad[i], pad[i], self.dilation[i], bool(pool.ceil_mode))
            for i in (0, 1)
        )
        super().__init__(name, inputs, out, (reach,))

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        return F.max_pool2d(inputs[0], self.kernel, self.stride, 0, self.dilation)


class AvgPool(Layer):
    outside = "zero"

    def __init__(self, name: str, inputs: tuple[int, ...], out: int, pool: nn.AvgPool2d):
        self.kernel, self.stride = pair(pool.kernel_size, "kernel_size", 1), pair(pool.stride, "stride", 1)
        self.divisor, self.counts_pad = pool.divisor_override, pool.count_include_pad
        self.pad, ceil = pair(pool.padding, "padding", 0), bool(pool.ceil_mode)
        reach = tuple(
            Window(self.kernel[i], self.stride[i], self.pad[i], self.pad[i], 1, ceil) for i in (0, 1)
        )
        # a window that hangs over what is counted has a smaller divisor
        hangs = ceil or (self.pad != (0, 0) and not self.counts_pad)
        self.varies = hangs and self.divisor is None
        super().__init__(name, inputs, out, (reach,))

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        if not self.varies:
            return F.avg_pool2d(inputs[0], self.kernel, self.stride, 0, divisor_override=self.divisor)
        sums = F.avg_pool2d(inputs[0], self.kernel, self.stride, 0, divisor_override=1)
        y, x = (self._counted(axis, span, blocks) for axis, span in enumerate(spans_of(out)))
        return sums / (y[:, None, :, None] * x[:, None, None, :]).to(sums.dtype)

    def _counted(self, axis: int, span: Span, blocks) -> Tensor:
        """int64 ``[B, tile]``: the pixels of each window along one axis that its mean is over."""
        at = blocks.at(axis)[:, None] * span.step + span.first
        at = at + torch.arange(span.size, device=at.device)
        start = at * self.stride[axis] - self.pad[axis]
        beyond = self.pad[axis] if self.counts_pad else 0
        end = (start + self.kernel[axis]).clamp(max=blocks.size_of(self.inputs[0])[axis] + beyond)
        return (end - start.clamp(min=-beyond)).clamp(min=1)


class Upsample(Layer):
    def __init__(self, name: str, inputs: tuple[int, ...], out: int, layer: nn.Upsample):
        factors = layer.scale_factor
        factors = tuple(factors) if isinstance(factors, (tuple, list)) else (factors, factors)
        whole = all(f is not None and f == int(f) and 1 <= f <= _MAX_FACTOR for f in factors)
        if not whole or layer.size is not None:
            raise TypeError(f"{name}: expected integer scale factors up to {_MAX_FACTOR}, got {layer}")
        if layer.mode not in ("nearest", "bilinear") or layer.align_corners:
            raise TypeError(f"{name}: expected mode nearest or bilinear (align_corners=False), got {layer}")
        self.factors, self.mode = tuple(int(f) for f in factors), layer.mode
        self.outside = "edge" if self.mode == "bilinear" else ""
        reach = tuple(Enlarged(f, self.mode == "bilinear") for f in self.factors)
        super().__init__(name, inputs, out, (reach,))

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        x = inputs[0]
        corners = False if self.mode == "bilinear" else None
        factors = tuple(float(f) for f in self.factors)
        y = F.interpolate(x, None, factors, self.mode, corners)
        top, left = (
            span.first - reach.span(span).first * reach.factor
            for reach, span in zip(self.reaches[0], spans_of(out), strict=True)
        )
        return y[:, :, top : top + out.tile_h, left : left + out.tile_w]


class Activation(Layer):
    """One elementwise layer that nothing before it could take."""

    rows = True

    def __init__(self, step: Step, module: nn.Module):
        super().__init__(place(step.target), step.inputs, step.out)
        self.kwargs, self.copies = dict(step.kwargs), False
        if step.kind == "act" and step.activation:
            self.function, self.kwargs = ACTIVATIONS[step.activation], {}
        elif step.kind == "act" and step.args == ("function",):
            self.function = find(step.target)
        else:
            self.function, self.kwargs = module.get_submodule(step.target), {}
            self.copies = getattr(self.function, "inplace", False)  # the value may have other readers

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        return self.function(inputs[0].clone() if self.copies else inputs[0], **self.kwargs)

    def on_rows(self, inputs: list[Tensor], plan: PixelPlan) -> Tensor:
        return self.function(inputs[0].clone() if self.copies else inputs[0], **self.kwargs)


class Add(Layer):
    rows = True

    def __init__(self, step: Step):
        super().__init__(called(step), step.inputs, step.out)

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        return inputs[0] + inputs[1]

    def on_rows(self, inputs: list[Tensor], plan: PixelPlan) -> Tensor:
        return inputs[0] + inputs[1]


class Dropout:
    """A dropout, which does nothing in eval mode and cannot run in training mode."""

    def __init__(self, path: str, module: nn.Module):
        self.name, self.dropout = place(path), module.get_submodule(path)

    def check(self) -> None:
        if self.dropout.training and self.dropout.p > 0:
            raise TypeError(
                f"{self.name}: expected a dropout in eval mode, got {self.dropout} in training mode"
            )


class _Parameter(NamedTuple):
    """A parameter or buffer, where it stands among the arguments of a call."""

    path: str


class Call(Layer):
    """An elementwise function of maps, numbers and parameters of one value or one for each channel; cat."""

    def __init__(self, step: Step, module: nn.Module, parameters: dict[int, str]):
        maps = tuple(v for v in step.inputs if v not in parameters)
        super().__init__(called(step), maps, step.out)
        self.module, self.method = module, step.target if step.kind == "method" else None
        self.function = None if self.method else find(step.target)
        self.args = _with_parameters((step.args, dict(step.kwargs)), parameters)
        for value in step.inputs:
            if value in parameters:
                self._check_parameter(parameters[value])

    def _check_parameter(self, path: str) -> None:
        shape = tuple(attrgetter(path)(self.module).shape)
        if len(shape) > 4 or any(size != 1 for size in (*shape[-2:], *shape[:-3])):
            raise TypeError(
                f"{self.name}: expected {place(path)} of shape [C, 1, 1] or one value, got {shape}"
            )

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        args, kwargs = self._filled(self.args, dict(zip(self.inputs, inputs, strict=True)))
        if self.method:
            return getattr(args[0], self.method)(*args[1:], **kwargs)
        return self.function(*args, **kwargs)

    def _filled(self, value, env: dict[int, Tensor]):
        if type(value) is Ref:
            return env[value.value]
        if type(value) is _Parameter:
            return attrgetter(value.path)(self.module)
        if isinstance(value, (tuple, list)):
            return [self._filled(v, env) for v in value]
        if isinstance(value, dict):
            return {k: self._filled(v, env) for k, v in value.items()}
        return value


def _with_parameters(value, parameters: dict[int, str]):
    """Recorded arguments with parameters named instead of referred to."""
    if type(value) is Ref:
        return _Parameter(parameters[value.value]) if value.value in parameters else value
    if isinstance(value, (tuple, list)):  # a list of torch.fx stays behind
        return [_with_parameters(v, parameters) for v in value]
    if isinstance(value, dict):
        return {k: _with_parameters(v, parameters) for k, v in value.items()}
    return value
