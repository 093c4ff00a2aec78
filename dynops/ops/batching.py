"""Rules of ``torch.func.vmap``: how an op of B examples is one call of an op.

A rule takes ``(op, size, batched, arguments)``: the op, B, the names of the arguments that have a dimension of
examples, which is their first one, and all arguments by name. It returns ``(result, out_dims)``, or None where it
does not hold: then the op runs example by example.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_MOST = 2**31  # an index is int32
_BATCHED = torch._C._dispatch_key_parse("Batched")


def vmap_rules(op, rule: Callable | None) -> tuple[Callable, Callable]:
    """The vmap of ``torch.library.register_vmap`` by a rule as above, and the kernel of the Batched key.

    That key belongs to the vmap inside of ``torch.autograd`` (``is_grads_batched``).
    """
    names = [argument.name for argument in op._schema.arguments]

    def run(size, in_dims, arguments):
        batched = {name for name, dim in zip(names, in_dims, strict=True) if isinstance(dim, int)}
        arguments = {
            name: value.movedim(dim, 0) if isinstance(dim, int) else value
            for name, value, dim in zip(names, arguments, in_dims, strict=True)
        }
        done = None
        if rule is not None and size:
            done = rule(op, size, batched, dict(arguments))
        return _one_by_one(op, size, batched, arguments) if done is None else done

    def of_functorch(info, in_dims, *arguments):
        return run(info.batch_size, in_dims, arguments)

    def of_autograd(*arguments):
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        in_dims = [0 if _is_batched(value) else None for value in arguments]
        arguments = [
            value if d is None else torch._remove_batch_dim(value, level, 0, 0)
            for value, d in zip(arguments, in_dims, strict=True)
        ]
        size = next(value.shape[0] for value, d in zip(arguments, in_dims, strict=True) if d is not None)
        out, dims = run(size, in_dims, arguments)
        if isinstance(out, Tensor):
            return _as_batched(out, dims, level)
        return tuple(_as_batched(o, d, level) for o, d in zip(out, dims, strict=True))

    return of_functorch, of_autograd


def _as_batched(out: Tensor, dim: int | None, level: int) -> Tensor:
    if dim is None:
        return out
    examples = out.movedim(dim, 0).contiguous()  # outermost in memory, as _add_batch_dim wants them
    return torch._add_batch_dim(examples, 0, level)


def _is_batched(value) -> bool:
    return isinstance(value, Tensor) and torch._C._dispatch_keys(value).has(_BATCHED)


def _one_by_one(op, size: int, batched: set[str], arguments: dict):
    def example(b: int):
        return op(*(value[b] if name in batched else value for name, value in arguments.items()))

    if size == 0:  # one example of zeros tells the shapes
        arguments = {n: a.new_zeros(1, *a.shape[1:]) if n in batched else a for n, a in arguments.items()}
    results = [example(b) for b in range(max(size, 1))]
    if isinstance(results[0], Tensor):
        return _stacked(op, results)[:size], 0
    stacked = tuple(_stacked(op, parts)[:size] for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def _stacked(op, parts) -> Tensor:
    if any(part.shape != parts[0].shape for part in parts):
        raise RuntimeError(
            f"{op._schema.name}: the size of its result depends on the values of the mask, which a vmap over the mask "
            "cannot have; build the plan outside of it, or in the capacity form (capacity=...)"
        )
    return torch.stack(tuple(parts))


# --------------------------------------------------------------------------------- into a dimension


def passive(dim: int, *names: str) -> Callable:
    """Examples become part of a dimension that the op only copies: ``dim`` of these arguments and of the result."""

    def rule(op, size, batched, arguments):
        if not batched <= set(names):
            return None
        for name in names:
            if arguments[name] is not None:
                arguments[name] = _into(arguments[name], dim, size, name in batched)
        out = op(*arguments.values())
        return out.unflatten(dim, (size, out.shape[dim] // size)), dim

    return rule


def _into(x: Tensor, dim: int, size: int, batched: bool) -> Tensor:
    """``x``, or ``size`` of it, as one tensor with all examples along ``dim``."""
    x = x.movedim(0, dim) if batched else _copies(x, dim, size)
    return x.flatten(dim, dim + 1)


def _copies(x: Tensor, dim: int, size: int) -> Tensor:
    return x.unsqueeze(dim).expand(*x.shape[:dim], size, *x.shape[dim:])


def _out_of(out: Tensor, size: int) -> Tensor:
    return out.unflatten(0, (size, out.shape[0] // size))


# ------------------------------------------------------------------------------------ into the batch


def samples(*names: str, one_or_each: tuple[str, ...] = (), lists: tuple[str, ...] = ()) -> Callable:
    """Examples become samples of the batch.

    ``names`` have a row for each sample. ``one_or_each``: for each sample, or one for all. ``lists``: the same, with a
    few rows for each sample, and the same for all examples. The result has a row for each sample.
    """

    def rule(op, size, batched, arguments):
        if not batched <= {*names, *one_or_each}:
            return None
        geometry = list(arguments["geometry"])
        n, heads = geometry[0], arguments.get("heads", 1)
        for name in names:
            if arguments[name] is not None:
                arguments[name] = _into(arguments[name], 0, size, name in batched)
        for name in one_or_each:
            value = arguments[name]
            if name in batched:
                value = value.expand(size, n, *value.shape[2:])
                arguments[name] = value.flatten(0, 1)
            elif value is not None and value.shape[0] != 1:
                arguments[name] = _into(value, 0, size, False)
        for name in lists:
            value = arguments[name]
            lists_of_samples = n * (heads if name.startswith("in_") else 1)
            if n != 1 and value is not None and value.shape[0] == lists_of_samples:
                arguments[name] = _into(value, 0, size, False)
        arguments["geometry"] = [size * n, *geometry[1:]]
        return _out_of(op(*arguments.values()), size), 0

    return rule


def sample_weight_grad(op, size, batched, arguments):
    """The weights' gradients of per-sample convolutions, as :func:`samples`: summed over samples that share one."""
    if not batched <= {"grad", "x", "region"}:
        return None
    geometry, shape = list(arguments["geometry"]), list(arguments["weight_shape"])
    n = geometry[0]
    for name in ("grad", "x", "region"):
        if arguments[name] is not None:
            arguments[name] = _into(arguments[name], 0, size, name in batched)
    arguments["geometry"], arguments["weight_shape"] = [size * n, *geometry[1:]], [size * n, *shape[1:]]
    dw, db = op(*arguments.values())
    dw, db = dw.unflatten(0, (size, n)), db.unflatten(0, (size, n)) if arguments["bias"] else db
    if shape[0] != n:
        dw, db = dw.sum(1, keepdim=True), db.sum(1, keepdim=True) if arguments["bias"] else db
    return (dw, db), (0, 0 if arguments["bias"] else None)


