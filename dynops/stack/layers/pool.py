"""Max and mean pooling over windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import backends, modes
from ...geometry import BlockGeometry, ConvGeometry, pair, window_count
from ...kernels.cpu import prepared
from ...kernels.cpu.pixels import max_rows
from ...kernels.cpu.prepared import StepKind
from ...ops.pixels.rows import gather_rows
from ...plans import PixelPlan
from ..receptive_field import Span, Window
from ..trace import Step, dense_type
from .base import Layer, Rows, Unjoinable, spans_of


class _Pool(Layer):
    def __init__(self, name: str, step: Step, pool: nn.Module, dilation=1):
        self.pool, self.converted = pool, step.kind == "pool"
        self.masked = step.kind in ("pool", "function")  # the third is a module that stays dense
        self.forward = dense_type(pool).forward
        self.kernel, self.stride = pair(pool.kernel_size, "kernel_size", 1), pair(pool.stride, "stride", 1)
        self.pad, self.dilation = pair(pool.padding, "padding", 0), pair(dilation, "dilation", 1)
        ceil = bool(pool.ceil_mode)
        reach = tuple(
            Window(self.kernel[i], self.stride[i], self.pad[i], self.pad[i], self.dilation[i], ceil)
            for i in (0, 1)
        )
        super().__init__(name, step.inputs, step.out, (reach,))

    def takes(self, windows: bool) -> None:
        """Notes if the kernel of windows makes this pool. One that may be of the whole map ends a sequence."""
        self.of_windows = self.masked and windows
        self.joins = self.of_windows and not (self.kernel == self.stride and min(self.kernel) > 3)

    def rows(self, run):
        if not self.converted:
            return self.recorded.rows(run)
        if run.maps and run.is_bordered(self.inputs[0]):
            return self.forward(self.pool, run.map(self.inputs[0]))
        rows = run.rows_of(self.inputs[0])
        if rows is not None and (kind := whole_map(self.pool, *rows.plan.shape[1:])):
            return over_pixels(kind, rows.values, rows.plan)[:, :, None, None]
        if rows is None or not self.of_windows or run.policy.active.ragged:
            return run.masked(self.pool, self.inputs[0])
        g = self._window(rows.plan.shape)
        plan = run.policy.active.after(g, rows.plan.device, bool(self.pool.ceil_mode))
        made = windows_of_rows(self.step_kind, rows.values, rows.plan, plan, g)
        return run.masked(self.pool, self.inputs[0]) if made is None else Rows(made, plan)

    def _window(self, size: tuple[int, int, int]) -> ConvGeometry:
        out = (reach.out_size(size[1 + i]) for i, reach in enumerate(self.reaches[0]))
        return ConvGeometry(*size, *out, *self.kernel, *self.stride, *self.pad, *self.dilation, 1, 0)

    def join(self, bound) -> None:
        size, channels = bound.same(self.inputs)
        if whole_map(self.pool, *size[1:]):
            raise Unjoinable
        g = self._window(size)
        bound.step(self.step_kind, self, g.out_shape, channels, g, bool(self.pool.ceil_mode))


class MaxPool(_Pool):
    outside, step_kind = "-inf", StepKind.MAX_POOL

    def __init__(self, name: str, step: Step, pool: nn.MaxPool2d):
        super().__init__(name, step, pool, pool.dilation)
        if pool.return_indices:
            self.refusal = f"{name}: expected return_indices=False, got {pool}"
        self.takes(self.refusal == "")

    def rows(self, run):
        if self.converted and (x := run.rows_of(self.inputs[0])) is not None:
            made = max_of_rows(self.pool, x, run.policy.active)
            if made is not None:
                return made
        return super().rows(run)

    def tiles(self, inputs: list[Tensor], out: BlockGeometry, blocks) -> Tensor:
        return F.max_pool2d(inputs[0], self.kernel, self.stride, 0, self.dilation)


def max_of_rows(pool: nn.MaxPool2d, x: Rows, active) -> Rows | None:
    """A max-pool of a ragged batch, or of bfloat16, from rows to rows by the C++ kernel. None where it does not run.

    6 ms of ResNet-50 on 8 images of 319x362 in 593x599, where the dense pool takes 100 and the copies around it 190.
    """
    values, plan = x
    known = (
        plan.device.type == "cpu" and plan.count is None and values.dtype in (torch.float32, torch.bfloat16)
    )
    if not known or modes.watched() or modes.differentiated(values) or whole_map(pool, *plan.shape[1:]):
        return None
    if not active.ragged and values.dtype is torch.float32:  # windows_of_rows
        return None
    if backends.choose(None, values.device, values.dtype) != "cpp":
        return None
    sizes = pool.kernel_size, pool.stride, pool.padding, pool.dilation
    kernel, stride, pad, dilation = (pair(size, "size") for size in sizes)
    n, *size = plan.shape
    out = [
        window_count(size[i], kernel[i], stride[i], pad[i], pad[i], dilation[i], pool.ceil_mode)
        for i in (0, 1)
    ]
    g = ConvGeometry(n, *size, *out, *kernel, *stride, *pad, *dilation, 1, 0)
    to = active.after(g, plan.device, bool(pool.ceil_mode))
    if to.count is not None:
        return None
    return Rows(max_rows(values, to.index, plan.inverse(), g, not active.ragged), to)


class AvgPool(_Pool):
    outside = "zero"

    def __init__(self, name: str, step: Step, pool: nn.AvgPool2d):
        super().__init__(name, step, pool)
        self.divisor, self.counts_pad = pool.divisor_override, pool.count_include_pad
        # a window that hangs over what is counted has a smaller divisor
        hangs = bool(pool.ceil_mode) or (self.pad != (0, 0) and not self.counts_pad)
        self.varies = hangs and self.divisor is None
        self.step_kind = kind_of_mean(pool)
        self.takes(self.step_kind is not None)

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


def kind_of_mean(pool: nn.AvgPool2d) -> StepKind | None:
    """The step that makes a mean pool of rows, or None."""
    unpadded = pair(pool.padding, "padding", 0) == (0, 0)
    if pool.divisor_override is not None:
        return None
    if not pool.ceil_mode and (unpadded or pool.count_include_pad):
        return StepKind.MEAN_POOL
    return StepKind.INNER_MEAN_POOL if unpadded or not pool.count_include_pad else None


def max_pool(kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    """The module of a call of ``F.max_pool2d``."""
    return nn.MaxPool2d(kernel_size, stride or None, padding, dilation, return_indices, ceil_mode)


def avg_pool(
    kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    """The module of a call of ``F.avg_pool2d``."""
    return nn.AvgPool2d(kernel_size, stride or None, padding, ceil_mode, count_include_pad, divisor_override)


def whole_map(pool: nn.Module, height: int, width: int) -> str:
    """ "mean" or "amax" for an nn.AvgPool2d or nn.MaxPool2d of one window, which is the whole map; "" for any other."""
    if type(height) is not int or type(width) is not int:  # symbols of an export: a comparison would fix them
        return ""
    if pair(pool.kernel_size, "kernel_size", 1) != (height, width) or pair(pool.padding, "padding", 0) != (
        0,
        0,
    ):
        return ""
    if isinstance(pool, nn.MaxPool2d):
        return "" if pool.return_indices or pair(pool.dilation, "dilation", 1) != (1, 1) else "amax"
    return "" if pool.divisor_override else "mean"


class GlobalPool(Layer):
    """The mean or the largest value of all pixels: of a map under a mask over the mask, 0 where it has no pixel."""

    def __init__(self, recorded: Layer, step: Step, kind: str, keepdim: bool):
        super().__init__(recorded.name, step.inputs, step.out)
        self.recorded, self.refusal, self.kind, self.keepdim = recorded, recorded.refusal, kind, keepdim
        self.feeds_convs = False  # every reader is a convolution, as in squeeze-excite

    @property
    def joins(self) -> bool:
        return self.keepdim and self.feeds_convs and self.kind == "mean"

    def join(self, bound) -> None:
        (n, _, _), channels = bound.same(self.inputs)
        bound.step(StepKind.MEAN, self, (n, 1, 1), channels)

    def rows(self, run):
        rows = run.rows_of(self.inputs[0]) if run.policy.zero_outside else None
        if rows is None:
            return self.recorded.rows(run)
        out = over_pixels(self.kind, rows.values, rows.plan)
        if self.keepdim and self.feeds_convs:  # a map of one pixel a sample, which they read as rows
            plan = run.policy.plan(self.out, (rows.plan.shape[0], 1, 1), rows.plan.device)
            return Rows(
                out if plan.is_full else gather_rows(out[:, :, None, None], plan.index, plan.count), plan
            )
        return out[:, :, None, None] if self.keepdim else out


_GLOBAL = {"mean": "mean", "amax": "amax", "adaptive_avg_pool2d": "mean", "adaptive_max_pool2d": "amax"}
_GLOBAL_MODULES = {nn.AdaptiveAvgPool2d: "mean", nn.AdaptiveMaxPool2d: "amax"}


def global_pool(recorded: Layer, step: Step, inner: nn.Module | None) -> GlobalPool | None:
    """The layer of a recorded call that pools all pixels, or None."""
    if type(inner) in _GLOBAL_MODULES:
        one = inner.output_size in (1, (1, 1), [1, 1]) and not getattr(inner, "return_indices", False)
        return GlobalPool(recorded, step, _GLOBAL_MODULES[type(inner)], True) if one else None
    name, given = step.target.rpartition(":")[2], dict(step.kwargs)
    if step.kind not in ("function", "method") or name not in _GLOBAL:
        return None
    args = list(step.args[1:])
    if name.startswith("adaptive"):
        size = args[0] if args else given.get("output_size")
        return GlobalPool(recorded, step, _GLOBAL[name], True) if size in (1, (1, 1), [1, 1]) else None
    dims, keepdim = (
        args[0] if args else given.pop("dim", None),
        args[1] if len(args) > 1 else given.pop("keepdim", False),
    )
    if len(args) > 2 or given or not isinstance(dims, (tuple, list)) or not isinstance(keepdim, bool):
        return None
    is_global = sorted(d % 4 for d in dims if isinstance(d, int)) == [2, 3] and len(dims) == 2
    return GlobalPool(recorded, step, _GLOBAL[name], keepdim) if is_global else None


def takes_kernels(rows: Tensor, plan: PixelPlan, *vectors: Tensor | None) -> bool:
    """True for rows ``[P, C]`` of a compact plan, and vectors, that the kernels of sequences take by themselves."""
    if (
        type(rows) is not Tensor
        or rows.dtype is not torch.float32
        or not rows.is_cpu
        or plan.count is not None
    ):
        return False
    is_plain = rows.dim() == 2 and rows.is_contiguous()
    like_rows = all(v is None or (v.dtype is rows.dtype and v.is_cpu and v.is_contiguous()) for v in vectors)
    return is_plain and like_rows and backends.has_binary() and modes.plain(rows, *vectors)


def windows_of_rows(
    kind: StepKind, rows: Tensor, in_plan: PixelPlan, plan: PixelPlan, g: ConvGeometry,
    linear: tuple | None = None,
) -> Tensor | None:  # fmt: skip
    """The rows of a pool or a resizing, by the kernel of rows; None where a dense map has to be made."""
    if not takes_kernels(rows, in_plan) or plan.count is not None:
        return None
    if g.in_shape != in_plan.shape or g.out_shape != plan.shape:
        return None
    return prepared.windows(kind, rows, (in_plan.index, plan.index), in_plan.inverse(), g, linear)


def over_pixels(kind: str, rows: Tensor, plan: PixelPlan) -> Tensor:
    """``[N, C]``: the "mean", "sum", "amax", "amin" or 2-"norm" of each sample's rows ``[P, C]``, in float32 at least."""
    if (
        kind == "mean"
        and rows.dtype is torch.float32
        and plan.count is None
        and plan.shape[0] == 1
        and len(plan)
    ):
        return rows.mean(0, keepdim=True)  # 12 us instead of 40
    alive = None if plan.count is None else (plan.index >= 0)[:, None]
    if kind in ("amax", "amin"):
        return _extreme(kind, rows, plan, alive)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if kind == "norm" and has_slices(plan) and modes.route(wide) == modes.DIFFERENTIATED:
        return _NormOfSamples.apply(wide, plan).to(rows.dtype)
    wide = wide.square() if kind == "norm" else wide
    made = sums_of_samples(wide if alive is None else torch.where(alive, wide, 0), plan)
    if kind == "mean":
        made = made / pixels_of_samples(plan)[:, None].to(made.dtype)
    return (made.sqrt() if kind == "norm" else made).to(rows.dtype)


