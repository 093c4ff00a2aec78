"""Launches of Triton kernels that cost the host less: what Triton works out of a call's arguments is kept.

``kernel[grid](...)`` binds, specialises and looks up all arguments in Python: 36 us of a CPU thread for the convolution's
44, in Triton 3.9 over a driver that runs nothing. The kernel that it compiled takes the same arguments in 9 us.
"""

from __future__ import annotations

from operator import itemgetter

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_INT32_LIMIT = 2**31
_MOST_COMPILED = 4096  # of one form of a call; ever new sizes would gather
_forms: dict[tuple, _Form] = {}
_run = JITFunction.run  # whoever puts another one in its place sees every launch


def launch(kernel: JITFunction, *grid: int):
    """``kernel[grid]``: a function of the kernel's arguments, in their order or by their names, and Triton's options.

    It calls what Triton compiled for the same device, types, alignments, constants and options before. Triton's settings
    (``triton.knobs``) count where a kernel is compiled. In the interpreter it is ``kernel[grid]``.
    """
    whole = (*grid, 1, 1)[:3]

    def run(*arguments, **named):
        key = id(kernel), len(arguments), *named
        form = _forms.get(key)
        if form is None:
            form = _forms[key] = _Form(kernel, arguments, named)
        form.launch(whole, (*arguments, *named.values()), named)

    return run


class _Form:
    """A way of calling a kernel: which of its arguments are given in which order."""

    def __init__(self, kernel, arguments: tuple, named: dict):
        self.kernel, self.given = kernel, len(arguments)
        self.compiled: dict[tuple, CompiledKernel] = {}
        parameters = {p.name: p for p in kernel.params} if isinstance(kernel, JITFunction) else {}
        self.interpreted = not parameters
        if self.interpreted:
            return
        names = [*list(parameters)[: self.given], *named]
        self.ordered = itemgetter(*[names.index(name) for name in parameters])
        pointers, numbers, rest = [], [], []
        for i, (name, value) in enumerate(zip(names, (*arguments, *named.values()), strict=True)):
            if name not in parameters or parameters[name].is_constexpr or isinstance(value, float):
                rest.append(i)
            elif not isinstance(value, int):
                pointers.append(i)
            else:
                (numbers if parameters[name].do_not_specialize else rest).append(i)
        self.pointers, self.numbers, self.rest = map(_getter, (pointers, numbers, rest))

    def launch(self, grid: tuple[int, int, int], values: tuple, named: dict) -> None:
        if self.interpreted:
            self.kernel[grid](*values[: self.given], **named)
            return
        key = self._key(values)
        found = self.compiled.get(key) if JITFunction.run is _run else None
        if found is not None:
            found[grid](*self.ordered(values))
            return
        made = self.kernel[grid](*values[: self.given], **named)
        if type(made) is CompiledKernel:
            if len(self.compiled) >= _MOST_COMPILED:
                self.compiled.clear()
            self.compiled[key] = made

    def _key(self, values: tuple) -> tuple:
        """All that Triton specialises a kernel on; what is no pointer, and is specialised, by its value."""
        pointers = self.pointers(values)
        first = pointers[0]
        device = (first.base if type(first) is TensorDescriptor else first).device
        key = [device, max(self.numbers(values), default=0) < _INT32_LIMIT]
        for value in pointers:
            if value is None:
                key.append(None)
            elif isinstance(value, Tensor):
                key.append(value.dtype if value.data_ptr() % 16 == 0 else (value.dtype, "odd"))
            elif isinstance(value, TensorDescriptor):
                key.append((value.base.dtype, *value.block_shape))
            else:
                key.append((type(value), value))
        return *key, *self.rest(values)


def _getter(places: list[int]):
    """A function from a tuple to the tuple of its values at these places."""
    return itemgetter(*places) if len(places) > 1 else lambda values: tuple([values[i] for i in places])


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. ``triton.cdiv`` takes 2 us on the host."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The power of two that is not below ``n``. ``triton.next_power_of_2`` takes 2 us on the host."""
    return 1 << max(n - 1, 0).bit_length()