# --------------------------------------------------------------------- into the groups of a convolution


def pixel_conv(op, size, batched, arguments):
    """Weights of their own: examples are groups (of one input, output channels). Inputs only: samples of the batch."""
    if not batched <= {"x", "weight", "bias", "base"} or _has_epilogue(arguments):
        return None
    if "weight" not in batched and "bias" not in batched:
        return _pixels_as_samples(op, size, batched, arguments)
    geometry, transposed = list(arguments["geometry"]), arguments["geometry"][-1]
    if "x" in batched or geometry[-2] != 1:
        _group(arguments, "x", 1, size, batched)
        _group(arguments, "weight", 0, size, batched)
        geometry[-2] *= size
    else:
        _group(arguments, "weight", 1 if transposed else 0, size, batched)
    _group(arguments, "bias", 0, size, batched)
    _group(arguments, "base", 1, size, batched)
    arguments["geometry"] = geometry
    out = op(*arguments.values())
    return out.unflatten(1, (size, out.shape[1] // size)), 1


def pixel_conv_input_grad(op, size, batched, arguments):
    if not batched <= {"grad", "weight"}:
        return None
    if "weight" not in batched:
        return _pixels_as_samples(op, size, batched, arguments)
    _group(arguments, "grad", 1, size, batched)
    _group(arguments, "weight", 0, size, batched)
    geometry = list(arguments["geometry"])
    arguments["geometry"] = [*geometry[:-2], geometry[-2] * size, geometry[-1]]
    out = op(*arguments.values())
    return out.unflatten(1, (size, out.shape[1] // size)), 1


def pixel_conv_weight_grad(op, size, batched, arguments):
    if not batched <= {"grad", "x"}:
        return None
    geometry, shape = list(arguments["geometry"]), list(arguments["weight_shape"])
    _group(arguments, "grad", 1, size, batched)
    if "x" in batched or geometry[-2] != 1 or geometry[-1]:
        _group(arguments, "x", 1, size, batched)
        geometry[-2] *= size
    arguments["geometry"], arguments["weight_shape"] = geometry, [shape[0] * size, *shape[1:]]
    dw, db = op(*arguments.values())
    if arguments["bias"]:
        return (_out_of(dw, size), _out_of(db, size)), (0, 0)
    return (_out_of(dw, size), db), (0, None)


def _has_epilogue(arguments: dict) -> bool:
    return any(arguments[name] is not None for name in ("scale", "shift", "gate", "residual"))


def _group(arguments: dict, name: str, dim: int, size: int, batched: set[str]) -> None:
    if arguments[name] is not None:
        arguments[name] = _into(arguments[name], dim, size, name in batched)


def _pixels_as_samples(op, size, batched, arguments):
    """The plan repeated, for compact plans: unused rows must stand at the end."""
    geometry, index, source = list(arguments["geometry"]), arguments["index"], arguments["source"]
    pixels = geometry[0] * geometry[3] * geometry[4]
    rows = arguments["x"].shape[-2] if "x" in arguments else arguments["source_rows"]
    if arguments["count"] is not None or size * max(pixels, rows) >= _MOST:
        return None
    example = torch.arange(size, dtype=index.dtype, device=index.device)
    arguments["index"] = (index + (example * pixels)[:, None]).flatten()
    if source is not None:
        each = source + (example * rows)[:, None, None, None]
        arguments["source"] = torch.where(source < 0, source, each).flatten(0, 1)
        if "source_rows" in arguments:
            arguments["source_rows"] = size * rows
    for name in ("x", "grad", "base"):
        if arguments.get(name) is not None:
            _group(arguments, name, 0, size, batched)
    arguments["geometry"] = [size * geometry[0], *geometry[1:]]
    return _out_of(op(*arguments.values()), size), 0
