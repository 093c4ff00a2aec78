"""The benchmarks of samples: what is decided, what is counted, and that all contenders compute the same."""

import dataclasses
import math

import pytest
import torch
from benchmark_cases import BRIEF, SETTING, briefly, make_report, make_row, tiny_roofline  # noqa: F401
from torch import nn

from benchmarks import __main__ as cli
from benchmarks import readme, suites
from benchmarks.channels import layers as channels
from benchmarks.experts import layers as experts
from benchmarks.harness import compare as comparing
from benchmarks.harness import masks
from benchmarks.harness.contenders import calibrated, formats_of
from benchmarks.harness.report import Report
from benchmarks.harness.rows import Row
from benchmarks.harness.setting import Budget
from benchmarks.harness.tables import row_cells, table
from benchmarks.harness.theory import LayerMacs
from benchmarks.harness.timing import percentile
from benchmarks.pixels import layers, model
from benchmarks.samples import blocks, copies, exits, halting, skip_rnn, skipnet, tables
from benchmarks.samples import contests as contests_
from dynops import SamplePlan

CASE = blocks.Case("residual", 4, 16, 6)


@pytest.fixture(autouse=True)
def no_photograph(monkeypatch):
    """No row of samples needs it."""
    monkeypatch.setattr(masks, "has_photograph", lambda: False)


@pytest.fixture
def contests(monkeypatch):
    """The contests that would have been measured: a list of ``(dense calls, MACs, contests)``."""
    seen = []

    def record(setting, dense, dense_macs, found, p99=False):
        seen.append((dense, dense_macs, found))
        return []

    for module in (blocks, skipnet, exits, halting, skip_rnn):
        monkeypatch.setattr(module, "contested", record)
    return seen


@pytest.mark.parametrize("mode", ["residual", "replace"])
def test_blocks_compute_the_dense_block_where_the_gate_is_open(mode, contests):
    case = dataclasses.replace(CASE, mode=mode)
    blocks.measure(case, SETTING)
    ((dense, macs, found),) = contests
    assert macs == 4 * 36 * 16 * 16 * 9 * 2
    x = torch.randn(4, 16, 6, 6, generator=torch.Generator().manual_seed(0)).relu()
    with torch.inference_mode():
        expected = dense["NCHW eager"]()
        torch.testing.assert_close(dense["channels_last eager"](), expected, rtol=1e-4, atol=1e-4)
        for contest in found:
            assert set(contest.ours) == {"NCHW eager", "channels_last eager"} == set(contest.gates)
            kept = None
            for call in contest.ours.values():
                out = call()
                same = torch.isclose(out, expected, rtol=1e-3, atol=1e-3).flatten(1).all(1)
                skipped = (out == x).flatten(1).all(1)
                assert torch.equal(same, ~skipped) and int(same.sum()) == contest.density * 4
                assert kept is None or torch.equal(kept, same)
                kept = same
    assert {contest.density for contest in found} == set(blocks.SHARES)
    assert {c.density for c in found if c.variant == "gated"} == set(blocks.GATED_SHARES)
    assert [contest.saves for contest in found if contest.variant == "plain"] == [False, True, True, True, False]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_count_the_gate(dtype, contests):
    blocks.measure(CASE, dataclasses.replace(SETTING, dtype=dtype))
    ((_, macs, found),) = contests
    gate = 4 * (16 * 16 + 16 * 2)
    for contest in found:
        assert contest.macs == macs * contest.density + (gate if contest.variant == "gated" else 0)
        assert contest.ours["channels_last eager"]().dtype == dtype


@pytest.mark.parametrize("share", blocks.SHARES)
def test_fitted_gates_keep_their_share(share):
    x = torch.randn(8, 12, 5, 5, generator=torch.Generator().manual_seed(1)).relu()
    gate = blocks.fitted_gate(x, share)
    for form in (torch.contiguous_format, torch.channels_last):
        mask = gate(x.contiguous(memory_format=form)).mask
        assert mask.sum() == round(8 * share) and set(mask.tolist()) <= {0.0, 1.0}


def test_rows_of_blocks():
    setting = dataclasses.replace(SETTING, roofline=tiny_roofline())
    rows = blocks.measure(dataclasses.replace(CASE, shares=(1.0, 0.5, 0.0)), setting)
    assert len(rows) == 6 and {row.group for row in rows} == {"residual block"}
    for row in rows:
        assert row.gate_ms > 0 and row.ours_name in row.ours_all and set(row.ours_all) == set(row.dense_all)
        assert row.ours_ms == row.ours_all[row.ours_name] and row.dense_ms == row.dense_all[row.dense_name]
        assert row.break_even_only == (row.density != 0.5) and row.ours_p99_ms == 0
        assert row.megabytes == pytest.approx(4e-6 * (2 * 16 * 16 * 9 + 4 * 16 + 2 * 4 * 16 * 36))
        assert row.roofline_ms == setting.roofline.ms(row.computed_gmacs, row.megabytes)
    theory = {(row.density, row.variant): row.theory for row in rows}
    assert theory[0.5, "plain"] == 2 and 1.9 < theory[0.5, "gated"] < 2 and theory[0.0, "plain"] == math.inf


