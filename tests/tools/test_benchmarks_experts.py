"""The benchmark of experts: what it counts, what it writes, and that all contenders compute the same."""

import dataclasses

import pytest
import torch
from benchmark_cases import SETTING, briefly, make_report, make_row, tiny_roofline  # noqa: F401

from benchmarks import readme
from benchmarks.experts import layers as experts
from benchmarks.experts import loops, tables
from benchmarks.experts.layers import Layer, Routing
from benchmarks.harness.rows import Row
from dynops import ExpertPlan, ops

TINY = Layer(hidden=24, inner=12, experts=5, topk=2)
GEMM = Layer(hidden=12, inner=12, experts=5, topk=2)


def expert_row(**changes) -> Row:
    values = {
        "suite": "experts",
        "case": TINY.name,
        "tokens": 4,
        "weights": "float32",
        "gmacs": 2.0,
        "computed_gmacs": 2.0,
    }
    values |= {
        "megabytes": 3.0,
        "roofline_ms": 4.0,
        "dense_ms": 15.0,
        "dense_name": "grouped_mm",
        "ours_ms": 5.0,
    }
    return make_row(**{**values, **changes})


def test_cells_of_a_row():
    assert tables.row_cells(expert_row())[-5:] == [
        "5.000",
        "3.00x",
        "4.000",
        "0.80",
        "800",
    ]  # 2 * 2 GMAC in 5 ms
    assert tables.model_cells(expert_row(group=experts.MODEL))[-3:] == ["266.7", "800.0", "3.00x"]
    assert tables.row_cells(expert_row(group=experts.ONE_GEMM))[3] == "GEMM"


def test_routings_differ_and_count_their_experts():
    routings = experts._routings(TINY, 3, TINY.hidden, SETTING)
    assert (
        len(routings) == experts.ROUTINGS and len({tuple(r.index.flatten().tolist()) for r in routings}) > 1
    )
    for r in routings:
        assert r.experts == len(set(r.index.flatten().tolist()))
        torch.testing.assert_close(r.weight.sum(1), torch.ones(3))


def test_readme_of_experts():
    table = readme.experts_block([make_report(expert_row(), expert_row(tokens=1, weights="int8"))])
    assert table.count(TINY.name) == 2 and table.count("3.00x") == 2 and "tokens/s" not in table
    assert "tokens/s" in readme.experts_block([make_report(expert_row(group=experts.MODEL))])


def test_contenders_compute_the_same():
    pytest.importorskip("transformers")
    module = experts.transformers_experts(TINY, SETTING)
    r = Routing.random(TINY, 6, TINY.hidden, SETTING, torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = {name: experts.running(module, name, False)(r) for name in (*experts.BUILT_IN, "dynops")}
    for out in outputs.values():
        torch.testing.assert_close(out, outputs["eager"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_run_measures_every_row(monkeypatch, backward):
    pytest.importorskip("transformers")
    monkeypatch.setattr(experts, "LAYERS", (TINY,))
    monkeypatch.setattr(experts, "GEMM", GEMM)
    setting = dataclasses.replace(SETTING, backward=backward, roofline=tiny_roofline())
    rows = [row for case in experts.all_cases() for row in experts.measure(case, setting)]
    modes = [(row.group, row.mode, row.weights, row.tokens) for row in rows]
    if backward:
        assert modes == [("SwiGLU", "forward+backward", "float32", 512)]
        assert rows[0].gmacs == pytest.approx(3 * 512 * 2 * 3 * 24 * 12 / 1e9)
    else:
        assert len(modes) == len(set(modes)) == 4 + 2 + 4
        assert rows[0].gmacs == pytest.approx(2 * 3 * 24 * 12 / 1e9)
        assert rows[0].megabytes == pytest.approx(2 * 3 * 24 * 12 * 4 / 1e6)  # two experts for one token
        assert set(rows[0].dense_all) == set(experts.BUILT_IN)
        assert rows[4].weights == "int8" and rows[4].megabytes == pytest.approx(rows[0].megabytes / 4)
    assert all(row.ours_ms > 0 and row.roofline_ms > 0 for row in rows)
    assert all(row.theory == 1 and row.density == TINY.topk / TINY.experts for row in rows)


@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_in_plain_pytorch_are_ours(tokens):
    x, scores = torch.randn(tokens, 32), torch.randn(tokens, 6).softmax(1)
    weight, index = scores.topk(2)
    up, down = torch.randn(6, 48, 32), torch.randn(6, 32, 24)
    expected = ops.experts_mlp(x, up, down, ExpertPlan.from_topk(index, 6), weight)
    found = loops.loop(x, index, weight, up, down)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    half = [t.bfloat16() for t in (x, weight, up, down)]
    found = loops.grouped(half[0], index, *half[1:]).float()
    assert (found - expected).norm() < 0.03 * expected.norm()
