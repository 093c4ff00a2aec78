"""Convolutions, with the norm, residual sum and activation after them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...geometry import BlockGeometry, ConvGeometry
from ...kept import kept
from ...kernels.cpu.engine import setup_of
from ...kernels.cpu.prepared import Prepared, fits, key_of, weight_shape
from ...modes import autocast_dtype, differentiated
from ...ops import block_conv
from ...ops.epilogue import ACTIVATIONS, NOTHING, Epilogue
from ...ops.pixels.conv import _pixel_conv
from ...ops.pixels.rows import gather_rows, in_format, scatter_pixels
from ...plans import BlockPlan, PixelPlan
from ..module_geometry import geometry_of, two
from ..norm import check_features, fold, norm_rows, tensors_of, uses_batch_statistics
from ..receptive_field import KeptSizes, Transposed, Window
from ..trace import Step
from .base import SAME, Layer, NoTensor, Rows, Unjoinable, finish, place, spans_of
from .norm import check_norm, dense_norm, statistics_refusal
from .resample import Padded, through


class Conv(Layer):
    """A convolution with what is fused to it: one call of the op."""

    outside = "zero"
    packs = True

    def __init__(self, step: Step, module: nn.Module):
        self.conv = conv = module.get_submodule(step.target)
        self.norm = None if step.norm is None else module.get_submodule(step.norm)
        self.norm_name, self.activation = place(step.norm or ""), step.activation
        self.x, self.residual = step.inputs[0], step.residual
        self.transposed = isinstance(conv, nn.ConvTranspose2d)
        reach = tuple(self._reach(i) for i in (0, 1))
        super().__init__(place(step.target), step.inputs, step.out, (reach, SAME))
        self.pads, self.in_channels, self.out_channels = None, conv.in_channels, conv.out_channels
        if conv.padding_mode != "zeros":
            self.pads, self.packs = conv._reversed_padding_repeated_twice, False
            self.refusal = f"{self.name}: expected padding_mode='zeros', got {conv.padding_mode!r}"
        elif self.norm is not None:
            self.refusal = statistics_refusal(self.norm_name, self.norm)
        self.waits = False  # for what follows: a call of a module that may be computed with it
        self.parameters = conv._parameters  # nn.Module.__getattr__ costs half a microsecond
        self._geometries = KeptSizes()

    def _reach(self, i: int) -> Window | Transposed:
        c = self.conv
        if self.transposed:
            sizes = (c.kernel_size, c.stride, c.padding, c.dilation, c.output_padding)
            return Transposed(*(two(size)[i] for size in sizes))
        if isinstance(c.padding, str):
            pads = c._reversed_padding_repeated_twice[2 - 2 * i : 4 - 2 * i]
        else:
            pads = (two(c.padding)[i],) * 2
        return Window(two(c.kernel_size)[i], two(c.stride)[i], *pads, two(c.dilation)[i])

    @property
    def is_bare(self) -> bool:
        """True for a convolution with nothing fused to it."""
        return self.norm is None and self.residual is None and not self.activation

    def check(self) -> None:
        if self.norm is not None:
            check_norm(self.norm_name, self.norm)

    def check_input(self, x: Tensor) -> None:
        """Raises ValueError for an input of other channels, or on another device."""
        weight = self.parameters["weight"]
        if x.shape[1] != self.in_channels:
            raise ValueError(f"x: expected {self.in_channels} channels, got {x.shape[1]}")
        if x.device != weight.device:
            raise ValueError(f"x: expected it on the weight's device {weight.device}, got {x.device}")

    def geometry(self, in_shape: tuple[int, int, int]) -> ConvGeometry:
        padded = self.pads is not None
        return self._geometries.kept(in_shape, lambda: geometry_of(self.conv, in_shape, padded))

    def _unpadded(self, g: ConvGeometry) -> ConvGeometry:
        """The geometry on the map itself, where the input carries its padding already."""
        if self.pads is None:
            return g
        left, right, top, bottom = self.pads
        return g._replace(in_h=g.in_h - top - bottom, in_w=g.in_w - left - right, pad_h=top, pad_w=left)

    def macs(self, in_shape: tuple[int, int, int]) -> float:
        return self.geometry(in_shape).macs(1, self.in_channels, self.out_channels)

    # ------------------------------------------------------------------------------------ rows

    def rows(self, run):
        if run.direct and (made := self._prepared(run)) is not None:
            return made
        if run.maps and (run.is_bordered(self.x) or (self.pads is not None and run.policy.active.ragged)):
            return self._as_called(run)
        padded, (values, in_plan, shape) = run.env[self.x], self._input(run)
        g = self.geometry(shape)
        plan = run.policy.plan(self.out, g.out_shape, values.device, self._unpadded(g))
        if type(padded) is Padded and self.pads is None:
            g = through(padded.geometry, g)
        residual, wide = None, run.autocast is None or values.dtype == torch.float64
        if self.residual is not None:
            residual = run.added(self.residual, plan, self.out_channels)
            # a sum of two dtypes has the wider one, as it has layer by layer
            apart = (
                run.policy.zero_outside
                and residual is not None
                and not wide
                and residual.dtype != run.autocast
            )
            if residual is None or residual.shape[1] != self.out_channels or apart:
                rows = self._product(run, values, in_plan, plan, g, "")
                return self._then_broadcast(run, rows, residual, plan)
        if self.waits and run.maps and run.autocast is None:
            self._check_values(values)
            return run.bare(values, in_plan, self.parameters["weight"], self.parameters["bias"], plan, g)
        if run.ends_with(self) and not (self.norm is not None and uses_batch_statistics(self.norm)):
            run.ended = plan
            base = run.base(self.out_channels, values.dtype if wide else run.autocast)
            return self._product(run, values, in_plan, plan, g, self.activation, residual, base, False)
        return Rows(self._product(run, values, in_plan, plan, g, self.activation, residual), plan)

    def _prepared(self, run) -> Rows | None:
        """The rows by one call of a kernel that was prepared, where rows of compact plans come and go: 15 us instead of
        40, and the kernel takes 5 to 40. None: any other case."""
        x, residual, norm = run.env[self.x], None, self.norm
        if self.pads is not None or self.waits or run.ends_with(self) or type(x) not in (Rows, Padded):
            return None
        values, in_plan = x.inner if type(x) is Padded else x
        if norm is not None and uses_batch_statistics(norm):
            return None
        g = self.geometry(x.plan.shape)
        plan = run.policy.plan(self.out, g.out_shape, in_plan.device, g)
        g = through(x.geometry, g) if type(x) is Padded else g
        if self.residual is not None:
            added = run.env[self.residual]
            if type(added) is not Rows or added.plan is not plan:
                return None
            residual = added.values
        weight, bias = self.parameters["weight"], self.parameters["bias"]
        if not self._fits(values, in_plan, plan, g, weight, residual):
            return None
        pointwise = in_plan is plan and g.is_pointwise and not g.transposed
        setup = setup_of(g, weight.shape, values.dtype, True)
        quads = run.quads(plan, g) if setup.winograd else None
        tensors, eps = (bias,), 0.0
        if norm is not None:
            tensors, eps = (bias, *tensors_of(norm)), norm.eps

        def make() -> Prepared:
            if norm is not None:
                check_features(norm, self.out_channels)
            affine = (None, None) if norm is None else fold(norm)
            return Prepared(weight, bias, g, setup, self.activation, *affine, pointwise, quads is not None)

        made = kept.get(
            (eps, *key_of(g, pointwise, self.activation, quads is not None)), make, weight, *tensors
        )
        if pointwise:
            return Rows(made.run(values, plan.index, None, residual, quads), plan)
        return Rows(made.run(values, plan.index, run.inverse(in_plan), residual, quads), plan)

    @property
    def joins(self) -> bool:
        return self.pads is None and not self.waits

    def join(self, bound) -> None:
        g = self.geometry(bound.padded_size(self.x))
        sizes = (g.out_shape, (g.out_shape[0], 1, 1))
        if self.residual is not None and (
            bound.size(self.residual) not in sizes or bound.channels(self.residual) != self.out_channels
        ):
            raise Unjoinable
        bound.multiply(self, g.out_shape, self.out_channels, g, self.conv, self.norm, self.activation)

    def _fits(
        self, values: Tensor, in_plan, plan, g: ConvGeometry, weight: Tensor, residual: Tensor | None
    ) -> bool:
        return (
            type(values) is Tensor
            and type(plan) is type(in_plan) is PixelPlan
            and plan.count is None
            and in_plan.count is None
            and weight.shape == weight_shape(g, values.shape[1], self.out_channels)
            and values.dtype is weight.dtype
            and weight.is_cpu
            and values.is_contiguous()
            and len(plan) > 0
            and (
                residual is None
                or (fits(residual, values, len(plan)) and residual.shape[1] == self.out_channels)
            )
        )

    def _as_called(self, run):
        """Runs the functions of maps, which know the edges of each image."""
        out = type(self.conv).pixels_of.forward(self.conv, run.map(self.x))
        out = out if self.norm is None else run.normed(self.norm, out)
        out = out if self.residual is None else out + run.map(self.residual)
        return ACTIVATIONS[self.activation](out)

    def takes_blocks(self, x: Tensor, plan: BlockPlan, base: Tensor | None) -> bool:
        """True where the layer, alone in its stack, is expected to be faster by the kernel of blocks."""
        weight, norm = self.parameters["weight"], self.norm
        if not x.is_cuda or x.dim() != 4 or self.transposed or self.pads is not None:
            return False
        self.check_input(x)
        g = self.geometry((x.shape[0], *x.shape[2:]))
        if self.residual is not None and (g.in_shape != g.out_shape or self.in_channels != self.out_channels):
            return False
        if not self.is_bare:  # what is fused has no gradient
            if norm is not None and uses_batch_statistics(norm):
                return False
            if differentiated(x, base, *self.conv.parameters(), *(() if norm is None else norm.parameters())):
                return False
        return block_conv.takes(x, autocast_dtype(x) or x.dtype, weight, plan, g)

    def _input(self, run) -> tuple[Tensor, PixelPlan | None, tuple[int, int, int]]:
        """The input as rows and their plan, or a dense map and None; and its (N, H, W)."""
        if self.pads is None and type(padded := run.env[self.x]) is Padded:
            return *padded.inner, padded.plan.shape
        if self.pads is None and (rows := run.rows_of(self.x)) is not None:
            return rows.values, rows.plan, rows.plan.shape
        x = run.dense(self.x)
        if not isinstance(x, Tensor):
            raise NoTensor(f"x: expected a tensor, got {type(x).__name__}")
        if x.dim() == 3 and self.x != 0:  # of one sample: by its own forward
            raise NoTensor(f"x: expected [N, C, H, W], got shape {tuple(x.shape)}")
        if x.dim() != 4:
            raise ValueError(f"x: expected [N, C, H, W], got shape {tuple(x.shape)}")
        x = run.put(self.x, in_format(x, torch.channels_last))  # once for all readers
        if self.pads is not None:
            x = F.pad(x, self.pads, mode=self.conv.padding_mode)
        self.check_input(x)
        return x, None, (x.shape[0], x.shape[2], x.shape[3])

    def _product(
        self,
        run,
        values: Tensor,  # [R, C], or [N, C, H, W] where in_plan is None
        in_plan: PixelPlan | None,
        plan: PixelPlan,
        geometry: ConvGeometry,
        activation: str,
        residual: Tensor | None = None,  # [P, O], or [N, O, H, W]
        base: Tensor | None = None,  # [N, O, H, W], only without ``rows``
        rows: bool = True,
    ) -> Tensor:  # [P, O], or [N, O, H, W] without ``rows``
        weight, bias = self.parameters["weight"], self.parameters["bias"]
        if run.autocast is not None and values.dtype != torch.float64:
            values, bias = values.to(run.autocast), None if bias is None else bias.to(run.autocast)
        else:
            self._check_values(values)
        outs = weight.shape[1] * geometry.groups if geometry.transposed else weight.shape[0]
        if weight.shape != (expected := weight_shape(geometry, values.shape[1], outs)):
            raise ValueError(f"weight: expected shape {expected}, got {tuple(weight.shape)}")
        if residual is not None and residual.dtype is not values.dtype:
            residual = residual.to(values.dtype)
        norm = self.norm
        if norm is not None:
            check_features(norm, self.out_channels)
        if norm is None:
            epilogue = Epilogue(activation, residual=residual)
        elif uses_batch_statistics(norm):
            out = _pixel_conv(values, weight, bias, plan, in_plan, geometry, NOTHING, None, True, None)
            if residual is not None and residual.dim() == 4:
                residual = gather_rows(residual, plan.index, plan.count)
            return norm_rows(norm, out, plan, residual, activation)
        else:
            epilogue = Epilogue(activation, *fold(norm), None, residual)
        if type(plan) is BlockPlan:
            return block_conv.block_conv(values, weight, bias, plan, geometry, epilogue, base)
        # other layers of the stack read rows by their pixels
        return _pixel_conv(values, weight, bias, plan, in_plan, geometry, epilogue, base, rows, None, False)

    def _check_values(self, values: Tensor) -> None:
        if values.shape[1] != self.in_channels:
            self.check_input(values)
        if values.dtype is not (expected := self.parameters["weight"].dtype):
            raise TypeError(f"x: expected the weight's dtype {expected}, got {values.dtype}")

    def _then_broadcast(self, run, rows: Tensor, residual: Tensor | None, plan: PixelPlan):
        """The sum with a value of other channels, or with a map of another size."""
        activation = ACTIVATIONS[self.activation]
        if residual is not None:
            residual = residual if residual.dim() == 2 else gather_rows(residual, plan.index, plan.count)
            return Rows(activation(rows + residual), plan)
        return run.masked_as(self, activation(scatter_pixels(rows, plan) + run.dense(self.residual)))

    # ----------------------------------------------------------------------------------- tiles

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        x, c = inputs[0], self.conv
        self.check_input(x)
        if self.transposed:
            y = self._transposed(x, out)
        else:
            y = F.conv2d(x, c.weight, c.bias, c.stride, 0, c.dilation, c.groups)
        if self.norm is not None:
            y = dense_norm(self.norm, y)
        return self._finish(y, inputs)

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

    def whole(self, inputs: list[Tensor]) -> Tensor:
        """Runs with the norm in the weights: a norm of its own costs a pass over the map, two of 52 us where the
        convolution between takes 380 (16 x 16 channels of 32 x 32)."""
        (weight, bias), c = self._folded(), self.conv
        y = F.conv2d(inputs[0], weight, None, c.stride, c.padding, c.dilation, c.groups)
        if (
            bias is not None
        ):  # oneDNN's AVX2 kernels begin their sums with it: 1.4 times as far from the exact one
            y += bias.view(-1, 1, 1)
        return self._finish(y, inputs)

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        """The convolution's weight and bias with its norm, kept until one of them changes."""
        weight, bias = self.conv.weight, self.conv.bias
        if self.norm is None:
            return weight, bias
        scale, shift = fold(self.norm)

        def make() -> tuple[Tensor, Tensor]:
            moved = shift if bias is None else shift + bias * scale
            return weight * scale.to(weight.dtype).view(-1, 1, 1, 1), moved.to(weight.dtype)

        return kept.get("folded", make, weight, bias, scale, shift)

    def _finish(self, y: Tensor, inputs: list[Tensor]) -> Tensor:
        return finish(y, None if self.residual is None else inputs[1], self.activation)
