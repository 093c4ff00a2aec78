"""The roofline of the GPU kernels: work counted by hand, what must grow with what, and a prediction for every benchmark."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import blocks, channels, experts, layers, masks, samples, theory
from benchmarks.expert_rows import ExpertRow
from benchmarks.gpu import (
    problems,
    roofline,
    work,
    work_blocks,
    work_channels,
    work_experts,
    work_pixels,
    work_samples,
)
from benchmarks.gpu.datasheets import A100, B200, H100, H200, SHEETS, sheet_of
from benchmarks.report import Report, Row
from dynops import BlockPlan, PixelPlan

RESNET = layers.Case("3x3", 32, 64, 64, 56, 56, 3)
PIXELS = 32 * 56 * 56
STRIDED = layers.Case("strided", 2, 8, 16, 14, 14, 1, 2)


def total(steps, field: str) -> float:
    return sum(getattr(step, field) for step in steps)


# ------------------------------------------------------------------------------------ by hand


def test_the_dense_convolution_by_hand():
    (step,) = work_pixels.dense(RESNET, 2)
    assert step.flops == 2 * 100352 * 9 * 64 * 64
    assert step.read == 100352 * 64 * 2 + 9 * 64 * 64 * 2
    assert step.written == 100352 * 64 * 2


def test_a_convolution_on_half_of_the_pixels_by_hand():
    share = work_pixels.read_share(RESNET, "random", 0.5)
    assert share == pytest.approx(1 - 0.5**9)
    fill, product = work_pixels.conv(RESNET, PIXELS / 2, 2, share)
    assert (fill.read, fill.written) == (0, 100352 * 64 * 2)
    assert product.flops == 100352 * 9 * 64 * 64
    assert product.read == pytest.approx(100352 * (511 / 512) * 64 * 2 + 36864 * 2 + 50176 * 4)
    assert product.written == 50176 * 64 * 2


def test_a_strided_1x1_reads_a_quarter_of_its_input():
    (step,) = work_pixels.dense(STRIDED, 2)
    assert step.read == 2 * 14 * 14 / 4 * 8 * 2 + 8 * 16 * 2
    assert step.flops == 2 * (2 * 7 * 7) * 8 * 16
    assert work_pixels.read_share(STRIDED, "random", 0.5) == 0.125


def test_plans_by_hand():
    count, select = work.mask_to_index(1000, 250)
    assert (count.read, count.waits, select.read, select.written) == (1000, 1, 1000, 1000)
    capacity = work.mask_to_index(1000, 250, capacity=True)
    assert total(capacity, "waits") == 0 and total(capacity, "bytes") == 1000 + 1000 + 4000
    count, place = work.expert_index(pairs=16, experts=300, index_size=8)
    assert (count.read, count.written) == (128, 0)
    assert (place.read, place.written) == (128, 4 * (16 + 16 + 301))


def test_experts_by_hand():
    layer = experts.Layer(hidden=4, inner=8, experts=2, topk=1)
    assert work_experts.experts_with_tokens(layer, 1) == 1
    assert work_experts.experts_with_tokens(layer, 2) == 1.5
    steps = {step.name: step for step in work_experts.mlp(layer, 2, size=2)}
    assert steps["up"].flops + steps["down"].flops == 2 * work_experts.mlp_macs(layer, 2) == 2 * 3 * 2 * 4 * 8
    assert steps["up"].read == (2 * 4 + 1.5 * 16 * 4) * 2 + 4 * 2
    assert steps["down"].written == 2 * 4 * 2
    assert "combine" not in steps  # each token has one row, which is stored where it belongs


def test_tiles_and_rows_by_hand():
    tiles = work_blocks.gather_tiles(tiles=3, channels=8, tile=6, map_pixels=100, size=2)
    assert tiles.read == 100 * 8 * 2 + 3 * 4  # three tiles of 36 pixels overlap in a map of 100
    assert tiles.written == 3 * 36 * 8 * 2
    _, _, merged = work.merge_rows(rows=2, out_rows=5, row_size=10, add=False)
    assert (merged.read, merged.written) == (2 * 10 + 3 * 10 + 5 * 4, 50)
    assert work.merge_rows(2, 5, 10, add=True)[-1].read == merged.read + 2 * 10


def test_compacted_channels_by_hand():
    case = channels.Case("", layers.Case("", 2, 32, 32, 4, 4, 3))
    steps = {step.name: step for step in work_channels.conv(case, 0.5, size=2)}
    assert steps["compact input"].written == 32 * 16 * 2
    assert steps["compact input"].read == pytest.approx(32 * 32 * 2 * (1 - 0.5**16))
    # two copies of 9 * 32 * 32 weights are more than twice the maps of 32 * (32 + 32): read in place
    assert "compact weight" not in steps
    assert steps["product"].flops == 2 * 32 * 9 * 16 * 16
    assert steps["product"].read == 32 * 16 * 2 + 9 * 32 * 32 * 2


def test_a_step_takes_the_longer_of_its_two_times():
    compute = work.Step("", flops=H200.half, read=H200.bandwidth / 4, unit="conv", launches=1)
    memory = work.Step("", flops=H200.half / 4, written=H200.bandwidth / 2, unit="conv", launches=3, waits=2)
    found = roofline.time_of([compute, memory], H200, "bfloat16")
    assert found.work == pytest.approx(1.5) and found.bound == "compute"
    assert found.seconds == pytest.approx(1.5 + 4 * roofline.GAP)
    hosted = roofline.time_of([compute, memory], H200, "bfloat16", graph=False)
    assert hosted.seconds == pytest.approx(found.seconds + 2 * roofline.HOST_WAIT)
    small = roofline.time_of([work.Step("", launches=10)], H200, "bfloat16", graph=False)
    assert small.seconds == pytest.approx(10 * roofline.HOST_LAUNCH) and small.bound == "launches"


# --------------------------------------------------------------------- against what is counted elsewhere


@pytest.mark.parametrize("case", layers.all_cases(quick=True), ids=lambda case: case.name)
def test_flops_are_those_of_the_geometry(case):
    (dense,) = work_pixels.dense(case, 2)
    assert dense.flops == 2 * case.dense_macs
    geometry = work_pixels.geometry(case)
    assert geometry.out_shape == (case.n, *case.out_size)
    product = work_pixels.conv(case, 10, 2, 1.0)[-1]
    assert product.flops == 2 * geometry.macs(10, case.c, case.o)


@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (1, 2), (5, 2)])
def test_read_share_is_that_of_a_random_mask(kernel, stride):
    case = layers.Case("", 1, 1, 1, 256, 256, kernel, stride)
    mask = masks.random(1, *case.out_size, 0.2, torch.Generator().manual_seed(0))
    counted = PixelPlan.from_mask(mask).needed_by(work_pixels.geometry(case)).num_rows / 256**2
    assert work_pixels.read_share(case, "random", 0.2) == pytest.approx(counted, rel=0.03)


def test_clustered_masks_read_little_more_than_they_compute():
    shares = {kind: work_pixels.read_share(RESNET, kind, 0.25) for kind in ("random", "square", "top-left")}
    assert 0.25 < shares["square"] < 0.33 and 0.25 < shares["top-left"] < 0.33 < shares["random"]


@pytest.mark.parametrize("kind", ["3x3", "bottleneck", "3x3, pool, 3x3", "3x3, 3x3"])
def test_block_stacks_do_the_macs_of_theory(kind):
    case = next(case for case in blocks.all_cases() if case.kind == kind)
    case = replace(case, channels=64, h=96, w=64)
    module = case.build(case.channels)
    mask = masks.top_left(1, *work_blocks.out_size(case), 0.3, torch.Generator())
    plan = BlockPlan.from_mask(mask, 8).pixels()
    problem = problems.block_problem(replace(case, path=None), "top-left", "bfloat16", 8)
    dense, ours = theory.chain_macs(module, case.in_shape), theory.chain_macs(module, case.in_shape, plan)
    assert total(problem.dense, "flops") == 2 * dense
    assert total(problem.ours(0.3, False), "flops") == 2 * ours
    assert problem.theory(0.3) == pytest.approx(dense / ours)


def test_channels_do_the_macs_of_the_benchmark():
    for case in channels.all_cases():
        if case.kind in ("top-k", "widths", "one width", "groups of 8"):
            for live in case.live:
                drawn = channels._masks(case, live, torch.Generator().manual_seed(0))
                counted = channels._computed_macs(case.conv, *drawn)
                flops = work_channels.conv(case, live, 2)[-1].flops
                rel = 0.2 if case.kind == "widths" else 0.02  # which samples are wide is drawn for each side
                assert flops == pytest.approx(2 * counted, rel=rel), case


def test_samples_do_the_macs_of_the_kept():
    case = samples.all_cases()[0]
    dense = total(work_samples.dense(case, 2), "flops")
    assert dense == 2 * 2 * case.n * case.h**2 * 9 * case.channels**2
    assert total(work_samples.skip(case, case.n // 2, 2), "flops") == dense / 2
    assert total(work_samples.skip(case, 0, 2), "flops") == 0


# ------------------------------------------------------------------------------- what must grow


@pytest.mark.parametrize("op", ["pixels", "channels", "blocks"])
def test_time_grows_with_density_and_breaks_even_where_it_says(op):
    found = [p for p in problems.OPS[op]("bfloat16") if p.continuous][::5]
    inside = 0
    for problem in found:
        times = [roofline.predicted(problem, H200, d).ours_ms for d in (0.05, 0.25, 0.5, 1.0)]
        assert times == sorted(times), problem
        even = roofline.break_even(problem, H200)
        assert 0 <= even <= 1
        if 0 < even < 1:
            inside += 1
            assert roofline.predicted(problem, H200, even * 0.98).speedup >= 1
            assert roofline.predicted(problem, H200, min(1.0, even * 1.2 + 0.02)).speedup <= 1
    assert found and (inside or op == "channels")


def test_break_even_of_a_made_up_op():
    dense = [work.Step("dense", read=H200.bandwidth, launches=0)]

    def ours(density: float, capacity: bool) -> list[work.Step]:
        return [work.Step("ours", read=H200.bandwidth * (0.25 + density), launches=0)]

    problem = problems.Problem("pixels", "", "", "random", "float32", dense, ours, continuous=True)
    assert roofline.break_even(problem, H200) == pytest.approx(0.75, abs=2e-3)
    assert roofline.break_even(replace(problem, ours=lambda d, c: dense), H200) == 1.0
    assert roofline.break_even(replace(problem, ours=lambda d, c: dense * 2), H200) == 0.0
    assert roofline.break_even(replace(problem, dense=None), H200) is None


def test_faster_sheets_predict_less_time():
    problem = problems.pixel_problem(RESNET, "random", "bfloat16")
    times = [roofline.predicted(problem, sheet, 0.5).ours_ms for sheet in (A100, H100, H200, B200)]
    assert times == sorted(times, reverse=True) and len(set(times)) == 4


def test_tf32_is_for_convolutions_and_narrow_groups_are_for_no_tensor_core():
    assert H200.rate("float32", "conv") == H200.tf32 and H200.rate("float32", "matmul") == H200.single
    assert H200.rate("bfloat16", "vector") == H200.rate("float32", "vector") == H200.single
    depthwise = layers.Case("", 1, 64, 64, 56, 56, 3, groups=64)
    width16 = layers.Case("", 1, 64, 64, 56, 56, 3, groups=4)
    assert (work_pixels.unit(depthwise), work_pixels.unit(width16), work_pixels.unit(RESNET)) == (
        "vector",
        "conv",
        "conv",
    )
    with pytest.raises(ValueError, match="float64"):
        H200.rate("float64", "conv")
    with pytest.raises(ValueError, match="tensor"):
        H200.rate("bfloat16", "tensor")


# -------------------------------------------------------------------------------------- sheets


@pytest.mark.parametrize(
    "device, sheet",
    [
        ("NVIDIA H200", H200),
        ("NVIDIA A100-SXM4-80GB", A100),
        ("NVIDIA H100 80GB HBM3", H100),
        ("NVIDIA B200", B200),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("AMD EPYC", None),
    ],
)
def test_sheet_of_a_device(device, sheet):
    assert sheet_of(device) is sheet


def test_measured_ceilings_replace_those_of_the_sheet():
    slower = H200.with_ceilings(bandwidth=4e12, half=7e14)
    assert (slower.bandwidth, slower.half, slower.tf32) == (4e12, 7e14, H200.tf32)
    assert slower.measured == ("bandwidth", "half") and H200.measured == ()
    for wrong in ({"l2": 1.0}, {"bandwidth": 0.0}, {"half": math.nan}):
        with pytest.raises(ValueError, match="ceilings"):
            H200.with_ceilings(**wrong)


# --------------------------------------------------------------------- a prediction for every benchmark


def _row(suite: str, group: str, case: str, mask: str, density: float, **rest) -> Row:
    values = {"variant": "plain", "mode": "forward", "dtype": "bfloat16", **rest}
    return Row(suite, group, case, mask, density, gmacs=1.0, computed_gmacs=density, dense_ms=1.0, dense_name="", ours_ms=0.5, **values)  # fmt: skip


def _good(p) -> bool:
    return p is not None and 0 < p.ours_ms < 100 and 0 < p.dense_ms < 100 and p.realised > 0


def test_every_case_of_the_benchmarks_has_a_prediction():
    for case in layers.all_cases():
        for kind in case.mask_kinds[:2]:
            p = roofline.predict(_row("layers", case.group, case.name, kind, 0.25), H200)
            assert _good(p) and p.problem.case == case.name
    for case in blocks.all_cases():
        row = _row("blocks", case.group, case.name, case.mask_kinds[0], 0.1, block=case.block or 16)
        assert _good(roofline.predict(row, H200)), case
    for case in channels.all_cases():
        row = _row("channels", case.group, case.name, f"{case.kind}, {case.sides}", case.live[0])
        assert _good(roofline.predict(row, H200)), case
    for case in samples.all_cases():
        assert _good(roofline.predict(_row("samples", case.group, case.name, "random", 0.5), H200)), case
    nothing = roofline.predict(_row("samples", "", "residual, 16,64,56x56", "none", 0.0), H200)
    assert nothing.theory == math.inf and nothing.realised == 0 and nothing.ours.flops == 0
    for layer, mode in (
        (experts.LAYERS[0], "forward"),
        (experts.LAYERS[1], "forward"),
        (experts.GEMM, "GEMM"),
    ):
        row = ExpertRow(
            layer.name, 128, "bfloat16", "bfloat16", mode, 1.0, 1.0, 1.0, {"grouped_mm": 1.0}, 1.0
        )
        assert _good(roofline.predict(row, H200))


def test_the_name_of_a_case_gives_it_back():
    for case in problems.pixel_cases():
        found = problems.conv_case(case.name)
        assert (found.name, found.dense_macs, found.out_size) == (case.name, case.dense_macs, case.out_size)


def test_variants_and_passes_cost_what_they_leave_out():
    def ours(**rest) -> float:
        return roofline.predict(
            _row("layers", "1x1", "32,64,256,56 1x1", "random", 0.25, **rest), H200
        ).ours_ms

    plain, reused, packed = (ours(variant=v) for v in ("plain", "plan reused", "packed out"))
    both, training = ours(variant="packed in and out, plan reused"), ours(mode="forward+backward")
    assert both < reused < plain < training and packed < plain
    assert roofline.predict(_row("layers", "1x1", "a model", "random", 0.25), H200) is None
    assert roofline.predict(_row("models", "ResNet-50", "ResNet-50", "random", 0.25), H200) is None


# ---------------------------------------------------------------------------------- the command


def test_the_command_prints_and_writes_what_is_predicted(tmp_path, capsys):
    roofline.main(["--sheet", "A100", "--op", "plans", "--dtype", "float32", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "predicted for A100" in printed and "mask to index, capacity" in printed
    with (tmp_path / "gpu-roofline.csv").open() as file:
        records = list(csv.DictReader(file))
    assert len(records) == len(problems.OPS["plans"]("float32"))
    assert all("predicted" in name for name in records[0])
    assert {r["predicted_for_gpu"] for r in records} == {"A100"} and float(
        records[0]["predicted_ours_us"]
    ) > 0


def test_the_committed_table_is_what_the_command_writes():
    """Change the model, and the table is to be written anew: ``roofline --out benchmarks/results``."""
    with (roofline.RESULTS / "gpu-roofline.csv").open() as file:
        committed = list(csv.DictReader(file))
    assert {r["predicted_for_gpu"] for r in committed} == set(SHEETS)
    assert {r["predicted_for_op"] for r in committed} == set(problems.OPS)
    for op in ("pixels", "channels", "experts", "samples", "plans"):
        made = [
            {k: "" if v is None else str(v) for k, v in roofline.record(p, even).items()}
            for p, even in roofline.predictions(op, "bfloat16", H200)
        ]
        own = [r for r in committed if (r["predicted_for_gpu"], r["predicted_for_op"]) == ("H200", op)]
        assert len(own) == len(made)
        for kept, now in zip(own, made, strict=True):
            if kept["predicted_for_mask"] != "square":  # drawn: another torch may draw another
                assert kept == now


def test_measured_rows_stand_beside_their_predictions(tmp_path, capsys):
    rows = [_row("layers", "3x3", RESNET.name, "random", 0.5), _row("models", "", "whole", "random", 0.5)]
    machine = {"device": "NVIDIA H200", "ceilings": {"bandwidth": 4e12}}
    path = Report(machine, rows).save(tmp_path, "gpu")[0]
    roofline.main(["--measured", str(path)])
    printed = capsys.readouterr().out
    slower = roofline.predict(rows[0], H200.with_ceilings(bandwidth=4e12))
    assert "with bandwidth measured" in printed and "whole" not in printed
    assert f"{0.5 / slower.ours_ms:.2f}" in printed.splitlines()[-1].split()
    other = Report({"device": "NVIDIA GH200 480GB"}, rows).save(tmp_path, "other")[0]
    with pytest.raises(SystemExit, match="GH200"):
        roofline.main(["--measured", str(other)])
