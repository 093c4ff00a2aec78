"""The benchmark of experts: what it counts, what it writes, and that all contenders compute the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks import expert_rows, experts, layers, readme, report, timing
from benchmarks.experts import Layer, Machine, Routing
from benchmarks.timing import Budget

CPU = torch.device("cpu")
BRIEF = Budget(seconds=0.0, min_rounds=2, max_rounds=2, warmup=1)
SETTING = layers.Setting(CPU, torch.float32, compiled=False, budget=BRIEF)
TINY = Layer(hidden=24, inner=12, experts=5, topk=2)


@pytest.fixture(autouse=True)
def allocator_as_it_is(monkeypatch):
    """Keeping freed memory would last for the whole process, and hide it from the tests of peak memory."""
    monkeypatch.setattr(timing, "_keep_memory", lambda: None)


@pytest.fixture
def machine(monkeypatch) -> Machine:
    monkeypatch.setattr(experts, "Budget", lambda *_: BRIEF)
    return Machine(CPU, torch.float32)


def make_row(**changes) -> expert_rows.ExpertRow:
    values = {
        "layer": TINY.name, "tokens": 4, "dtype": "float32", "weights": "float32", "mode": "forward", "gmacs": 2.0,
        "megabytes": 3.0, "roofline_ms": 4.0, "built_in_ms": {"eager": 20.0, "grouped_mm": 15.0}, "ours_ms": 5.0,
    }  # fmt: skip
    return expert_rows.ExpertRow(**values | changes)


def test_ratios_of_a_row():
    row = make_row()
    assert row.best == "grouped_mm" and row.speedup == 3.0 and row.roofline_share == 0.8
    assert row.gflops == 800.0  # 2 * 2 GMAC in 5 ms
    assert expert_rows.model_cells(make_row(mode="model"))[-3:] == ["266.7", "800.0", "3.00x"]


def test_roofline_is_the_later_of_arithmetic_and_memory(machine):
    machine.gmacs, machine.megabytes = 2.0, 100.0
    times = {experts.PRODUCT: 10.0, experts.READ: 50.0}  # 0.2 GMAC and 2 MB a millisecond
    assert machine.roofline_ms(4.0, 10.0, times) == 20.0
    assert machine.roofline_ms(0.1, 10.0, times) == 5.0
    machine.runs = [times, times | {experts.READ: 25.0}]
    assert "400 to 400 GFLOP/s in float32" in str(machine) and "at 2 to 4 GB/s" in str(machine)


def test_routings_differ_and_count_their_experts():
    routings = experts._routings(TINY, 3, TINY.hidden, SETTING)
    assert (
        len(routings) == experts.ROUTINGS and len({tuple(r.index.flatten().tolist()) for r in routings}) > 1
    )
    for r in routings:
        assert r.experts == len(set(r.index.flatten().tolist()))
        torch.testing.assert_close(r.weight.sum(1), torch.ones(3))


def test_report_round_trip_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    made = report.Report(report.machine(CPU), experts=[make_row(), make_row(tokens=1, weights="int8")])
    paths = made.save(tmp_path, "stem", plot=True)
    assert report.Report.load(paths[0]) == made
    assert [path.suffix for path in paths] == [".json", ".csv", ".png"]
    lines = paths[1].read_text().splitlines()
    assert len(lines) == 3 and "eager: 20.0; grouped_mm: 15.0" in lines[1]
    table = readme.experts_block([made])
    assert table.count(TINY.name) == 2 and table.count("3.00x") == 2 and "tokens/s" not in table
    assert "tokens/s" in readme.experts_block([report.Report(made.machine, experts=[make_row(mode="model")])])


def test_contenders_compute_the_same():
    pytest.importorskip("transformers")
    module = experts.transformers_experts(TINY, SETTING)
    r = Routing.random(TINY, 6, TINY.hidden, SETTING, torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = {name: experts._running(module, name, False)(r) for name in (*experts.BUILT_IN, "dynops")}
    for out in outputs.values():
        torch.testing.assert_close(out, outputs["eager"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_run_measures_every_row(monkeypatch, machine, backward):
    pytest.importorskip("transformers")
    monkeypatch.setattr(experts, "LAYERS", (TINY,))
    monkeypatch.setattr(experts, "GEMM", TINY)
    setting = layers.Setting(CPU, torch.float32, compiled=False, budget=BRIEF, backward=backward)
    rows = experts.run(setting, machine)
    modes = [(row.mode, row.weights, row.tokens) for row in rows]
    if backward:
        assert modes == [("forward+backward", "float32", 512)]
        assert rows[0].gmacs == pytest.approx(3 * 512 * 2 * 3 * 24 * 12 / 1e9)
    else:
        assert len(modes) == len(set(modes)) == 4 + 2 + 4
        assert rows[0].gmacs == pytest.approx(2 * 3 * 24 * 12 / 1e9)
        assert rows[0].megabytes == pytest.approx(2 * 3 * 24 * 12 * 4 / 1e6)  # two experts for one token
        assert set(rows[0].built_in_ms) == set(experts.BUILT_IN)
        assert rows[4].weights == "int8" and rows[4].megabytes == pytest.approx(rows[0].megabytes / 4)
    assert all(row.ours_ms > 0 and row.roofline_ms > 0 for row in rows)
