"""The benchmarks of pixels and blocks, and the harness: theory, break-even, masks, reports, the command line."""

import dataclasses
import math
import mmap

import pytest
import torch
from benchmark_cases import BRIEF, CPU, SETTING, briefly, make_report, make_row, tiny_roofline  # noqa: F401
from torch import nn

import dynops
from benchmarks import __main__ as cli
from benchmarks import readme
from benchmarks.blocks import stacks, video
from benchmarks.harness import masks, tables, theory
from benchmarks.harness import rows as rows_
from benchmarks.harness.report import Report
from benchmarks.harness.setting import Budget
from benchmarks.harness.timing import fastest, interleaved
from benchmarks.pixels import layers, memory, model
from dynops import PixelPlan, ops

TINY = layers.Case("3x3", 2, 8, 12, 10, 6, 3, 2)


def test_case_macs_are_those_of_the_convolution():
    for case in (*layers.all_cases(), TINY):
        conv = nn.Conv2d(case.c, case.o, case.kernel, bias=False, device="meta", **case.arguments)
        out = conv(torch.empty(case.n, case.c, case.h, case.w, device="meta"))
        assert tuple(out.shape[2:]) == case.out_size == case.geometry().out_shape[1:]
        assert case.dense_macs == out.numel() * conv.weight[0].numel()
        assert (case.weights, case.outputs) == (conv.weight.numel(), out.numel())


def test_theory_is_dense_macs_over_computed_macs():
    row = make_row()
    assert (row.theory, row.speedup, row.realised) == (4.0, 3.0, 0.75)


def test_layer_rows_count_the_pixels_that_the_plan_computes():
    setting = dataclasses.replace(SETTING, densities=(0.3,), mask_kinds=("random",))
    rows = layers.measure(TINY, setting)
    by_density = {row.density: row for row in rows if row.variant == "plain"}
    assert set(by_density) == {0.3, *layers.BREAK_EVEN_DENSITIES}
    assert by_density[0.3].theory == pytest.approx(15 / round(0.3 * 15))  # the output is 5x3
    assert by_density[1.0].theory == 1.0
    assert {d for d, row in by_density.items() if not row.break_even_only} == {0.3}
    assert {row.variant for row in rows} == {"plain", "plan reused", "packed out"}
    assert all(row.roofline_ms == row.megabytes == 0 for row in rows)


def test_rooflines_of_layers():
    """Bytes by hand: one active output of a strided 3x3 reads four of the nine pixels at the corner."""
    roofline = tiny_roofline()
    roofline.gmacs, roofline.megabytes = 2.0, 100.0
    roofline.times = {"peak product": 10.0, "memory read": 50.0}  # 0.2 GMAC and 2 MB a millisecond
    assert roofline.ms(4.0, 10.0) == pytest.approx(20.01) and roofline.ms(0.1, 10.0) == pytest.approx(5.01)
    assert roofline.ms(4.0, 10.0, {"peak product": 20.0, "memory read": 1.0}) == pytest.approx(40.01)
    setting = dataclasses.replace(SETTING, roofline=roofline)
    plan = PixelPlan.from_mask(_corner(5, 3).expand(2, 5, 3))
    weights, read, written = 12 * 8 * 9, 2 * 4 * 8, 2 * 12 * 15
    assert layers._megabytes(TINY, setting, plan, "plain") == 4 * (weights + read + written) / 1e6
    assert layers._megabytes(TINY, setting, plan, "packed out") == 4 * (weights + read + 2 * 12) / 1e6
    for measured in (layers.measure(TINY, setting), stacks.measure(TINY_STACKS[1], setting)):
        for row in measured:
            assert row.roofline_ms == roofline.ms(row.computed_gmacs, row.megabytes) > 0
            assert row.roofline_share == row.roofline_ms / row.ours_ms
    assert not layers.measure(TINY, dataclasses.replace(setting, backward=True))[0].roofline_ms
    roofline.runs.append(roofline.times | {"memory read": 25.0})
    roofline.runs = roofline.runs[1:] + [roofline.times]
    assert "400 to 400 GFLOP/s in float32" in str(roofline) and "at 2 to 4 GB/s" in str(roofline)


