"""Keeps what is made of tensors (packed weights, folded norms, inverse indices) while these stay as they are.

One rule for all of it. A thing is kept with the memory that it was made of, and is made again where

- the memory is another one: ``p.data = …``, ``.to(…)``, ``load_state_dict(assign=True)``;
- the version counter of a tensor moved: any in-place operation that autograd sees;
- an optimiser of ``torch.optim`` stepped: all is forgotten, since fused steps move no counter;
- on a CPU, the **fingerprint** of the content differs: ``F.batch_norm`` moves running statistics without a
  counter, and so do collectives, FSDP2, ``weight.data``, other processes and numpy. Up to 16 KB (norms) every
  byte is read; of more, 66 cache lines; of stacked experts, at least two lines of each.

A fingerprint does not see one element that is written through ``.data`` in a large weight; on a GPU, where reading it
would wait for the device, there is none at all. :func:`refresh` is for these. ``DYNOPS_CHECK_KEPT=1`` in the environment
compares whole contents, on every device, and warns where something went unnoticed.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import backends

# Without a binary nothing is kept: a source tree that was not built runs the reference, and slowly anyway.
fingerprint = backends._C.fingerprint if backends.has_binary() else None

_LINES = 64  # that a fingerprint reads of a large tensor: 0.5 us in the caches, 1.5 us out of them
_LINES_A_SLICE = 2  # of each expert or kernel in [E, O, I] or [E, O, I, kh, kw]: a step may touch 2 of 64
_MOST_ENTRIES = 1024  # of one memory: views at ever new places would gather
_compare_whole = os.environ.get("DYNOPS_CHECK_KEPT", "") not in ("", "0")


class _Looked(threading.local):
    now = False


_looked = _Looked()


@contextlib.contextmanager
def looked_at():
    """Inside it, in this thread, contents are not read again.

    For a caller who has just looked at all tensors that are used, and knows that what is kept of them was made of this
    content: it forgot all of it (:meth:`Kept.drop`), and ``Kept.turned`` has not moved since.

    Of a UNet with 114 million parameters the fingerprints of all its layers take 50 ms where its weights are in no cache.
    """
    before, _looked.now = _looked.now, True
    try:
        yield
    finally:
        _looked.now = before


class Mark:
    """The contents of a few tensors at one moment."""

    __slots__ = ("_marks", "_memory", "_seen", "_storages", "_whole")

    def __init__(self, *tensors: Tensor | None):
        self._marks, self._memory, self._storages = _marks(tensors), [], []
        for t in tensors:
            if t is None:
                continue
            if t.is_cpu:
                self._memory += _memory(t)
            else:  # the memory itself: a freed one's address comes back, as in module.half().float()
                self._storages.append(weakref.ref(t.untyped_storage()))
        self._seen = fingerprint(*self._memory)
        self._whole = _whole(tensors) if _compare_whole else None

    def holds(self, *tensors: Tensor | None) -> bool:
        """True if ``tensors``, of the same shapes, strides and dtypes, hold the same now, as far as can be seen at once."""
        try:
            marks = []
            for t in tensors:
                marks += (0, 0) if t is None else (t.data_ptr(), t._version)
        except RuntimeError:  # a tensor made in inference mode has no version
            marks = _marks(tensors)
        if marks != self._marks or not (_looked.now or self._seen == fingerprint(*self._memory)):
            return False
        return (not self._storages and self._whole is None) or self._is_really_same(tensors)

    def lies_at(self, begins: set[int]) -> bool:
        """True if one of the tensors begins at one of these addresses."""
        return not begins.isdisjoint(self._marks[::2])

    def _is_really_same(self, tensors: tuple) -> bool:
        present = [t for t in tensors if t is not None]
        elsewhere = (t for t in present if not t.is_cpu)
        for storage, t in zip(self._storages, elsewhere, strict=True):
            if storage() is not t.untyped_storage() or not _shows_changes(t):
                return False
        if self._whole is not None and self._whole != _whole(tensors):
            warnings.warn(_unnoticed(present), stacklevel=4)
            return False
        return True


class Kept:
    """Things made of tensors, by the memory, place, shape and dtype of these and a key."""

    def __init__(self):
        self._slots: dict[int, _Slot] = {}  # by id(storage): a slot goes with its storage
        self.epoch = 0
        self.turned = 0  # how often something was found to hold no longer, or was forgotten
        self.stepped = False  # an optimiser's step only sets this: Dynamo traces it in a compiled step

    def get(self, key, make: Callable[[], object], tensor: Tensor, *others: Tensor | None):
        """``make()``, or what it returned for this ``key`` while the tensors stay as they are.

        Args:
            key: hashable; with the layout of ``tensor`` all that ``make`` depends on beside the tensors' content.
            make: returns a tensor or a tuple of them; runs without gradients, and never in inference mode, so that
                what an evaluation made may be saved for a backward later.
            tensor, others: what ``make`` reads.
        """
        if self.stepped:
            self.clear()
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:  # a fake tensor, or one of a mesh
            return make()
        slot = self._slots.get(id(tensor.untyped_storage()))
        place = key, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        entry = None if slot is None else slot.get(place)
        if entry is not None:
            if entry.mark.holds(tensor, *others):
                return entry.made if entry.event is None else entry.on_this_stream()
            self.turned += 1
        return self._remake(place, make, tensor, *others)

    def _remake(self, place: tuple, make: Callable[[], object], *tensors: Tensor | None):
        if not can_keep(*tensors):
            return made_plain(make)
        epoch = self.epoch
        mark = Mark(*tensors)  # before: what is written meanwhile is then noticed
        made = made_plain(make)
        # A view would keep its own memory alive for ever. And another thread's optimiser may have stepped.
        if epoch == self.epoch and not _shares_memory(made, tensors):
            storage = tensors[0].untyped_storage()
            slot = self._slots.get(id(storage))
            if slot is None:
                slot = self._slots[id(storage)] = _Slot(storage, self._slots)
            elif len(slot) >= _MOST_ENTRIES:
                slot.clear()
            slot[place] = _Entry(mark, made)
        return made

    def drop(self, *tensors: Tensor) -> None:
        """Forgets all that was made of these tensors, or of others together with them."""
        self.turned += 1
        begins = {t.data_ptr() for t in tensors}
        for slot in list(self._slots.values()):
            for place, entry in list(slot.items()):
                if entry.mark.lies_at(begins):
                    slot.pop(place, None)

    def clear(self) -> None:
        """Forgets everything."""
        self.stepped = False
        self.turned += 1
        self.epoch += 1
        self._slots.clear()

    def __len__(self) -> int:
        return sum(map(len, list(self._slots.values())))


class _Slot(dict):
    """Everything made of one memory, by key and layout. It is not found by the tensor: weak references to parameters hinder
    ``torch.utils.swap_tensors``, and a view or ``detach()`` of a weight is the same weight."""

    __slots__ = ("storage",)

    def __init__(self, storage: torch.UntypedStorage, slots: dict):
        super().__init__()
        key = id(storage)
        self.storage = weakref.ref(storage, lambda dead: slots.pop(key, None))


class Made:
    """Something that is kept, and on a GPU the moment from which streams other than the one that made it may read it."""

    __slots__ = ("event", "made", "stream")

    def __init__(self, made):
        self.made = made
        self.event = self.stream = None
        first = next((t for t in _tensors(made) if t.is_cuda), None)
        if first is not None:
            self.stream = torch.cuda.current_stream(first.device)
            self.event = torch.cuda.Event()
            self.event.record(self.stream)

    def on_this_stream(self):
        """What was made, which the current stream of its device may read from here on."""
        if self.event is None:
            return self.made
        stream = torch.cuda.current_stream(self.stream.device)
        if stream != self.stream:
            stream.wait_event(self.event)
            for tensor in _tensors(self.made):
                tensor.record_stream(stream)
        return self.made


class _Entry(Made):
    """The value made of one content. Threads may make the same twice; either is right."""

    __slots__ = ("mark",)

    def __init__(self, mark: Mark, made):
        super().__init__(made)
        self.mark = mark


def can_keep(*tensors: Tensor | None) -> bool:
    """True if a change of these tensors can be noticed."""
    return fingerprint is not None and all(t is None or t.is_cpu or _shows_changes(t) for t in tensors)


def made_plain(make: Callable[[], object]):
    """``make()`` without gradients and outside of inference mode, whose tensors no backward may save."""
    if torch.is_inference_mode_enabled():  # entering either takes more than a microsecond
        with torch.inference_mode(False), torch.no_grad():
            return make()
    if torch.is_grad_enabled():
        with torch.no_grad():
            return make()
    return make()


def _shows_changes(t: Tensor) -> bool:
    """True if a change of a tensor that is not on a CPU can be noticed. It must not be part of a CUDA graph, whose replay sees the tensor as it is then."""
    return not t.is_inference() and not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def _marks(tensors: tuple) -> list[int]:
    """Returns where each tensor lies, and its version, or -1: one made in inference mode has none."""
    marks = []
    for t in tensors:
        marks += (0, 0) if t is None else (t.data_ptr(), _version(t))
    return marks


def _version(t: Tensor) -> int:
    try:  # not by is_inference(): a parameter that got such data has a version still
        return t._version
    except RuntimeError:
        return -1


def _memory(t: Tensor) -> tuple[int, int, int]:
    """Returns where ``t`` begins, the bytes from there to its end, gaps included, and how many lines to read of them."""
    if t.numel() == 0:
        return 0, 0, 0
    if t.is_contiguous():
        elements = t.numel()
    else:
        elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    lines = max(_LINES, _LINES_A_SLICE * t.shape[0]) if t.dim() in (3, 5) else _LINES
    return t.data_ptr(), elements * t.element_size(), lines


def _whole(tensors: tuple) -> int:
    """A hash of all of the content, from any device."""
    copies = [t.detach().cpu().contiguous() for t in tensors if t is not None]
    return fingerprint(*chain.from_iterable((*_memory(t)[:2], 0) for t in copies))


def _unnoticed(tensors: list) -> str:
    shapes = ", ".join(str(list(t.shape)) for t in tensors)
    return (
        f"dynops: a tensor of shape {shapes} was written in a way that neither its version nor its fingerprint shows; "
        "call dynops.refresh(module) after such a write"
    )


def _tensors(made) -> tuple:
    """The tensors of a tensor, a tuple of them or a plan; a number has none."""
    if isinstance(made, Tensor):
        return (made,)
    indices = getattr(made, "_indices", None)
    several = made if isinstance(made, tuple) else () if indices is None else indices()
    return tuple(m for m in several if isinstance(m, Tensor))


def _shares_memory(made, tensors: tuple) -> bool:
    storages = [t.untyped_storage() for t in tensors if t is not None]
    return any(m.untyped_storage() is storage for m in _tensors(made) for storage in storages)


kept = Kept()


def refresh(module: nn.Module | None = None) -> None:
    """Forgets the packed weights and folded norms of a module, so that the next call makes them again.

    Call it only after a write that dynops cannot notice. On a CPU that is a write of single elements through ``.data``.
    On a GPU it is a write through ``.data``, by a collective, by another process, or by ``F.batch_norm`` outside of a layer.

    Args:
        module: the module that was written to; None: all modules.
    """
    if module is None:
        return kept.clear()
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module or None, got {type(module).__name__}")
    kept.drop(*module.parameters(), *module.buffers())


def _note_step(optimizer, args, kwargs) -> None:
    kept.stepped = True


register_optimizer_step_post_hook(_note_step)
