"""Modules that ``convert_`` made whole: subclasses whose forward runs a trace inside ``dynops.use_mask``.

Such a class has the name, the attributes and the pickles of the class that it is made of. Outside the context its forward
is that one's. Inside, it runs the trace while it holds, and else the forward, whose layers then run each alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from .. import context
from ..modes import refuse_tracing
from .layers.base import NoTensor
from .maps import as_map, check_inputs, constant_conv, follow, inside, layer_input, may_follow, name_module
from .program import Program
from .trace import Trace

_TRACE, _PROGRAM, _PLACES, _NOTICE, _CONVERTS, _DENSE = (
    "_dynops_trace",
    "_dynops_program",
    "_dynops_places",  # of the converted layers: their parents' children, their names, the layers
    "_dynops_notice",  # what stayed dense, until a warning was given
    "_dynops_converts",
    "_dynops_dense",  # the layers that filter_fn left dense
)
_KEYS = (_TRACE, _PROGRAM, _PLACES, _NOTICE, _CONVERTS, _DENSE)


def is_whole(module: nn.Module) -> bool:
    return _TRACE in module.__dict__


def make_whole(
    model: nn.Module, traces: dict[nn.Module, Trace | None], converts: Callable, notice: dict, dense: list
) -> None:
    """Gives each module of ``traces`` its class, and its trace where it has one.

    Args:
        converts: converts a layer that has taken the place of one of ``model``'s converted layers.
        notice: the layers that stayed dense though nobody asked for it, and why.
        dense: the layers that were to stay dense.
    """
    for module, steps in traces.items():
        module.__dict__[_TRACE] = steps
        module.__class__ = _whole_class(type(module))
    for module in traces:
        _bind(module)
        inner = set(module.modules())
        own = [layer for layer in dense if layer in inner]
        module.__dict__.update({_PLACES: _places(module), _CONVERTS: converts, _NOTICE: notice, _DENSE: own})
    if traces == {} and is_whole(model):  # converted before; one notice for all that is inside
        model.__dict__[_NOTICE] = notice


def unmake_whole(module: nn.Module) -> None:
    """Gives a module back the class that it had."""
    if not is_whole(module):
        return
    for key in _KEYS:
        module.__dict__.pop(key, None)
    whole = next(kind for kind in type(module).__mro__ if "_dynops_base" in vars(kind))
    module.__class__ = rebased(type(module), whole, whole._dynops_base)


def rebased(kind: type, old: type, new: type) -> type:
    """``kind``, which is ``old`` or a parametrisation of it, made of ``new``."""
    if kind is old:
        return new
    members = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    return type(kind.__name__.replace(old.__name__, new.__name__), (new,), members)


@functools.cache
def masked_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a layer whose output inside the context is zero outside of the mask."""

    def forward(self, *args, **kwargs):
        active = context.current()
        if active is not None and may_follow():  # its functions are those of maps
            return follow(partial(_layer_of_maps, base, self, active), args, kwargs, active)
        out = base.forward(self, *args, **kwargs)
        if active is None or not isinstance(out, Tensor) or out.dim() != 4:
            return out
        plan = active.plan((out.shape[0], *out.shape[2:]), out.device)
        return out.masked_fill((plan.inverse() < 0)[:, None], 0)

    return type(f"Masked{base.__name__}", (base,), _members(base, forward, _new_masked))


def _layer_of_maps(base: type[nn.Module], module: nn.Module, active, *args, **kwargs):
    x = layer_input(args[0], active) if args else None
    if x is not None:
        if issubclass(base, nn.Conv2d) and len(args) == 1 and not kwargs:
            out = constant_conv(module, base.forward, x)
            if out is not NotImplemented:
                return out
        args = x, *args[1:]
    return as_map(base.forward(module, *args, **kwargs), active)


def _places(module: nn.Module) -> list[list]:
    inner = ((m._modules, name, child) for m in module.modules() for name, child in m._modules.items())
    return [list(place) for place in inner if "_dynops_converted" in getattr(place[2], "__dict__", ())]