@pytest.mark.parametrize("backward", [False, True])
def test_every_contender_computes_the_same_layer(backward):
    setting = dataclasses.replace(SETTING, backward=backward)
    tensors = layers.random_tensors(TINY, setting, torch.Generator().manual_seed(0))
    mask = masks.random(2, 5, 3, 0.4, torch.Generator().manual_seed(0))
    plan = PixelPlan.from_mask(mask)
    ours = layers.our_versions(TINY, setting, tensors, mask, plan, with_variants=True)
    dense = layers.conv_versions(TINY, setting, tensors)
    if backward:
        for call in dense.values():
            for grad in call():
                assert grad.isfinite().all()
        x, weight, grad = tensors
        x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = nn.functional.conv2d(x, weight, stride=2, padding=1) * mask[:, None]
        for got, expected in zip(ours["plain"](), torch.autograd.grad(out, (x, weight), grad), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        return
    expected = dense["NCHW eager"]()
    torch.testing.assert_close(dense["channels_last eager"](), expected)
    for name, call in ours.items():
        out = ops.scatter_pixels(call(), plan) if "packed" in name else call()
        torch.testing.assert_close(out, expected * mask[:, None])


def _corner(h, w):
    """One active pixel, the first."""
    mask = torch.zeros(1, h, w)
    mask[0, 0, 0] = 1
    return mask


def dense_macs(module, x):
    """The MACs that hooks count at each convolution's output."""
    macs = []
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda m, _, out: macs.append(out.numel() * m.weight[0].numel()))
    module(x)
    return sum(macs)


def test_stack_macs_are_those_of_its_convolutions():
    for case in {case.kind: case for case in stacks.all_cases()}.values():
        with torch.device("meta"):
            module = case.build(case.channels)
            x = torch.empty(case.n, case.channels, case.h, case.w)
            expected = dense_macs(module, x)
            out = module(x)
        assert theory.output_shape(module, case.in_shape) == (case.n, *out.shape[2:])
        found = theory.chain_work(module, case.in_shape)
        weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Conv2d))
        assert found == (expected, weights + x.numel() + out.numel())


def test_stack_theory_counts_the_halo():
    plan = dynops.BlockPlan.from_mask(_corner(8, 8), 4).pixels()
    module = stacks.bottleneck(16)
    assert theory.chain_macs(module, (1, 8, 8), plan) == 25 * 16 * 4 + 16 * 9 * 4 * 4 + 16 * 4 * 16
    plan = dynops.BlockPlan.from_mask(_corner(8, 8), 4).pixels()
    module = stacks.pooled(2)  # 4x4 outputs read 5x5 after the pool, 10x10 before it
    assert theory.chain_macs(module, (1, 16, 16), plan) == 100 * 9 * 4 + 16 * 9 * 4
    with pytest.raises(ValueError, match="plan: expected one for the output's"):
        theory.chain_macs(module, (1, 8, 8), plan)


def test_transposed_convolutions_count_the_taps_they_meet():
    module = nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1)
    assert theory.chain_macs(module, (2, 7, 6)) == 2 * 14 * 12 * 4 * 3 * 5


def test_model_theory_counts_resized_masks_stem_and_head():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    macs = theory.LayerMacs(model, torch.randn(1, 3, 8, 8))
    stem, second, head = 16 * 4 * 27, 16 * 8 * 4, 80
    assert macs.dense == stem + second + head
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 7, 6] = True  # 2 of the 16 output pixels
    assert macs.computed(mask, set()) == pytest.approx((stem + second) / 8 + head)
    assert macs.computed(mask, {"0"}) == pytest.approx(stem + second / 8 + head)


TINY_STACKS = [
    stacks.Case("SBNet 3x3", "3x3", stacks.conv3x3, 4, 80, 72, densities=(0.5, 0.1)),
    stacks.Case("SBNet bottleneck", "bottleneck", stacks.bottleneck, 16, 20, 12, block=4),
    stacks.Case("tiles", "3x3, pool, 3x3", stacks.pooled, 4, 20, 12, block=4, path="tiles"),
    stacks.Case("scattered", "3x3, 3x3", stacks.chain, 4, 40, 36, block=16, **stacks.SCATTERED),
]