class _NormOfSamples(torch.autograd.Function):
    """The 2-norm of each sample's rows. Its gradient is one pass over them, and zero where the norm is.

    Composed of a square, a sum and a root it takes four: 10 % of a training step of ConvNeXt-V2.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, plan: PixelPlan) -> Tensor:
        norm = sums_of_samples(rows.square(), plan).sqrt()
        ctx.save_for_backward(rows, norm)
        ctx.plan = plan
        return norm

    @staticmethod
    def backward(ctx, grad: Tensor):
        (rows, norm), plan = ctx.saved_tensors, ctx.plan
        share = torch.where(norm == 0, 0, grad / norm)
        if torch.is_grad_enabled():  # of a second derivative
            return rows * spread_over(share, plan), None
        out, sizes = torch.empty_like(rows), lengths(plan)
        for part, factor, to in zip(rows.split(sizes), share, out.split(sizes), strict=True):
            torch.mul(part, factor, out=to)
        return out, None


_MOST_SLICES = 64  # sums over slices of rows are pairwise and vectors; index_add is neither


def sums_of_samples(rows: Tensor, plan: PixelPlan) -> Tensor:
    """``[N, C]``: the sum of each sample's rows, which are zero past the count."""
    samples = plan.shape[0]
    if samples == 1:
        return rows.sum(0, keepdim=True)
    if not has_slices(plan):
        return rows.new_zeros(samples, rows.shape[1]).index_add(0, sample_of(plan), rows)
    return torch.stack([part.sum(0) for part in rows.split(lengths(plan))])