def test_worst_case_rows_have_percentiles():
    case = dataclasses.replace(CASE, shares=(1.0,), variants=("gated",), p99=True)
    (row,) = blocks.measure(case, SETTING)
    assert row.group == tables.WORST and row.break_even_only
    assert row.ours_p99_ms >= row.ours_ms > 0 and row.dense_p99_ms >= row.dense_ms > 0


def test_percentiles_take_120_calls(monkeypatch):
    budgets = []

    def all_times(calls, device, budget, flush):
        budgets.append(budget)
        return {key: [float(i) for i in range(1, 121)] for key in calls}

    monkeypatch.setattr(comparing, "all_times", all_times)
    contest = contests_.Contest("g", "c", "all", 1.0, 5.0, {"ours": lambda: None})
    setting = dataclasses.replace(SETTING, budget=Budget(2.0, 5))
    (row,) = contests_.contested(setting, {"dense": lambda: None}, 10.0, [contest], p99=True)
    assert (row.ours_ms, row.ours_p99_ms, row.theory) == (60.5, 119.0, 2.0)
    assert [budget.min_rounds * budget.calls for budget in budgets] == [120]


@pytest.mark.parametrize(("share", "expected"), [(0.5, 5), (0.99, 10), (0.0, 1), (1.0, 10), (0.41, 5)])
def test_percentile(share, expected):
    assert percentile([float(i) for i in range(10, 0, -1)], share) == expected


@pytest.mark.parametrize("keep", ["random", "all", "none"])
def test_skipnet_is_the_masked_resnet(keep):
    torch.manual_seed(0)
    x = torch.randn(3, 3, 32, 32)
    net = calibrated(skipnet.CifarResNet(2), x)
    shape = len(net.blocks), 3
    kept = torch.rand(shape) < 0.5 if keep == "random" else torch.full(shape, keep == "all")
    expected = net.stem(x)
    for i, block in enumerate(net.blocks):
        shortcut = expected if block.downsample is None else block.downsample(expected)
        expected = torch.where(kept[i, :, None, None, None], block(expected), shortcut)
    expected = net.fc(expected.mean((2, 3)))
    for recurrent in (False, True):
        for _, own, copied, prepared in contests_.our_versions(x, SETTING):
            ours = skipnet.SkipNet(copied(net), recurrent, prepared).eval()
            with torch.inference_mode():
                torch.testing.assert_close(ours(own, kept), expected, rtol=1e-3, atol=1e-3)
    if keep == "all":
        torch.testing.assert_close(net(x), expected, rtol=1e-3, atol=1e-3)


def test_skipnet_counts_what_runs():
    x = torch.randn(2, 3, 32, 32)
    net = skipnet.CifarResNet(1).eval()
    stem = 2 * 32 * 32 * 27 * 16
    inside = [1024 * 16 * 16 * 18, 256 * (16 * 32 + 32 * 32) * 9, 64 * (32 * 64 + 64 * 64) * 9]
    shortcuts = 2 * (256 * 16 * 32 + 64 * 32 * 64)
    always = stem + shortcuts + 2 * 640
    keep = torch.tensor([[True, False], [False, False], [True, True]])
    assert skipnet.computed_macs(net, x, keep) == always + inside[0] + 2 * inside[2]
    assert skipnet.computed_macs(net, x, keep | True) == LayerMacs(net, x).dense
    gate = skipnet.RecurrentGate([16, 16, 32])
    assert skipnet.gate_macs(gate, 2) == 2 * (10 * (16 + 16 + 32) + 3 * (40 * 10 * 2 + 10))


def test_skipnet_rows(contests):
    skipnet.measure(1, SETTING, batch=4)
    ((dense, macs, (plain, gated)),) = contests
    assert (plain.variant, gated.variant) == ("plain", "recurrent gate")
    assert not plain.gates and set(gated.gates) == set(gated.ours) == set(dense)
    assert plain.macs < gated.macs < macs
    with torch.inference_mode():
        for call in gated.gates.values():
            assert call().shape == (4,)
        torch.testing.assert_close(gated.ours["NCHW eager"](), plain.ours["NCHW eager"](), rtol=1e-3, atol=1e-3)  # fmt: skip


def test_resnet_110_has_its_size():
    net = skipnet.CifarResNet()
    assert len(net.blocks) == 54
    macs = LayerMacs(net.eval(), torch.randn(1, 3, 32, 32)).dense
    assert macs == pytest.approx(253e6, rel=0.01)  # He et al.: 1.7 M parameters
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(1.73e6, rel=0.01)