@pytest.mark.parametrize("case", TINY_STACKS, ids=lambda case: case.group)
def test_block_contenders_compute_the_dense_stack(case):
    stack = case.module()
    x = torch.randn(case.n, case.channels, case.h, case.w)
    mask = masks.top_left(*theory.output_shape(stack, case.in_shape), 0.05, torch.Generator())
    found = stacks.contenders(case, SETTING, stack, x, mask)
    with torch.inference_mode():
        dense = stack(x)
        for variant, contender in found.items():
            active = mask
            if variant != stacks.PIXELS:
                active = dynops.BlockPlan.from_mask(mask, contender.block).mask()
            base = x if variant == "base=input" else torch.zeros_like(dense)
            torch.testing.assert_close(contender.call(), torch.where(active[:, None], dense, base))
            assert contender.work.macs < theory.chain_macs(stack, case.in_shape)
    assert ("base=input" in found) == (case.build is stacks.bottleneck)
    assert (stacks.PIXELS in found) == (case.group == "scattered")


@pytest.mark.parametrize("case", TINY_STACKS, ids=lambda case: case.group)
def test_block_rows(case):
    rows = stacks.measure(case, SETTING)
    plain = [row for row in rows if row.variant == "plain"]
    scattered = case.group == "scattered"
    kinds = {"random", "random blocks"} if scattered else {"top-left"}  # without a photograph
    assert {row.mask for row in plain} == kinds
    assert {row.density for row in plain if not row.break_even_only} == set(case.densities)
    assert any(row.density == 1 for row in plain) != scattered
    assert all(row.theory == 1 for row in plain if row.density == 1)
    assert all(row.block in ((case.block,) if case.block else (4, 8, 16, 32)) for row in plain)
    assert all(row.block == 0 and row.theory > 2 for row in rows if row.variant == stacks.PIXELS)


def test_masks_of_random_blocks():
    mask = masks.random_blocks(2, 40, 50, 0.25, torch.Generator().manual_seed(0))
    plan = dynops.BlockPlan.from_mask(mask, masks.CELL)
    assert torch.equal(plan.mask(), mask) and plan.num_blocks == 2 * 3  # of 3x4 in each


def test_video_rows():
    pytest.importorskip("matplotlib")
    rows = video.measure(4, SETTING, size=(64, 48), block=8)
    assert [row.variant for row in rows] == ["medians of 3 frames", "plain", "plain", "plain"]
    assert all(0 < row.density < 1 and row.theory > 1 and row.block == 8 for row in rows)
    assert rows[0].ours_ms == sorted(row.ours_ms for row in rows[1:])[1]


def test_video_notices_a_block_that_was_not_recomputed(monkeypatch):
    pytest.importorskip("matplotlib")
    plan = video.Stream.plan

    def without_one(self, previous, frame):
        blocks_of = plan(self, previous, frame)
        return dynops.BlockPlan(blocks_of.index[1:], blocks_of.geometry)

    monkeypatch.setattr(video.Stream, "plan", without_one)
    with pytest.raises(AssertionError, match="frame"):
        video.measure(4, SETTING, size=(64, 48), block=8)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.25, 4.0), (0.5, 2.0), (1.0, 1.0)], 1.0),
        ([(0.25, 2.0), (0.5, 1 / 1.5)], 0.375),  # times 0.5 and 1.5 of dense: half-way
        ([(0.5, 0.9), (0.25, 0.8)], 0.0),
        ([(1.0, 0.5), (0.5, 1.0)], 0.5),  # the order of the points does not matter
    ],
)
def test_break_even_interpolates_time(points, expected):
    assert rows_.break_even(points) == pytest.approx(expected)


def test_break_evens_need_density_one():
    rows = [make_row(density=0.5), make_row(density=1.0, ours_ms=12.0), make_row(case="b", density=0.5)]
    assert rows_.break_evens(rows) == {"a": pytest.approx(0.5 + (1 - 1 / 3) / (2 - 1 / 3) * 0.5)}


def test_summary_keeps_only_plain_rows_of_the_savings():
    rows = [
        make_row(ours_ms=2.0),
        make_row(ours_ms=3.0, mask="square", case="slow"),
        make_row(ours_ms=1.5, mask="photo"),
        make_row(ours_ms=0.1, variant="plan reused"),
        make_row(ours_ms=60.0, density=0.9, break_even_only=True),
    ]
    summary = rows_.summarise("3x3", rows)
    assert (summary.count, summary.median, summary.worst.case) == (3, 0.75, "slow")
    target = rows_.summaries(rows, ("3x3",))[0]
    assert (target.count, target.median) == (2, pytest.approx(0.625))


