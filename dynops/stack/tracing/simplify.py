"""Steps without those that only pass a value on: copies, dropouts, and permutes around layers of single pixels."""

from __future__ import annotations

from torch import nn

from ..layers import COPIES, WITH_CHANNELS, mapped
from ..trace import Ref, Step

_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
_PER_PIXEL = ("linear", "layer_norm", "rms_norm")  # functions of the last dimension


def without_copies(steps: tuple[Step, ...], output: int) -> tuple[list[Step], int]:
    """The steps without dropouts and copies, whose result is the value that they got."""
    same: dict[int, int] = {}
    kept = []
    for step in steps:
        step = _renamed(step, same)
        if step.kind == "dropout" or (step.kind == "method" and step.target in COPIES):
            same[step.out] = step.inputs[0]
        else:
            kept.append(step)
    return kept, same.get(output, output)


def without_permutes(steps: list[Step], output: int, module: nn.Module) -> tuple[list[Step], int]:
    """The steps with maps ``[N, C, H, W]`` in place of those permuted to ``[N, H, W, C]``.

    Calls over the last dimension of these become "per_pixel". The steps stay as they are where anything else reads one
    of them, or the output is one.
    """
    same: dict[int, int] = {}
    last: set[int] = set()  # values whose channels are last
    parameters = {step.out: step.target for step in steps if step.kind == "attr"}
    kept = []
    for found in steps:
        step, order = _renamed(found, same), _order(found)
        permuted = last.intersection(found.inputs)
        if order == (_TO_FIRST if permuted else _TO_LAST):
            same[found.out] = step.inputs[0]
            if not permuted:
                last.add(found.out)
            continue
        if permuted:
            of_parameters = parameters.keys() >= set(step.inputs)
            if of_parameters or not _is_per_pixel(found, last, parameters, module):
                return steps, output
            last.add(found.out)
            if found.kind not in ("act", "add"):
                step = step._replace(kind="per_pixel")
        kept.append(step)
    return (steps, output) if output in last else (kept, same.get(output, output))


def _order(step: Step) -> tuple[int, ...] | None:
    """The order of dimensions that a permute makes; None for another step."""
    if step.target not in ("permute", "torch:permute") or len(step.inputs) != 1:
        return None
    dims = step.args[1:] or (dict(step.kwargs)["dims"],)
    dims = dims[0] if len(dims) == 1 else dims
    if not isinstance(dims, (tuple, list)) or not all(isinstance(dim, int) for dim in dims):
        return None
    return tuple(dim % 4 for dim in dims)


def _is_per_pixel(step: Step, last: set[int], parameters: dict[int, str], module: nn.Module) -> bool:
    """True for a step that makes each pixel's channels of those of the same pixel, all of them being last."""
    maps = [v for v in step.inputs if v not in parameters]
    if not last.issuperset(maps):
        return False
    inner = (
        module.get_submodule(step.target)
        if step.kind in ("act", "module") and ":" not in step.target
        else None
    )
    if step.kind in ("act", "add"):  # a PReLU finds its channels in the second dimension
        return len(maps) == len(step.inputs) and not isinstance(inner, nn.PReLU)
    if step.kind == "module":
        sizes = (1,) if type(inner) is nn.Linear else getattr(inner, "normalized_shape", ())
        return len(maps) == 1 and type(inner) in (nn.Linear, nn.LayerNorm, nn.RMSNorm) and len(sizes) == 1
    if len(maps) != 1 or step.kind != "function":
        return False
    if step.target in WITH_CHANNELS:
        return True
    size = step.args[1] if len(step.args) > 1 else dict(step.kwargs).get("normalized_shape")
    name = step.target.removeprefix("torch.nn.functional:")
    return name == "linear" or (name in _PER_PIXEL and isinstance(size, (tuple, list)) and len(size) == 1)


def _renamed(step: Step, same: dict[int, int]) -> Step:
    """The step with other numbers of values."""

    def other(value):
        return Ref(same.get(value.value, value.value)) if type(value) is Ref else mapped(value, other)

    inputs = tuple(same.get(v, v) for v in step.inputs)
    residual = same.get(step.residual, step.residual)
    return step._replace(inputs=inputs, residual=residual, args=other(step.args), kwargs=other(step.kwargs))
