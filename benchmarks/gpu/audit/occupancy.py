"""The number of warps of a kernel that an SM can hold, by registers, shared memory, warps and blocks.

The limits are those of the table "Technical Specifications per Compute Capability" of the CUDA C++ Programming
Guide, and the units in which registers and shared memory are handed out those of NVIDIA's occupancy calculator.
"""

from __future__ import annotations

from typing import NamedTuple

WARP = 32
REGISTERS = 64 * 1024  # of an SM, of 32 bits
REGISTER_UNIT = 256  # a warp gets its registers in these
WARP_UNIT = 4  # the four parts of an SM hold the same number of warps of a block, as to registers
SHARED_UNIT = 128  # bytes
SHARED_SYSTEM = 1024  # bytes of each block that CUDA keeps for itself
TENSOR_COLUMNS = 512  # of an SM's tensor memory


class Limits(NamedTuple):
    """The resources of an SM of an architecture."""

    warps: int
    blocks: int
    shared: int  # bytes
    shared_block: int  # bytes that one block may have
    tensor_columns: int = 0


LIMITS = {
    80: Limits(warps=64, blocks=32, shared=164 * 1024, shared_block=163 * 1024),
    90: Limits(warps=64, blocks=32, shared=228 * 1024, shared_block=227 * 1024),
    100: Limits(
        warps=64, blocks=32, shared=228 * 1024, shared_block=227 * 1024, tensor_columns=TENSOR_COLUMNS
    ),
}


class Occupancy(NamedTuple):
    """The bound: blocks and warps of an SM, the share of the warps that it could hold, and what sets it."""

    blocks: int
    warps: int
    share: float
    limited_by: str


def occupancy(arch: int, threads: int, registers: int, shared: int, tensor_columns: int = 0) -> Occupancy:
    """The occupancy bound of a kernel.

    Args:
        arch: 80, 90 or 100.
        threads: of a block.
        registers: of a thread.
        shared: bytes of a block, static and dynamic.
        tensor_columns: of tensor memory that a block allocates.
    """
    limits, warps = LIMITS[arch], _up(threads, WARP) // WARP
    bounds = {"warps": limits.warps // warps, "blocks": limits.blocks}
    if registers:
        held = REGISTERS // _up(registers * WARP, REGISTER_UNIT)  # warps that have their registers
        bounds["registers"] = held // WARP_UNIT * WARP_UNIT // warps
    if shared:
        bounds["shared"] = limits.shared // _up(shared + SHARED_SYSTEM, SHARED_UNIT)
    if tensor_columns:
        bounds["tensor memory"] = limits.tensor_columns // tensor_columns
    limited_by = min(bounds, key=bounds.get)
    blocks = bounds[limited_by]
    return Occupancy(blocks, blocks * warps, blocks * warps / limits.warps, limited_by)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
