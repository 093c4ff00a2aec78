"""The meaning of a mask in plain PyTorch: every function runs dense, and what it makes of a map is multiplied by the mask.

``with MaskedPolicy(mask): model(x)`` on a model that was not converted gives what the converted one gives under
``dynops.use_mask(mask)``, for maps whose sizes are multiples of the mask's, or it of theirs.
"""

import weakref

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_LAYERS = {
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
_GLOBAL = {"mean", "adaptive_avg_pool2d"}
_VIEWS = {"chunk", "split", "__getitem__", "view", "transpose", "contiguous", "flatten", "reshape"}


class MaskedPolicy(TorchFunctionMode):
    """The mode; ``mask``: ``[N, h, w]``, of which a batch of 1 holds for every sample."""

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
        maps = [x for x in pytree.tree_leaves((args, kwargs)) if self.is_map(x) and x.dim() == 4]
        if (
            any(isinstance(x, torch.Tensor) and self.last.get(id(x)) is x for x in (*args, *kwargs.values()))
            and name != "__get__"
        ):
            return self.of_last(func, name, args, kwargs)
        if name == "__get__" or not (maps or name in _LAYERS):
            return func(*args, **kwargs)
        if name in _GLOBAL and (share := self.share(name, args, kwargs)) is not None:
            return func(*args, **kwargs) * share
        if name == "permute" and self.is_map(args[0]):
            out = func(*args, **kwargs)
            self.last[id(out)] = out
            return out
        out = self.normed(name, args, kwargs) if name == "group_norm" else func(*args, **kwargs)
        if name == "__setitem__":
            args[0].mul_(self.at(args[0]))
        if name in _VIEWS:
            return pytree.tree_map_only(torch.Tensor, lambda y: self.note(y) if y.dim() == 4 else y, out)
        if not isinstance(out, torch.Tensor) or out.dim() != 4 or min(out.shape[2:]) < 2:
            return out
        if name == "pad":  # its zeros are there
            return self.note(out) if kwargs.get("mode", "constant") == "constant" else out
        if name in _LAYERS or name in _RESIZING or any(out.shape[2:] == x.shape[2:] for x in maps):
            mask = self.at(out)
            return self.note(out.mul_(mask) if name.endswith("_") or name.startswith("__i") else out * mask)
        return out

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
        """A group norm whose statistics are over the mask."""
        x, groups = args[0], args[1]
        weight, bias, eps = (kwargs.get(key) for key in ("weight", "bias", "eps"))
        mask = self.at(x)[:, :, None]
        parts = x.unflatten(1, (groups, -1))
        count = mask.sum((2, 3, 4), keepdim=True).clamp(min=1) * parts.shape[2]
        mean = (parts * mask).sum((2, 3, 4), keepdim=True) / count
        var = ((parts - mean).square() * mask).sum((2, 3, 4), keepdim=True) / count
        out = ((parts - mean) * (var + eps).rsqrt()).flatten(1, 2)
        return out if weight is None else out * weight[:, None, None] + bias[:, None, None]
