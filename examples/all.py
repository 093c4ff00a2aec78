"""All examples, one after the other: ``python -m examples.all --out rows.csv`` (or .json, or .md)."""

from __future__ import annotations

import importlib

from .measure import options, train_and_report, write

ROOMS = {
    "samples": ("skipnet", "convnet_aig", "blockdrop", "branchynet", "msdnet", "act"),
    "pixels": ("sact", "dynconv"),
    "channels": ("fbs", "cgnet", "condconv"),
    "experts": ("moe", "hydranet"),
    "steps": ("skip_rnn",),
}
MODULES = {name: f"examples.{room}.{name}" for room, names in ROOMS.items() for name in names}


def main() -> None:
    parser = options("examples.all", __doc__)
    parser.add_argument("names", nargs="*", help="some of them; none: all")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(MODULES):
        parser.error(f"names: expected some of {', '.join(MODULES)}, got {', '.join(sorted(unknown))}")
    results = []
    for name in arguments.names or MODULES:
        results.append(train_and_report(importlib.import_module(MODULES[name]), arguments))
        for path in arguments.out:  # after each: a run that is stopped leaves what it has
            write(results, path)


if __name__ == "__main__":
    main()
