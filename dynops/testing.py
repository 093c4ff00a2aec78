"""Helps tests: one error budget, makers of inputs and masks, and a dense oracle.

The oracle (:func:`dense_masked_conv2d`) is plain ``F.conv2d`` and a mask. It shares no line with
``dynops.ops``, so that a mistake there cannot hide here. A test then reads::

    x, weight = random_tensor(2, 8, 9, 9), random_tensor(4, 8, 3, 3)
    mask = random_mask((2, 7, 7), density=0.3)
    actual = dynops.ops.sparse_conv2d(x, weight, None, dynops.PixelPlan.from_mask(mask))
    exact = dense_masked_conv2d(x.double(), weight.double(), None, mask)
    dense = dense_masked_conv2d(x, weight, None, mask)
    assert_within_budget(actual, exact, dense)
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from . import backends

LAYOUTS = ("nchw", "channels_last", "strided", "transposed", "expanded", "zero_stride")

_ACTIVATIONS = {
    None: lambda y: y,
    "relu": torch.relu,
    "relu6": lambda y: y.clamp(0, 6),
    "silu": lambda y: y * torch.sigmoid(y),
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "hardswish": F.hardswish,
    "relu2": lambda y: F.relu(y).square(),
}


def available_backends() -> tuple[str, ...]:
    """The backends that run CPU tensors here: "reference", and "cpp" where the binary was built."""
    return ("reference",) if backends._C is None else ("reference", "cpp")


# ------------------------------------------------------------------------------- error budget


def in_both_formats(tensors: dict[str, Tensor | None]) -> list[dict[str, Tensor | None]]:
    """``tensors`` as they are; and, where the first map ``[_, _, H, W]`` is, with all of them in the other format than it.

    For the yardstick of :func:`assert_within_budget`: torch sums the two memory formats in orders of their own. One is up
    to 2.7 times as exact as the other, and which one depends on sizes and on the CPU.
    """
    maps = {k: t for k, t in tensors.items() if t is not None and t.dim() == 4}
    if not maps:
        return [tensors]
    last = next(iter(maps.values())).is_contiguous(memory_format=torch.channels_last)
    other = torch.contiguous_format if last else torch.channels_last
    return [tensors, tensors | {k: t.contiguous(memory_format=other) for k, t in maps.items()}]


def assert_within_budget(
    actual: Tensor, exact: Tensor, dense: Tensor | Sequence[Tensor], what: str = "result"
) -> None:
    """Checks ``actual`` against the exact result, with the dense op's own error as the yardstick.

    In the Euclidean norm ``|actual - exact|`` may be at most ``2 |dense - exact|`` plus one rounding
    of the output dtype, ``eps/2 * |exact|``. So where the exact result is zero, ``actual`` must be
    zero too. A norm over many values can hide one that is wrong. So the largest single error may be at most
    ``8 max|dense - exact| + 4 eps * max|exact|``.

    Args:
        actual: the result under test.
        exact: the same result from float64 inputs and arithmetic.
        dense: the same result from the dense PyTorch op in ``actual``'s dtype; or several, of the op in both memory
            formats. Then the most exact one is the yardstick; the first, where fewer than 100 numbers are not zero,
            whose errors are luck. What is one of them to the bit is the dense op, and passes.
        what: named in the error.

    Raises:
        AssertionError: another shape or dtype than ``dense``, a value that is not finite where
            ``exact`` is, or an error over the budget.
    """
    assert exact.dtype == torch.float64, f"{what}: exact: expected float64, got {exact.dtype}"
    if not isinstance(dense, Tensor):
        if any(torch.equal(actual, d) for d in dense if d.dtype == actual.dtype):
            return
        several = dense if exact.count_nonzero() >= 100 else dense[:1]
        dense = min(several, key=lambda d: float((d.detach().double() - exact.detach()).norm()))
    for name, value in (("dense", dense), ("exact", exact)):
        assert actual.shape == value.shape, (
            f"{what}: shape {tuple(actual.shape)}, but {name} has {tuple(value.shape)}"
        )
    assert actual.dtype == dense.dtype, f"{what}: dtype {actual.dtype}, but dense has {dense.dtype}"
    actual, exact, eps = actual.detach().double(), exact.detach(), torch.finfo(dense.dtype).eps
    dense = dense.detach().double()
    wrong = int((actual.isfinite() != exact.isfinite()).sum())
    assert wrong == 0, f"{what}: {wrong} of {actual.numel()} values are not finite where the exact ones are"
    if exact.numel() == 0:
        return
    error, yardstick, size = (actual - exact).abs(), (dense - exact).abs(), exact.abs()
    budget = 2 * yardstick.norm() + eps / 2 * size.norm()
    assert error.norm() <= budget, (
        f"{what}: error norm {error.norm():.3e} over the budget {budget:.3e} "
        f"(dense op {yardstick.norm():.3e}, exact result {size.norm():.3e}, {actual.numel()} values)"
    )
    limit = 8 * yardstick.max() + 4 * eps * size.max()
    assert error.max() <= limit, (
        f"{what}: error {error.max():.3e} at {tuple(map(int, (error == error.max()).nonzero()[0]))}, "
        f"over {limit:.3e}; {int((error > limit).sum())} of {actual.numel()} values are"
    )


# -------------------------------------------------------------------------------------- inputs


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32, generator=None) -> Tensor:
    """Random values of either sign with magnitudes from 0.25 to 1: none is zero.

    A zero would hide a product that was never computed.
    """
    magnitude = torch.rand(shape, dtype=torch.float64, generator=generator) * 0.75 + 0.25
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (magnitude * sign).to(dtype)


def random_mask(
    shape: tuple[int, int, int], density: float = 0.5, kind: str = "random", generator=None
) -> Tensor:
    """A bool mask ``[N, H, W]``.

    Args:
        density: the share of active pixels (in expectation for "random").
        kind: "random" (each pixel by itself), "square" (one filled rectangle in each image at a
            random place), "one" (one active pixel in all), "empty" or "full".
    """
    n, h, w = shape
    if kind == "random":
        return torch.rand(shape, generator=generator) < density
    mask = torch.full(shape, kind == "full")
    if kind == "square":
        side_h, side_w = round(h * density**0.5), round(w * density**0.5)
        for image in mask:
            y = int(torch.randint(0, h - side_h + 1, (), generator=generator))
            x = int(torch.randint(0, w - side_w + 1, (), generator=generator))
            image[y : y + side_h, x : x + side_w] = True
    elif kind == "one" and mask.numel():
        mask.view(-1)[int(torch.randint(0, mask.numel(), (), generator=generator))] = True
    elif kind not in ("one", "empty", "full"):
        raise ValueError(f"kind: expected random, square, one, empty or full, got {kind!r}")
    return mask


def in_layout(x: Tensor, layout: str) -> Tensor:
    """``x`` ``[N, C, H, W]`` laid out in memory in one of :data:`LAYOUTS`.

    The values stay the same, except in two layouts: in "expanded" every image is the first (batch stride 0),
        in "zero_stride" every pixel of an image is its first (strides 0 in H and W).
    """
    if layout == "nchw":
        return x.to(memory_format=torch.contiguous_format)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)  # unlike contiguous(), also where C is 1
    if layout == "strided":  # every other column of a wider map
        gap = torch.full_like(x, float("nan") if x.is_floating_point() else 1)
        wide = torch.stack([x, gap], -1).flatten(-2)
        return wide[..., ::2]
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return x[:1].contiguous(memory_format=torch.channels_last).expand_as(x) if len(x) else x
    if layout == "zero_stride":
        return x[:, :, :1, :1].expand_as(x)
    raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")


# -------------------------------------------------------------------------------------- oracle


def dense_masked_conv2d(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [O, C/groups, kh, kw]
    bias: Tensor | None,  # [O]
    mask: Tensor,  # [N, out_h, out_w]
    *,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    padding_mode: str = "zeros",
    **epilogue,
) -> Tensor:
    """``sparse_conv2d`` as the dense layer would do it: everything is computed, then masked.

    Args:
        epilogue: activation, scale, shift, gate ``[N, 1, H, W]``, residual ``[N, O, H, W]`` and
            base, as in ``dynops.ops.sparse_conv2d``.
    """
    if padding_mode != "zeros":
        layer = torch.nn.Conv2d(
            x.shape[1], weight.shape[0], weight.shape[2:], stride, padding, dilation, groups,
            padding_mode=padding_mode, device="meta",
        )  # fmt: skip
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=padding_mode)
        padding = 0
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return _finish(out, mask, **epilogue)


def dense_masked_conv_transpose2d(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [C, O/groups, kh, kw]
    bias: Tensor | None,  # [O]
    mask: Tensor,  # [N, out_h, out_w]
    *,
    stride=1,
    padding=0,
    output_padding=0,
    groups: int = 1,
    dilation=1,
    **epilogue,
) -> Tensor:
    """``sparse_conv_transpose2d`` as the dense layer would do it; see :func:`dense_masked_conv2d`."""
    out = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _finish(out, mask, **epilogue)


def _finish(
    out, mask, *, activation=None, scale=None, shift=None, gate=None, residual=None, base=None
) -> Tensor:
    if scale is not None:
        out = out * scale.view(1, -1, 1, 1)
    if shift is not None:
        out = out + shift.view(1, -1, 1, 1)
    if gate is not None:
        out = out * gate
    if residual is not None:
        out = out + residual
    out = _ACTIVATIONS[activation](out)
    return torch.where(mask[:, None], out, torch.zeros_like(out) if base is None else base)


def rows_at(dense: Tensor, mask: Tensor) -> Tensor:
    """The rows ``[P, C]`` of a map ``[N, C, H, W]`` at a bool mask's pixels, in ascending order."""
    return dense.permute(0, 2, 3, 1)[mask]


