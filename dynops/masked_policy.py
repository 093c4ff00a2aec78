"""MaskedPolicy: the meaning of a mask in a model, in plain PyTorch. For tests; import it from ``dynops.testing``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from .stack.layers.pool import avg_pool, max_pool, whole_map
from .stack.maps.layout import NCHW, NCS, normalized, permuted, reshaped
from .stack.maps.pointwise import ELEMENTWISE

_OF_MAPS = {
    "conv2d",
    "conv_transpose2d",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "max_pool2d",
    "avg_pool2d",
}
_RESIZING = {
    *(
        "interpolate",
        "lp_pool2d",
        "adaptive_avg_pool2d",
        "adaptive_max_pool2d",
        "pixel_shuffle",
        "pixel_unshuffle",
        "pad",
    ),
    "grid_sample",
}
_REDUCTIONS = {"mean", "sum", "amax", "amin", "norm", "vector_norm", "var", "std"}
_POOLS = {
    "adaptive_avg_pool2d": "mean",
    "adaptive_max_pool2d": "amax",
    "avg_pool2d": "mean",
    "max_pool2d": "amax",
}
_OVER_CHANNELS = {"linear", "layer_norm", "rms_norm", "prelu", "matmul", "__matmul__"}
_VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "permute", "movedim", "moveaxis"),
    *("transpose", "swapaxes", "contiguous", "chunk", "split", "narrow", "unbind", "select", "__getitem__"),
}  # fmt: skip


class MaskedPolicy(TorchFunctionMode):
    """The meaning of a mask in plain PyTorch: the result of each function of a map is multiplied by the mask.

    ``with MaskedPolicy(mask): model(x)`` on a model that was not converted has the result of the converted model under
    ``dynops.use_mask(mask)``. It holds for maps whose sizes are multiples of the mask's, or divisors of it. A map is
    the result of a convolution, norm or pool, and of functions of one, in any order of its axes. Means, sums, extrema,
    norms and variances over all its pixels, with channels or without, are over the mask. So are the statistics of norms.
    The result of other functions of maps, as the correlation of two images, is no map. Nor is a pool of it.

    Args:
        mask: a tensor ``[N, h, w]``, 0 or 1. It repeats for a batch of k N.
        masks: masks ``[N, h, w]`` by size ``(h, w)``, for sizes that are no multiples, as layers without padding make them.
            ``use_mask(...).masks()`` has them after a run.
    """

    def __init__(self, mask: Tensor, masks: dict[tuple[int, int], Tensor] | None = None):
        super().__init__()
        self.mask = mask[:, None].to(torch.float64)
        self.known = {size: known[:, None].to(torch.float64) for size, known in (masks or {}).items()}
        self.maps = WeakIdKeyDictionary()  # to the axes, as dynops.stack.maps.layout names them, and (h, w)
        self.mixed = WeakIdKeyDictionary()  # what functions that mix pixels made of maps, and is none

    # ---------------------------------------------------------------------------------- maps

    def note(self, x: Tensor, axes: tuple[str, ...] = NCHW, size: tuple[int, int] | None = None) -> Tensor:
        self.maps[x] = axes, tuple(x.shape[2:]) if size is None else size
        return x

    def is_map(self, x) -> bool:
        return isinstance(x, Tensor) and x in self.maps

    def at(self, x: Tensor, axes: tuple[str, ...] = NCHW, size: tuple[int, int] | None = None) -> Tensor:
        """The mask, for a map of these axes."""
        size = tuple(x.shape[2:]) if size is None else size
        if size in self.known:
            mask = self.known[size]
        elif size[0] >= self.mask.shape[2]:
            mask = F.interpolate(self.mask, size=size)
        else:
            mask = F.adaptive_max_pool2d(self.mask, size)
        batch = x.shape[axes.index("n")]
        mask = (
            mask[:, 0].expand(batch, -1, -1)
            if len(mask) == 1
            else mask[:, 0].repeat(batch // len(mask), 1, 1)
        )
        letters = ["n", "h", "w"]
        if "s" in axes:
            mask, letters = mask.flatten(1), ["n", "s"]
        mask = mask[(...,) + (None,) * axes.count("c")].to(x.dtype)
        places, channel = [], len(letters)
        for axis in axes:
            places.append(letters.index(axis) if axis != "c" else channel)
            channel += axis == "c"
        return mask.permute(places)

    def masked(self, x: Tensor, axes: tuple[str, ...] = NCHW, size: tuple[int, int] | None = None) -> Tensor:
        mask = self.at(x, axes, size)
        return self.note(torch.where(mask != 0, x, 0).to(x.dtype), axes, size)

    # ----------------------------------------------------------------------------- functions

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        known = [x for x in pytree.tree_leaves((args, kwargs)) if self.is_map(x)]
        if not known and (name not in _OF_MAPS or (name in _POOLS and args[0] in self.mixed)):
            return self.apart(func(*args, **kwargs), (args, kwargs))
        if name == "__get__":
            out = func(*args, **kwargs)
            return self.note(out, *self.maps[args[0]]) if func.__self__.__name__ == "data" else out
        if (name.endswith("_") and not name.endswith("__")) or (
            name.startswith("__i") and name.endswith("__")
        ):
            return self.in_place(func, name, args, kwargs, known)
        if kwargs.get("inplace") and self.is_map(args[0]):  # autograd needs what an activation made
            out = self.__torch_function__(func, types, args, {**kwargs, "inplace": False})
            return args[0].copy_(out)
        if kwargs.get("out") is not None or name == "__setitem__":
            return self.written(func, name, args, kwargs, known)
        for rule in (self.viewed, self.reduced, self.pooled, self.normed, self.by_pixel, self.joined):
            out = rule(func, name, args, kwargs)
            if out is not NotImplemented:
                return self.apart(out, (args, kwargs))
        return self.apart(self.resized(func, name, args, kwargs, known), (args, kwargs))

    def apart(self, out, given):
        """Notes what was made of maps and is none: a function's pool of it is none either."""
        read = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
        if any(x in self.maps or x in self.mixed for x in read):
            for y in pytree.tree_leaves(out):
                if isinstance(y, Tensor) and y not in self.maps:
                    self.mixed[y] = True
        return out

    def in_place(self, func, name, args, kwargs, known):
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            return out
        axes, size = self.maps[args[0]] if self.is_map(args[0]) else self.maps[known[0]]
        if self.is_map(args[0]) or out.shape == known[0].shape:
            out.mul_(self.at(out, axes, size))
        return self.note(out, axes, size) if self.is_map(args[0]) else out

    def written(self, func, name, args, kwargs, known):
        """A function that writes into a map or a dense tensor that it got."""
        out = func(*args, **kwargs)
        into = args[0] if name == "__setitem__" else kwargs["out"]
        if self.is_map(into):
            with torch.no_grad() if not into.requires_grad else torch.enable_grad():
                into.mul_(self.at(into, *self.maps[into]))
        elif isinstance(into, Tensor) and name != "__setitem__" and into.shape == known[0].shape:
            with torch.no_grad():
                into.mul_(self.at(into, *self.maps[known[0]]))
        return out

    def viewed(self, func, name, args, kwargs):
        if name not in _VIEWS:
            return NotImplemented
        x = args[0] if args else kwargs.get("input", kwargs.get("self"))
        if not self.is_map(x):
            return NotImplemented
        out, (axes, size) = func(*args, **kwargs), self.maps[x]
        if isinstance(out, Tensor):
            return self.view_of(out, name, x, axes, size, args, kwargs)
        return type(out)([self.view_of(y, name, x, axes, size, args, kwargs) for y in out])

    def view_of(self, y: Tensor, name: str, x: Tensor, axes, size, args, kwargs) -> Tensor:
        """A view, noted where its axes are known."""
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        if name in ("permute", "transpose", "swapaxes", "movedim", "moveaxis"):
            marks = torch.empty([i + 2 for i in range(x.dim())], device="meta")  # sizes that tell axes apart
            dims = [size - 2 for size in getattr(marks, name)(*args[1:], **kwargs).shape]
            return self.note(y, permuted(axes, tuple(dims))[0], size)
        if name == "contiguous" or (name in ("chunk", "split", "narrow") and y.dim() == x.dim()):
            same = [a == b for a, b, axis in zip(x.shape, y.shape, axes, strict=True) if axis != "c"]
            return self.note(y, axes, size) if all(same) else y
        if name in ("unbind", "select"):
            at = dim % x.dim()
            return self.note(y, axes[:at] + axes[at + 1 :], size) if axes[at] == "c" else y
        if name == "__getitem__":
            return self.indexed(y, x, axes, size, args[1])
        found = reshaped(axes, tuple(x.shape), tuple(y.shape), size)
        return y if found is None else self.note(y, found[0], size)

    def indexed(self, y: Tensor, x: Tensor, axes, size, where) -> Tensor:
        where = where if isinstance(where, tuple) else (where,)
        if [type(w) for w in where if type(w) is not slice] == [list]:  # channels by their numbers
            where = [slice(None) if type(w) is list and axes[d] == "c" else w for d, w in enumerate(where)]
            where = tuple(where)
        if not all(w is None or w is Ellipsis or isinstance(w, (int, slice)) for w in where):
            return y
        steps = [w.step for w in where if isinstance(w, slice) and w.step not in (None, 1)]
        if steps and axes == NCHW and y.dim() == 4 and None not in where:
            return self.masked(y)  # every k-th pixel
        taken = sum(w is not None and w is not Ellipsis for w in where)
        fill = (slice(None),) * (x.dim() - taken)
        at = where.index(Ellipsis) if Ellipsis in where else len(where)
        where = (*where[:at], *fill, *where[at + 1 :])
        made, old = [], iter(range(x.dim()))
        for w in where:
            if w is None:
                made.append("c")
                continue
            d = next(old)
            if axes[d] != "c" and not (isinstance(w, slice) and w.indices(x.shape[d]) == (0, x.shape[d], 1)):
                return y
            if not isinstance(w, int):
                made.append(axes[d])
        return self.note(y, tuple(made), size)

    def reduced(self, func, name, args, kwargs):
        """A reduction over channels or over all pixels."""
        if name not in _REDUCTIONS or not args or not self.is_map(args[0]):
            return NotImplemented
        x, (axes, size) = args[0], self.maps[args[0]]
        rest = list(args[2:] if "norm" in name else args[1:])
        dims = rest.pop(0) if rest else kwargs.get("dim", kwargs.get("axis"))
        keepdim = rest.pop(0) if rest else kwargs.get("keepdim", False)
        dims = None if dims is None else normalized(dims, x.dim())
        letters = {axes[d] for d in dims} if dims else set()
        if letters == {"c"}:
            left = axes if keepdim else tuple(a for d, a in enumerate(axes) if d not in dims)
            return self.masked(func(*args, **kwargs), left, size)
        if letters - {"c"} not in ({"h", "w"}, {"s"}):
            return NotImplemented
        mask = self.at(x, axes, size)
        if name in ("var", "std"):
            return self.variance(x, mask, dims, name, kwargs)
        if name in ("amax", "amin"):
            worst = -math.inf if name == "amax" else math.inf
            out = func(x.masked_fill(mask == 0, worst), *args[1:], **kwargs)
            return torch.where(out.isinf(), 0, out)
        out = func(*args, **kwargs)
        if name != "mean":
            return out
        pixels = mask.sum(dims, keepdim).clamp(min=1)
        return out * (math.prod(x.shape[d] for d in dims if axes[d] != "c") / pixels)

    def variance(self, x, mask, dims, name, kwargs):
        """Over the mask; 0 where it has no pixel."""
        mask, keepdim = mask.expand(x.shape), kwargs.get("keepdim", False)
        count = mask.sum(dims, True)
        squares = torch.where(mask != 0, x - (x * mask).sum(dims, True) / count.clamp(min=1), 0).square()
        free = (count - kwargs.get("correction", int(kwargs.get("unbiased", True)))).clamp(min=0)
        out = torch.where(count == 0, 0, squares.sum(dims, True) / free)
        out = out if keepdim else out.amax(dims)
        return out if name == "var" else out.sqrt()

    def pooled(self, func, name, args, kwargs):
        """A pool to one pixel, as the reduction that it is."""
        x = args[0] if args else kwargs.get("input")
        if name not in _POOLS or not self.is_map(x) or x.dim() != 4:
            return NotImplemented
        given = {k: v for k, v in kwargs.items() if k != "input"}
        if name.startswith("adaptive"):
            size = given.get("output_size", args[1] if len(args) > 1 else None)
            kind = _POOLS[name] if size in (1, (1, 1), [1, 1]) else ""
        else:
            kind = whole_map((max_pool if "max" in name else avg_pool)(*args[1:], **given), *x.shape[2:])
        return self.reduced(getattr(torch, kind), kind, (x, (2, 3), True), {}) if kind else NotImplemented

    def normed(self, func, name, args, kwargs):
        """Norms whose statistics are over the mask."""
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not (x.dim() == 4 or self.is_map(x)):  # a weight is standardised so
            return NotImplemented
        axes, size = self.maps.get(x, (NCHW, tuple(x.shape[2:])))
        if axes not in (NCHW, NCS):
            return NotImplemented
        if name == "group_norm":
            return self.masked(self.over_groups(self.at(x, axes, size), *args, **kwargs), axes, size)
        if name == "instance_norm" and kwargs.get("running_mean") is None:
            named = {k: kwargs.get(k) for k in ("weight", "bias")}
            mask, eps = self.at(x, axes, size), kwargs.get("eps", 1e-5)
            return self.masked(self.over_groups(mask, x, x.shape[1], **named, eps=eps), axes, size)
        if (
            name == "batch_norm"
            and axes == NCHW
            and kwargs.get("training", args[5] if len(args) > 5 else False)
        ):
            active = self.at(x)[:, 0] != 0
            rows = func(x.permute(0, 2, 3, 1)[active], *args[1:], **kwargs)
            out = torch.zeros_like(x.permute(0, 2, 3, 1)).masked_scatter(active[..., None], rows)
            return self.note(out.permute(0, 3, 1, 2))
        return NotImplemented

    def over_groups(self, mask, input, num_groups, weight=None, bias=None, eps=1e-5):
        mask, parts = mask.flatten(2)[:, :, None], input.flatten(2).unflatten(1, (num_groups, -1))
        count = mask.sum((2, 3), keepdim=True).clamp(min=1) * parts.shape[2]
        mean = (parts * mask).sum((2, 3), keepdim=True) / count
        var = ((parts - mean).square() * mask).sum((2, 3), keepdim=True) / count
        out = ((parts - mean) * (var + eps).rsqrt()).flatten(1, 2)
        out = out if weight is None else out * weight[:, None]
        out = out if bias is None else out + bias[:, None]
        return out.view(input.shape).to(input.dtype)  # autocast leaves it wider

    def by_pixel(self, func, name, args, kwargs):
        """Functions of each pixel by itself."""
        maps = [x for x in (*args, *kwargs.values()) if self.is_map(x)]
        if not maps:
            return NotImplemented
        base = max(maps, key=lambda x: self.maps[x][1])
        axes, size = self.maps[base]
        if name in ("softmax", "log_softmax"):
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            if not isinstance(dim, int) or axes[dim] != "c":
                return NotImplemented
        elif name in _OVER_CHANNELS:
            over = len(args[1]) if name in ("layer_norm", "rms_norm") else 1
            product = "matmul" in name and (self.is_map(args[1]) or args[1].dim() != 2 or axes.count("c") > 1)
            if product or (name != "prelu" and axes[-over:] != ("c",) * over):
                return NotImplemented
        elif name not in ELEMENTWISE and name not in ("expand", "repeat", "var", "std"):
            return NotImplemented
        out = func(*args, **kwargs)
        fits = isinstance(out, Tensor) and out.dim() == len(axes)
        if not fits or any(
            a != b for a, b, axis in zip(out.shape, base.shape, axes, strict=True) if axis != "c"
        ):
            return out
        return self.masked(out, axes, size) if out.is_floating_point() else self.note(out, axes, size)

    def joined(self, func, name, args, kwargs):
        """cat along channels, and stack."""
        if name not in ("cat", "concat", "concatenate", "stack"):
            return NotImplemented
        tensors = args[0] if args else kwargs["tensors"]
        base = next((x for x in tensors if self.is_map(x)), None)
        if base is None:
            return NotImplemented
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        (axes, size), out = self.maps[base], func(*args, **kwargs)
        dim %= out.dim()
        if name == "stack":
            return self.masked(out, (*axes[:dim], "c", *axes[dim:]), size)
        return self.masked(out, axes, size) if axes[dim] == "c" else self.same_size(out, [base])

    def resized(self, func, name, args, kwargs, known):
        """Functions that make maps of another size, and any other that makes one of the same."""
        out = func(*args, **kwargs)
        if name == "pad" and known:
            x, mode = known[0], args[2] if len(args) > 2 else kwargs.get("mode", "constant")
            axes, size = self.maps[x]
            if all(a == b or axis == "c" for a, b, axis in zip(x.shape, out.shape, axes, strict=True)):
                return self.masked(out, axes, size)
            if mode != "constant" or axes != NCHW:
                return out
            return (
                self.masked(out) if out.shape == known[0].shape else self.note(out)
            )  # it may have moved the map
        if name in _OF_MAPS or name in _RESIZING:
            is_map = isinstance(out, Tensor) and out.dim() == 4 and min(out.shape[2:]) > 1
            return self.masked(out) if is_map else out
        return pytree.tree_map_only(Tensor, lambda y: self.same_size(y, known), out)

    def same_size(self, y: Tensor, known: list[Tensor]) -> Tensor:
        """A result of four dimensions, masked where a map of its batch and size was among the arguments."""
        if y.dim() != 4 or not y.is_floating_point() or min(y.shape[2:]) < 2:
            return y
        maps = [x for x in known if self.maps[x][0] == NCHW]
        fits = any((x.shape[0], *x.shape[2:]) == (y.shape[0], *y.shape[2:]) for x in maps)
        return self.masked(y) if fits else y
