"""The functions of torch on maps: a table by name. What is not in it runs on dense tensors.

One meaning: what a function makes of a map is zero outside of the mask of its own size. A sum, product, cat or
activation of a map is one too. A mean over all pixels is over the mask. A dense result of a map's own batch and size is
masked; any other, as attention makes it between tokens, is a plain tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ... import context
from ..layers.norm import group_norm_of_rows
from . import axes, convolution, layout, pointwise, spatial
from .attention import attention
from .layout import NCHW, NCS
from .pointwise import words
from .scope import scope
from .value import SparseMap, dense_tree, handled_by, masked

_METADATA = words("""
shape dtype device ndim layout is_cuda is_cpu is_meta is_quantized is_sparse is_mps is_xpu is_mkldnn
itemsize nbytes is_nested is_leaf names
""")
_FIRST = ("input", "tensor", "self")  # names of the first argument
_QUESTIONS = words("""
size dim ndimension numel nelement __len__ is_floating_point is_complex get_device element_size
stride is_contiguous is_inference is_same_size is_signed __hash__
""")


def compute(func, args: tuple, kwargs: dict):
    """A function of torch, of which an argument is a map."""
    name = getattr(func, "__name__", "")
    if not args and (first := next((key for key in _FIRST if key in kwargs), None)) is not None:
        args, kwargs = (kwargs[first],), {k: v for k, v in kwargs.items() if k != first}
    active = context.current()
    if active is not None and any(type(x) is SparseMap and x.active is not active for x in args):
        args = tuple([x.under(active) if type(x) is SparseMap else x for x in args])
    if kwargs.get("out") is not None:
        return _into_out(func, args, kwargs)
    if name in _QUESTIONS:
        return _question(func, name, args, kwargs)
    if name in ("__get__", "__set__", "__delete__"):
        return _attribute(func, name, args, kwargs)
    if active is None and any(type(x) is SparseMap and x.active is None for x in args):
        return func(*dense_tree(args), **dense_tree(kwargs))
    if name in ("register_hook", "retain_grad"):
        args[0].through_dense()
    handler = _TABLE.get(name)
    if handler is not None and not (scope.dense and scope.is_dense(args, kwargs)):
        out = handler(func, name, args, kwargs)
        if out is not NotImplemented:
            return out
    return _on_dense(func, name, args, kwargs)


handled_by(compute)


def _into_out(func, args: tuple, kwargs: dict):
    """A function with ``out=``."""
    out = kwargs["out"]
    made = func(*args, **{k: v for k, v in kwargs.items() if k != "out"})
    if not isinstance(out, Tensor):  # of several results
        for into, one in zip(out, made, strict=True):
            into.copy_(one)
        return out
    if out.shape != made.shape:
        out.resize_(made.shape)
    return out.copy_(made)


def _question(func, name: str, args: tuple, kwargs: dict):
    if name == "is_contiguous" and len(args) + len(kwargs) > 1:  # channels_last: so its rows are
        return args[0].dim() == 4
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _attribute(func, kind: str, args: tuple, kwargs: dict):
    x, name = args[0], getattr(func.__self__, "__name__", "")
    if kind == "__get__" and name in _METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if kind == "__get__" and name == "requires_grad":
        return _requires_grad(x)
    if kind == "__get__" and name == "data":
        return x.detach() if x.is_input else spatial.data_of(x)
    return func(*dense_tree(args), **dense_tree(kwargs))


def _requires_grad(x: SparseMap) -> bool:
    if (pending := x.convolution()) is not None:
        return pending.requires_grad
    return (x.dense() if x.is_input else x.rows()).requires_grad


def _on_dense(func, name: str, args: tuple, kwargs: dict):
    """A function on dense tensors, with its result masked where it is a map of the same batch and size."""
    maps = [x for x in pytree.tree_leaves((args, kwargs)) if type(x) is SparseMap]
    if name.endswith("_") and not name.endswith("__") and args and type(args[0]) is SparseMap:
        return _into_map(func, args, kwargs)
    func = Tensor.reshape if name == "view" else func  # memory has another order than the module's own
    out = func(*dense_tree(args), **dense_tree(kwargs))
    if scope.dense and scope.is_dense(args, kwargs):
        return out
    base = next((x for x in maps if not x.is_input and x.axes == NCHW), None)
    if base is not None:
        return pytree.tree_map_only(Tensor, lambda y: _masked_like(y, base), out) if _is_tree(out) else out
    first = maps[0]
    if isinstance(out, Tensor) and first.is_input and out.dim() == 4 and out.is_floating_point():
        return SparseMap.of_input(out, first.active)
    return out


def _is_tree(out) -> bool:
    return isinstance(out, (Tensor, tuple, list))


def _masked_like(y: Tensor, base: SparseMap):
    n, h, w = base.plan.shape
    fits = type(y) is not SparseMap and y.dim() == 4 and (y.shape[0], *y.shape[2:]) == (n, h, w)
    if not fits or not y.is_floating_point():
        return y
    return SparseMap.of_rows(layout.gathered(y, base.plan, NCHW), base.plan, base.active)


def _into_map(func, args: tuple, kwargs: dict):
    x, *rest = args
    if x.is_input:
        func(x.dense(), *dense_tree(rest), **dense_tree(kwargs))
        return x
    dense = func(x.dense().clone(), *dense_tree(rest), **dense_tree(kwargs))
    if dense.shape == x.shape:
        x.exchange(x.like(layout.gathered(masked(dense, x.plan, x.axes), x.plan, x.axes)))
    return x


# ---------------------------------------------------------------------------------- the table


def _plainly(function):
    """A handler that is called with the arguments alone."""
    return lambda func, name, args, kwargs: function(*args, **kwargs)


def _called(function):
    return lambda func, name, args, kwargs: function(func, *args, **kwargs)


def _of_map(function):
    """A handler of views, which inputs have of their own."""

    def run(func, name, args, kwargs):
        x = args[0] if args else None
        if type(x) is not SparseMap or x.is_input:
            return NotImplemented
        return function(*args, **kwargs)

    return run


def _sizes(shape) -> tuple:
    one = len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size))
    return tuple(shape[0] if one else shape)


def _transpose(x, dim0: int, dim1: int):
    dims = list(range(x.dim()))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return spatial.permute(x, dims)


def _unsqueeze(x, dim: int):
    dim = dim % (x.dim() + 1)
    return spatial.view(x, (*x.shape[:dim], 1, *x.shape[dim:]))


def _unflatten(x, dim: int, sizes):
    dim = dim % x.dim()
    return spatial.view(x, (*x.shape[:dim], *sizes, *x.shape[dim + 1 :]))


def _as_view(x, *shape, **kwargs):
    if kwargs or any(isinstance(s, torch.dtype) for s in shape):
        return NotImplemented
    return spatial.view(x, _sizes(shape))


def _contiguous(x, *args, **kwargs):
    """Rows have one order in memory: a view of them is copied."""
    if x.pending is not None and x.pending.follows:
        return x.like(x.rows().contiguous())
    return x


def _to(func, name, args, kwargs):
    if any(isinstance(a, (str, torch.device)) for a in (*args, *kwargs.values())):
        device = next(a for a in (*args, *kwargs.values()) if isinstance(a, (str, torch.device)))
        if type(args[0]) is not SparseMap or torch.device(device).type != args[0].device.type:
            return NotImplemented
    if any(isinstance(a, Tensor) for a in args[1:]) or type(args[0]) is not SparseMap:
        return NotImplemented
    return pointwise.elementwise(func, name, args, kwargs)


def _new(func, name, args, kwargs):
    """A new tensor of the dtype and device of a map, whose values nothing reads."""
    x = args[0]
    if type(x) is not SparseMap or x.is_input:
        return NotImplemented
    out = func(torch.empty(0, dtype=x.dtype, device=x.device), *args[1:], **kwargs)
    return _masked_like(out, x) if x.axes == NCHW else out


def _expand_as(func, name, args, kwargs):
    """Of a map as ``expand``; a tensor needs only the size of a map."""
    x, other = args
    if type(x) is SparseMap:
        return NotImplemented if x.is_input else axes.expand(x, *other.shape)
    return x.expand(other.shape)


def _interpolate(func, name, args, kwargs):
    kwargs = {k: v for k, v in kwargs.items() if v is not None}
    return spatial.enlarged(func, name, args, kwargs)


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    if type(input) is not SparseMap or input.axes not in (NCHW, NCS):
        return NotImplemented
    x = pointwise.masked_input(input)
    return x.like(group_norm_of_rows(x.rows(), x.plan, num_groups, weight, bias, eps))


def _instance_norm(
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    if not use_input_stats or running_mean is not None or type(input) is not SparseMap:
        return NotImplemented
    return _group_norm(input, input.shape[1], weight, bias, eps)


def _dropout_of_channels(func, name, args, kwargs):
    x = args[0]
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    if type(x) is SparseMap and not training:
        return x
    return NotImplemented


_TABLE = {
    **dict.fromkeys(pointwise.ELEMENTWISE, pointwise.elementwise),
    **{f"{name}_": pointwise.elementwise for name in pointwise.ELEMENTWISE},
    **dict.fromkeys(("mean", "sum", "amax", "amin", "norm", "vector_norm"), pointwise.reduced),
    **dict.fromkeys(("var", "std"), _called(pointwise.spread)),
    **dict.fromkeys(("layer_norm", "rms_norm"), _called(pointwise.over_channels)),
    "linear": _plainly(convolution.linear),
    **dict.fromkeys(("softmax", "log_softmax"), _called(pointwise.softmax)),
    "scaled_dot_product_attention": _plainly(attention),
    "prelu": _plainly(pointwise.prelu),
    "batch_norm": _plainly(pointwise.batch_norm),
    "group_norm": _plainly(_group_norm),
    "instance_norm": _plainly(_instance_norm),
    "conv2d": _plainly(convolution.conv2d),
    "conv_transpose2d": _plainly(convolution.conv_transpose2d),
    "pad": _plainly(convolution.pad),
    "max_pool2d": spatial.max_pools,
    "avg_pool2d": spatial.avg_pools,
    "adaptive_avg_pool2d": spatial.adaptive_pool,
    "adaptive_max_pool2d": spatial.adaptive_pool,
    "lp_pool2d": _plainly(spatial.lp_pool),
    "interpolate": _interpolate,
    "pixel_shuffle": spatial.enlarged,
    "pixel_unshuffle": spatial.unshuffled,
    "grid_sample": spatial.resampled,
    "dropout2d": _dropout_of_channels,
    "feature_dropout": _dropout_of_channels,
    "to": _to,
    **dict.fromkeys(("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"), _new),
    "view": _of_map(_as_view),
    "reshape": _of_map(lambda x, *shape, **named: spatial.reshape(x, _sizes(shape) or named["shape"])),
    "flatten": _of_map(lambda x, start_dim=0, end_dim=-1: spatial.reshape(x, spatial.flattened(x.shape, start_dim, end_dim))),
    "unflatten": _of_map(_unflatten),
    "unsqueeze": _of_map(_unsqueeze),
    "permute": _of_map(lambda x, *dims, **named: spatial.permute(x, named.get("dims") or _sizes(dims))),
    "transpose": _of_map(_transpose),
    "swapaxes": _of_map(_transpose),
    "contiguous": _of_map(_contiguous),
    "chunk": _of_map(spatial.chunk),
    "split": _of_map(lambda x, split_size_or_sections=None, dim=0, **named: spatial.split(
        x, split_size_or_sections if split_size_or_sections is not None else named.get("split_size"), dim)),
    "narrow": _of_map(lambda x, dim, start, length: spatial.narrowed(x, dim % x.dim(), slice(start, start + length))),
    "__getitem__": _of_map(spatial.index),
    "__setitem__": lambda func, name, args, kwargs: spatial.set_item(*args) if type(args[0]) is SparseMap else NotImplemented,
    "cat": _plainly(spatial.cat),
    "concat": _plainly(spatial.cat),
    "concatenate": _plainly(spatial.cat),
    "stack": _plainly(axes.stack),
    "select": _of_map(axes.select),
    "unbind": _of_map(axes.unbind),
    "squeeze": _of_map(lambda x, *dims, **named: axes.squeeze(x, *dims, *named.values())),
    "movedim": _of_map(axes.movedim),
    "moveaxis": _of_map(axes.movedim),
    "expand": _of_map(axes.expand),
    "expand_as": _expand_as,
    "repeat": _of_map(axes.repeat),
    "matmul": _plainly(axes.matmul),
    "__matmul__": _plainly(axes.matmul),
}  # fmt: skip
