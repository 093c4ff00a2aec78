"""incremental_ and Stream: a model keeps what did not change since its last call, and computes the rest.

Papers: SIGE (NeurIPS 2022), DeltaCNN (CVPR 2022), CBinfer (ICDSC 2017).
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import context
from .kept import Mark
from .plans.masks import check_mask, resize_mask
from .scope import Scope
from .stack import converted
from .stack.changed.followed import Followed, plain_tree
from .stack.changed.frame import Frame, OtherSizes, Unfollowable
from .stack.changed.options import Options
from .stack.changed.report import Last, Report
from .stack.changed.tape import Tape
from .stack.graph import KINDS
from .stack.staleness import DATA, Opaque, Watch, frozen
from .stack.trace import Untraceable, trace

_OF_MODULES = frozenset(nn.Module().__dict__)
_METHODS = ("forward", "encode", "decode")
_scope = Scope("dynops.Stream")


def incremental_(model: nn.Module) -> None:
    """Lets a model keep its values in a :class:`Stream`, in place. ``dynops.revert_`` undoes it.

    Every parameter, buffer, ``state_dict`` key and hook stays where it is; only the model's class changes. Outside of
    ``with stream:`` the model is what it was. Inside, calls of the model, and of its methods ``encode``, ``decode`` and
    ``forward_*``, run the model's own Python. Each function of torch that it calls computes what changed.

    Args:
        model: in eval mode; any module.

    Raises:
        TypeError: ``model`` is not a module, or is one of TorchScript.
        ValueError: :func:`dynops.convert_` has converted it.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if is_incremental(model):
        return
    if any("_dynops_converted" in m.__dict__ or converted.is_whole(m) for m in model.modules()):
        raise ValueError(
            "model: expected one that convert_ has not converted; dynops.revert_(model) undoes it"
        )
    model.__class__ = _incremental_class(type(model))


def is_incremental(module: nn.Module) -> bool:
    return any("_dynops_incremental" in vars(kind) for kind in type(module).__mro__)


def undo(module: nn.Module) -> None:
    """Gives a module back the class that it had before :func:`incremental_`."""
    own = next((kind for kind in type(module).__mro__ if "_dynops_incremental" in vars(kind)), None)
    if own is not None:
        module.__class__ = converted.rebased(type(module), own, vars(own)["_dynops_base"])


@functools.cache
def _incremental_class(base: type[nn.Module]) -> type[nn.Module]:
    names = {name for kind in base.__mro__ for name in vars(kind) if name.startswith("forward_")}
    names |= {name for name in _METHODS if callable(getattr(base, name, None))}
    methods = {name: _method(base, name) for name in names if inspect.isfunction(getattr(base, name))}
    members = {**converted._members(base, methods["forward"], _new), **methods, "_dynops_incremental": True}
    return type(f"Incremental{base.__name__}", (base,), members)


def _new(base: type[nn.Module]) -> nn.Module:
    """An empty module, for pickle and deepcopy to fill."""
    kind = _incremental_class(base)
    return kind.__new__(kind)


def _method(base: type[nn.Module], name: str) -> Callable:
    own = getattr(base, name)

    @functools.wraps(own)
    def method(self, *args, **kwargs):
        entry = None if torch.compiler.is_compiling() else _scope.innermost()
        if entry is None or entry.stream._runs_here():
            return own(self, *args, **kwargs)
        return entry.stream._run(entry, self, name, own, args, kwargs)

    return method


class _Entry(NamedTuple):
    """What holds inside a ``with`` block."""

    stream: Stream
    step: object = None
    mask: Tensor | None = None
    align: tuple[int, int] | None = None


class _Within:
    """A ``with`` block of a stream."""

    def __init__(self, entry: _Entry):
        self._entry = entry

    def __enter__(self) -> Stream:
        _scope.enter(self._entry)
        return self._entry.stream

    def __exit__(self, *error) -> None:
        _scope.leave(self._entry)

    def changed(self, mask: Tensor) -> _Within:
        """As :meth:`Stream.changed`, of the same step."""
        return _Within(self._entry._replace(mask=_checked_mask(mask)))

    def at(self, step) -> _Within:
        """As :meth:`Stream.at`, with the same mask."""
        return _Within(self._entry._replace(step=step))


