"""Which of the collected tests a process runs, and in which order."""

from __future__ import annotations


def part_of(items: list, part: str) -> list:
    """The i-th of n parts, for ``"i/n"``, counted from 0."""
    i, parts = map(int, part.split("/"))
    return items[len(items) * i // parts : len(items) * (i + 1) // parts]
