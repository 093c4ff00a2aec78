"""Which of the collected tests a process runs, and in which order."""


def part_of(items: list, part: str) -> list:
    """The i-th of n parts, for ``"i/n"``, counted from 0."""
    i, parts = map(int, part.split("/"))
    return items[len(items) * i // parts : len(items) * (i + 1) // parts]


LONG = (
    "test_triton_interpreter",
    "test_instruction_sets",
    "test_cuda_compile",
    "test_opcheck",
    "test_compile",
)


def long_first(items: list) -> list:
    """The tests that start processes or compilers first, so that no process is left with one of them at the end."""
    return sorted(items, key=lambda item: not any(name in item.nodeid for name in LONG))
