"""PixelPlan: the pixels of one resolution that are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import ConvGeometry, is_int, pair
from .masks import check_mask, named, raising, resize_mask


class PixelPlan:
    """The pixels of one resolution that are computed.

    Attributes:
        index: int32 ``[P]``, ascending flat positions ``n*H*W + y*W + x`` of the active pixels.
            In the capacity form ``[capacity]``, where entries from ``count`` on are -1.
        shape: ``(N, H, W)``, the resolution that the plan is for.
        count: ``None`` in the compact form; in the capacity form an int32 ``[1]`` tensor on the
            plan's device, the number of valid entries.

    The compact form has exactly one entry for each active pixel; building it on a GPU reads the
    count back to the host. The capacity form has a fixed size and never synchronises, so it can be
    captured in a CUDA graph; pixels past the capacity are dropped, in ascending order.
    """

    def __init__(self, index: Tensor, shape: tuple[int, int, int], count: Tensor | None = None):
        if index.dtype != torch.int32 or index.dim() != 1:
            raise TypeError(f"index: expected int32 [P], got {index.dtype} {tuple(index.shape)}")
        self.index = index
        self.shape = tuple(shape)
        self.count = count
        self._inverse: Tensor | None = None
        self._as_rows: PixelPlan | None = None
        self._pointwise: dict[int, ConvGeometry] = {}
        self._kept: dict = {}  # what kernels made of the index
        self._samples = None  # the SamplePlan whose pixels these are, where they are whole samples

    @classmethod
    def from_mask(cls, mask: Tensor, capacity: int | None = None) -> PixelPlan:
        """Builds the plan of a mask.

        Args:
            mask: ``[N, H, W]`` or ``[N, 1, H, W]``, bool, integer or floating; nonzero = active.
            capacity: size of the capacity form; ``None`` builds the compact form (inside
                ``torch.compile``, where sizes must not depend on data: the capacity form with
                room for every pixel).

        Raises:
            TypeError: ``mask`` is not a tensor, or is complex or quantised.
            ValueError: wrong rank, more than 2**31 - 1 pixels, a negative capacity, or a NaN in
                the mask (not checked where checking would synchronise: capacity form on a GPU).
        """
        mask = check_mask(mask)
        shape = tuple(mask.shape)
        if capacity is None and torch.compiler.is_compiling():
            capacity = shape[0] * shape[1] * shape[2]
        if capacity is None:
            return cls(raising(torch.ops.dynops.mask_to_index.default, mask), shape)
        if not is_int(capacity, 0):
            raise ValueError(f"capacity: expected an int >= 0 or None, got {capacity!r}")
        index, count = raising(torch.ops.dynops.mask_to_index_capacity, mask, capacity)
        return cls(index, shape, count)

    @classmethod
    def full(cls, shape: tuple[int, int, int], device: torch.device | str = "cpu") -> PixelPlan:
        """The plan that computes every pixel of ``shape = (N, H, W)``."""
        n, h, w = shape
        return cls(torch.arange(n * h * w, dtype=torch.int32, device=device), shape)

    @property
    def num_rows(self) -> int:
        """Rows of a packed tensor on this plan: the active pixels, or the capacity."""
        return self.index.shape[0]

    @property
    def num_pixels(self) -> int:
        """All pixels of the resolution, N*H*W."""
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def device(self) -> torch.device:
        return self.index.device

    @property
    def is_full(self) -> bool:
        """Whether a compact plan holds every pixel (a capacity plan never says so)."""
        return self.count is None and self.num_rows == self.num_pixels

    @property
    def density(self) -> float:
        """Active pixels / all pixels. Synchronises a capacity plan."""
        active = self.num_rows if self.count is None else int(self.count)
        return active / max(self.num_pixels, 1)

    def mask(self) -> Tensor:
        """The plan as a bool mask ``[N, H, W]``."""
        flat = torch.zeros(self.num_pixels + 1, dtype=torch.bool, device=self.device)
        flat[self._slots()] = True
        return flat[:-1].view(self.shape)

    def inverse(self) -> Tensor:
        """int32 ``[N, H, W]``: the row of each pixel, or -1 where it is not active (kept)."""
        if self._inverse is None:
            self._inverse = torch.ops.dynops.inverse_index(self.index, self.count, self.shape)
        return self._inverse

    def as_rows(self) -> PixelPlan:
        """The plan of a map ``[1, C, 1, P]`` whose pixels are this plan's rows (kept)."""
        if self._as_rows is None:
            full = PixelPlan.full((1, 1, self.num_rows), self.device)
            index = full.index if self.count is None else torch.where(self.index < 0, self.index, full.index)
            self._as_rows = PixelPlan(index, full.shape, self.count)
        return self._as_rows

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
        margin = [dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i] for i in (0, 1)]
        if in_size is None:
            in_size = tuple(max((self.shape[1 + i] - 1) * stride[i] + margin[i], 0) for i in (0, 1))
        in_size = pair(in_size, "in_size", 0)
        out_size = tuple((in_size[i] - margin[i]) // stride[i] + 1 for i in (0, 1))
        if out_size != self.shape[1:]:
            raise ValueError(
                f"in_size: expected one that yields the plan's {self.shape[1:]}, got {in_size}, which yields {out_size}"
            )
        geometry = ConvGeometry(
            self.shape[0], *in_size, *self.shape[1:], *kernel, *stride, *padding, *dilation, 1, 0
        )
        return self.needed_by(geometry)

    def needed_by(self, geometry: ConvGeometry) -> PixelPlan:
        """As :meth:`needed`, for a whole :class:`ConvGeometry` (transposed convolutions too)."""
        if geometry.is_pointwise:
            return self
        if self._samples is not None and not geometry.leaves_gaps:
            return self._samples.pixels((geometry.in_h, geometry.in_w))
        mask = torch.ops.dynops.needed_mask(self.index, self.count, list(geometry))
        return PixelPlan.from_mask(mask, None if self.count is None else mask.numel())

    def resized(self, size: tuple[int, int]) -> PixelPlan:
        """This plan at another ``(H, W)``: an output pixel is active if any pixel under it is."""
        size = pair(size, "size", 1)
        if size == self.shape[1:]:
            return self
        mask = resize_mask(self.mask(), size)
        return PixelPlan.from_mask(mask, None if self.count is None else mask.numel())

    def to(self, device: torch.device | str) -> PixelPlan:
        """The same plan on another device."""
        count = None if self.count is None else self.count.to(device)
        return PixelPlan(self.index.to(device), self.shape, count)

    def _slots(self) -> Tensor:
        """int64 positions of the rows; the rows past the count go to the spare slot N*H*W."""
        index = self.index.long()
        return torch.where(index < 0, self.num_pixels, index)

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        form = "" if self.count is None else ", capacity form"
        return f"PixelPlan({self.num_rows} of {self.num_pixels} pixels, shape={self.shape}{form})"


def as_pixel_plan(mask_or_plan, name: str = "mask_or_plan") -> PixelPlan:
    """A :class:`PixelPlan` from a plan or a mask."""
    if isinstance(mask_or_plan, PixelPlan):
        return mask_or_plan
    if isinstance(mask_or_plan, Tensor):
        return named(name, "mask", PixelPlan.from_mask, mask_or_plan)
    raise TypeError(f"{name}: expected a PixelPlan or a mask tensor, got {type(mask_or_plan).__name__}")