EXITS = [
    dataclasses.replace(case, shape=shape)
    for case, shape in zip(exits.all_cases(), ((8, 3, 8, 8), (8, 64, 4, 4), (2, 8, 512)), strict=True)
]


@pytest.mark.parametrize("case", EXITS, ids=lambda case: case.name)
def test_half_of_the_rows_leave_at_each_exit(case, contests):
    exits.measure(case, SETTING)
    ((dense, macs, (contest,)),) = contests
    stages, heads = case.modules()
    x = torch.randn(case.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        every, state = [], x
        for stage, head in zip(stages, heads, strict=True):
            state = stage(state)
            every.append(head(state))
        for call in dense.values():
            torch.testing.assert_close(call(), every[3], rtol=1e-3, atol=1e-3)
        rows = torch.stack(every).reshape(4, case.rows, -1)
        for call in contest.ours.values():
            out = call()
            at = out.exits.flatten()
            half = case.rows // 2
            assert at.bincount().tolist() == [half, half // 2, half // 4, half // 4]
            expected = rows[at, torch.arange(case.rows)].view(out.logits.shape)
            torch.testing.assert_close(out.logits, expected, rtol=1e-3, atol=1e-3)
        for call in contest.gates.values():
            call()
    assert set(contest.gates) == set(contest.ours) and contest.density == 15 / 32


def test_exits_count_every_head_that_runs():
    stages = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(4))
    heads = nn.ModuleList(exits.head(2, pooled=True) for _ in range(4))
    dense, computed = exits.network_macs(stages, heads, torch.randn(8, 2, 3, 3))
    stage, head = 8 * 9 * 4, 8 * 2 * exits.CLASSES
    assert dense == 4 * stage + head and computed == (stage + head) * 15 / 8


LOOPS = [
    dataclasses.replace(halting.LOOPS[0], shape=(7, 8, 6, 6)),
    dataclasses.replace(halting.LOOPS[1], shape=(14, 16)),
]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
def test_halting_takes_the_steps_that_were_drawn(loop, contests):
    halting.measure(loop, SETTING)
    ((dense, macs, (contest,)),) = contests
    torch.manual_seed(0)
    x = torch.randn(loop.shape)
    block = calibrated(loop.build(loop.shape[1]), x[:8])
    steps = halting.halting_steps(loop.shape[0])
    assert sorted(steps.tolist()) == sorted([*range(1, 8)] * (loop.shape[0] // 7))
    with torch.inference_mode():
        after = [x]
        for _ in range(8):
            after.append(block(after[-1]))
        expected = torch.stack([after[n][i] for i, n in enumerate(steps.tolist())])
        for call in contest.ours.values():
            out = call()
            torch.testing.assert_close(out.output["x"], expected, rtol=1e-3, atol=1e-3)
            assert torch.equal(out.steps, steps)
        for call in dense.values():
            torch.testing.assert_close(call(), after[8], rtol=1e-3, atol=1e-3)
        for call in contest.gates.values():
            call()
    head = 4 * loop.shape[0] * loop.shape[1]
    assert contest.density == 0.5 and contest.macs == pytest.approx(macs / 2 + head)


def test_skip_rnn_updates_half_of_the_steps(contests):
    skip_rnn.measure((3, 40, 16), SETTING)
    ((dense, macs, (own, given)),) = contests
    assert (own.variant, given.variant) == ("plain", "decisions given")
    cell = 4 * 16 * 32
    assert macs == 120 * cell and given.macs == pytest.approx(given.density * 120 * cell)
    assert own.macs == pytest.approx(own.density * 120 * (cell + 16)) and 0.4 < own.density < 0.6
    with torch.inference_mode():
        for contest in (own, given):
            assert set(contest.ours) == set(dense)
            first, second = contest.ours["batch first"](), contest.ours["time first"]()
            torch.testing.assert_close(first.output, second.output.transpose(0, 1), rtol=1e-3, atol=1e-4)
            assert int(first.updates.sum()) == round(contest.density * 120)
        for call in own.gates.values():
            call()


@pytest.mark.parametrize("shape", [(6, 4, 5, 5), (8, 16)])
def test_ways_to_copy_agree(shape):
    plan = SamplePlan.from_mask(contests_.random_keep(shape[0], 0.5, torch.Generator().manual_seed(0)))
    x = torch.randn(shape)
    sample = x[0].numel() * 4
    moved = {"gather": shape[0], "scatter": 2 * shape[0], "scatter, add": 2.5 * shape[0]}
    for form in formats_of(x).values():
        for op, (ours, ways, moved_bytes) in copies.problems(x.contiguous(memory_format=form), plan).items():
            assert moved_bytes == moved[op] * sample
            for call in ways.values():
                torch.testing.assert_close(ours(), call())


def test_copy_rows():
    rows = [row for shape in ((6, 4, 5, 5), (8, 16)) for row in copies.measure(shape, SETTING)]
    assert [row.group for row in rows] == ["gather", "scatter", "scatter, add"] * 2
    assert "index_select, NCHW" in rows[0].dense_all and "index_select" in rows[3].dense_all
    assert all(row.theory == 1 and row.dense_ms == min(row.dense_all.values()) for row in rows)
    assert tables.copy_cells(_copy())[3:] == ["16.0", "b", "4.0", "8.0", "2.00x"]


def row(**changes) -> Row:
    values = {"suite": "samples", "group": "residual block", "case": "residual, 16,64,56x56", "density": 0.5}
    values |= {
        "gmacs": 2.0,
        "dense_ms": 4.0,
        "ours_ms": 2.5,
        "ours_name": "channels_last eager",
        "gate_ms": 0.125,
    }
    return make_row(**{**values, **changes})


NONE = row(density=0.0, computed_gmacs=0.0, ours_ms=0.01, mask="none", break_even_only=True)


def _copy() -> Row:
    values = {"suite": "copies", "group": "gather", "case": "6,4,5,5", "gmacs": 0.0, "computed_gmacs": 0.0}
    values |= {"megabytes": 8.0, "roofline_ms": 0.5, "dense_ms": 2.0, "dense_name": "b", "ours_ms": 1.0}
    return make_row(**values)


def test_nothing_to_compute_has_no_theory(tmp_path):
    assert NONE.theory == math.inf and NONE.realised == 0
    assert row_cells(NONE)[-3:] == ["-", "400.00x", "-"]
    saved = make_report(row(), NONE, _copy())
    assert Report.load(saved.save(tmp_path, "stem", plot=True)[0]) == saved


def test_tables_show_the_gate_where_there_is_one():
    first, second = table([row(), row(group="Skip RNN", gate_ms=0.0, ours_name="")]).split("\n\n")
    assert "gate ms" in first and "0.125" in first and "channels_last eager" in first
    assert "gate ms" not in second and "best of ours" not in second


def test_readme_of_samples():
    rows = [row(), NONE, row(density=1.0, computed_gmacs=2.0, ours_ms=4.0, break_even_only=True)]
    rows += [row(group="SkipNet", case="net", variant="recurrent gate")]
    text = readme.samples_block([make_report(*rows, _copy()), make_report(row(suite="layers"))])
    cells = "residual, 16,64,56x56 | plain | 4.00 | 0.125 | 1.00x (1.00) | 1.60x (0.80) | 0.010 ms |"
    assert f"| float32 | forward | {cells}" in text
    assert text.count("SkipNet, recurrent gate") == 1 and "| gather | 6,4,5,5 | 8.0 | 16.0 | b |" in text
    assert readme.samples_block([]) == readme.NO_SAMPLES


def test_quick_samples_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(blocks, "all_cases", lambda quick: [dataclasses.replace(CASE, shares=(1.0, 0.5))])
    monkeypatch.setattr(exits, "all_cases", lambda quick: EXITS[1:2])
    monkeypatch.setattr(skipnet, "measure", lambda *_: [row(group=skipnet.GROUP, case="a net")])
    monkeypatch.setattr(halting, "LOOPS", LOOPS)
    monkeypatch.setattr(skip_rnn, "LSTMS", ((3, 6, 8),))
    monkeypatch.setattr(copies, "SHAPES", ((8, 16),))
    cli.main(["layers", "--op", "samples", "--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("gate ms", "realised: median", "a net", "plain copy GB/s"))
    (path,) = tmp_path.glob("*-float32-samples.json")
    loaded = Report.load(path)
    groups = {"residual block", "SkipNet", "early exit", "halting", "Skip RNN"}
    assert {found.group for found in loaded.of("samples")} == groups and len(loaded.of("copies")) == 3


def test_headline_shows_something_of_everything(monkeypatch):
    for module in (layers, channels, blocks, exits):
        monkeypatch.setattr(module, "measure", lambda case, setting: [row(case=case.name)])
    monkeypatch.setattr(experts, "all_cases", lambda quick: ["experts"])
    monkeypatch.setattr(experts, "measure", lambda case, setting: [row(case=case)])
    monkeypatch.setattr(model, "all_cases", lambda: ["a size"])
    monkeypatch.setattr(model, "measure", lambda size, setting, gates: [row(case=size)])
    found = [made.case for made in suites.headline(SETTING).rows]
    assert found[:2] == [case.name for case in layers.headline_cases()[:2]]
    assert found[-3:] == ["replace, 8,256,14x14", "ResNet-18", "experts"]
    with_photo = dataclasses.replace(SETTING, mask_kinds=("photo",))
    assert suites.headline(with_photo).rows[-1].case == "a size"