@pytest.mark.parametrize("kind", ["random", "square", "photo", "top-left"])
@pytest.mark.parametrize("density", [0.5, 0.25, 0.1, 0.01])
def test_mask_density(kind, density):
    if kind == "photo":
        pytest.importorskip("matplotlib")
    mask = masks.MASKS[kind](3, 40, 56, density, torch.Generator().manual_seed(0))
    assert mask.shape == (3, 40, 56) and mask.dtype == torch.bool
    for sample in mask.float().mean((1, 2)).tolist():
        slack = {"square": 0.12, "top-left": 0.3}.get(kind, 0.02)  # whole rows and columns round
        assert sample == pytest.approx(density, rel=slack)


@pytest.mark.parametrize("kind", ["random", "square", "top-left"])
def test_full_and_tiny_masks(kind):
    generator = torch.Generator().manual_seed(0)
    assert masks.MASKS[kind](2, 7, 5, 1.0, generator).all()
    assert masks.MASKS[kind](2, 7, 5, 1e-4, generator).any(2).any(1).all()
    assert masks.MASKS[kind](0, 7, 5, 0.5, generator).shape == (0, 7, 5)


def test_square_is_one_rectangle():
    for sample in masks.square(4, 30, 20, 0.2, torch.Generator().manual_seed(1)):
        rows, columns = sample.any(1).sum(), sample.any(0).sum()
        assert rows * columns == sample.sum()


def test_gate_follows_the_gradient():
    image = torch.zeros(1, 3, 64, 64)
    image[:, :, 40:56, 8:24] = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert model.gate(image, 0.25, 32).tolist() == [[[False, False], [True, False]]]
    fine = model.gate(image, 0.05, 1)
    assert fine.shape == (1, 64, 64) and fine[:, 39:57, 7:25].sum() == fine.sum()


def test_interleaved_takes_turns():
    calls = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = interleaved(contenders, CPU, Budget(seconds=0.0, min_rounds=4, max_rounds=9, warmup=1, calls=2))
    assert "".join(calls) == "ab" + "aaabbb" + "bbbaaa" + "aaabbb" + "bbbaaa"
    assert set(times) == {"a", "b"} and all(t >= 0 for t in times.values())


def test_the_two_fastest_are_kept():
    def spin(turns):
        return lambda: math.fsum(range(turns))

    first_look, kept = fastest({"slow": spin(200_000), "fast": spin(10), "middle": spin(2_000)}, CPU)
    assert list(kept) == ["fast", "middle"] and set(first_look) == {"slow", "fast", "middle"}
    assert fastest(kept, CPU) == ({}, kept)  # nothing to choose from


def test_cold_calls_come_after_a_flush():
    calls = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    budget = Budget(seconds=0.0, min_rounds=2, max_rounds=2, warmup=0, calls=2)
    interleaved(contenders, CPU, budget, flush=lambda: calls.append("-"))
    assert "".join(calls) == "-a-a-b-b" + "-b-b-a-a"


def test_report_round_trip(tmp_path):
    sizes = {
        "gmacs": 0.0,
        "computed_gmacs": 0.0,
        "dense_ms": 0.0,
        "ours_ms": 0.0,
        "dense_mb": 10.0,
        "ours_mb": 9.0,
    }
    nothing = make_row(density=0.0, computed_gmacs=0.0, dense_all={"NCHW eager": 6.0})
    rows = [
        make_row(),
        make_row(density=1.0, break_even_only=True),
        make_row(suite="memory", **sizes),
        nothing,
    ]
    saved = make_report(*rows)
    (path,) = saved.save(tmp_path / "deep", "stem")
    assert Report.load(path) == saved
    text = path.read_text()
    assert text.count("\n{") == 4 and '"realised": 0.75' in text and '"ratio": 0.9' in text
    assert "Infinity" not in text and "NaN" not in text


def test_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    paths = make_report(make_row(), make_row(suite="models", density=0.1)).save(tmp_path, "stem", plot=True)
    assert [path.suffix for path in paths] == [".json", ".png"]
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    assert len(make_report(make_row(suite="experts")).save(tmp_path, "none", plot=True)) == 1


