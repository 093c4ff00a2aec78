"""The examples with a small budget: what dynops computes is the dense-masked result, costs fewer MACs and was learned."""

import copy
import csv
import importlib
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="it holds the digits")

from benchmarks.harness.compare import DENSE, Comparison
from benchmarks.harness.setting import Budget
from dynops.testing import assert_within_budget
from examples import all as every
from examples import common, measure
from examples.pixels import edit_latent, fcmae

# The size of the images and the steps: a second or two each on one core.
SHORT = {
    "skipnet": (8, 100), "convnet_aig": (8, 100), "blockdrop": (8, 200), "branchynet": (8, 60), "msdnet": (8, 30),
    "sact": (8, 60), "act": (8, 150), "dynconv": (12, 60), "fbs": (8, 60), "cgnet": (8, 60),
    "condconv": (8, 80), "moe": (8, 80), "hydranet": (8, 60), "skip_rnn": (8, 150),
}  # fmt: skip


def test_every_example_is_listed():
    folder = Path(every.__file__).parent
    found = {path.stem: path for path in folder.glob("*/*.py") if "def build()" in path.read_text()}
    assert set(found) == set(every.MODULES)
    for name, path in found.items():
        assert every.MODULES[name] == f"examples.{path.parent.name}.{name}"


@pytest.mark.parametrize("name", every.MODULES)
def test_dynamic_is_the_dense_masked_form_for_fewer_macs(name, monkeypatch):
    example = importlib.import_module(every.MODULES[name])
    size, steps = SHORT[name]
    monkeypatch.setattr(example, "SIZE", size)
    monkeypatch.setattr(common, "BATCH", 32)
    data = common.Digits.load(example.SIZE)
    model = example.build().to(memory_format=torch.channels_last)
    example.train(model, data, common.Length(steps))
    assert not model.training
    x = data.test[0].to(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = example.run(copy.deepcopy(model).double(), x.double(), "dense")
        masked, actual = example.run(model, x, "dense"), example.run(model, x, "dynamic")
    # A gate within rounding of its threshold may decide otherwise in another precision: such samples are few.
    same = torch.ones(len(x), dtype=torch.bool)
    for logits in (masked, actual):
        same &= (logits - exact).norm(dim=1) < 1e-3 * exact.norm(dim=1)
    assert same.float().mean() > 0.97
    assert_within_budget(actual[same], exact[same], masked[same], name)
    full, dynamic = (partial(example.run, model, mode=mode) for mode in ("full", "dynamic"))
    assert 0 < measure.dynamic_macs(dynamic, model, x) < 0.97 * measure.full_macs(full, x)
    assert measure.accuracy(dynamic, data.test) > 0.5  # chance: 0.1


def test_masked_pretraining_learns_from_visible_patches_alone(monkeypatch):
    monkeypatch.setattr(fcmae, "SIZE", 32)
    monkeypatch.setattr(fcmae, "PATCH", 8)
    monkeypatch.setattr(common, "BATCH", 32)
    data = common.Digits.load(32)
    model = fcmae.FCMAE()
    losses = fcmae.train(model, data, common.Length(25))
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
    images, visible = data.test[0][:4], fcmae.random_patches(4)
    hidden = torch.where(fcmae.at_size(visible, images), images, 7)
    assert visible.flatten(1).sum(1).eq(6).all() and not torch.equal(hidden, images)
    with torch.no_grad():
        assert torch.equal(model.encode(images, visible), model.encode(hidden, visible))


def test_an_edited_latent_is_decoded_for_fewer_macs():
    rows = edit_latent.measure(32, 16, 0.05, Budget(seconds=0.1, min_rounds=2, max_rounds=2))
    exact, kept, spread = rows.values()
    assert exact["error"] < 1e-5 and exact["theory"] < 1.1  # the first group norm moves everything
    assert exact["error"] < kept["error"] < spread["error"] < 0.3
    assert 2 < kept["theory"] < spread["theory"] and exact["bytes"] > spread["bytes"] > 0
    assert all(row["speedup"] > 0 for row in rows.values())


def test_report_and_files(tmp_path, monkeypatch, capsys):
    example = importlib.import_module("examples.channels.condconv")
    monkeypatch.setattr(example, "SIZE", 8)
    data = common.Digits.load(example.SIZE)
    model = example.build().to(memory_format=torch.channels_last)
    example.train(model, data, common.Length(1000, seconds=0.2))
    row = measure.report(example, model, data, 0.2, Budget(seconds=0.1, min_rounds=2, max_rounds=2))
    assert row.theory == row.macs_dense / row.macs_dynamic > 1
    assert row.realised == pytest.approx(row.dense_ms / row.dynamic_ms / row.theory)
    assert capsys.readouterr().out == f"{row}\n" and str(row).startswith("example `condconv`, accuracy ")
    for name in ("rows.csv", "rows.json", "rows.md"):
        measure.write([row, row], tmp_path / name)
    with (tmp_path / "rows.csv").open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == 2 and float(read[0]["realised"]) == pytest.approx(row.realised)
    assert json.loads((tmp_path / "rows.json").read_text())[1] == row.row()
    assert (tmp_path / "rows.md").read_text().count("| `condconv` |") == 2


def test_command_lines(tmp_path, monkeypatch, capsys):
    times = {(DENSE, "NCHW"): [3.0], (DENSE, "channels_last"): [4.0], ("dynamic", ""): [2.0]}
    monkeypatch.setattr(measure, "compare", lambda dense, ours, setting: Comparison(setting, times))
    monkeypatch.setattr(
        sys, "argv", ["all", "--seconds", "0.1", "--out", str(tmp_path / "rows.md"), "condconv"]
    )
    every.main()
    assert "| 3.00 | 2.00 | 1.50x |" in (tmp_path / "rows.md").read_text()
    monkeypatch.setattr(sys, "argv", ["condconv", "--seconds", "0.1", "--out", str(tmp_path / "row.json")])
    measure.main("examples.channels.condconv")
    (row,) = json.loads((tmp_path / "row.json").read_text())
    assert row["example"] == "condconv" and row["speedup"] == 1.5
    assert capsys.readouterr().out.count("`condconv`, accuracy ") == 2
    for wrong in (["all", "no_such_net"], ["all", "--out", "rows.txt"]):
        monkeypatch.setattr(sys, "argv", wrong)
        with pytest.raises(SystemExit):
            every.main()


def test_split_is_fixed_and_disjoint():
    parts = [x.flatten(1) for x, _ in vars(common.Digits.load(8)).values()]
    again = [x.flatten(1) for x, _ in vars(common.Digits.load(8)).values()]
    assert [len(part) for part in parts] == [1197, 240, 360]
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert len(torch.cat(parts).unique(dim=0)) == 1797  # no two digits are alike


def test_length_by_steps_and_by_seconds():
    assert list(common.Length(4).progress()) == [0, 0.25, 0.5, 0.75]
    assert list(common.Length(10).part(0.25).progress()) == [0, 0.5]
    progress = list(common.Length(1, seconds=0.05).progress())
    assert len(progress) > 10 and progress[0] == 0 and progress == sorted(progress) and progress[-1] < 1