def _look(module: nn.Module) -> None:
    """Converts layers that have come since, and warns once of those that stay dense."""
    notice = module.__dict__[_NOTICE]
    for place in module.__dict__[_PLACES]:
        children, name, layer = place
        now = children.get(name)
        if now is not layer:
            place[2] = now
            if now is not None and (reason := module.__dict__[_CONVERTS](now)):
                notice[name] = reason
    if notice:
        names = [f"{name or 'the model'} ({reason})" for name, reason in list(notice.items())[:5]]
        more = f" and {len(notice) - 5} more" if len(notice) > 5 else ""
        notice.clear()
        warnings.warn(
            f"convert_: these layers run dense inside use_mask, over the zeros of inactive pixels, and what they write "
            f"there is read by the next layer: {', '.join(names)}{more}",
            stacklevel=5,
        )


# ----------------------------------------------------------------------------------- classes


def _whole_class(base: type[nn.Module]) -> type[nn.Module]:
    return _graph_class(base) if issubclass(base, fx.GraphModule) else _plain_class(base)


@functools.cache
def _plain_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Sparse{base.__name__}", (base,), _members(base, _forward_of(base), _new) | _parts(base))


def _parts(base: type[nn.Module]) -> dict:
    """The methods that are called as parts of a forward: forward_features, forward_head and the like."""

    def part_of(method: Callable) -> Callable:
        @functools.wraps(method)
        def part(self, *args, **kwargs):
            active = context.current()
            if active is None or _TRACE not in self.__dict__:
                return method(self, *args, **kwargs)
            try:
                return _on_maps(method, self, args, kwargs, active, True)
            except Exception as error:
                if not inside():
                    name_module(error, self)
                raise

        return part

    names = {name for kind in base.__mro__ for name in vars(kind) if name.startswith("forward_")}
    return {name: part_of(method) for name in names if callable(method := getattr(base, name))}


def _forward_of(base: type[nn.Module]) -> Callable:
    def forward(self, *args, **kwargs):
        active = context.current()
        if active is None or _TRACE not in self.__dict__:  # a slice of a converted nn.Sequential has none
            return base.forward(self, *args, **kwargs)
        if not is_compiling():
            refuse_tracing()  # before the tracer warns of each size that is read
        if not may_follow() or inside() or is_compiling():  # an export may not ask for sizes
            return _under_mask(base, self, args, kwargs, active)
        check_inputs(self, args, kwargs, active)
        try:
            return _under_mask(base, self, args, kwargs, active)
        except Exception as error:
            name_module(error, self)
            raise

    with contextlib.suppress(TypeError, ValueError):  # an export names inputs and their sizes by it
        forward.__signature__ = inspect.signature(base.forward)
    return forward


def _under_mask(base: type[nn.Module], module: nn.Module, args: tuple, kwargs: dict, active):
    """A module's forward inside the context: its trace, or its own Python on maps."""
    program = module.__dict__[_PROGRAM]
    if program is not None and program.module is not module:  # a shallow copy of a converted module
        program = _bind(module)
    holds = program is not None and program.holds()
    if not (is_compiling() or (holds and not module.__dict__[_NOTICE])):
        _look(module)
    inputs = _tensors(module.__dict__[_TRACE].input_names, args, kwargs) if holds else None
    if inputs is not None and not may_follow():
        return program.run(inputs, active, module.__dict__[_DENSE])
    if inputs is not None:
        try:
            return program.run(inputs, active, module.__dict__[_DENSE])
        except NoTensor:  # the trace is none
            module.__dict__.update({_TRACE: None, _PROGRAM: None})
    return _on_maps(base.forward, module, args, kwargs, active)


def _on_maps(forward: Callable, module: nn.Module, args: tuple, kwargs: dict, active, part: bool = False):
    """``forward(module, *args, **kwargs)`` on maps. Where a compiler traces a module that changed, layer by layer."""
    if may_follow():
        return follow(partial(forward, module), args, kwargs, active, module.__dict__[_DENSE], part)
    if is_dynamo_compiling() and module.__dict__[_TRACE] is None:
        return forward_that_needs_maps(forward, module, args, kwargs, active, part)
    return forward(module, *args, **kwargs)


