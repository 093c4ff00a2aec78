"""PixelPlan: the pixels of one resolution that are computed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..geometry import ConvGeometry, pair, transposed_size, window_count
from .collect import cat_index, of_one_kind
from .derived import IndexPlan
from .masks import (
    as_plan,
    check_expand,
    check_expected,
    check_index,
    check_mask,
    check_shape,
    flat_index,
    repeat_index,
    resize_mask,
)


class PixelPlan(IndexPlan):
    """The pixels of one resolution that are computed.

    Attributes:
        index: int32 ``[P]``, ascending flat positions ``n*H*W + y*W + x`` of the active pixels.
            In the capacity form ``[capacity]``, where entries from ``count`` on are -1.
        shape: ``(N, H, W)``, the resolution that the plan is for.
        count: ``None`` in the compact form; in the capacity form an int32 ``[1]`` tensor on the
            plan's device, the number of valid entries.
        expected: ``None``, or about how many entries of the capacity form will be valid. Kernels on a GPU choose
            their tiles by it instead of by the capacity. No result depends on it.

    The compact form has exactly one entry for each active pixel; building it on a GPU reads the
    count back to the host. The capacity form has a fixed size and never synchronises, so it can be
    captured in a CUDA graph; pixels past the capacity are dropped, in ascending order.
    """

    _WHERE = "shape"
    expected: int | None = None

    def __init__(
        self,
        index: Tensor,
        shape: tuple[int, int, int],
        count: Tensor | None = None,
        expected: int | None = None,
    ):
        check_index(index, count, shape[0] * shape[1] * shape[2], "[P]", "; from_coordinates takes any order")
        check_expected(expected)
        self._set(index, shape, count)
        self._expecting(expected)

    def _set(self, index: Tensor, shape: tuple[int, int, int], count: Tensor | None) -> None:
        super()._set(index, tuple(shape), count)
        self._pointwise: dict[int, ConvGeometry] = {}
        self._samples = None  # the SamplePlan whose pixels these are, where they are whole samples

    def _expecting(self, expected: int | None) -> PixelPlan:
        """This plan, which is new, with that many pixels to expect. The compact form knows how many it has."""
        if expected is not None and self.count is not None:
            self.expected = min(expected, self.num_rows)
        return self

    def _expected_of(self, pixels: int) -> int | None:
        """The active pixels to expect of ``pixels`` at this plan's density."""
        return None if self.expected is None else -(-self.expected * pixels // max(self.num_pixels, 1))

    @classmethod
    def from_mask(cls, mask: Tensor, capacity: int | None = None, expected: int | None = None) -> PixelPlan:
        """Builds the plan of a mask.

        Args:
            mask: ``[N, H, W]``, ``[N, 1, H, W]`` or ``[H, W]`` (batch 1), bool, integer or floating;
                nonzero = active.
            capacity: size of the capacity form; ``None`` builds the compact form (inside
                ``torch.compile``, in a ``vmap`` over the mask and of a meta tensor, where sizes must
                not depend on data: the capacity form with room for every pixel).
            expected: about how many pixels will be active, where a capacity says less; see the class. The compact
                form ignores it, and more than the capacity is the capacity. Plans that
                are made of this one (:meth:`needed`, :meth:`resized`) expect the same density.

        Raises:
            TypeError: ``mask`` is not a tensor, or is complex or quantised.
            ValueError: wrong rank, more than 2**31 - 1 pixels, a negative capacity or expectation, or a NaN in
                the mask (not checked where checking would synchronise: capacity form on a GPU).
        """
        mask = check_mask(mask)
        check_expected(expected)
        return cls._of_mask(mask, tuple(mask.shape), capacity)._expecting(expected)

    @classmethod
    def from_coordinates(
        cls, coordinates: Tensor, shape: tuple[int, int, int], capacity: int | None = None
    ) -> PixelPlan:
        """Builds the plan of a list of pixels, in any order, as sparse-tensor libraries and event cameras have them.

        The plan's rows are in ascending order of (n, y, x), and a pixel that is named twice is one row. Features
        in the order of the list come into the plan's order, and back, by :meth:`rows_of`::

            rows = plan.rows_of(coordinates)
            packed = features.new_zeros(plan.num_rows, features.shape[1]).index_add(0, rows, features)
            features = packed[rows]

        Args:
            coordinates: int ``[P, 3]``, (n, y, x) of each pixel, or ``[P, 2]``, (y, x), for a batch of 1.
            shape: ``(N, H, W)``, the resolution that the plan is for.
            capacity: as in :meth:`from_mask`.

        Raises:
            TypeError: ``coordinates`` are no tensor of integers.
            ValueError: another shape; coordinates outside of ``shape`` (looked for on a CPU, and in the compact form
                on a GPU; else, where looking would synchronise, they are left out).
        """
        shape = check_shape(shape)
        flat = flat_index(coordinates, shape, looks=capacity is None)
        pixels = shape[0] * shape[1] * shape[2]
        mask = torch.zeros(pixels + 1, dtype=torch.bool, device=flat.device)
        mask[torch.where(flat < 0, pixels, flat)] = True
        return cls.from_mask(mask[:-1].view(shape), capacity)

    def rows_of(self, coordinates: Tensor) -> Tensor:
        """int64 ``[P]``: the row of each pixel of a list, or -1 where it is not active.

        Args:
            coordinates: as in :meth:`from_coordinates`.
        """
        flat = flat_index(coordinates, self.shape, looks=self.count is None)
        if flat.device != self.device:
            raise ValueError(
                f"coordinates: expected them on the plan's device {self.device}, got {flat.device}"
            )
        padded = torch.cat([self.inverse().view(-1), self.index.new_full((1,), -1)])
        return padded[flat].long()  # -1, which is outside, is the last

    @classmethod
    def cat(cls, plans: Iterable[PixelPlan]) -> PixelPlan:
        """The plan of several batches one after the other. ``default_collate`` of plans is this.

        Where one of them has the capacity form, so has the result, with room for all; nothing synchronises.

        Raises:
            TypeError, ValueError: no plans, or plans of different (H, W) or devices; more than 2**31 - 1 pixels.
        """
        plans = of_one_kind(plans, PixelPlan, size=lambda plan: plan.shape[1:])
        shape = check_shape((sum(plan.shape[0] for plan in plans), *plans[0].shape[1:]), "plans")
        index, count = cat_index([(plan.index, plan.count, plan.num_pixels) for plan in plans])
        expected = [plan.num_rows if plan.count is None else plan.expected for plan in plans]
        return cls._made(index, shape, count)._expecting(None if None in expected else sum(expected))

    @classmethod
    def full(cls, shape: tuple[int, int, int], device: torch.device | str = "cpu") -> PixelPlan:
        """The plan that computes every pixel of ``shape = (N, H, W)``."""
        n, h, w = shape
        return cls._made(torch.arange(n * h * w, dtype=torch.int32, device=device), shape)

    @property
    def num_pixels(self) -> int:
        """All pixels of the resolution, N*H*W."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    num_all = num_pixels

    def mask(self) -> Tensor:
        """The plan as a bool mask ``[N, H, W]``."""
        flat = torch.zeros(self.num_pixels + 1, dtype=torch.bool, device=self.device)
        flat[self._slots()] = True
        return flat[:-1].view(self.shape)

    def inverse(self) -> Tensor:
        """int32 ``[N, H, W]``: the row of each pixel, or -1 where it is not active (kept)."""
        return self.derived(
            "inverse", lambda: torch.ops.dynops.inverse_index(self.index, self.count, self.shape)
        )

    def as_rows(self) -> PixelPlan:
        """The plan of a map ``[1, C, 1, P]`` whose pixels are this plan's rows (kept)."""
        return self.derived("rows", self._make_rows)

    def _make_rows(self) -> PixelPlan:
        full = PixelPlan.full((1, 1, self.num_rows), self.device)
        index = full.index if self.count is None else torch.where(self.index < 0, self.index, full.index)
        return PixelPlan._made(index, full.shape, self.count)._expecting(self.expected)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PixelPlan:
        """The same plan on another device."""
        return super().to(device, non_blocking)._expecting(self.expected)

    def pin_memory(self) -> PixelPlan:
        """The same plan in pinned memory. A DataLoader calls this."""
        return super().pin_memory()._expecting(self.expected)

    def pointwise(self, groups: int) -> ConvGeometry:
        """The geometry of a 1x1 convolution from this resolution to itself (kept)."""
        geometry = self._pointwise.get(groups)
        if geometry is None:
            n, h, w = self.shape
            geometry = self._pointwise[groups] = ConvGeometry(
                n, h, w, h, w, 1, 1, 1, 1, 0, 0, 1, 1, groups, 0
            )
        return geometry

    def needed(self, kernel_size, stride=1, padding=0, dilation=1, in_size=None) -> PixelPlan:
        """The plan of the input pixels that a convolution reads to compute this plan's outputs.

        Args:
            kernel_size, stride, padding, dilation: as in ``nn.Conv2d`` (ints or pairs).
            in_size: ``(H, W)`` of the input; by default the smallest that yields this plan's size.
        """
        kernel, stride = pair(kernel_size, "kernel_size", 1), pair(stride, "stride", 1)
        padding, dilation = pair(padding, "padding", 0), pair(dilation, "dilation", 1)
        axes = [(kernel[i], stride[i], padding[i], dilation[i]) for i in (0, 1)]
        if in_size is None:
            in_size = tuple(max(transposed_size(self.shape[1 + i], *axes[i]), 0) for i in (0, 1))
        in_size = pair(in_size, "in_size", 0)
        out_size = tuple(window_count(in_size[i], k, s, p, p, d) for i, (k, s, p, d) in enumerate(axes))
        if out_size != self.shape[1:]:
            raise ValueError(
                f"in_size: expected one that yields the plan's {self.shape[1:]}, got {in_size}, which yields {out_size}"
            )
        geometry = ConvGeometry(
            self.shape[0], *in_size, *self.shape[1:], *kernel, *stride, *padding, *dilation, 1, 0
        )
        return self.needed_by(geometry)

    def needed_by(self, geometry: ConvGeometry) -> PixelPlan:
        """:meth:`needed` of a whole :class:`ConvGeometry` (transposed convolutions too)."""
        if geometry.is_pointwise:
            return self
        if self._samples is not None and not geometry.leaves_gaps:
            return self._samples.pixels((geometry.in_h, geometry.in_w))
        return self._moved_to(torch.ops.dynops.needed_mask(self.index, self.count, list(geometry)))

    def resized(self, size: tuple[int, int]) -> PixelPlan:
        """This plan at another ``(H, W)``: an output pixel is active if any pixel under it is."""
        size = pair(size, "size", 1)
        if size == self.shape[1:]:
            return self
        return self._moved_to(resize_mask(self.mask(), size))

    def _moved_to(self, mask: Tensor) -> PixelPlan:
        """The plan, in this one's form, of a mask that follows from this one at another resolution."""
        if self.count is None:
            return PixelPlan.from_mask(mask)
        return PixelPlan.from_mask(mask, mask.numel(), self._expected_of(mask.numel()))

    def expand(self, batch: int) -> PixelPlan:
        """This plan, of a batch of 1, for every sample of a batch (kept); a plan of that batch itself.

        Layers and ``dynops.use_mask`` do so where a mask or plan is one for the whole batch.

        Raises:
            ValueError: a plan of another batch than 1; more than 2**31 - 1 pixels in the batch.
        """
        if batch == self.shape[0]:
            return self
        check_expand(self, batch, self.num_pixels)
        if is_compiling():  # a symbol is no key
            return self._expanded(batch)
        return self.derived(("batch", batch), lambda: self._expanded(batch))

    def _expanded(self, batch: int) -> PixelPlan:
        shape = (batch, *self.shape[1:])
        if self.count is not None:
            expected = None if self.expected is None else batch * self.expected
            return PixelPlan.from_mask(self.mask().expand(shape), batch * self.num_rows, expected)
        return PixelPlan._made(repeat_index(self.index, batch, self.num_pixels), shape)

    def _slots(self) -> Tensor:
        """int64 positions of the rows; the rows past the count go to the spare slot N*H*W."""
        index = self.index.long()
        return torch.where(index < 0, self.num_pixels, index)

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        form = "" if self.count is None else ", capacity form"
        return f"PixelPlan({self.num_rows} of {self.num_pixels} pixels, shape={self.shape}{form})"


def as_pixel_plan(mask_or_plan, name: str = "mask_or_plan", batch: int | None = None) -> PixelPlan:
    """A :class:`PixelPlan` from a plan or a mask; one for a single sample is that of every sample of ``batch``."""
    return as_plan(PixelPlan, mask_or_plan, name, batch=batch)
