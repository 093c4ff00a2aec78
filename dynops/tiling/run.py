"""dynops.tiles: a model on a large image, tile by tile."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import context
from ..geometry import is_int
from .arrays import Image, Mask, any_in, check_out, put, under
from .blend import Band
from .reach import NotLocal, Reach, reach_of
from .windows import BlendedAxis, ExactAxis, Window


def tiles(
    model: Callable,
    image,
    mask=None,
    *,
    tile: int | tuple[int, int] = 512,
    exact: bool | None = None,
    overlap: float = 0.25,
    batch_size: int = 4,
    prepare: Callable[[Tensor], Tensor] | None = None,
    nodata: float | None = None,
    channels_last: bool = False,
    out=None,
    progress: bool = False,
):
    """Runs a model on an image that is too large for it: tile by tile, and only where a mask is active::

        logits = dynops.tiles(model, slide, tissue, tile=1024)

    A model is local if each output depends on a limited part of the image, as in convolutions, pools, norms in eval mode and
    upsampling by whole numbers. At each active pixel a local model has the result of the whole image, to rounding. Its
    reach, and the multiples at which it may be cut, are measured on strips of noise: up to some thirty runs on at most
    64 x 4096 pixels. Tiles overlap by the reach. Any other model (attention, squeeze-excite, GroupNorm, global pools)
    runs on overlapping windows of ``tile`` pixels. Their outputs are averaged with weights that fall towards the edges.

    Gradients are not computed. Only the parts of the image that a tile needs are read.

    Args:
        model: a module in eval mode, or a function, from ``[B, C, h, w]`` to a map, or to a tuple, list or dict of maps.
        image: ``[C, H, W]`` or ``[N, C, H, W]``: a tensor, or anything with a ``shape`` that can be sliced, such as a
            numpy.memmap, a zarr or an h5py array.
        mask: ``[H, W]``, ``[N, H, W]`` or ``[N, 1, H, W]``, nonzero = active, of any resolution, as a thumbnail's;
            a tensor or an array. None: all of the image.
        tile: pixels along a side, or (height, width), that one run computes; exact tiles are rounded up to the model's
            stride and read their surroundings besides. An image that is smaller along an axis is not cut there.
        exact: True raises an error where the model is not local, False always blends. None: exact where that can be.
        overlap: of blended windows, a share of ``tile`` below 1, or pixels as an int.
        batch_size: tiles of one size that run at once.
        prepare: makes the model's input ``[C, h, w]`` of a part of the image as it is stored, pixel by pixel: scaling,
            colours. It is called before what lies outside of the image is zero. None: the model's dtype.
        nodata: a value (NaN too) that all channels of a pixel without data have. Such pixels are inactive, and zero for the model.
        channels_last: the image is ``[H, W, C]`` or ``[N, H, W, C]``.
        out: written at active pixels, and nowhere else: a tensor or an array (numpy.memmap, zarr) of the result's shape; for
            a model with several outputs a tuple, list or dict of these. None: a new tensor on the image's device (the
            CPU for an array), zero where nothing is active.
        progress: shows a bar of the tiles, by tqdm.

    Returns:
        ``out``, or maps ``[C', h, w]`` (``[N, C', h, w]`` for a batch) in the model's own scale and dtype: a segmentation at
        1/1, features at 1/32. An output pixel is active if any mask pixel under it is.

    Raises:
        TypeError, ValueError: an argument that does not fit, a model in training mode, ``exact=True`` for a model that is
            not local (the message says why), outputs that are no floating maps, or a call inside ``dynops.use_mask``.
    """
    job = Job(model, image, mask, prepare, nodata, channels_last, batch_size, progress, out)
    return job.run_all(tile, exact, overlap)


def _checked_tile(tile) -> tuple[int, int]:
    sizes = (tile, tile) if is_int(tile) else tile
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 2 or not all(is_int(size, 1) for size in sizes):
        raise ValueError(f"tile: expected pixels as an int >= 1 or (height, width), got {tile!r}")
    return tuple(sizes)


def _checked_overlap(overlap, tile: tuple[int, int]) -> tuple[int, int]:
    if isinstance(overlap, float) and 0 <= overlap < 1:
        return tuple(int(size * overlap) for size in tile)
    if not is_int(overlap, 0) or overlap >= min(tile):
        raise ValueError(
            f"overlap: expected a share in [0, 1) or pixels as an int below {min(tile)}, got {overlap!r}"
        )
    return overlap, overlap


class Job:
    """One call of :func:`tiles`.

    Attributes:
        known: the reaches that were measured, each with the size of its axis; shared between calls of one model.
    """

    def __init__(self, model, image, mask, prepare, nodata, channels_last, batch_size, progress, out):
        if not callable(model):
            raise TypeError(f"model: expected a module or a function, got {type(model).__name__}")
        if context.current() is not None:
            raise ValueError(
                "dynops.tiles: expected a call outside of dynops.use_mask, whose mask would be stretched over each tile: "
                "pass the mask of the image as mask="
            )
        if isinstance(model, nn.Module) and model.training:
            raise ValueError(
                "model: expected a module in eval mode, got one in training mode: call model.eval()"
            )
        if not is_int(batch_size, 1):
            raise ValueError(f"batch_size: expected an int >= 1, got {batch_size!r}")
        self.model, self.name = model, getattr(type(model), "__name__", "a function")
        self.image = Image(image, channels_last)
        self.mask = Mask(mask, self.image.samples)
        self.prepare, self.nodata, self.batch_size, self.progress = prepare, nodata, batch_size, progress
        own = (
            [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
            if isinstance(model, nn.Module)
            else []
        )
        stored = image if isinstance(image, Tensor) else torch.empty(0, device="cpu")
        first = (
            own[0] if own else stored if stored.is_floating_point() else torch.empty(0, device=stored.device)
        )
        self.dtype, self.device, self.out_device = first.dtype, first.device, stored.device
        self.spec, self.given, self.outs, self.known = None, out, None, {}

    def run_all(self, tile, exact: bool | None, overlap: float):
        """The result."""
        tile = _checked_tile(tile)
        if exact not in (None, True, False):
            raise TypeError(f"exact: expected True, False or None, got {exact!r}")
        overlaps, reaches = _checked_overlap(overlap, tile), None
        with torch.no_grad():
            try:
                reaches = None if exact is False else self.reaches(tile)
            except NotLocal as reason:
                if exact:
                    raise ValueError(
                        f"exact: expected a model whose outputs depend on a limited part of the image, got {self.name}: "
                        f"{reason}. exact=False blends overlapping windows"
                    ) from None
            if reaches is None:
                self.blended(tile, overlaps)
            else:
                self.exactly(tile, reaches)
        return self.given if self.given is not None else pytree.tree_unflatten(self.outs, self.spec)

    # ------------------------------------------------------------------------------- the model

    def run(self, x: Tensor) -> list[Tensor]:
        """The model's outputs for ``[B, C, h, w]``."""
        leaves, spec = pytree.tree_flatten(self.model(x))
        for y in leaves:
            if (
                not isinstance(y, Tensor)
                or not y.is_floating_point()
                or y.dim() != 4
                or y.shape[0] != x.shape[0]
            ):
                what = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
                raise ValueError(
                    f"model: expected floating maps [{x.shape[0]}, C, h, w] as its output, got {what} from {self.name}: pass "
                    f"the part of it that makes maps"
                )
        self.spec = spec
        return leaves

    def input_channels(self) -> int:
        """The channels that the model gets: ``prepare`` may make others."""
        one = self.image.part(0, slice(0, 1), slice(0, 1))
        return self.prepared(one, None).shape[0]

    def reaches(self, tile: tuple[int, int]) -> list[Reach | None]:
        """The reach along both axes; None where the image is not cut."""
        generator, channels = torch.Generator("cpu").manual_seed(0), self.input_channels()

        def noise(h: int, w: int) -> Tensor:
            x = torch.randn(1, channels, h, w, generator=generator, device="cpu")
            return x.to(self.device, self.dtype)

        def run(x: Tensor) -> list[Tensor]:
            try:
                return self.run(x)
            except ValueError as error:
                raise NotLocal(str(error)) from None

        sizes, found = (self.image.height, self.image.width), []
        for axis, size in enumerate(sizes):
            known = self.known.setdefault((axis, channels, self.dtype), [])
            reach = next((reach.moved(size) for reach in known if reach.fits(size)), None)
            if reach is None and size > tile[axis]:
                reach = reach_of(run, noise, axis, size)
                known.append(reach)
            found.append(reach)
        return found

    # ------------------------------------------------------------------------------- the image

    def prepared(self, part: Tensor, valid: Tensor | None) -> Tensor:
        """A part of the image as the model takes it, ``[C, h, w]``."""
        part = part.to(self.device)
        made = part if self.prepare is None else self.prepare(part)
        if not isinstance(made, Tensor) or made.dim() != 3 or made.shape[1:] != part.shape[1:]:
            what = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(f"prepare: expected [C, {part.shape[1]}, {part.shape[2]}] from it, got {what}")
        made = made.to(self.device, self.dtype)
        return made if valid is None else made.masked_fill(~valid.to(made.device), 0)

    def read(self, sample: int, y: Window, x: Window) -> tuple[Tensor, Tensor | None]:
        """What a window reads, zero beyond the image, and bool ``[h, w]``: where it has data (None: everywhere)."""
        rows, columns = (
            slice(y.start, min(y.end, self.image.height)),
            slice(x.start, min(x.end, self.image.width)),
        )
        part = self.image.part(sample, rows, columns)
        valid = None
        if self.nodata is not None:
            absent = part.isnan() if math.isnan(self.nodata) else part == self.nodata
            valid = ~absent.all(0)
        made = self.prepared(part, valid)
        missing = (0, x.end - columns.stop, 0, y.end - rows.stop)
        return (F.pad(made, missing) if any(missing) else made), None if valid is None else valid.cpu()

    def keep(self, sample: int, sizes, rows: slice, columns: slice, y: Window, x: Window, valid) -> Tensor:
        """bool ``[h, w]``: the active pixels of a part of an output of ``sizes``."""
        active = self.mask.at(sample, sizes, rows, columns)
        if valid is None:
            return active
        spans = []
        for part, size, own, window, read in zip(
            (rows, columns), sizes, (self.image.height, self.image.width), (y, x), valid.shape, strict=True
        ):
            first, end = under(part, size, own)
            spans.append(((first - window.start).clamp(0, read), (end - window.start).clamp(0, read)))
        return active & any_in(valid, *spans)

    def windows(self, axes) -> list[tuple[int, Window, Window]]:
        """The windows that make an active pixel, by sample, row and column."""
        spans = [[axis.spans(window) for window in axis.windows] for axis in axes]
        found = []
        for n in range(self.image.samples):
            for y, rows in zip(axes[0].windows, spans[0], strict=True):
                for x, columns in zip(axes[1].windows, spans[1], strict=True):
                    if self.is_active(n, rows, columns):
                        found.append((n, y, x))
        return found

    def is_active(self, sample: int, rows: list, columns: list) -> bool:
        """True where a pixel is, of any output."""
        outputs = max(len(rows), len(columns))  # an axis that is not cut has one for all
        rows, columns = (spans * outputs if len(spans) == 1 else spans for spans in (rows, columns))
        return any(
            self.mask.any(sample, (y_size, x_size), y, x)
            for (y, y_size), (x, x_size) in zip(rows, columns, strict=True)
        )

    def batches(self, windows: list) -> Iterator[tuple[list, list[Tensor]]]:
        """Windows with what they read, and the model's outputs for them: those of one size together."""
        waiting: dict[tuple, list] = {}
        for n, y, x in windows:
            self.tick()
            part, valid = self.read(n, y, x)
            if valid is not None and not bool(valid.any()):
                continue
            group = waiting.setdefault(tuple(part.shape), [])
            group.append((n, y, x, valid, part))
            if len(group) == self.batch_size:
                yield self.ran(waiting.pop(tuple(part.shape)))
        for group in waiting.values():
            yield self.ran(group)

    def ran(self, group: list) -> tuple[list, list[Tensor]]:
        return [entry[:4] for entry in group], self.run(torch.stack([entry[4] for entry in group]))

    @contextlib.contextmanager
    def bar(self, total: int) -> Iterator[None]:
        self.tick = lambda: None
        if not self.progress:
            yield
            return
        try:
            from tqdm import tqdm
        except ImportError:
            warnings.warn("progress: tqdm is not installed, no bar is shown", stacklevel=6)
            yield
            return
        with tqdm(total=total, unit="tile") as shown:
            self.tick = shown.update
            yield

    # ------------------------------------------------------------------------------- the result

    def make_outs(self, leaves: list[Tensor], sizes: list[tuple[int, int]]) -> None:
        """Takes or makes what the results are written into."""
        batch = (self.image.samples,) if self.image.batched else ()
        shapes = [(*batch, y.shape[1], *size) for y, size in zip(leaves, sizes, strict=True)]
        if self.given is None:
            self.outs = [
                torch.zeros(shape, dtype=y.dtype, device=self.out_device)
                for y, shape in zip(leaves, shapes, strict=True)
            ]
            return
        self.outs = pytree.tree_leaves(self.given)
        check_out(self.outs, shapes)

    def put(self, leaf: int, n: int, rows: slice, columns: slice, values: Tensor, keep: Tensor) -> None:
        if bool(keep.any()):
            put(self.outs[leaf], n if self.image.batched else None, rows, columns, values, keep)

    def exactly(self, tile: tuple[int, int], reaches: list[Reach | None]) -> None:
        """Each window writes its own outputs."""
        sizes = self.image.height, self.image.width
        axes = [ExactAxis(size, t, reach) for size, t, reach in zip(sizes, tile, reaches, strict=True)]
        windows = self.windows(axes)
        if not windows:  # of one part the shape of the result is known
            y, x = (axis.windows[0] for axis in axes)
            empty = torch.zeros(1, self.input_channels(), y.end, x.end, device=self.device, dtype=self.dtype)
            self.exact_outs(axes, self.run(empty))
        with self.bar(len(windows)):
            for group, leaves in self.batches(windows):
                if self.outs is None:
                    self.exact_outs(axes, leaves)
                for i, window in enumerate(group):
                    for leaf, made in enumerate(leaves):
                        self.put_exact(axes, leaf, window, made[i])

    def put_exact(self, axes: list[ExactAxis], leaf: int, window: tuple, made: Tensor) -> None:
        n, y, x, valid = window
        rows, own_rows = axes[0].places(y, leaf, made.shape[1])
        columns, own_columns = axes[1].places(x, leaf, made.shape[2])
        if rows.start == rows.stop or columns.start == columns.stop:
            return  # of an output that ends before the image, without padding
        keep = self.keep(n, tuple(self.outs[leaf].shape[-2:]), rows, columns, y, x, valid)
        self.put(leaf, n, rows, columns, made[:, own_rows, own_columns], keep)

    def exact_outs(self, axes: list[ExactAxis], leaves: list[Tensor]) -> None:
        sizes = [tuple(axes[d].out_size(i, y.shape[2 + d]) for d in (0, 1)) for i, y in enumerate(leaves)]
        self.make_outs(leaves, sizes)

    def blended(self, tile: tuple[int, int], overlaps: tuple[int, int]) -> None:
        """Windows of one size, row by row: only what a row of windows overlaps is held."""
        leaves = self.run(torch.zeros(1, self.input_channels(), *tile, device=self.device, dtype=self.dtype))
        sizes = self.image.height, self.image.width
        axes = [BlendedAxis(sizes[d], tile[d], overlaps[d], [y.shape[2 + d] for y in leaves]) for d in (0, 1)]
        self.make_outs(leaves, [tuple(axis.out_size(i) for axis in axes) for i in range(len(leaves))])
        windows = self.windows(axes)
        with self.bar(len(windows)):
            for n, of_image in itertools.groupby(windows, lambda window: window[0]):
                bands = [
                    Band(axes, i, y, self.outs[i], partial(self.put_blended, n, i))
                    for i, y in enumerate(leaves)
                ]
                for y, row in itertools.groupby(of_image, lambda window: window[1]):
                    self.add_row(bands, y, list(row))
                for band in bands:
                    band.flush(band.sums.shape[1])

    def add_row(self, bands: list[Band], y: Window, windows: list) -> None:
        for band in bands:
            band.move(y)
        for group, leaves in self.batches(windows):
            for i, (*_, x, valid) in enumerate(group):
                for band, made in zip(bands, leaves, strict=True):
                    band.add(made[i], y, x, valid)

    def put_blended(
        self, n: int, leaf: int, rows: slice, columns: slice, values: Tensor, data: Tensor
    ) -> None:
        whole = tuple(self.outs[leaf].shape[-2:])
        self.put(leaf, n, rows, columns, values, data & self.mask.at(n, whole, rows, columns))