def spread_over(values: Tensor, plan: PixelPlan) -> Tensor:
    """``[P, ...]``: of each pixel its sample's row of ``[N, ...]``."""
    if not (modes.differentiated(values) and has_slices(plan)):
        return values[sample_of(plan)]
    # the gradient of an index adds row by row: 9 % of a training step of ConvNeXt-V2
    sizes = zip(values.split(1), lengths(plan), strict=True)
    return torch.cat([row.expand(length, *row.shape[1:]) for row, length in sizes])


def has_slices(plan: PixelPlan) -> bool:
    """True where the rows of each sample are a slice whose length is known, and such slices are few."""
    return 0 < plan.shape[0] <= _MOST_SLICES and plan.count is None and modes.may_look(plan.index)


def lengths(plan: PixelPlan) -> list[int]:
    """The pixels of each sample (kept)."""
    return plan.derived("lengths", lambda: (plan.inverse() >= 0).flatten(1).sum(1).tolist())


def _extreme(kind: str, rows: Tensor, plan: PixelPlan, alive: Tensor | None) -> Tensor:
    worst = float("-inf") if kind == "amax" else float("inf")
    if alive is not None:
        rows = torch.where(alive, rows, worst)
    owner = sample_of(plan)[:, None].expand_as(rows)
    made = rows.new_full((plan.shape[0], rows.shape[1]), worst).scatter_reduce(0, owner, rows, kind)
    empty = (plan.inverse() < 0).flatten(1).all(1)
    return torch.where(empty[:, None], 0, made)


def sample_of(plan: PixelPlan) -> Tensor:
    """int64 ``[P]``: the sample of each row; 0 past the count (kept)."""
    _, h, w = plan.shape
    return plan.derived("samples", lambda: plan.index.long().clamp(min=0) // max(h * w, 1))


def pixels_of_samples(plan: PixelPlan) -> Tensor:
    """float32 ``[N]``: the pixels of each sample, at least 1 (kept)."""
    return plan.derived(
        "pixels of samples", lambda: (plan.inverse() >= 0).flatten(1).sum(1).clamp(min=1).float()
    )
