"""The report of a run: its machine, rows and notes, as a file and as a plot."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from .plots import draw
from .rows import Row


@dataclass
class Report:
    """The rows of one run. ``checks``: the outcome of the stages of ``benchmarks.gpu check``."""

    machine: dict
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checks: dict = field(default_factory=dict)

    def of(self, *suites: str) -> list[Row]:
        """The rows of some suites."""
        return [row for row in self.rows if row.suite in suites]

    def save(self, folder: Path, stem: str, plot: bool = False) -> list[Path]:
        """Writes ``stem``.json, and .png where ``plot`` asks for it and matplotlib is there; returns the paths.

        The file has a line for each row, which leaves out the fields that have their defaults.
        """
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{stem}.json"]
        parts = [f'"{name}": {json.dumps(getattr(self, name))}' for name in ("machine", "notes", "checks")]
        rows = ",\n".join(json.dumps(row.as_dict()) for row in self.rows)
        paths[0].write_text("{" + ",\n".join([*parts, f'"rows": [\n{rows}\n]']) + "}\n")
        if plot and draw(self.rows, self.title(), folder / f"{stem}.png"):
            paths.append(folder / f"{stem}.png")
        return paths

    def title(self) -> str:
        """The title of a plot: the machine, the dtype, the pass."""
        row = self.rows[0]
        return f"{self.machine['device']}, {self.machine['threads']} threads, {row.dtype}, {row.mode}"

    @classmethod
    def load(cls, path: Path) -> Report:
        content = json.loads(path.read_text())
        rows = [Row.from_dict(values) for values in content["rows"]]
        return cls(content["machine"], rows, content["notes"], content["checks"])
