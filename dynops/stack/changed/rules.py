"""Rules: what a function does to a change of its inputs, and how it computes rows. :mod:`.finding` finds a step's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...geometry import ConvGeometry
from ...kept import kept
from ...ops.dense_conv import dense_conv
from ...plans import PixelPlan
from ..layers.pool import windows_of_rows
from ..maps import SparseMap, bare, entered
from ..maps import convolution as maps_conv
from ..maps.layout import NCHW, gathered
from ..maps.value import RowsOnly
from ..norm import fold_of
from . import arguments, masks
from .stored import positions
from .tape import ALL


class Context:
    """Stands for ``use_mask`` in the maps of a step: it knows the plan of what is made, and no other."""

    ragged, rows_only = False, True

    def __init__(self, plan: PixelPlan | None = None):
        self.target, self.geometry = plan, None

    def plan(self, shape, device) -> PixelPlan:
        if self.target is None or self.target.shape != tuple(shape):
            raise RowsOnly
        return self.target

    def after(self, geometry: ConvGeometry, device, ceil: bool = False) -> PixelPlan:
        self.geometry = geometry
        return self.plan(geometry.out_shape, device)


class Rule:
    """How a function is run. This one is of functions without a rule: dense, and its result is compared."""

    compares = True  # its result's change is found by comparing it
    may_be_dense = False  # a dense run gives the same result as rows at the pixels that changed

    def reads_own_place(self, step, i: int) -> bool:
        """True where output pixel p reads input ``i`` at p alone."""
        return False

    def knows_places(self, step) -> bool:
        """True where the result depends on where a pixel lies, as that of a sum with an embedding of positions."""
        return False

    def spread(self, frame, step):
        """What changes in the result: None, a plan or ``ALL``."""
        return ALL

    def rows(self, frame, step, plan: PixelPlan) -> list:
        """The result's leaves at a plan: maps, or rows."""
        raise RowsOnly

    def dense(self, frame, step) -> list:
        """The result's leaves, whole."""
        return pytree.tree_leaves(frame.called(step, frame.for_step(step)))

    def macs(self, step) -> float:
        """Multiply-accumulates of one pixel of the result."""
        return 0.0


class PixelByPixel(Rule):
    """Reads each map at the pixel that it makes; what is no map, or of one pixel a sample, as a whole."""

    compares, may_be_dense = False, True

    def reads_own_place(self, step, i: int) -> bool:
        value = step.inputs[i]
        return value.axes is not None and value.size == step.size

    def knows_places(self, step) -> bool:
        _, h, w = step.size
        weights = step.name in ("linear", "batch_norm", "layer_norm", "prelu", "rms_norm")
        return not weights and any({h, w, h * w} & (set(x.shape) - {1}) for x in step.plains)

    def spread(self, frame, step):
        return frame.together(step, step.inputs)

    def rows(self, frame, step, plan: PixelPlan) -> list:
        context = Context(plan)

        def value_of(number: int):
            value = frame.tape.values[number]
            if value.axes is not None and value.size == step.size:
                return frame.map_at(value, plan, context)
            return frame.whole(value)

        with entered():
            leaves = pytree.tree_leaves(frame.called(step, lambda v: value_of(v.number)))
        if not all(type(x) is SparseMap and x.plan is plan for x in leaves if isinstance(x, Tensor)):
            raise RowsOnly
        return leaves

    def macs(self, step) -> float:
        if step.name == "linear" and step.plains:
            return step.plains[0].numel()
        return 0.0


class BatchNorm(PixelByPixel):
    """A batch norm in eval mode. Of a whole convolution that nothing else reads it is in the weights."""

    folded: tuple[Tensor, Tensor] | None = None

    def affine(self, step) -> tuple[Tensor, Tensor] | None:
        """The norm as a scale and a shift ``[C]``; kept, as a call begins with a look at the parameters."""
        if self.folded is None:
            given = arguments.of_step(step)
            weight, bias, mean, var = arguments.tensors(
                step, given, "weight", "bias", "running_mean", "running_var"
            )
            self.folded = fold_of(given["eps"], weight, bias, mean, var)
        return self.folded

    def dense(self, frame, step) -> list:
        x = step.inputs[0]
        if len(step.inputs) > 1 or x.dtype not in (torch.float32, torch.float64):
            return super().dense(frame, step)
        scale, shift = self.affine(step)
        if scale.dtype != x.dtype:
            return super().dense(frame, step)
        if (
            x.dense is None
            and x.stored is None
            and isinstance(x.step.rule, Convolution)
            and x.step.rule.waits_for_norms
        ):
            return [x.step.rule.folded(frame, x.step, scale, shift)]
        return [torch.addcmul(shift.view(-1, 1, 1), frame.whole(x), scale.view(-1, 1, 1))]


