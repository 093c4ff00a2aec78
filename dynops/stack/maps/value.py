"""SparseMap: a map under a mask, as a tensor that the Python of a model computes with.

Inside ``dynops.use_mask`` a module that cannot be traced runs its own forward on these. Each function of torch that
it calls goes to :mod:`dynops.stack.maps.functions`, which computes rows where it can and dense tensors where not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...plans import PixelPlan
from .layout import NCHW, gathered, mask_at, scattered, shape_of


class RowsOnly(Exception):
    """A function asked for all of a map, of which only rows are known."""


class SparseMap(Tensor):
    """A tensor whose pixels are those of a plan, and which is zero elsewhere; or the model's input, which is dense.

    Attributes:
        plan: its pixels, or None for an input: a dense tensor that convolutions read whole.
        axes: see :mod:`.layout`.
        active: the ``use_mask`` context that it belongs to; None: it is the input of one to come.
        pending: a convolution, a padding or a view that was not computed yet, or None.
        margins: of an input that a model padded itself: (left, right, top, bottom) around the map that has a mask.
        border: of such an input that was not computed yet: its pixels as another map, and how the whole is made.

    Content is never written in place: it is exchanged.
    """

    plan: PixelPlan | None
    axes: tuple[str, ...]

    @staticmethod
    def __new__(cls, active, plan, shape, dtype, device):
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.active, made.plan, made.axes = active, plan, NCHW
        made._shape, made._dtype, made._device = torch.Size(shape), dtype, device
        made._rows = made._dense = made._written = made.pending = made.margins = made.border = None
        made._origin = None  # a weak reference to what made the rows
        return made

    @classmethod
    def of_input(cls, x: Tensor, active) -> SparseMap:
        """An input, which is read whole."""
        made = cls(active, None, x.shape, x.dtype, x.device)
        made._dense = x
        return made

    @classmethod
    def of_border(cls, border, size: tuple[int, int], x: SparseMap) -> SparseMap:
        """An input that is a map ``x`` with a border."""
        made = cls(x.active, None, (*x.shape[:2], *size), x.dtype, x.device)
        made.border = border
        return made

    @classmethod
    def of_rows(cls, rows: Tensor, plan: PixelPlan, active, axes: tuple[str, ...] = NCHW) -> SparseMap:
        """A map of rows ``[P, *channels]``."""
        made = cls(active, plan, shape_of(axes, plan, tuple(rows.shape[1:])), rows.dtype, rows.device)
        made._rows, made.axes = rows, axes
        return made

    @classmethod
    def of_pending(cls, pending, plan: PixelPlan, active, channels: tuple[int, ...], axes=NCHW) -> SparseMap:
        """A map whose rows are computed when something reads them."""
        shape = shape_of(axes, plan, channels)
        made = cls(active, plan, shape, pending.dtype, plan.device)
        made.pending, made.axes = pending, axes
        return made

    # Tensor's own go through __torch_function__, at 3 us
    shape = property(lambda self: self._shape)
    dtype = property(lambda self: self._dtype)
    device = property(lambda self: self._device)
    ndim = property(lambda self: len(self._shape))

    def dim(self) -> int:
        return len(self._shape)

    def size(self, dim: int | None = None):
        return self._shape if dim is None else self._shape[dim]

    @property
    def is_input(self) -> bool:
        return self.plan is None

    def rows(self) -> Tensor:
        """The rows ``[P, *channels]`` of a map that is no input."""
        pending = self.pending
        if pending is None:
            if self._written is not None and self._dense._version != self._written:
                self._take_back()
            return self._rows
        rows = pending.rows()
        if not pending.follows:
            self._rows, self.pending, self._origin = rows, None, weakref.ref(pending)
        return rows

    def dense(self) -> Tensor:
        """The whole tensor."""
        if self.plan is None:
            if self._dense is None:
                self._dense, self.border = self.border.make(), None  # from now on something may write into it
            return self._dense
        if self.pending is not None and self.pending.follows:
            if self.active is not None and self.active.rows_only:
                raise RowsOnly
            return scattered(self.rows(), self.plan, self.axes)
        rows = self.rows()
        if self._dense is not None:
            return self._dense
        if self.active is not None and self.active.rows_only:
            raise RowsOnly
        dense = scattered(rows, self.plan, self.axes)
        if saved_hooks() is None:  # a recomputation would find it, and save less than the first computation
            self._dense = dense
            self._written = None if dense.is_inference() else dense._version
        return dense

    def through_dense(self) -> None:
        """Lets the gradient pass through the dense tensor, of which a hook or ``retain_grad`` asks for it."""
        if self.plan is not None and not (self.pending is not None and self.pending.follows):
            self._rows = gathered(self.dense(), self.plan, self.axes)

    def _take_back(self) -> None:
        """Takes the rows from the dense tensor: a model wrote into a view of it."""
        dense = self._dense.masked_fill_(~mask_at(self.plan, self.axes), 0)
        self._rows, self._written = gathered(dense, self.plan, self.axes), dense._version
        self._origin = None

    def shown(self) -> list[SparseMap]:
        """This map and those that it shows as they are, in other axes."""
        found = [self]
        while type(found[-1].pending) is View and found[-1].pending.same:
            found.append(found[-1].pending.base)
        return found

    def convolution(self):
        """The convolution that the map waits for, or None."""
        pending = self.shown()[-1].pending
        return pending if pending is not None and pending.grows else None

    def holds(self, pending: Pending) -> bool:
        """True for a map whose rows are what ``pending`` makes: it waits for it, or nothing was written since."""
        if self.pending is not None:
            return self.pending is pending
        written = self._written is not None and self._dense._version != self._written
        return not written and self._origin is not None and self._origin() is pending

    def like(self, rows: Tensor) -> SparseMap:
        """A map of the same pixels."""
        return SparseMap.of_rows(rows, self.plan, self.active, self.axes)

    def at(self, plan: PixelPlan, axes: tuple[str, ...]) -> Tensor | None:
        """What :func:`gathered` returns of this map; None where it does not fit."""
        if self.plan is plan and self.axes == axes:
            return self.rows()
        return gathered(self.dense(), plan, axes)

    def under(self, active) -> SparseMap:
        """The map in another ``use_mask`` context: there it is an input, which is read whole. Rows that had none stay rows."""
        if active is None or active is self.active:
            return self
        if self.active is None:
            return SparseMap.of_rows(self.rows(), self.plan, active, self.axes)
        return SparseMap.of_input(self.dense(), active)

    def exchange(self, made: SparseMap) -> None:
        """Takes the content of another map of the same shape: what a function that works in place does."""
        if self.pending is not None and self.pending.follows:
            self.pending.write(made.rows())
            return
        self._rows, self._dense, self.pending = made._rows, made._dense, made.pending
        self._written, self._origin = made._written, made._origin
        if self.plan is None:
            self.plan, self.axes = made.plan, made.axes

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _functions(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Reached only from C++: functions of Python are taken before."""
        return func(*dense_tree(args), **dense_tree(kwargs or {}))

    def __reduce_ex__(self, protocol):
        return self.dense().__reduce_ex__(protocol)


