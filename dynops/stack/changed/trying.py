"""Tries whether a function works pixel by pixel: on random maps, of which it gets the rows at a few pixels alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...plans import PixelPlan
from ..maps import SparseMap, entered
from ..maps.layout import gathered
from .rules import Context
from .tape import Ref

_PIXELS_TRIED = 40
_AGREE = {torch.float32: 1e-4, torch.float64: 1e-8}  # relative; of half precision 0.03


def tried(frame, step) -> bool:
    """As :func:`_works_pixel_by_pixel`, once for each function with these arguments and sizes."""
    numbers = {v.number: i for i, v in enumerate(step.inputs)}
    renamed = tuple(_renamed(part, numbers) for part in step.key[1:])
    inputs = tuple((v.shape, v.dtype, v.axes, v.size) for v in step.inputs)
    values = tuple(id(v) for v in step.inputs if v.axes is None or v.size != step.size)
    key = step.name, renamed, inputs, values, tuple(map(id, step.plains))
    known = frame.tape.tried
    try:
        found = known.get(key)
    except TypeError:  # an argument without a hash
        return _works_pixel_by_pixel(frame, step)
    if found is None:
        found = known[key] = (_works_pixel_by_pixel(frame, step), step.axes)
    if found[0]:
        step.axes = found[1]
    return found[0]


def _renamed(key, numbers: dict[int, int]):
    """A frozen tree with inputs counted from 0."""
    if type(key) is Ref:
        return Ref(numbers[key.value])
    if type(key) is not tuple or key[0] is None:
        return key
    container, inner = key
    if container is dict:
        return container, tuple((k, _renamed(x, numbers)) for k, x in inner)
    return container, tuple(_renamed(x, numbers) for x in inner)


def _works_pixel_by_pixel(frame, step) -> bool:
    """Tries a function on random maps of the step's sizes: are its rows at a few pixels those of its dense result?"""
    n, h, w = step.size
    maps = {v.number: v for v in step.inputs if v.axes is not None and v.size == step.size}
    if not all(v.dtype.is_floating_point for v in maps.values()):
        return False
    generator = torch.Generator("cpu").manual_seed(step.number)
    count = n * h * w
    mask = torch.zeros(count, dtype=torch.bool, device="cpu")
    mask[torch.randperm(count, generator=generator, device="cpu")[: min(_PIXELS_TRIED, count // 2)]] = True
    plan = PixelPlan.from_mask(mask.view(n, h, w).to(next(iter(maps.values())).device))
    context = Context(plan)
    tried = {
        number: torch.randn(v.shape, generator=generator, device="cpu").to(v.device, v.dtype)
        for number, v in maps.items()
    }

    def sparse(value):
        x = tried.get(value.number)
        return (
            frame.whole(value)
            if x is None
            else SparseMap.of_rows(gathered(x, plan, value.axes), plan, context, value.axes)
        )

    try:
        with entered():
            made = pytree.tree_leaves(frame.called(step, sparse))
        if not made or not all(type(x) is SparseMap and x.plan is plan for x in made):
            return False
        rows = [x.rows() for x in made]
        dense = pytree.tree_leaves(
            frame.called(step, lambda v: tried[v.number].clone() if v.number in tried else frame.whole(v))
        )
    except Exception:  # of a function that takes no maps: it runs dense
        return False
    for x, mine, theirs in zip(made, rows, dense, strict=True):
        if tuple(x.shape) != tuple(theirs.shape) or x.dtype != theirs.dtype:
            return False
        expected = gathered(theirs, plan, x.axes)
        if expected is None or expected.shape != mine.shape or not _agree(mine, expected):
            return False
    step.axes = [x.axes for x in made]
    return True


def _agree(a: Tensor, b: Tensor) -> bool:
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    most = _AGREE.get(a.dtype, 0.03)
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(
        a[~finite].nan_to_num(0), b[~finite].nan_to_num(0)
    ):
        return False
    a, b = a[finite].double(), b[finite].double()
    return float((a - b).norm()) <= most * float(b.norm()) + 1e-12
