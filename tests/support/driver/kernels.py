"""A compiled Triton kernel's parameters: which of them are memory, what is done to it, what alignment was assumed.

All of it is read from Triton's first intermediate form, where every call is inlined.
"""

import dataclasses
import re
from collections import defaultdict

_PARAMETER = re.compile(r'%([\w.]+): ([^ ,)]+)( \{[^}]*\})? loc\("([^"]+)"')
_OPERATION = re.compile(r"(?:(%[\w.]+)(?::\d+)? = )?([\w.]+)")
_VALUE = re.compile(r"%[\w.]+")
_INITIAL = re.compile(r"(%[\w.]+) = (%[\w.]+)")  # of a loop's values
_POINTS_ON = {
    "arith.select", "scf.for", "scf.if", "scf.while", "tt.addptr", "tt.bitcast", "tt.broadcast", "tt.expand_dims",
    "tt.join", "tt.make_tensor_descriptor", "tt.reshape", "tt.splat", "tt.trans",
}  # fmt: skip
# Their addresses are the only operands that point somewhere: the others are values and masks.
_READS = {"tt.load", "tt.descriptor_load", "tt.descriptor_gather", "tt.atomic_rmw", "tt.atomic_cas"}
_WRITES = {
    "tt.store", "tt.descriptor_store", "tt.descriptor_scatter", "tt.descriptor_reduce", "tt.atomic_rmw", "tt.atomic_cas",
}  # fmt: skip


@dataclasses.dataclass
class Parameter:
    """A parameter of the binary: the source's None, 1 and constants have none."""

    is_memory: bool
    aligned: bool  # the code is right only for a multiple of 16
    read: bool = False
    written: bool = False


def parameters(ttir: str) -> dict[str, Parameter]:
    """The parameters by name."""
    lines = [line.strip() for line in ttir.splitlines()]
    head = next(line for line in lines if line.startswith("tt.func public"))
    found, points_to = {}, defaultdict(set)  # of a value: the parameters whose memory it may point to
    for value, type_, attributes, name in _PARAMETER.findall(head):
        found[name] = Parameter(type_.startswith("!tt."), "tt.divisibility = 16" in attributes)
        points_to[f"%{value}"] = {name} if found[name].is_memory else set()
    results = []  # of the regions around a line
    for line in lines[lines.index(head) + 1 :]:
        _follow(line, points_to, results, found)
    return found


def _follow(line: str, points_to: dict, results: list, found: dict[str, Parameter]) -> None:
    if line.startswith("}"):
        if not line.startswith("} else") and results:
            results.pop()
        return
    operation = _OPERATION.match(line)
    if operation is None:
        return
    result, name = operation.groups()
    assert name != "tt.call", f"a function that is not inlined: {line}"
    values = set().union(*(points_to[v] for v in _VALUE.findall(line) if v != result))
    for to, initial in _INITIAL.findall(line) if name == "scf.for" else ():
        points_to[to] |= points_to[initial]
    if result is not None and name in _POINTS_ON:
        points_to[result] |= values
    if name == "scf.yield" and results and results[-1] is not None:
        points_to[results[-1]] |= values
    if line.split(" loc(")[0].endswith("{"):
        results.append(result)
    if name in _READS | _WRITES:
        assert values, f"an address of no parameter's memory: {line}"
        for parameter in values:
            found[parameter].read |= name in _READS
            found[parameter].written |= name in _WRITES
