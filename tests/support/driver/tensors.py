"""Tensors of the stand-in's devices in a PyTorch without CUDA, and what PyTorch's own ops do on them.

Such a tensor is an ordinary ``torch.Tensor`` whose device is ``cuda:i`` and whose memory is the host's: pages of zeros
that exist once they are touched, so that sizes are those of a real GPU. PyTorch without CUDA has no kernel for it; the
ones registered here run the op on the host. Large results of floating point stay zero: nothing that decides a
launch depends on them.
"""

import contextlib
import ctypes
import functools
import mmap
import weakref

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.dlpack import from_dlpack, to_dlpack

from .machine import driver
from .order import Memory
from .watch import watch

SMALL = 1 << 16  # elements up to which floating results are computed
_HOST_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_NORESERVE = 0x4000  # MAP_NORESERVE of Linux, which Python 3.10 does not name


# ---------------------------------------------------------------------------- memory and devices


class _DLDevice(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("index", ctypes.c_int))


class _DLTensor(ctypes.Structure):  # its beginning
    _fields_ = (("data", ctypes.c_void_p), ("device", _DLDevice))


_CPU, _CUDA = 1, 2  # kDLCPU, kDLCUDA
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _relabelled(x: Tensor, kind: int, index: int) -> Tensor:
    """The same memory as a tensor of another device: DLPack's label is changed on the way."""
    capsule = to_dlpack(x.detach())
    label = _DLTensor.from_address(_pointer(capsule, b"dltensor")).device
    label.type, label.index = kind, index
    return _as_strided(from_dlpack(capsule), x.shape, x.stride())  # DLPack forgets strides of size 1


def _as_strided(x: Tensor, *form) -> Tensor:
    """The host's kernel looks at no value, and does for any device."""
    return torch.ops.aten.as_strided.default.redispatch(_HOST_KERNEL, x, *form)


def allocate(size, stride, dtype: torch.dtype, index: int) -> Tensor:
    """Zeros on device ``index``, in memory of its own."""
    elements = 0 if 0 in size else 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if elements == 0:
        return _relabelled(torch.empty_strided(size, stride, dtype=dtype), _CUDA, index)
    pages = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
    host = torch.frombuffer(pages, dtype=torch.uint8)
    memory = Memory(host.data_ptr(), len(pages), index, watch.stream(index))
    watch.memories[memory.first] = memory
    driver().standin_allocated(memory.first, memory.size, index)
    weakref.finalize(pages, _free, memory)
    flat = _relabelled(host.view(dtype), _CUDA, index)
    return _as_strided(flat, size, stride, 0)


def _free(memory: Memory) -> None:
    del watch.memories[memory.first]
    driver().standin_freed(memory.first)
    watch.order.freed(memory)


_clone_on_host = torch.UntypedStorage.clone


def _clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """``storage.clone()``, which ``copy.deepcopy`` of a tensor calls."""
    if storage.device.type != "cuda":
        return _clone_on_host(storage)
    new = allocate((storage.nbytes(),), (1,), torch.uint8, storage.device.index)
    old = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return new.copy_(old).untyped_storage()


def on_host(x: Tensor) -> Tensor:
    """The memory of a tensor of a device as a tensor of the host."""
    return _relabelled(x, _CPU, 0)


# -------------------------------------------------------------------------------- PyTorch's ops

_READ_BY_THE_HOST = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "histc", "is_nonzero", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
_BY_MASK = {"index", "index_put", "index_put_", "_index_put_impl_"}  # where an index is a mask


def run(op, *arguments, **named):
    """The kernel of every op of PyTorch for tensors of a device."""
    name = op._schema.name.removeprefix("aten::")
    if name in ("empty", "empty_strided"):
        return _empty(name, *arguments, **named)
    if name == "record_stream":
        memory, stream = watch.memory_of(arguments[0]), arguments[1]
        return memory and memory.also_used_on.add((memory.device, stream.stream_id))
    if name.startswith("set_") or any(r.alias_info and not r.alias_info.is_write for r in op._schema.returns):
        return op.redispatch(_HOST_KERNEL, *arguments, **named)  # a view
    if name == "copy_":
        return _copy(*arguments)
    arguments = [_number_as_tensor(*pair) for pair in zip(arguments, op._schema.arguments, strict=False)]
    tensors = [leaf for leaf in pytree.tree_leaves((arguments, named)) if isinstance(leaf, Tensor)]
    there = [x for x in tensors if x.is_cuda]
    index = there[0].device.index if there else _index(named["device"])
    if _waits(name, arguments, named):
        watch.host_reads(name, index)
    if name not in _BY_MASK and any(not x.is_cuda and x.dim() > 0 for x in tensors):
        raise RuntimeError(
            f"{op}: expected all tensors on one device, got {[str(x.device) for x in tensors]}"
        )
    written = _written(op, arguments, named)
    result = _without_values(op, arguments, named, tensors, written, index)
    if result is None:
        result = _on_the_host(op, arguments, named, index)
    outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.is_cuda]
    watch.operation(name, index, there, [*written, *outputs])
    return result


