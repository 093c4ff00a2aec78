"""The command line: ``python -m benchmarks.gpu audit|check|tune``; ``--help`` after a command for its own."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "audit": "every kernel compiled for sm_80, sm_90 and sm_100, and what its machine code needs; no GPU is used",
    "check": "checks values and measures on the GPU that is there; builds where no binary runs",
    "tune": "searches tiles on the GPU that is there",
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        print("python -m benchmarks.gpu COMMAND")
        print(*(f"  {name:<9} {what}" for name, what in COMMANDS.items()), sep="\n")
        return 0 if arguments in (["-h"], ["--help"]) else 2
    # imported here: a command needs what the others may lack
    module = importlib.import_module(f".{arguments[0]}.{arguments[0]}", __package__)
    return module.main(arguments[1:]) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
