"""Mends Triton's interpreter, and checks each address that a kernel takes in it: imported by the files that run in it.

Every launch, in the interpreter or on a GPU, gets its tensors between guards of poison (``guards.py``). In the
interpreter each lane of each load, store and atomic that is not masked off must also be an element of the tensor
that its pointer came from: the 16 bits that an address leaves free carry the number of the argument.
"""

import contextlib
import dataclasses
import functools

import guards
import numpy as np
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle, tl
from triton.tools.tensor_descriptor import TensorDescriptor

torch.set_num_threads(1)  # it runs on one, and waking others for small tensors costs more than they do


_dot = InterpreterBuilder.create_dot


def _dot_of_values(self, a, b, *others):
    """The interpreter keeps bfloat16 as uint16, and its own product multiplies those integers."""
    a, b = (self.cast_impl(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
    return _dot(self, a, b, *others)


def _bfloat16_of_integers(self, source, dtype):
    """An integer's value, where the interpreter takes its bits."""
    if dtype.scalar == tl.bfloat16:
        source = self.cast_impl(
            source, tl.block_type(tl.float32, dtype.shape) if dtype.is_block() else tl.float32
        )
    return self.cast_impl(source, dtype)


InterpreterBuilder.create_dot = _dot_of_values
InterpreterBuilder.create_si_to_fp = _bfloat16_of_integers

# Its check of every integer product and sum for overflow takes more than half of its time.
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)


_NUMBER = np.uint64(48)  # the bit where the number of an argument begins: a process has addresses below 2**47
_ADDRESS = np.uint64(2**48 - 1)


class OutOfRange(AssertionError):
    """A lane that is not masked off is outside the tensor of its pointer."""


class _Argument:
    """The memory of a tensor argument of a launch."""

    def __init__(self, name: str, x: Tensor):
        self.name, self.first, self.width = name, x.data_ptr(), x.element_size()
        extent = (guards.span(x)[1] - self.first) // self.width if x.numel() else 0
        self.elements = np.zeros(extent, dtype=bool)  # which of those from the first to the last are its own
        np.lib.stride_tricks.as_strided(self.elements, x.shape, x.stride())[...] = True

    def outside(self, offset: np.ndarray, width: int) -> np.ndarray:
        """Which of these byte offsets are not of an element of ``width`` bytes."""
        element = offset // self.width
        known = (offset % self.width == 0) & (element >= 0) & (element < len(self.elements))
        known &= width == self.width
        return ~(known & self.elements[np.where(known, element, 0)]) if len(self.elements) else ~known


class _Launch:
    """A launch in the interpreter: the numbers of its arguments, and the first address that was wrong."""

    def __init__(self, kernel: str, tensors: dict[str, Tensor]):
        self.kernel, self.fault, self.patched = kernel, None, set()
        self.arguments = [_Argument(name, x) for name, x in tensors.items()]
        forms = [_form(x) for x in tensors.values()]
        self.numbers = {form: i for i, form in enumerate(forms)}

    def addresses(self, access: str, pointers: TensorHandle, mask: np.ndarray | bool) -> TensorHandle:
        """The plain addresses of these pointers, all that are not masked off being inside their tensors."""
        numbers, at = pointers.data >> _NUMBER, (pointers.data & _ADDRESS).astype(np.int64)
        mask = np.broadcast_to(mask, at.shape)
        for number in np.unique(numbers[mask]):
            lanes = mask & (numbers == number)
            self.check(access, int(number) - 1, np.where(lanes, at, 0), lanes, _width(pointers))
        return TensorHandle(pointers.data & _ADDRESS, pointers.dtype)

    def check(self, access: str, number: int, at: np.ndarray, lanes: np.ndarray, width: int) -> None:
        known = 0 <= number < len(self.arguments)
        argument = self.arguments[number] if known else None
        wrong = lanes & argument.outside(at - argument.first, width) if known else lanes
        if wrong.any():
            lane = tuple(map(int, np.argwhere(wrong)[0]))
            where = (
                f"byte {at[lane] - argument.first} of {argument.name}" if known else f"address {at[lane]:#x}"
            )
            self.fault = OutOfRange(
                f"{self.kernel}, program {interpreter.interpreter_builder.grid_idx}: {access} of {width} bytes at "
                f"{where}, lane {lane}: outside its tensor"
            )
            raise self.fault


def _form(x: Tensor) -> tuple:
    """What tells arguments apart: the interpreter makes tensors of its own of the same memory."""
    return x.data_ptr(), x.dtype, tuple(x.shape), x.stride()


def _width(pointers: TensorHandle) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


_launch: _Launch | None = None
_convert = interpreter._implicit_cvt


def _numbered(value):
    """A tensor's pointer carries the number of its argument, from 1."""
    converted = _convert(value)
    if _launch is not None and isinstance(value, Tensor):
        number = _launch.numbers[_form(value)] + 1
        converted.handle.data = converted.handle.data | np.uint64(number << int(_NUMBER))
    return converted


interpreter._implicit_cvt = _numbered

_patch = interpreter._patch_lang


def _patched_once(function):
    """The interpreter's own functions in the modules that ``function`` sees: once in a launch, not at every call."""
    modules = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
    if _launch is not None and modules <= _launch.patched:
        return None
    if _launch is not None:
        _launch.patched |= modules
    return _patch(function)


interpreter._patch_lang = _patched_once

# Loads and stores of all kinds end in these four, in Triton 3.6 to 3.9.
_load, _store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
_exchange, _update = InterpreterBuilder.create_atomic_cas, InterpreterBuilder.create_atomic_rmw


def _checked_load(self, pointers, mask, *others, **named):
    return _load(self, _launch.addresses("load", pointers, mask.data), mask, *others, **named)


def _checked_store(self, pointers, value, mask, *others, **named):
    return _store(self, _launch.addresses("store", pointers, mask.data), value, mask, *others, **named)


def _checked_exchange(self, pointers, *others):
    return _exchange(self, _launch.addresses("atomic", pointers, True), *others)


def _checked_update(self, operation, pointers, value, mask, *others):
    return _update(self, operation, _launch.addresses("atomic", pointers, mask.data), value, mask, *others)


InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = _checked_load, _checked_store
InterpreterBuilder.create_atomic_cas, InterpreterBuilder.create_atomic_rmw = (
    _checked_exchange,
    _checked_update,
)


launched: set[str] = set()  # the kernels that were, as module.name


def _guarded(run):
    """``run`` of a kernel with its tensors between guards, their addresses checked."""

    @functools.wraps(run)
    def launch(self, *args, grid, warmup=False, **kwargs):
        assert all(size > 0 for size in grid), f"{self.__name__}: launched without a program: {grid}"
        launched.add(f"{self.fn.__module__}.{self.__name__}")
        given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        tensors = {name: t for name, value in given.items() if (t := _tensor(value)) is not None}
        with guards.around(self.__name__, tensors) as moved, _checked(self.__name__, moved):
            given |= {name: _with_tensor(given[name], t) for name, t in moved.items()}
            return run(self, grid=grid, warmup=warmup, **given)

    return launch


@contextlib.contextmanager
def _checked(kernel: str, tensors: dict[str, Tensor]):
    global _launch
    _launch = _Launch(kernel, tensors)
    try:
        yield
    except interpreter.InterpreterError:
        if _launch.fault is None:
            raise
        raise _launch.fault from None  # rather than the text of it
    finally:
        _launch = None


def _tensor(value) -> Tensor | None:
    """The tensor of an argument, if it has one."""
    value = value.base if isinstance(value, TensorDescriptor) else value
    return value if isinstance(value, Tensor) else None


def _with_tensor(value, x: Tensor):
    return dataclasses.replace(value, base=x) if isinstance(value, TensorDescriptor) else x


InterpretedFunction.run = _guarded(InterpretedFunction.run)
triton.runtime.jit.JITFunction.run = _guarded(triton.runtime.jit.JITFunction.run)
