"""Frames of a video, and a model inside a stream beside itself outside of it."""

import copy

import torch
from torch import nn
from torch.utils import _pytree as pytree

import dynops
from dynops.testing import assert_within_budget


class Calls(nn.Module):
    """A model whose forward is ``function(self, *args)``."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def model_of(function, **children) -> Calls:
    """As :class:`Calls`, in eval mode, with statistics and affine parameters that are not trivial, and incremental."""
    model = Calls(function, **children).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    model.requires_grad_(False)
    dynops.incremental_(model)
    return model


def edited(x: torch.Tensor, kind: str = "square") -> torch.Tensor:
    """A copy of ``[N, C, H, W]`` with another content at some pixels of one of its samples; of the others too by chance."""
    x, (n, _, h, w) = x.clone(), x.shape
    if kind == "none":
        return x
    if kind == "full":
        return x.copy_(torch.randn(x.shape))
    chosen = {int(torch.randint(n, ()))} | {i for i in range(n) if torch.rand(()) < 0.3}
    for i in chosen:
        if kind == "pixels":
            at = torch.rand(h, w) < 0.05
        else:
            top, left = int(torch.randint(h, ())), int(torch.randint(w, ()))
            at = torch.zeros(h, w, dtype=torch.bool)
            at[top : top + 3, left : left + 3] = True
        x[i, :, at] = torch.randn(x.shape[1], int(at.sum())).to(x.dtype)
    return x


def frames_of(x: torch.Tensor, count: int) -> list[torch.Tensor]:
    """``x`` and edits of edits of it; one is as the one before, one is new everywhere."""
    frames = [x]
    for i in range(count - 1):
        kind = {1: "none", 5: "full"}.get(i, "pixels" if i % 3 == 2 else "square")
        frames.append(edited(frames[-1], kind))
    return frames


def assert_dense(y, model, *args, **kwargs) -> None:
    """Checks a result of the stream against the model outside of it."""
    dense = model(*args, **kwargs)
    args = pytree.tree_map_only(torch.Tensor, _in_other_format, args)
    others = pytree.tree_leaves(model(*args, **kwargs))
    double = copy.deepcopy(model).double()
    wide = pytree.tree_map_only(
        torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, kwargs)
    )
    exact = double(*wide[0], **wide[1])
    mine, spec = pytree.tree_flatten(y)
    theirs, expected = pytree.tree_flatten(dense)
    assert spec == expected
    for a, d, o, e in zip(mine, theirs, others, pytree.tree_leaves(exact), strict=True):
        assert type(a) is type(d), f"{type(a)}, but dense has {type(d)}"
        if not isinstance(a, torch.Tensor):
            assert a == d
        elif not a.is_floating_point():
            assert a.dtype == d.dtype and torch.equal(a, d)
        else:
            assert_within_budget(a, e.double(), [d, o])


def _in_other_format(x: torch.Tensor) -> torch.Tensor:
    if x.dim() != 4:
        return x
    last = x.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)


def run(model, frames, stream=None, **options) -> dynops.Stream:
    """Runs frames, each a tensor or a tuple of them, in a stream, and compares each result with the dense one."""
    stream = dynops.Stream(**options) if stream is None else stream
    for i, frame in enumerate(frames):
        args = frame if isinstance(frame, tuple) else (frame,)
        with stream:
            y = model(*args)
        try:
            assert_dense(y, model, *args)
        except AssertionError as error:
            raise AssertionError(f"frame {i}: {error}") from error
    return stream