def saved_hooks() -> tuple | None:
    """The innermost hooks of saved tensors."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


_functions: Callable


def handled_by(functions: Callable) -> None:
    """Names the function that computes the functions of torch on maps."""
    global _functions
    _functions = functions


class Pending:
    """Content that is computed when something reads it.

    Attributes:
        dtype: of the rows.
        follows: True for content that another map has: it is read anew each time.
        grows: True for a convolution, which what follows may be computed with.
    """

    dtype: torch.dtype
    follows = grows = False

    def rows(self) -> Tensor:
        """``[P, *channels]``."""
        raise NotImplementedError


class View(Pending):
    """A part of another map, or the same in another shape: what is written into one shows in the other.

    Args:
        read: rows of the base to rows of the view.
        put: (rows of the base, rows of the view) to new rows of the base.
        same: whether both have the same rows.
    """

    follows = True
    strides: tuple[int, ...] | None = None  # of a permuted map, were it dense

    def __init__(self, base: SparseMap, read: Callable, put: Callable, same: bool):
        self.base, self.read, self.put, self.same = base, read, put, same
        self.dtype = base.dtype

    def rows(self) -> Tensor:
        return self.read(self.base.rows())

    def write(self, rows: Tensor) -> None:
        base = self.base
        base.exchange(base.like(self.put(base.rows(), rows)))


def dense_tree(tree):
    """A tree of arguments with dense tensors in the place of maps."""
    return pytree.tree_map_only(SparseMap, SparseMap.dense, tree)


def masked(x: Tensor, plan: PixelPlan, axes: tuple[str, ...]) -> Tensor:
    """A dense tensor, zero where the plan has no pixel."""
    return torch.where(mask_at(plan, axes), x, 0)
