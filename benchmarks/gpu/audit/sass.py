"""The machine code of a binary, read with the disassembler that Triton ships."""

from __future__ import annotations

import functools
import math
import re
import subprocess
from collections import Counter
from pathlib import Path

import triton

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Counted are the tensor cores of sm_80, sm_90 and sm_100; copies to shared memory that need no registers, and those
# of them by the tensor memory accelerator; loads and stores, and those of 16 bytes; spilled registers.
INSTRUCTIONS = {
    "HMMA": r"HMMA",
    "HGMMA": r"HGMMA",
    "UTCMMA": r"UTC\w*MMA",
    "LDGSTS": r"LDGSTS",
    "LDGSTS.128": r"LDGSTS(?=.*\.128)",
    "TMA": r"UBLKCP|UTMALDG|UTMASTG",
    "LDG": r"LDG",
    "LDG.128": r"LDG(?=.*\.128)",
    "STG": r"STG",
    "STG.128": r"STG(?=.*\.128)",
    "FFMA": r"FFMA2?",
    "LDL": r"LDL",
    "STL": r"STL",
}
_COUNTED = {name: re.compile(rf"(?:{pattern})(?:\.|$)") for name, pattern in INSTRUCTIONS.items()}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_USAGE = re.compile(r"^ Function (\S+):\n(.*)$", re.MULTILINE)
_FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.MULTILINE)
_INFO = re.compile(r"^\.nv\.info\.(\S+)$", re.MULTILINE)
_THREADS = re.compile(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:.*\s+Value:\s+(0x\w+) (0x\w+) (0x\w+)")


def usage(binary: Path) -> dict[str, dict[str, int]]:
    """REG, STACK, LOCAL and SHARED (bytes, static) of each function of a cubin."""
    found = _USAGE.findall(_run("cuobjdump", "-res-usage", binary))
    return {name: {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", line)} for name, line in found}


def counts(binary: Path) -> dict[str, dict[str, int]]:
    """The number of each of :data:`INSTRUCTIONS` in each function of a cubin."""
    names_and_texts = _FUNCTION.split(_run("cuobjdump", "-sass", binary))[1:]
    return {name: count(text) for name, text in zip(names_and_texts[::2], names_and_texts[1::2], strict=True)}


def bounded_threads(binary: Path) -> dict[str, int]:
    """The most threads of a block of each function of a cubin that has launch bounds."""
    names_and_texts = _INFO.split(_run("cuobjdump", "-elf", binary))[1:]
    found = {}
    for name, text in zip(names_and_texts[::2], names_and_texts[1::2], strict=True):
        if sizes := _THREADS.search(text):
            found[name] = math.prod(int(size, 16) for size in sizes.groups())
    return found


def count(text: str) -> dict[str, int]:
    """The number of each of :data:`INSTRUCTIONS` in a listing."""
    mnemonics = Counter(_INSTRUCTION.findall(text))
    return {
        name: sum(n for word, n in mnemonics.items() if pattern.match(word))
        for name, pattern in _COUNTED.items()
    }


@functools.cache
def version(tool: Path | str) -> str:
    """The release that a CUDA tool says it is: ``13.1.80``."""
    said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d[\d.]*)", said)[1]


def _run(tool: str, option: str, binary: Path) -> str:
    command = [str(BIN / tool), option, str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