class Stream:
    """What the layers of a model last wrote: the state of one video, or of one edited image.

    ``with stream: y = model(x)``. The first call computes everything and keeps it. A later call compares ``x`` with the
    one before and computes what changed, at every resolution. A model may have many streams, and a stream many models.

    Args:
        spread: "exact": a change goes through the receptive field of each layer, and the result is the dense one, to
            rounding. A number k: at every resolution the pixels up to k away from those that changed in the input are
            computed, and others keep their old value (SIGE). That is approximate.
        threshold: a row of a layer's output whose values all moved by no more than this is not written and does not
            spread. It is compared with what was last written, so that small changes add up (DeltaCNN). A number, or
            a mapping of patterns of names, as in the report, to numbers ("input": the model's input). 0: exact.
        relative: thresholds are in units of the root mean square of the layer's first output.
        refresh: every ``refresh``-th call computes everything.
        block: changed pixels are widened to blocks of this size, of every map. Larger blocks fit kernels better.
        statistics: of group and instance norms. "exact": over the whole map: a change moves all of its sample. "kept":
            those of the last call that computed everything (SIGE). That is approximate.
        attention: "exact": a changed token moves every token that attends to it. "kept": only changed tokens are computed
            again, over the kept keys and values of the others (SIGE). That is approximate.
        keep: called as ``keep(name, bytes)``, or a list of patterns of names: values for which it is false are not kept,
            and are computed again where they are read. None keeps all that need it.
        align: ``(dx, dy)``: in each call the image has moved by whole pixels, to the right and down. See :meth:`aligned`.

    Attributes:
        bytes: of all that is kept.

    A changed size, dtype, batch or device of the input, a parameter that was written, or another mode of autocast
    begins anew, with a warning. An exception in a call drops the state. A model in training mode runs as if there were no stream.

    Raises:
        TypeError, ValueError: an argument that does not fit.
        RuntimeError: a call of the model where gradients are needed, or while another thread is in a call of the stream.
    """

    def __init__(
        self,
        *,
        spread: str | int = "exact",
        threshold: float | Mapping[str, float] = 0.0,
        relative: bool = False,
        refresh: int | None = None,
        block: int | tuple[int, int] | None = None,
        statistics: str = "exact",
        attention: str = "exact",
        keep: Callable[[str, int], bool] | list[str] | None = None,
        align: tuple[int, int] | None = None,
    ):
        self._options = Options(spread, threshold, relative, block, statistics, attention, keep)
        if refresh is not None and (type(refresh) is not int or refresh < 1):
            raise ValueError(f"refresh: expected None or an int >= 1, got {refresh!r}")
        self._refresh, self._align = refresh, _checked_shift(align)
        self._tapes: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._lock, self._owner = threading.Lock(), None
        self._entry = _Entry(self, align=self._align)
        self._last: Last | None = None

    # ---------------------------------------------------------------------------------- contexts

    def __enter__(self) -> Stream:
        _scope.enter(self._entry)
        return self

    def __exit__(self, *error) -> None:
        _scope.leave(self._entry)

    def changed(self, mask: Tensor) -> _Within:
        """``with stream.changed(mask):`` the caller knows what changed in the input; nothing is compared.

        A mask that leaves out a pixel that changed gives a wrong result there, and in later calls.

        Args:
            mask: ``[N, H, W]``, ``[N, 1, H, W]`` or ``[H, W]``; nonzero = changed. It is brought to the input's size.
        """
        return _Within(_Entry(self, mask=_checked_mask(mask), align=self._align))

    def at(self, step) -> _Within:
        """``with stream.at(step=t):`` a state of its own for each step, as diffusion needs it.

        Args:
            step: hashable, or a tensor of one number.
        """
        step = step.item() if isinstance(step, Tensor) else step
        hash(step)
        return _Within(_Entry(self, step=step, align=self._align))

    def aligned(self, dx: int, dy: int) -> _Within:
        """``with stream.aligned(dx, dy):`` the image has moved since the last call, as that of a camera that pans.

        What is kept moves with it where ``dx`` and ``dy`` are multiples of the layer's stride; else it is computed again.
        """
        return _Within(_Entry(self, align=_checked_shift((dx, dy))))

    # ------------------------------------------------------------------------------------- state

    def reset(self) -> None:
        """Forgets everything: the next call is dense."""
        self._tapes.clear()
        self._last = None

    @property
    def bytes(self) -> int:
        return sum(tape.bytes for tape in self._all_tapes())

    def to(self, device: torch.device | str) -> Stream:
        """Moves what is kept; the model is to be moved too."""
        for tape in self._all_tapes():
            for value in tape.values:
                if value.stored is not None:
                    value.stored = value.stored.to(device)
                    value.device = torch.device(device)
        self.reset()  # steps hold parameters of the old device
        return self

    def _all_tapes(self) -> list[Tape]:
        return [tape for tapes in self._tapes.values() for tape in tapes.values()]

    def __deepcopy__(self, memo) -> Stream:
        return self._like()

    def __reduce__(self):
        return _stream_of, (self._options.given, self._refresh, self._align)

    def _like(self) -> Stream:
        return _stream_of(self._options.given, self._refresh, self._align)

    # --------------------------------------------------------------------------------------- runs

    def _runs_here(self) -> bool:
        return self._owner == threading.get_ident()

    def _run(self, entry: _Entry, model: nn.Module, name: str, own: Callable, args: tuple, kwargs: dict):
        """A call of a model's method inside the stream."""
        modules = _modules_of(model)
        if any(m.training for m in modules):
            warnings.warn(
                "Stream: expected a model in eval mode; in training mode it keeps nothing", stacklevel=4
            )
            self._tapes.pop(model, None)
            return own(model, *args, **kwargs)
        _refuse_gradients(model, args, kwargs)
        if context.current() is not None:
            raise RuntimeError(
                "Stream: expected no mask context around it, as the stream knows what to compute"
            )
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("Stream: expected one call at a time; give each thread a stream of its own")
        self._owner = threading.get_ident()
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._kept_run(entry, model, modules, name, own, args, kwargs)
        finally:
            self._owner = None
            self._lock.release()

    def _kept_run(
        self, entry: _Entry, model: nn.Module, modules: list, name: str, own: Callable, args, kwargs
    ):
        began = time.perf_counter()
        tapes = self._tapes.setdefault(model, {})
        key = name, entry.step
        tape = tapes.get(key)
        if tape is not None and tape.output == "unfollowable":
            return own(model, *args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        leaves = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        signature = _signature(leaves, spec)
        tensors = [
            t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
        ]
        if tape is not None and (reason := _stale(tape, signature, tensors)):
            warnings.warn(
                f"Stream: {reason} changed; the state of {type(model).__name__} begins anew", stacklevel=5
            )
            tape = None
        fresh = tape is None
        tape = Tape() if tape is None else tape
        if fresh:
            tape.arguments, tape.mark, tape.ids = signature, Mark(*tensors), [*map(id, tensors)]
            tape.names = {id(p): n for n, p in (*model.named_parameters(), *model.named_buffers())}
        tapes.pop(key, None)  # until the call has ended well
        state, known = _attributes(modules), tape.state
        tape.state = state
        tape.calls += 1
        refreshed = self._refresh is not None and (tape.calls - 1) % self._refresh == 0
        self._options.device = next((x.device for x in leaves if isinstance(x, Tensor)), torch.device("cpu"))
        frame = Frame(tape, self._options, tape.names, fresh or refreshed)
        frame.align(entry.align)
        wrapped, number = list(leaves), 0
        for i, x in enumerate(leaves):
            if isinstance(x, Tensor):
                wrapped[i] = frame.enter(number, x, _told(entry.mask, x))
                number += 1
        others = [x for x in leaves if not isinstance(x, Tensor)]
        as_before = not frame.fresh and tape.returns is not None and _same(others, tape.others)
        if as_before and not tape.draws and state is not None and state == known and frame.idle():
            frame.rest()
            out = tape.returns.copied(tape)
        elif as_before and name == "forward" and tape.pure and _does_the_same(model):
            try:
                frame.replay()
            except OtherSizes:  # begins anew, and then runs the model's Python
                out = self._kept_run(entry, model, modules, name, own, args, kwargs)
                tapes[key].pure = False
                return out
            out = tape.returns.copied(tape)
        else:
            drawn = torch.get_rng_state()
            given, named = pytree.tree_unflatten(wrapped, spec)
            try:
                out = own(model, *given, **named)
            except Unfollowable as reason:
                warnings.warn(f"Stream: {type(model).__name__} runs dense: {reason}", stacklevel=5)
                tape = Tape()
                tape.output = "unfollowable"
                tapes[key] = tape
                given, named = pytree.tree_unflatten(leaves, spec)
                return own(model, *given, **named)
            except BaseException:
                frame.close()
                raise
            tape.draws = not torch.equal(drawn, torch.get_rng_state())
            tape.returns = _Returns.of(out)
            out = _plain_attributes(frame.end(out))
        tape.others = others
        tapes[key] = tape
        self._last = Last(weakref.ref(model), tape, frame.moved, time.perf_counter() - began)
        return out

    # ------------------------------------------------------------------------------------- report

    def report(self) -> Report:
        """What the last call computed.

        Raises:
            RuntimeError: the stream was in no call yet.
        """
        if self._last is None:
            raise RuntimeError("report: expected a call of a model inside the stream before")
        return Report.of(self._last)


def _stream_of(given: dict, refresh, align) -> Stream:
    return Stream(**given, refresh=refresh, align=align)


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """As ``model.modules()``, in a fifth of its time: of EfficientNet-B0 that is 1 ms in each call."""
    found, left = {id(model): model}, [model]
    while left:
        for child in left.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                left.append(child)
    return list(found.values())


def _attributes(modules: list[nn.Module]) -> list | None:
    """A picture of what modules hold beside tensors; None where they have hooks, which are to be called."""
    if any(m._forward_hooks or m._forward_pre_hooks for m in modules):
        return None
    found: list = []
    for m in modules:
        for name, x in m.__dict__.items():
            if name not in _OF_MODULES:
                found.append(x if type(x) in DATA else _picture(x))
    return found


def _picture(x):
    try:
        return frozen(x) if type(x) in (list, dict, set, tuple) else id(x)
    except Opaque:
        return id(x)


def _signature(leaves: list, spec) -> tuple:
    """What a tape holds for, beside the content of tensors."""
    tensors = tuple((tuple(x.shape), x.dtype, x.device) for x in leaves if isinstance(x, Tensor))
    modes = tuple(
        torch.get_autocast_dtype(k) if torch.is_autocast_enabled(k) else None for k in ("cpu", "cuda")
    )
    return tensors, modes, spec


def _stale(tape: Tape, signature: tuple, tensors: list[Tensor]) -> str:
    """What has changed since a tape was made; "" where it holds."""
    if tape.arguments[0] != signature[0]:
        return "the size, dtype or device of an input"
    if tape.arguments[1] != signature[1]:
        return "autocast"
    if tape.arguments[2] != signature[2]:
        return "the structure of the arguments"
    if [*map(id, tensors)] != tape.ids or not tape.mark.holds(*tensors):
        return "a parameter or buffer"
    return ""


_watches: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _does_the_same(model: nn.Module) -> bool:
    """True where a trace says that the model's forward is a function of its tensors alone, and nothing of it changed since.

    Then its steps need no Python: of ResNet-50 on 512x512 pixels that is 20 ms of 85.
    """
    if model not in _watches:
        kinds = {m: KINDS[type(m)] for m in model.modules() if type(m) in KINDS}
        try:
            found = trace(model, kinds)
            _watches[model] = Watch(model, found) if not found.called else None
        except Untraceable:
            _watches[model] = None
    watch = _watches[model]
    return watch is not None and watch.holds()


def _same(a: list, b: list) -> bool:
    try:
        return len(a) == len(b) and all(x is y or bool(x == y) for x, y in zip(a, b, strict=True))
    except (TypeError, ValueError, RuntimeError):
        return False


class _Returns(NamedTuple):
    """What a forward returned: the numbers of values, and their structure."""

    leaves: list
    spec: object

    @classmethod
    def of(cls, out) -> _Returns | None:
        leaves, spec = pytree.tree_flatten(out)
        plain = (type(None), bool, int, float, str)
        if not all((type(x) is Followed and x.plain is None) or type(x) in plain for x in leaves):
            return None
        return cls([x.value.number if type(x) is Followed else ("", x) for x in leaves], spec)

    def copied(self, tape: Tape):
        def made(leaf):
            if type(leaf) is tuple:
                return leaf[1]
            stored = tape.values[leaf].stored
            return getattr(stored, "dense", stored).clone()

        return pytree.tree_unflatten([made(x) for x in self.leaves], self.spec)


def _plain_attributes(out):
    """Objects that hold tensors, as diffusers returns distributions: their tensors are plain ones now."""
    for leaf in pytree.tree_leaves(out):
        for name, x in (
            list(getattr(leaf, "__dict__", {}).items()) if not isinstance(leaf, (Tensor, nn.Module)) else ()
        ):
            if type(x) is Followed:
                setattr(leaf, name, plain_tree(x))
    return out


def _refuse_gradients(model: nn.Module, args: tuple, kwargs: dict) -> None:
    if not torch.is_grad_enabled():
        return
    tensors = (x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
    if any(x.requires_grad for x in (*tensors, *model.parameters())):
        raise RuntimeError(
            "Stream: expected a call without gradients, as kept values have none; use torch.inference_mode() or torch.no_grad()"
        )


def _checked_mask(mask: Tensor) -> Tensor:
    if isinstance(mask, Tensor) and mask.dim() == 2:
        mask = mask[None]
    return check_mask(mask) != 0


def _checked_shift(shift) -> tuple[int, int] | None:
    if shift is None:
        return None
    if not isinstance(shift, (tuple, list)) or len(shift) != 2 or not all(type(s) is int for s in shift):
        raise ValueError(f"align: expected (dx, dy) in whole pixels, got {shift!r}")
    return tuple(shift)


def _told(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The caller's mask at the size of an input, or None."""
    if mask is None or x.dim() != 4:
        return None
    if mask.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"mask: expected one for a batch of {x.shape[0]}, got shape {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"mask: expected it on the input's device {x.device}, got {mask.device}")
    mask = resize_mask(mask, tuple(x.shape[2:]))
    return mask.expand(x.shape[0], -1, -1).contiguous()
