"""``with use_mask(mask):`` the mask that converted layers work on, at whatever resolution they have."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import modes
from .geometry import ConvGeometry, known
from .kept import Made
from .plans import BlockPlan, PixelPlan, check_mask, resize_mask, widen_mask
from .plans.cells import axes, mask_after
from .recompute import travels
from .scope import Scope

_scope = Scope("dynops.active")
travels(_scope)


class use_mask:
    """Context manager: inside it, converted layers compute only the pixels of a mask.

    ``dynops.active`` is the same class under its older name.

    Args:
        mask_or_plan: a mask ``[N, H, W]`` or ``[N, 1, H, W]`` (nonzero = active), a :class:`PixelPlan` or a
            :class:`BlockPlan`. It has the resolution of the model's input, a coarser one, or one that is finer by whole
            numbers. A mask of batch 1, or ``[H, W]``, holds for every sample. If a layer has a batch of k N, as
            classifier-free guidance makes it by ``torch.cat([x, x])``, the mask repeats.
        block_size: pixels of a block at the mask's own resolution, ``int`` or ``(height, width)``. With it
            the mask is first widened to whole blocks: one active pixel makes its block active.
        ragged: the batch holds images of different sizes, each in the top left corner and zero beyond it. The
            mask, at the input's resolution, is true on each image. See below.

    A layer's plan follows from the mask at its input's resolution by the layer's own geometry. An output pixel
    stands for as many input pixels as the stride, around the centre of the window that it reads. It is active if one
    of them is. So 3x3 convolutions without padding move a mask by one pixel each. A layer with stride s computes blocks
    of ``block_size / s``. Where the input has neither the mask's size nor one that a layer made, the mask is resized by
    the ratio of sizes: an output pixel is active if any mask pixel under it is. Each size has one mask: it is made for
    the first layer with a map of this size. Plans are built once and shared between the layers.

    With ``ragged`` an output pixel is active if the layer makes it of the image alone. So unpadded layers and odd
    sizes drop the same rows and columns as for one image. Pools read nothing outside of an image, and global pools are
    over the image. So each image has the result that it has alone. An exception is BatchNorm in training mode: its
    statistics are over the batch. :func:`dynops.ragged` makes such a batch and its mask.

    The context nests (the innermost mask holds), may be entered again and by several threads at once, and
    is left when an exception passes through. It warns at its end if no converted layer ran inside. Entered inside a
    compiled function, with the mask as its input, it makes plans of the capacity form. The mask holds for the
    - thread that enters it: a thread that is started inside the block begins without a mask;
    - asyncio task that enters it: a task that is made inside the block begins with its mask, and may enter others;
    - generator that enters it, while the generator runs: not for the caller while the generator waits at a
      ``yield``. A generator that is a context manager (``contextlib.contextmanager``) or a pytest fixture
      hands its mask to the caller;
    - function that ``torch.utils.checkpoint`` runs inside: its recomputation has the same mask, wherever the
      backward pass is called.

    Raises:
        TypeError, ValueError: ``mask_or_plan`` is neither a mask nor a plan, or ``block_size`` is below 1. A layer on
            another device, or of a batch that fits no mask, raises ValueError when it is called.
    """

    rows_only = False  # what lies outside of a map's rows is known: it is zero

    def __init__(
        self,
        mask_or_plan: Tensor | PixelPlan | BlockPlan,
        block_size: int | tuple[int, int] | None = None,
        *,
        ragged: bool = False,
    ):
        if not isinstance(ragged, bool):
            raise TypeError(f"ragged: expected a bool, got {ragged!r}")
        self.ragged, self._used = ragged, False
        self._given: PixelPlan | None = None  # of the capacity form, in which the others are then too
        self._plans: dict[tuple[int, int, int], PixelPlan] = {}
        if isinstance(mask_or_plan, BlockPlan):
            mask_or_plan = mask_or_plan.pixels()
        if isinstance(mask_or_plan, PixelPlan):
            self._given = None if mask_or_plan.count is None else mask_or_plan
            mask = mask_or_plan.mask()
            if block_size is None:
                _keep_in(self._plans, mask_or_plan.shape, mask_or_plan)
        else:
            mask = _without_nan(check_mask(mask_or_plan)) != 0
        if block_size is not None:
            mask = widen_mask(mask, block_size)
        self._mask = mask  # [N, H, W] bool, as passed
        self._begun = _made(mask)
        self._masks: dict[tuple[int, int], Tensor] = {}  # at each size that it has been brought to
        _keep_in(self._masks, tuple(mask.shape[1:]), mask)
        # in a graph: the mask before layers with strides, the size after them, the strides
        self._shrunk: list[tuple] = []
        # of a ragged batch: masks before and after layers
        self._images: dict[tuple, tuple] = {}

    def __enter__(self) -> use_mask:
        _scope.enter(self)
        _value(self._begun)  # maybe on another thread, whose stream waits for it here
        return self

    def __exit__(self, error, *rest) -> None:
        _scope.leave(self)
        if error is None and not self._used and not is_compiling():
            warnings.warn(
                "use_mask: expected a converted layer inside, but none ran: the mask changed nothing. "
                "dynops.convert_(model) converts a model's layers.",
                stacklevel=2,
            )

    @property
    def mask_size(self) -> tuple[int, int]:
        """``(H, W)`` of the mask as passed."""
        return self._mask.shape[1], self._mask.shape[2]

    def masks(self) -> dict[tuple[int, int], Tensor]:
        """The masks ``[N, H, W]`` that layers have used, by size."""
        return {size: _value(mask) for size, mask in self._masks.items()}

    @property
    def ran(self) -> bool:
        """True from the first layer on that asked for its plan."""
        return self._used

    def plan(self, shape: tuple[int, int, int], device: torch.device) -> PixelPlan:
        """The plan for maps of ``shape = (N, H, W)`` on ``device`` (kept).

        Raises:
            ValueError: the mask has another batch or lies on another device.
        """
        return self._kept(shape, device, None)

    def after(self, geometry: ConvGeometry, device: torch.device, ceil: bool = False) -> PixelPlan:
        """The plan of the output of a convolution or pool on ``device`` (kept); errors as for :meth:`plan`.

        Args:
            ceil: a pool's ``ceil_mode``.
        """
        if self.ragged and not is_compiling():
            self._choose(geometry, ceil)
        return self._kept(geometry.out_shape, device, (geometry, ceil))

    def move(self, geometry: ConvGeometry, ceil: bool = False) -> None:
        """As :meth:`after`, for a layer inside of one that asks for the plan of its own output."""
        if self.ragged and not is_compiling():
            self._choose(geometry, ceil)
        elif not _is_empty(self._mask.shape[1:]):
            self._at((geometry.out_h, geometry.out_w), (geometry, ceil))

    def for_graph(self) -> tuple[Tensor, int | None]:
        """The mask ``[N, H, W]`` as the input of a CUDA graph whose layers run under it, and the pixels that are expected."""
        self._used = True
        return self._mask, None if self._given is None else self._given._expected_of(self._mask.numel())

    def _choose(self, geometry: ConvGeometry, ceil: bool) -> None:
        """In a ragged batch two layers may make one size from images of different sizes: the last layer holds."""
        below, size = self._at((geometry.in_h, geometry.in_w), None), (geometry.out_h, geometry.out_w)
        key = (geometry, ceil, id(below))
        if key not in self._images:
            mask, known = mask_after(below, axes(geometry, ceil), True), self._masks.get(size)
            same = known is not None and torch.equal(_value(known), mask)
            self._images[key] = below, known if same else _made(mask)  # with ``below``: its id stays its own
        self._hold(size, self._images[key][1])

    def of_images(self, mask: Tensor) -> PixelPlan:
        """The plan of a ragged batch of images that have become those of ``mask`` ``[N, H, W]``. From now on it holds for this size."""
        size, own = tuple(mask.shape[1:]), mask[: self._mask.shape[0]]  # repeated, as the images are
        known = self._masks.get(size)
        if known is None or not torch.equal(_value(known), own):
            self._hold(size, _made(own))
        return self._kept(tuple(mask.shape), mask.device, None)

    def _hold(self, size: tuple[int, int], mask) -> None:
        if self._masks.get(size) is not mask:
            self._masks[size] = mask
            self._plans = {shape: plan for shape, plan in self._plans.items() if shape[1:] != size}

    def _kept(self, shape: tuple[int, int, int], device: torch.device, layer: tuple | None) -> PixelPlan:
        self._used = True
        plan = None if is_compiling() else self._plans.get(shape)  # a plan on a CPU is kept as it is
        if type(plan) is not PixelPlan:
            plan = _kept_in(self._plans, shape, lambda: self._make(shape, layer))
        if plan.index.device != device:
            raise ValueError(f"use_mask: expected the mask on the layer's device {device}, got {plan.device}")
        return plan

    def _make(self, shape: tuple[int, int, int], layer: tuple | None) -> PixelPlan:
        n, *size = shape
        mask = self._mask
        if known(mask.shape[0] == n):
            pass
        elif mask.shape[0] == 1 and n > 1:
            one = (1, *size)
            return _kept_in(self._plans, one, lambda: self._make(one, layer)).expand(n)
        elif n > mask.shape[0] > 0 and n % mask.shape[0] == 0:
            repeated = self._at(tuple(size), layer).repeat(n // mask.shape[0], 1, 1)
            return PixelPlan.from_mask(repeated) if self._given is None else self._given._moved_to(repeated)
        elif mask.shape[0] != n and mask.shape[0] != 1:
            raise ValueError(
                f"use_mask: expected a mask for the layer's batch of {n}, got one for {mask.shape[0]} "
                f"(shape {tuple(mask.shape)}): pass one whose batch divides {n}"
            )
        if _is_empty(mask.shape[1:]) and not known(n == 0):
            raise ValueError(f"use_mask: expected a mask with pixels, got shape {tuple(mask.shape)}")
        if _is_empty(shape):
            return PixelPlan.from_mask(mask.new_zeros(shape))
        mask = self._at(tuple(size), layer)
        return PixelPlan.from_mask(mask) if self._given is None else self._given._moved_to(mask)

    def _at(self, size: tuple[int, int], layer: tuple | None) -> Tensor:
        """The mask at ``size``, which ``layer`` makes (kept)."""
        return _kept_in(self._masks, size, lambda: self._moved(size, layer))

    def _moved(self, size: tuple[int, int], layer: tuple | None) -> Tensor:
        if layer is None or size == (1, 1):  # one pixel sees all of the map
            return resize_mask(self._mask, size)
        g, earlier = layer[0], None
        if is_compiling() and not self.ragged:
            earlier = _found_in(self._masks, (g.in_h, g.in_w))
        made = self._by_geometry(size, *layer)
        return self._as_before(made, size, g, earlier) if is_compiling() and not self.ragged else made

    def _as_before(
        self, mask: Tensor, size: tuple[int, int], g: ConvGeometry, below: Tensor | None
    ) -> Tensor:
        """In a graph: the mask that the map had before it was shrunk, where ``g`` enlarges it to that size again.

        Symbols of sizes leave open if it does: 2 * ceil(h / 2) is h where h is even.

        Args:
            mask: of the layer's output. below: of its input, where a layer made it.
        """
        stride, in_size = (g.stride_h, g.stride_w), (g.in_h, g.in_w)
        if g.transposed:
            return self._enlarged(mask, size, in_size, stride)
        if stride != (1, 1):
            before = self._mask if below is None else _value(below)
            longer = [
                (a, size, (s * stride[0], t * stride[1]))
                for a, b, (s, t) in self._shrunk
                if _same(b, in_size)
            ]
            self._shrunk += [(before, size, stride), *longer]
        return mask

    def _enlarged(self, mask: Tensor, size: tuple[int, int], in_size: tuple[int, int], by: tuple) -> Tensor:
        for before, small, factors in self._shrunk:
            if factors != by or not _same(small, in_size):
                continue
            was = tuple(before.shape[1:])
            self._shrunk += [(a, size, stride) for a, b, stride in self._shrunk if _same(b, was)]
            off = sum((a - b) ** 2 for a, b in zip(size, was, strict=True))
            same = torch.full((), off, device=mask.device) == 0
            return torch.where(same, resize_mask(before, size), mask)
        return mask

    def _by_geometry(self, size: tuple[int, int], geometry: ConvGeometry, ceil: bool) -> Tensor:
        in_size, both = (geometry.in_h, geometry.in_w), axes(geometry, ceil)
        exact, below = all(known(axis.is_exact) for axis in both), True
        if not self.ragged and _found_in(self._masks, in_size) is None:
            below = not exact and _divides(in_size, self._mask.shape[1:], self._mask.device)
        if below is False:
            return resize_mask(self._mask, size)
        mask = self._at(in_size, None)
        if below is not True:
            return torch.where(below, mask_after(mask, both, False), resize_mask(self._mask, size))
        if self.ragged or geometry.transposed or not exact:
            return mask_after(mask, both, self.ragged)
        if (geometry.stride_h, geometry.stride_w) != (2, 2):
            return resize_mask(mask, size)
        rows = mask[:, ::2] | mask[:, 1::2]  # 10 us; from 224x224 to 112 at once it is 100
        return rows[..., ::2] | rows[..., 1::2]


def _kept_in(table: dict, sizes: tuple, make: Callable):
    """``table[sizes]``, made where it is missing."""
    found = _found_in(table, sizes)
    if found is None:
        found = _made(make())
        _keep_in(table, sizes, found)
    return _value(found)


def _same(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """True for sizes that are known to be equal."""
    return all(known(x == y) for x, y in zip(a, b, strict=True))


def _keep_in(table: dict, sizes: tuple, value) -> None:
    """Sets ``table[sizes]``. Sizes may be symbols while compiling: these have no hash, and looking them up fixes them."""
    if is_compiling():
        table[len(table)] = sizes, value
    else:
        table[sizes] = value


def _found_in(table: dict, sizes: tuple):
    """``table[sizes]``, or None."""
    if not is_compiling():
        return table.get(sizes)
    for key, value in table.items():
        at, found = value if isinstance(key, int) else (key, value)
        if _same(at, sizes):
            return found
    return None


def _made(value: Tensor | PixelPlan):
    """What a table keeps of a mask or plan: on a GPU with the moment from which other streams may read it.

    An event that is recorded in the capture of a CUDA graph means nothing outside of it, and the other way round.
    """
    return value if value.device.type != "cuda" or _records() else Made(value)


def _value(kept):
    if type(kept) is not Made:
        return kept
    return kept.made if _records() else kept.on_this_stream()


def _records() -> bool:
    """True if a compiler or a CUDA graph records what is called."""
    return is_compiling() or torch.cuda.is_current_stream_capturing()


def _divides(a: tuple[int, int], b: tuple[int, int], device: torch.device) -> bool | Tensor:
    """True where one size is a multiple of the other. Where symbols leave it open, a tensor that says so."""
    rests = [[x % y for x, y in zip(*both, strict=True)] for both in ((a, b), (b, a))]
    if any(all(known(rest == 0) for rest in both) for both in rests):
        return True
    if all(any(known(rest != 0) for rest in both) for both in rests):
        return False
    one, other = (torch.full((), sum(both), device=device) == 0 for both in rests)
    return one | other


def _is_empty(sizes) -> bool:
    """True where one of the sizes is 0."""
    return any(known(size == 0) for size in sizes)


def _without_nan(mask: Tensor) -> Tensor:
    """The mask, or an error where it has a NaN (not checked where checking would synchronise)."""
    checked = mask.is_floating_point() and modes.may_look(mask)
    if checked and bool(mask.isnan().any()):
        raise ValueError("mask: expected numbers, got NaN in it")
    return mask


def current() -> use_mask | None:
    """The innermost ``use_mask`` context that holds here."""
    return _scope.innermost()


active = use_mask
