"""The counts of tests in the files that pytest writes (``--junitxml``)."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .stages import Finished

NOTHING_COLLECTED = 5  # pytest's exit code: no test of the file is marked
SHOWN = 8


@dataclass
class Counts:
    """``problems``: the failures, ``{test: first line}``, and files that pytest could not finish."""

    passed: int = 0
    skipped: int = 0
    problems: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        text = f"{self.passed} passed, {self.skipped} skipped, {len(self.problems)} failed"
        shown = [f"\n   {name}: {line}" for name, line in list(self.problems.items())[:SHOWN]]
        return text + "".join(shown)


def read(file: Path, name: str, done: Finished, limit: float) -> Counts:
    """The counts of one run of pytest; what ended without saying so is a problem of its own."""
    found = Counts()
    if file.exists():
        try:
            cases = list(ElementTree.parse(file).iter("testcase"))
        except ElementTree.ParseError:
            cases = []
        for case in cases:
            _count(case, found)
    reported = done.code == 1 and found.problems
    if done.timed_out or (done.code not in (0, NOTHING_COLLECTED) and not reported):
        found.problems[name] = done.why(limit)
    return found


def _count(case: ElementTree.Element, found: Counts) -> None:
    results = {child.tag: child for child in case}
    bad = results.get("failure", results.get("error"))
    if bad is not None:
        lines = (bad.get("message") or bad.text or "").strip().splitlines()
        found.problems[f"{case.get('classname')}::{case.get('name')}"] = lines[0][:200] if lines else ""
    elif "skipped" in results:
        found.skipped += 1
    else:
        found.passed += 1


def total(parts: list[Counts]) -> Counts:
    found = Counts()
    for part in parts:
        found.passed += part.passed
        found.skipped += part.skipped
        found.problems |= part.problems
    return found