@torch._disable_dynamo  # named for the error of a graph that must not break
def forward_that_needs_maps(*arguments):
    """Runs outside of the graph of a compiler: Dynamo cannot trace tensors that hold rows."""
    return _on_maps(*arguments)


def _bind(module: nn.Module) -> Program | None:
    """Gives a module the program of its trace."""
    steps = module.__dict__[_TRACE]
    program = module.__dict__[_PROGRAM] = None if steps is None else Program(steps, module)
    return program


def _tensors(names: tuple[str, ...], args: tuple, kwargs: dict) -> tuple[Tensor, ...] | None:
    """The inputs of a call with (batched) tensors of these names and nothing else, or None."""
    if len(args) + len(kwargs) != len(names) or not kwargs.keys() <= set(names[len(args) :]):
        return None
    found = (*args, *(kwargs[name] for name in names[len(args) :]))
    tensors = all(isinstance(x, Tensor) for x in found)
    return found if tensors and found[0].dim() != 3 else None  # [C, H, W] goes layer by layer


def _members(base: type[nn.Module], forward: Callable, new: Callable) -> dict:
    def __reduce_ex__(self, protocol):
        if "_dynops_base" not in vars(type(self)):  # a parametrisation of it
            return base.__reduce_ex__(self, protocol)
        _, _, *state = base.__reduce_ex__(self, protocol)
        return new, (base,), *state

    def __setstate__(self, state):
        base.__setstate__(self, state)
        if is_whole(self):
            _bind(self)

    return {
        "forward": forward,
        "__setstate__": __setstate__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,  # transformers finds the layers that it records by str of the class
        "__doc__": base.__doc__,
        "__init_subclass__": classmethod(lambda cls, **options: None),
        "_dynops_base": base,
    }


def _new(base: type[nn.Module]) -> nn.Module:
    """An empty module of a whole class, for pickle and deepcopy to fill."""
    cls = _plain_class(base)
    return cls.__new__(cls)


def _new_masked(base: type[nn.Module]) -> nn.Module:
    cls = masked_class(base)
    return cls.__new__(cls)


def _graph_class(base: type[fx.GraphModule]) -> type[fx.GraphModule]:
    """Makes whole again what torch.fx makes anew of a GraphModule, whose class is its own."""

    def recompile(self):
        whole, code = type(self), self.__dict__.get("_code")
        self.__class__ = base  # torch.fx sets the forward of the module's class
        try:
            made = base.recompile(self)
        finally:
            self.__class__ = whole
        if self.__dict__.get("_code") == code and _TRACE in self.__dict__:
            _bind(self)  # the forward is another function, and does the same
        return made

    def __deepcopy__(self, memo):
        made = base.__deepcopy__(self, memo)
        if is_whole(self):
            made.__dict__.update({key: copy.deepcopy(self.__dict__[key], memo) for key in _KEYS})
            _graph_again(made)
        return made

    def __reduce_ex__(self, protocol):
        make, arguments, *_ = base.__reduce__(self)
        return _graph_loaded, (make, arguments)

    members = _members(base, _forward_of(base), _new)
    members |= {"recompile": recompile, "__deepcopy__": __deepcopy__, "__reduce_ex__": __reduce_ex__}
    members["__qualname__"] = "GraphModuleImpl"  # torch.fx passes over classes of this name
    return type(f"Sparse{base.__name__}", (base,), members)


def _graph_loaded(make: Callable, arguments: tuple) -> fx.GraphModule:
    made = make(*arguments)
    if is_whole(made):
        _graph_again(made)
    return made


def _graph_again(made: fx.GraphModule) -> None:
    made.__class__ = _graph_class(type(made))
    made.__dict__[_PLACES] = _places(made)
    _bind(made)
