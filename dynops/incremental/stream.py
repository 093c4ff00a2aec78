"""Stream: what the layers of a model last wrote.

Papers: SIGE (NeurIPS 2022), DeltaCNN (CVPR 2022), CBinfer (ICDSC 2017).
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from .. import context
from ..kept import Mark, kept, looked_at
from ..plans.masks import check_mask, resize_mask
from ..stack.changed.frame import Frame, OtherSizes, Unfollowable
from ..stack.changed.tape import Tape
from .holding import UNFOLLOWABLE, Given, Returns, modules_of, note_watch, plain_attributes, repeats, stale
from .model import scope
from .options import Options
from .report import Last, Report


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
        self._entry.stream._idle = True
        scope.enter(self._entry)
        return self._entry.stream

    def __exit__(self, error, *rest) -> None:
        scope.leave(self._entry)
        if error is None and self._entry.stream._idle and not is_compiling():
            warnings.warn(
                "Stream: expected a call of a model inside, but none ran: dynops.incremental_(model) prepares a model",
                stacklevel=3,
            )

    def changed(self, mask: Tensor) -> _Within:
        """As :meth:`Stream.changed`, of the same step."""
        return _Within(self._entry._replace(mask=_checked_mask(mask)))

    def aligned(self, dx: int, dy: int) -> _Within:
        """As :meth:`Stream.aligned`, with the same mask."""
        return _Within(self._entry._replace(align=_checked_shift((dx, dy))))

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
        self._entry = _Entry(weakref.proxy(self), align=self._align)  # no cycle: its memory goes with it
        self._last: Last | None = None
        self._idle = True  # no model ran since it was entered

    # ---------------------------------------------------------------------------------- contexts

    def __enter__(self) -> Stream:
        _Within(self._entry).__enter__()
        return self

    def __exit__(self, *error) -> None:
        _Within(self._entry).__exit__(*error)

    def changed(self, mask: Tensor) -> _Within:
        """``with stream.changed(mask):`` the caller knows what changed in the input; nothing is compared.

        A mask that leaves out a pixel that changed gives old values there, until a call without a mask compares.

        Args:
            mask: ``[N, H, W]``, ``[N, 1, H, W]`` or ``[H, W]``; nonzero = changed. It is brought to the input's size.
        """
        return _Within(_Entry(self, mask=_checked_mask(mask), align=self._align))

    def at(self, step) -> _Within:
        """``with stream.at(step=t):`` a state of its own for each step, as diffusion needs it.

        Args:
            step: hashable, or a tensor of one number.

        Raises:
            TypeError: ``step`` is not hashable.
        """
        step = step.item() if isinstance(step, Tensor) else step
        try:
            hash(step)
        except TypeError:
            raise TypeError(
                f"step: expected a hashable value or a tensor of one number, got {step!r}"
            ) from None
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
        """For a model that moves: forgets what is kept on other devices. The next call there is dense."""
        device = torch.device(device)
        for tapes in self._tapes.values():
            for key, tape in list(tapes.items()):
                if tape is UNFOLLOWABLE or any(v.device.type != device.type for v in tape.inputs):
                    del tapes[key]
        return self

    def _all_tapes(self) -> list[Tape]:
        return [tape for tapes in self._tapes.values() for tape in tapes.values() if tape is not UNFOLLOWABLE]

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
        self._idle = False
        modules = modules_of(model)
        if any(m.training for m in modules):
            if self._tapes.get(model) != {}:  # once, until it is in eval mode again
                text = "Stream: expected a model in eval mode; in training mode it keeps nothing"
                warnings.warn(text, stacklevel=5)
            self._tapes[model] = {}
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
            with torch.inference_mode(False), torch.no_grad(), contextlib.ExitStack() as within:
                return self._kept_run(within, entry, model, modules, name, own, args, kwargs)
        finally:
            self._owner = None
            self._lock.release()

    def _kept_run(
        self, within, entry: _Entry, model: nn.Module, modules: list, name: str, own: Callable, args, kwargs
    ):
        began, key = time.perf_counter(), (name, entry.step)
        tapes = self._tapes.setdefault(model, {})
        if tapes.get(key) is UNFOLLOWABLE:
            return own(model, *args, **kwargs)
        given = Given.of(args, kwargs)
        tape, fresh = self._tape_of(
            tapes.pop(key, None), model, modules, given
        )  # back when the call has ended well
        if tape.turned == kept.turned:  # its mark was just compared
            within.enter_context(looked_at())
        self._options.device = given.device
        frame = Frame(tape, self._options, tape.names, fresh or self._refreshes(tape))
        frame.align(entry.align)
        followed = [frame.enter(i, x, _told(entry.mask, x)) for i, x in enumerate(given.tensors)]
        if not frame.fresh and name == "forward" and given.repeats(tape.others) and repeats(model, tape):
            try:
                frame.rest() if frame.idle() else frame.replay()
            except OtherSizes:  # begins anew, and then runs the model's Python
                out = self._kept_run(within, entry, model, modules, name, own, args, kwargs)
                tapes[key].pure = False
                return out
            out = tape.returns.copied(tape)
        else:
            try:
                out = own(model, *given.args(followed), **given.kwargs(followed))
            except Unfollowable as reason:
                warnings.warn(f"Stream: {type(model).__qualname__} runs dense: {reason}", stacklevel=6)
                tapes[key], self._last = UNFOLLOWABLE, None
                return own(model, *given.args(given.tensors), **given.kwargs(given.tensors))
            except BaseException:
                frame.close()
                raise
            note_watch(model, tape)
            frame.write_back(given.tensors)
            tape.returns = Returns.of(out)
            out = plain_attributes(frame.end(out))
        tape.others = given.others
        tapes[key] = tape
        self._last = Last(tape, time.perf_counter() - began)
        return given.formatted(out)

    def _tape_of(self, tape: Tape | None, model: nn.Module, modules: list, given: Given) -> tuple[Tape, bool]:
        """The tape of a call, and whether it begins anew."""
        tensors = [
            t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
        ]
        reason = "" if tape is None else stale(tape, given.signature, tensors)
        if reason:
            text = f"Stream: {reason} changed; the state of {type(model).__qualname__} begins anew"
            warnings.warn(text, stacklevel=7)
        fresh = tape is None or bool(reason)
        if fresh:
            kept.drop(*tensors)  # what was made of another content, which only a look at it shows
            tape = Tape()
            tape.turned = kept.turned
            tape.arguments, tape.mark, tape.ids = given.signature, Mark(*tensors), [*map(id, tensors)]
            tape.names = {id(p): n for n, p in (*model.named_parameters(), *model.named_buffers())}
        tape.calls += 1
        return tape, fresh

    def _refreshes(self, tape: Tape) -> bool:
        return self._refresh is not None and (tape.calls - 1) % self._refresh == 0

    # ------------------------------------------------------------------------------------- report

    def report(self) -> Report:
        """What the last call computed.

        Raises:
            RuntimeError: the stream was in no call yet.
        """
        if self._last is None:
            raise RuntimeError(
                "report: expected a call inside the stream before, of a model that can be followed"
            )
        return Report.of(self._last)


def _stream_of(given: dict, refresh, align) -> Stream:
    return Stream(**given, refresh=refresh, align=align)


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