class Neighbourhood(Rule):
    """Reads a window of its first input. This one computes the whole result, of which the rows are taken."""

    compares, may_be_dense = False, True

    geometry: ConvGeometry | None = None

    def __init__(self, reads: tuple[masks.Reads, masks.Reads], size: tuple[int, int, int]):
        self.reads, self.size = reads, size

    def spread(self, frame, step):
        x = step.inputs[0]
        others = [v for v in step.inputs[1:] if v.plan is not None]
        if others or frame.constants_moved:
            return ALL
        return frame.through(x, self.reads, self.size, self.geometry)

    def rows(self, frame, step, plan: PixelPlan) -> list:
        return [gathered(self.dense(frame, step)[0], plan, NCHW)]


class Convolution(Neighbourhood):
    """A convolution, or a transposed one, whose weight is no value."""

    def __init__(self, step, g: ConvGeometry, arguments: dict, device):
        super().__init__(masks.of_geometry(g, device), g.out_shape)
        self.geometry = g
        self.pointwise = g.is_pointwise and not g.transposed
        self.weight = step.plains[arguments["weight"].place]
        bias = arguments.get("bias")
        self.bias = None if bias is None else bias.place

    @property
    def waits_for_norms(self) -> bool:
        """True where a norm that follows may be in the weights."""
        return not self.geometry.transposed

    def reads_own_place(self, step, i: int) -> bool:
        return self.pointwise

    def rows(self, frame, step, plan: PixelPlan) -> list:
        x, g, context = step.inputs[0], self.geometry, Context(plan)
        weight = self.weight
        bias = None if self.bias is None else step.plains[self.bias]
        dense = frame.whole_or_none(x)
        if dense is not None:
            values, in_plan = dense.contiguous(memory_format=torch.channels_last), None
        else:
            in_plan = plan if self.pointwise else plan.needed_by(g)
            values = frame.map_at(x, in_plan, context).rows()
        values, bias = maps_conv._operands(values, weight, bias)
        return [bare(values, in_plan, weight, bias, plan, g, context)]

    def folded(self, frame, step, scale: Tensor, shift: Tensor) -> Tensor:
        """The whole result with a norm after it."""
        weight = self.weight
        bias = None if self.bias is None else step.plains[self.bias]

        folded = kept.get("scaled", lambda: weight * scale.view(-1, 1, 1, 1), weight, scale)
        moved = shift if bias is None else shift + bias * scale
        x = frame.whole(step.inputs[0]) if step.held is None else step.held
        step.held = None
        return dense_conv(x, folded, self.geometry, moved)

    def macs(self, step) -> float:
        w = self.weight
        return (
            w.numel() / (self.geometry.stride_h * self.geometry.stride_w)
            if self.geometry.transposed
            else w.numel()
        )


class Pool(Neighbourhood):
    """A max or mean pool."""

    def __init__(self, g: ConvGeometry, device):
        super().__init__(masks.of_geometry(g, device), g.out_shape)
        self.geometry = g

    def rows(self, frame, step, plan: PixelPlan) -> list:
        x = frame.whole_map(step.inputs[0], Context(plan))
        made = frame.called(step, lambda v: x)
        return [made if type(made) is SparseMap else gathered(made, plan, NCHW)]


class Moved(Neighbourhood):
    """A padding, or nearest interpolation: each pixel is one of the input, or a number."""

    def __init__(self, reads, size, fill: float = 0.0):
        super().__init__(reads, size)
        self.fill = fill

    def rows(self, frame, step, plan: PixelPlan) -> list:
        def source() -> tuple[Tensor, Tensor | None]:
            (_, h, w), (y, x) = plan.shape, self.reads
            at = positions(plan)
            row, column = y.at[0][at // w % h], x.at[0][at % w]
            outside = (row < 0) | (column < 0)
            flat = (at // (h * w) * y.size + row) * x.size + column
            return flat.clamp(min=0).masked_fill(outside, 0), outside if bool(outside.any()) else None

        flat, outside = plan.derived(("moved", id(self)), source)
        rows = frame.whole_rows(step.inputs[0]).index_select(0, flat)
        return [rows if outside is None else rows.masked_fill_(outside[:, None], self.fill)]


class Linear(Neighbourhood):
    """Bilinear interpolation."""

    def __init__(self, reads, size, found):
        super().__init__(reads, size)
        self.found = found

    def rows(self, frame, step, plan: PixelPlan) -> list:
        x, found = step.inputs[0], self.found
        if found is not None:
            full = frame.full(x.size)
            rows = windows_of_rows(found.kind, frame.whole_rows(x), full, plan, found.geometry, found.linear)
            if rows is not None:
                return [rows]
        return super().rows(frame, step, plan)
