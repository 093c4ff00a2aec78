"""``python -m benchmarks.models``: a right model has no fault, and a wrong one has."""

import csv

import pytest
import torch
from torch import nn

from benchmarks.models import __main__ as command
from benchmarks.models import trial, zoo
from dynops.stack import run_rows


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.last(torch.relu(self.bn(self.first(x))))
        return self.head(x.mean((2, 3)))


def entry():
    torch.manual_seed(0)
    return zoo.Entry("torch.Small", Small, lambda batch: (torch.randn(batch, 3, 14, 14),))


@pytest.fixture
def wrong(monkeypatch):
    """A converted module whose output is off by one."""
    real = run_rows.run_rows
    monkeypatch.setattr("dynops.stack.program.run_rows", lambda *args, **kw: real(*args, **kw) + 1)


def test_a_right_model():
    row = trial.run(entry(), 2, 0.01)
    assert row.fault == "" and row.outside and row.convs == 2 and row.from_rows == 0.5
    assert max(row.error, row.full_error, row.hooked_error) < 1e-5
    pixels = 2 * 14 * 14
    convs, linear = pixels * (27 * 8 + 8 * 4), 2 * 4 * 2
    assert row.theory == pytest.approx((convs + linear) / (convs * 12 / 49 + linear))


def test_a_wrong_model(wrong):
    assert "differs from the meaning" in trial.run(entry(), 1, 0.01).fault


def test_a_model_without_padding():
    class Unpadded(Small):
        def __init__(self):
            super().__init__()
            self.first.padding = (0, 0)

    torch.manual_seed(0)
    unpadded = entry()._replace(make=Unpadded)
    assert "differs from the meaning" in trial.run(unpadded, 1, 0.01).fault
    row = trial.run(unpadded._replace(padded=False), 1, 0.01)
    assert row.fault == "" and row.error < 1e-5


def test_a_model_that_raises():
    broken = entry()._replace(inputs=lambda batch: (torch.randn(batch, 5, 14, 14),))
    assert trial.run(broken, 1, 0.01).fault.startswith("RuntimeError")


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        zoo, "entries", lambda everything: [entry(), entry()._replace(name="nolibrary.model")]
    )
    assert command.main(["--seconds", "0.01", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "1 of 1 right" in said and "nolibrary is not installed" in said
    rows = list(csv.DictReader((tmp_path / "models.csv").open()))
    assert [row["model"] for row in rows] == ["torch.Small"] and "| torch.Small |" in (
        tmp_path / "models.md"
    ).read_text()


def test_the_command_fails_on_a_wrong_model(wrong, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "entries", lambda everything: [entry()])
    assert command.main(["--seconds", "0.01"]) == 1