def dense_from_rows(rows: Tensor, mask: Tensor) -> Tensor:
    """The map ``[N, C, H, W]`` that holds ``rows`` at a bool mask's pixels and zero elsewhere."""
    dense = rows.new_zeros(*mask.shape, rows.shape[1])
    return dense.masked_scatter(mask[..., None], rows).permute(0, 3, 1, 2)


_MASKING = {
    "conv2d",
    "conv_transpose2d",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "max_pool2d",
    "avg_pool2d",
}
_RESIZING = {
    "interpolate",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "pixel_shuffle",
    "pixel_unshuffle",
    "pad",
}
_MEANS = {"mean", "adaptive_avg_pool2d"}
_VIEWS = {"chunk", "split", "__getitem__", "view", "transpose", "contiguous", "flatten", "reshape"}


class MaskedPolicy(TorchFunctionMode):
    """The meaning of a mask in plain PyTorch: what functions make of a map is multiplied by the mask.

    ``with MaskedPolicy(mask): model(x)`` on a model that was not converted gives what the converted one gives under
    ``dynops.use_mask(mask)``, for maps whose sizes are multiples of the mask's, or it of theirs. A map is what a
    convolution, norm or pool makes, and what functions make of one. Means over all its pixels are over the mask.

    It gives other values for InstanceNorm, for ``amax`` and ``AdaptiveMaxPool2d`` (over the zeros too), and for means of
    flattened maps. It takes no plan, no block size and no
    ragged batch. A mask for a batch of more than 1 does not repeat.

    Args:
        mask: a tensor ``[N, h, w]``, 0 or 1; one for a batch of 1 holds for every sample.
    """

    def __init__(self, mask):
        super().__init__()
        self.mask, self.maps = mask[:, None].to(torch.float64), weakref.WeakValueDictionary()
        self.last = weakref.WeakValueDictionary()  # maps [N, H, W, C]

    def at(self, x):
        """``[N, 1, H, W]``: the mask at the size of a map."""
        size = x.shape[2:]
        larger = size[0] >= self.mask.shape[2]
        mask = F.interpolate(self.mask, size=size) if larger else F.adaptive_max_pool2d(self.mask, size)
        return mask.expand(x.shape[0], -1, -1, -1).to(x.dtype)

    def is_map(self, x):
        return isinstance(x, torch.Tensor) and self.maps.get(id(x)) is x

    def note(self, x):
        self.maps[id(x)] = x
        return x

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        known = [x for x in pytree.tree_leaves((args, kwargs)) if self.is_map(x)]
        maps = [x for x in known if x.dim() == 4]
        if (
            any(isinstance(x, torch.Tensor) and self.last.get(id(x)) is x for x in (*args, *kwargs.values()))
            and name != "__get__"
        ):
            return self.of_last(func, name, args, kwargs)
        if name in _VIEWS and known:
            return pytree.tree_map_only(
                torch.Tensor, lambda y: self.viewed(y, known[0]), func(*args, **kwargs)
            )
        if name == "__get__" or not (maps or name in _MASKING):
            out = func(*args, **kwargs)
            same = bool(known) and isinstance(out, torch.Tensor) and name != "__get__"
            return self.note(out) if same and out.shape == known[0].shape else out
        if name in _MEANS and (share := self.share(name, args, kwargs)) is not None:
            return func(*args, **kwargs) * share
        if name == "permute" and self.is_map(args[0]):
            out = func(*args, **kwargs)
            self.last[id(out)] = out
            return out
        out = self.normed(name, args, kwargs)
        out = func(*args, **kwargs) if out is None else out
        if name == "__setitem__":
            args[0].mul_(self.at(args[0]))
        if not isinstance(out, torch.Tensor) or out.dim() != 4 or min(out.shape[2:]) < 2:
            return out
        if name == "pad":  # its zeros are there
            return self.note(out) if kwargs.get("mode", "constant") == "constant" else out
        if name in _MASKING or name in _RESIZING or any(out.shape[2:] == x.shape[2:] for x in maps):
            mask = self.at(out)
            return self.note(out.mul_(mask) if name.endswith("_") or name.startswith("__i") else out * mask)
        return out

    def viewed(self, y, x):
        """A view of a map, whose axes may be joined or parted; masked where it is one of four dimensions again."""
        if y.dim() == 4 and x.dim() != 4 and min(y.shape[2:]) > 1:
            y = y * self.at(y)
        return self.note(y)

    def of_last(self, func, name, args, kwargs):
        """A function of a map whose channels are its last dimension."""
        out = func(*args, **kwargs)
        if name == "permute":
            return self.note(out)
        out = out * self.at(out.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        self.last[id(out)] = out
        return out

    def share(self, name, args, kwargs):
        """The factor of a mean over all pixels that makes it one over the mask; None for another mean."""
        x = args[0]
        if name == "mean":
            dims, keepdim = (
                args[1] if len(args) > 1 else kwargs.get("dim"),
                args[2] if len(args) > 2 else kwargs.get("keepdim", False),
            )
            if not isinstance(dims, (tuple, list)) or sorted(d % 4 for d in dims) != [2, 3]:
                return None
        elif args[1] not in (1, (1, 1)):
            return None
        else:
            keepdim = True
        factor = x.shape[2] * x.shape[3] / self.at(x).sum((2, 3), keepdim=True).clamp(min=1)
        return factor if keepdim else factor[:, :, 0, 0]

    def normed(self, name, args, kwargs):
        """A norm whose statistics are over the mask; None for any other function."""
        if name == "group_norm":
            return self.group_normed(args, kwargs)
        if name != "batch_norm" or not (args[5] if len(args) > 5 else kwargs.get("training")):
            return None
        pixels, active = args[0].permute(0, 2, 3, 1), self.at(args[0])[:, 0] != 0
        rows = F.batch_norm(pixels[active], *args[1:], **kwargs)
        return (
            torch.zeros_like(pixels)
            .masked_scatter(active[..., None], rows.to(pixels.dtype))
            .permute(0, 3, 1, 2)
        )

    def group_normed(self, args, kwargs):
        x, groups = args[0], args[1]
        weight, bias, eps = (kwargs.get(key) for key in ("weight", "bias", "eps"))
        mask = self.at(x)[:, :, None]
        parts = x.unflatten(1, (groups, -1))
        count = mask.sum((2, 3, 4), keepdim=True).clamp(min=1) * parts.shape[2]
        mean = (parts * mask).sum((2, 3, 4), keepdim=True) / count
        var = ((parts - mean).square() * mask).sum((2, 3, 4), keepdim=True) / count
        out = ((parts - mean) * (var + eps).rsqrt()).flatten(1, 2)
        return out if weight is None else out * weight[:, None, None] + bias[:, None, None]
