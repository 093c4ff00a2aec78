"""Memory between guards of poison: a write past an end of a tensor is seen, and a read there spoils the result.

The poison is NaN in every floating dtype and a large positive value in every integer: an index from there leads far
outside. Tests allocate with :func:`between_guards`; :func:`around` moves the arguments of one launch, whatever
allocated them.
"""

import contextlib
from unittest import mock

import torch
from torch import Tensor

GUARD = 64  # elements on each side of a tensor that is allocated here
PAGE = 4096  # bytes on each side of an argument that is moved
ALIGNMENT = 256  # bytes: an address keeps its remainder where it is moved, and so do loads their width
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def poison(dtype: torch.dtype) -> int:
    """The byte that guards of this dtype are filled with."""
    return 0xFF if dtype.is_floating_point else 0x7F


def between_guards(size, stride, dtype, device, offset: int = GUARD) -> Tensor:
    """Memory of this shape, poisoned, between guards of ``offset`` elements."""
    last = sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    elements = last + 1 if torch.Size(size).numel() else 0
    flat = torch.zeros(elements + 2 * offset, dtype=dtype, device=device)
    flat.view(torch.uint8).fill_(poison(dtype))
    return flat.as_strided(size, stride, offset)


def guards_are_whole(x: Tensor) -> bool:
    """Whether nothing was written before or after a tensor of :func:`between_guards`."""
    flat, edge = _bytes(x), x.storage_offset() * x.element_size()
    return bool(
        (flat[:edge] == poison(x.dtype)).all() and (flat[len(flat) - edge :] == poison(x.dtype)).all()
    )


@contextlib.contextmanager
def guarded_outputs():
    """``torch.empty`` returns memory between guards, and they are looked at afterwards."""
    made, empty = [], torch.empty

    def guarded(size, *, dtype, device=None, memory_format=torch.contiguous_format):
        like = empty(size, dtype=dtype, device="meta", memory_format=memory_format)
        made.append(between_guards(size, like.stride(), dtype, device))
        return made[-1]

    with mock.patch.object(torch, "empty", guarded):
        yield
    assert made and all(map(guards_are_whole, made)), "written past an end of the output"


@contextlib.contextmanager
def around(what: str, tensors: dict[str, Tensor]):
    """The same tensors between guards; what is written to them is there afterwards.

    Tensors that share memory still do. Also guarded is what lies between the elements of a strided tensor.

    Raises:
        AssertionError: ``what`` wrote to a guard.
    """
    shared: dict[int, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        if x.numel():
            shared.setdefault(x.untyped_storage().data_ptr(), {})[name] = x
    with _alone(any(x.is_cuda for x in tensors.values())):
        pages = [_Page(group) for group in shared.values()]
        yield {**tensors, **{name: x for page in pages for name, x in page.copies.items()}}
        for page in pages:
            page.check(what)
            page.copy_back()


@contextlib.contextmanager
def _alone(on_gpu: bool):
    """Nothing else runs on the GPU: a kernel of another stream may write other elements of the same tensors."""
    if on_gpu:
        torch.cuda.synchronize()
    yield
    if on_gpu:
        torch.cuda.synchronize()


class _Page:
    """Copies of tensors of one storage, as far from one another as there, between guards."""

    def __init__(self, tensors: dict[str, Tensor]):
        some = next(iter(tensors.values()))
        spans = {name: span(x) for name, x in tensors.items()}
        first, last = min(a for a, _ in spans.values()), max(b for _, b in spans.values())
        whole = _bytes(some)
        self.source = whole[first - whole.data_ptr() : last - whole.data_ptr()]
        size, self.poison = last - first + 2 * PAGE + ALIGNMENT, poison(some.dtype)
        self.bytes = torch.full((size,), self.poison, dtype=torch.uint8, device=some.device)
        begin = PAGE + (first - PAGE - self.bytes.data_ptr()) % ALIGNMENT
        self.inner = slice(begin, begin + last - first)
        self.offsets = {name: begin + spans[name][0] - first for name in tensors}
        self.owned = self._owned(tensors)
        self.copies = {name: _placed(x, self.bytes, self.offsets[name]) for name, x in tensors.items()}
        self.bytes[self.inner] = torch.where(self.owned[self.inner], self.source, self.poison)

    def _owned(self, tensors: dict[str, Tensor]) -> Tensor:
        """Which bytes are of an element of a tensor."""
        marks = torch.zeros_like(self.bytes)
        for name, x in tensors.items():
            once = x[tuple(slice(1) if s == 0 else slice(None) for s in x.stride())]  # expanded: written once
            _placed(once, marks, self.offsets[name]).view(INTEGERS[x.element_size()]).fill_(-1)
        return marks != 0

    def check(self, what: str) -> None:
        changed = (self.bytes != self.poison) & ~self.owned
        if changed.any():
            name, offset = next(iter(self.offsets.items()))
            at = int(changed.nonzero()[0]) - offset
            raise AssertionError(f"{what} wrote outside {', '.join(self.offsets)}: at byte {at} of {name}")

    def copy_back(self) -> None:
        self.source.copy_(torch.where(self.owned[self.inner], self.bytes[self.inner], self.source))


def span(x: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte and of the end of its last element, by the strides."""
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _bytes(x: Tensor) -> Tensor:
    """The whole storage of a tensor."""
    return x.new_empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def _placed(x: Tensor, memory: Tensor, offset: int) -> Tensor:
    """A tensor of the form of ``x`` at a byte offset of other memory."""
    return x.new_empty(0).set_(memory.untyped_storage(), offset // x.element_size(), x.shape, x.stride())
