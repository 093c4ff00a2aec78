"""The command line: ``python -m benchmarks.gpu roofline``."""

from __future__ import annotations

import sys

from . import roofline

COMMANDS = {"roofline": roofline.main}


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in COMMANDS:
        raise SystemExit(
            f"command: expected one of {', '.join(COMMANDS)}, got {' '.join(arguments) or 'none'}"
        )
    COMMANDS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
