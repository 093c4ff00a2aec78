"""Settings that measure nothing, and rows, for the tests of the benchmarks."""

import contextlib

import pytest
import torch

from benchmarks import suites
from benchmarks.harness import machine, timing
from benchmarks.harness.report import Report
from benchmarks.harness.roofline import Roofline
from benchmarks.harness.rows import Row
from benchmarks.harness.setting import Budget, Setting

CPU = torch.device("cpu")
BRIEF = Budget(seconds=0.0, min_rounds=2, max_rounds=2, warmup=1, calls=1)
SETTING = Setting(CPU, torch.float32, compiled=False, budget=BRIEF, mask_kinds=("random", "square"))


def tiny_roofline(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Roofline:
    return Roofline(device, dtype, side=32, rows=4)


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    """Nothing is watched, waited for or kept: kept memory would last for the process, and hide from other tests."""
    monkeypatch.setattr(timing, "_keep_memory", lambda: None)
    monkeypatch.setattr(timing, "_no_gc", contextlib.nullcontext)
    monkeypatch.setattr(machine, "busy_share", lambda: 0.0)
    monkeypatch.setattr(suites, "Budget", lambda *_, **__: BRIEF)
    monkeypatch.setattr(suites, "Roofline", tiny_roofline)


def make_row(**changes) -> Row:
    """A row that saves 4x in theory and 3x in time."""
    values = {
        "suite": "layers",
        "group": "3x3",
        "case": "a",
        "mask": "random",
        "density": 0.25,
        "variant": "plain",
    }
    values |= {"mode": "forward", "dtype": "float32", "gmacs": 4.0, "computed_gmacs": 1.0}
    values |= {"dense_ms": 6.0, "dense_name": "NCHW eager", "ours_ms": 2.0}
    return Row(**{**values, **changes})


def make_report(*rows: Row, notes: tuple[str, ...] = ("a note",)) -> Report:
    return Report(machine.machine(CPU), list(rows), list(notes))
