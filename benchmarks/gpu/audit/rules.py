"""The rules of the audit: things that a kernel's machine code must have, and must not need."""

from __future__ import annotations

from .compiled import Binary
from .occupancy import LIMITS

# ptxas keeps one word of a thread in memory where that takes it to the next lower number of registers that matters:
# seen at 32 and 40 registers on sm_100, at 80, 96 and 168 on sm_80 and sm_90. A kernel that does not fit takes more.
STACK_WORD = 8
SMALLEST_WGMMA = 64  # rows that wgmma and tcgen05 need; fewer take the older instruction
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCMMA"}


def problems(binary: Binary, vectors: bool = False) -> list[str]:
    """The problems of a binary, each with its number. ``vectors``: it has to move 16 bytes at a time."""
    found = [*_spills(binary), *_too_much(binary), *_tensor_cores(binary)]
    return found + _vectors(binary) if vectors else found


def _spills(binary: Binary) -> list[str]:
    if not binary.local and binary.stack <= STACK_WORD:
        return []
    moves = f"{binary.counts['LDL']} LDL, {binary.counts['STL']} STL"
    return [f"spills: {binary.stack} bytes of stack, {binary.local} bytes of local memory, {moves}"]


def _too_much(binary: Binary) -> list[str]:
    limits, found = LIMITS[binary.arch], []
    if binary.shared > limits.shared_block:
        found.append(
            f"{binary.shared} bytes of shared memory, of {limits.shared_block} that a block may have"
        )
    if binary.tensor_columns > limits.tensor_columns:
        found.append(f"{binary.tensor_columns} columns of tensor memory, of {limits.tensor_columns}")
    if not found and not binary.occupancy.blocks:
        found.append(f"no block fits on an SM: {binary.threads} threads of {binary.registers} registers")
    return found


def expected(binary: Binary) -> str:
    """The tensor-core instruction that a kernel's matrix product must have; "" where there is none to have."""
    product = binary.product
    if product is None or not product.on_tensor_cores:
        return ""
    return TENSOR_CORES[binary.arch] if product.m >= SMALLEST_WGMMA else "HMMA"


def _tensor_cores(binary: Binary) -> list[str]:
    instruction = expected(binary)
    if not instruction or binary.counts[instruction]:
        return []
    others = ", ".join(f"{n} {name}" for name in ("HMMA", "FFMA") if (n := binary.counts[name]))
    product = binary.product
    return [
        f"no {instruction} in a product of {product.m}x{product.n}x{product.k} ({others or 'no product'})"
    ]


def _vectors(binary: Binary) -> list[str]:
    counts = binary.counts
    if binary.product is not None:
        if counts["LDGSTS.128"] or counts["TMA"]:
            return []
        return [f"no operand is copied 16 bytes at a time ({counts['LDGSTS']} LDGSTS, {counts['LDG']} LDG)"]
    return [f"no {name}.128 ({counts[name]} {name})" for name in ("LDG", "STG") if not counts[f"{name}.128"]]