def _number_as_tensor(value, declared):
    """A number that PyTorch made a tensor of for this op, and a number again for Python."""
    is_number = isinstance(value, (bool, int, float)) and str(declared.type) == "Tensor"
    return torch.tensor(value) if is_number else value


def _index(device: torch.device) -> int:
    return watch.device() if device.index is None else device.index


def _waits(name: str, arguments, named) -> bool:
    """True if the result's size or a Python value depends on what is in memory: a GPU makes the host wait."""
    if name in _BY_MASK:
        return any(x is not None and x.dtype == torch.bool for x in arguments[1])
    if name == "repeat_interleave":
        return named.get("output_size") is None
    return name in _READ_BY_THE_HOST


def _empty(name: str, size, *arguments, device, dtype=None, memory_format=None, **_):
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if name == "empty_strided":
        stride = arguments[0]
    else:
        like = torch.empty(size, device="meta", memory_format=memory_format or torch.contiguous_format)
        stride = like.stride()
    return allocate(size, stride, dtype, _index(device))


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    there = to if to.is_cuda else source
    index = there.device.index
    if to.is_cuda != source.is_cuda:  # nothing here is pinned, so the host waits
        watch.host_reads(f"a copy from {source.device} to {to.device}", index)
    if not to.is_cuda or not to.is_floating_point() or max(to.numel(), source.numel()) <= SMALL:
        on, of = (on_host(x) if x.is_cuda else x for x in (to, source))
        on.copy_(of)
    watch.operation("copy_", index, [source] if source.is_cuda else [], [to] if to.is_cuda else [])
    return to


def _written(op, arguments, named) -> list[Tensor]:
    """The arguments that the op writes to."""
    found = []
    for i, declared in enumerate(op._schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            value = named.get(declared.name) if i >= len(arguments) or declared.kwarg_only else arguments[i]
            found += [x for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]
    return found


def _without_values(op, arguments, named, tensors, written, index: int):
    """The result where all of it is large and floating, without computing it; None elsewhere."""
    if all(x.numel() <= SMALL for x in tensors) or not all(x.is_floating_point() for x in written):
        return None
    if written and all(x.numel() for x in written):
        return written if len(written) > 1 else written[0]

    def abstract(x):
        is_number = x.dim() == 0 and not x.is_cuda
        return x if is_number else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    with contextlib.suppress(NotImplementedError):  # some ops need values
        return _back(op, arguments, named, abstract, lambda x: allocate(x.shape, x.stride(), x.dtype, index))
    return None


def _on_the_host(op, arguments, named, index: int):
    """The op on the memory itself; what is new in its result goes to a device."""

    def host(x):
        if not x.is_cuda:
            return x
        return on_host(x) if x.numel() else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)

    def moved(x):
        new = allocate(x.shape, x.stride(), x.dtype, index)
        on_host(new).copy_(x)
        return new

    if "device" in named:
        named = {**named, "device": torch.device("cpu")}
    return _back(op, arguments, named, host, moved)


def _back(op, arguments, named, away, home):
    """The op on ``away(x)`` of every tensor; of the result what is new comes ``home``, and the rest is ``x``."""
    gone: dict[int, tuple[Tensor, Tensor]] = {}

    def send(x):
        twin = away(x)
        gone[id(twin)] = x, twin
        return twin

    def fetch(twin):
        x = gone[id(twin)][0] if id(twin) in gone else None
        if x is not None and x.shape == twin.shape:
            return x
        new = home(twin)
        if x is None:
            return new
        set_ = torch.ops.aten.set_.source_Storage_storage_offset  # out= of another size
        return set_.redispatch(_HOST_KERNEL, x, new.untyped_storage(), 0, new.shape, new.stride())

    arguments, named = pytree.tree_map_only(Tensor, send, (arguments, named))
    result = op(*arguments, **named)
    tensors = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    if any(x.is_meta and not x.is_floating_point() for x in tensors):
        return None
    return pytree.tree_map_only(Tensor, fetch, result)


_libraries = []  # a registration ends with its library


def install() -> None:
    """From now on PyTorch's ops run on tensors of the stand-in's devices."""
    torch.UntypedStorage.clone = _clone
    every, aten = torch.library.Library("_", "IMPL", "CUDA"), torch.library.Library("aten", "IMPL", "CUDA")
    every.fallback(run)
    # PyTorch has one kernel of these for all devices, which goes before a fallback and knows nothing of this one's
    for op in (torch.ops.aten.copy_, torch.ops.aten.convolution, torch.ops.aten.convolution_backward):
        aten.impl(op._qualified_op_name, functools.partial(run, op.default))
    _libraries.extend((every, aten))