def test_tables_show_what_some_row_has():
    text = tables.table(
        [make_row(roofline_ms=0.5), make_row(group="Skip RNN", gmacs=0.0, computed_gmacs=0.0)]
    )
    first, second = text.split("\n\n")
    assert "roofline" in first and "0.25" in first.split() and "GFLOP/s" in first and "1000" in first.split()
    assert "roofline" not in second and "GFLOP/s" not in second


def test_table_puts_the_worst_row_last_and_hides_none():
    rows = [make_row(ours_ms=t, case=f"case{t}") for t in (3.0, 1.0, 2.0)]
    lines = tables.table([*rows, make_row(variant="plan reused", case="other")]).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["case1.0", "case2.0", "case3.0"]
    assert "(plan reused)" in lines[6] and lines[8].startswith("other")


MARKERS = "before\n<!-- table:begin -->\nold\n<!-- table:end -->\nmiddle\n" + "".join(
    f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n"
    for name in ("blocks", "channels", "samples", "examples", "experts", "exact", "incremental")
)
MARKERS += "after\n"


def test_readme_blocks(tmp_path):
    page, front = tmp_path / "docs" / "benchmarks.md", tmp_path / "README.md"
    page.parent.mkdir()
    page.write_text(MARKERS)
    front.write_text("<!-- headline:begin -->\nold\n<!-- headline:end -->\n")
    make_report(make_row(), make_row(suite="models", case="model")).save(tmp_path / "results", "stem")
    for _ in range(2):
        cli.write_readme(tmp_path, tmp_path / "results")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "middle" in text
    assert "old" not in text + front.read_text() and "3.00x" in front.read_text()
    assert text.count("| model |") == 1 + 1  # the column's title and the row
    for missing in ("BLOCKS", "CHANNELS", "SAMPLES", "EXAMPLES", "EXPERTS", "EXACT", "INCREMENTAL"):
        assert text.count(getattr(readme, f"NO_{missing}")) == 1
    page.write_text("no markers")
    with pytest.raises(ValueError, match="expected the lines"):
        cli.write_readme(tmp_path, tmp_path / "results")


def test_readme_of_blocks():
    rows = [
        make_row(suite="blocks", group="SBNet 3x3", mask="top-left", density=d, block=16) for d in (0.5, 0.1)
    ]
    rows += [make_row(suite="blocks", mask="top-left", density=1.0, break_even_only=True, block=16)]
    rows += [
        make_row(suite="blocks", group="scattered", case="b", variant=variant, ours_ms=ms, block=block)
        for variant, ms, block in (("plain", 3.0, 8), (stacks.PIXELS, 1.5, 0))
    ]
    frames = [make_row(suite="video", ours_ms=ms, block=16) for ms in (1.0, 2.0, 6.0)]
    report_of_video = make_report(video.median(frames), *frames)
    text = readme.blocks_block([make_report(*rows), report_of_video, make_report(make_row())])
    assert "| dtype | pass | group | stack | 0.5 | 0.1 |" in text
    assert "| float32 | forward | SBNet 3x3 | a | 3.00x (0.75) | 3.00x (0.75) |" in text
    assert "| float32 | forward | b | random | 0.25 | 8x8 | 4.00x | 2.00x | 4.00x | 4.00x |" in text
    assert text.count("medians of 3 frames") == 1 and "16x16 blocks" in text


def test_quick_layers_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layers, "all_cases", lambda quick: [TINY])
    cli.main(["layers", "--quick", "--density", "0.5", "0.1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert TINY.name in printed and "note: " in printed and "realised" in printed
    (path,) = tmp_path.glob("*-float32-layers.json")
    loaded = Report.load(path)
    assert {row.density for row in loaded.rows} == {0.5, 0.1, *layers.BREAK_EVEN_DENSITIES}
    assert all(row.dense_name.endswith("eager") for row in loaded.rows)


def test_wrong_density_is_refused():
    with pytest.raises(SystemExit, match="density"):
        cli.main(["layers", "--density", "1.5"])


def test_peak_memory_sees_memory_that_no_allocator_of_torch_made():
    def call():
        with mmap.mmap(-1, 2**23) as held:  # 8 MB, and back to the system whatever malloc keeps
            held[:] = bytes(1) * len(held)

    assert 7 <= memory.peak_mb(call, CPU) <= 32
