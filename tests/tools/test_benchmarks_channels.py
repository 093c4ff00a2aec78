"""The benchmarks of channels: what is live, what is counted, and that all contenders compute the same."""

import dataclasses

import pytest
import torch
from benchmark_cases import SETTING, briefly, make_report, tiny_roofline  # noqa: F401

from benchmarks import __main__ as cli
from benchmarks import readme
from benchmarks.channels import layers as channels
from benchmarks.channels import weights
from benchmarks.harness.report import Report
from benchmarks.pixels import layers
from dynops import ops


def tiny(case: channels.Case) -> channels.Case:
    """The case with its own kernel, stride and choice of channels, on 3 samples of 16 channels."""
    depthwise = case.conv.groups > 1
    conv = dataclasses.replace(case.conv, n=3, c=16, o=16, h=6, w=6, groups=16 if depthwise else 1)
    return dataclasses.replace(case, conv=conv)


TINY = [*{(c.group, c.conv.kernel, c.conv.stride): tiny(c) for c in channels.all_cases()}.values()]


def drawn(case: channels.Case, live: float):
    return channels.live_channels(case, live, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.group)
def test_contenders_compute_the_live_part_of_the_dense_layer(case):
    tensors = layers.random_tensors(case.conv, SETTING, torch.Generator().manual_seed(0))
    inputs, outputs = drawn(case, 0.5)
    gate = torch.rand(3, 16) if case.gated else None
    out = channels.our_call(case, SETTING, tensors, gate, inputs, outputs)()
    x = tensors[0] if inputs is None else tensors[0] * inputs[:, :, None, None]
    every = layers.conv_versions(case.conv, SETTING, (x, *tensors[1:]))
    for call in every.values():
        expected = channels.gated(call, gate) if case.gated else call()
        if outputs is not None:
            expected = expected * outputs[:, :, None, None]
        if case.packed:
            expected = ops.gather_channels(expected, channels.plan_maker(case.kind, outputs)())
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", channels.CHOICES)
def test_shares_of_live_channels(kind):
    mask = channels.CHOICES[kind](8, 64, 0.25, torch.Generator().manual_seed(0))
    assert mask.shape == (8, 64) and abs(float(mask.double().mean()) - 0.25) < 0.06
    alike = bool((mask == mask[0]).all())
    assert alike == (kind == "one width")
    if kind != "ragged":
        plan = channels.plan_maker(kind, mask)()
        assert torch.equal(plan.mask().expand(8, -1), mask)


def test_theory_counts_live_pairs_of_each_sample():
    conv = layers.Case("", 2, 4, 6, 5, 5, 3)
    case = channels.Case("a", conv)
    inputs = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    outputs = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    found = channels.live_work(case, inputs, outputs)
    assert found.macs == 25 * 9 * (2 * 3 + 1 * 6)
    assert (
        found.values == 9 * 2 * 6 + 25 * (2 + 1) + 25 * 12
    )  # the weights and inputs that are live; the whole output
    assert channels.live_work(case, None, outputs).macs == 25 * 9 * 4 * (3 + 6)
    packed = channels.live_work(dataclasses.replace(case, packed=True), inputs, outputs)
    assert packed.values == found.values - 25 * 3
    depthwise = channels.Case("a", layers.Case("", 2, 6, 6, 5, 5, 3, groups=6))
    assert channels.live_work(depthwise, None, outputs).macs == 25 * 9 * (3 + 6)


@pytest.mark.parametrize("backward", [False, True])
def test_rows(backward):
    case = dataclasses.replace(TINY[0], live=(0.5, 0.25))
    rows = channels.measure(case, dataclasses.replace(SETTING, backward=backward))
    assert [(row.density, round(row.theory, 3)) for row in rows] == [(0.5, 4), (0.25, 16)]
    assert {row.dense_name for row in rows} <= {"NCHW eager", "channels_last eager"}
    assert all(row.speedup > 0 for row in rows)


SMALL = [
    dataclasses.replace(case, size=(3, 16, 16, 14, *case.size[4:]))
    for case in {case.group: case for case in weights.all_cases()}.values()
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.group)
def test_all_ways_of_weights_compute_the_same(case):
    with torch.inference_mode():
        problem = case.build(SETTING, torch.Generator().manual_seed(0), *case.size)
        if case.group == "CGNet":  # its dense versions were bound to the mask of the last density
            problem.ours = dict(list(problem.ours.items())[-1:])
        for ours in problem.ours.values():
            for name, dense in problem.dense.items():
                torch.testing.assert_close(
                    ours(), dense(), rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
                )


def test_theories_of_weights():
    setting = dataclasses.replace(SETTING, roofline=tiny_roofline())
    rows = [row for case in SMALL for row in weights.measure(case, setting)]
    assert all(row.roofline_ms > 0 for row in rows)
    moved = {row.group: row.megabytes for row in rows}
    assert moved["sample weights"] == pytest.approx(4e-6 * (3 * 16 * 196 * 2 + 3 * 16 * 16 * 9))
    theory = {row.group: row.theory for row in rows if row.density in (1.0, 0.1)}
    assert theory["DRConv"] == 8 and theory["CondConv"] == theory["involution"] == 1
    assert theory["CGNet"] == pytest.approx(10, rel=0.2)


def test_quick_channels_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(channels, "all_cases", lambda quick: TINY[:2])
    monkeypatch.setattr(weights, "all_cases", lambda quick: SMALL[:1])
    cli.main(["layers", "--op", "channels", "--quick", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*-float32-channels.json")
    loaded = Report.load(path)
    assert {row.suite for row in loaded.rows} == {"channels"} and len(loaded.rows) == 3
    assert "theory 1" in capsys.readouterr().out


def test_readme_of_channels():
    case = dataclasses.replace(TINY[0], group="FBS")
    rows = [row for own in (TINY[0], case) for row in channels.measure(own, SETTING)]
    text = readme.channels_block([make_report(*rows)])
    assert text.count("| half in, half out |") == 1 and text.count("| FBS |") == 2
    assert readme.channels_block([]) == readme.NO_CHANNELS
