"""The benchmark of incremental models: its edits change what they say, and its rows compare the same computation."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from benchmarks.harness import masks
from benchmarks.harness.setting import Budget
from benchmarks.incremental import __main__ as command
from benchmarks.incremental import tables, video
from benchmarks.incremental.cases import EVERYTHING, EXACT, MOVING, NOTHING, SQUARE, Case, Variant, all_cases
from benchmarks.incremental.edits import Edits
from benchmarks.incremental.run import measure

SHORT = Budget(0.0, 2, 2, warmup=0, calls=1)


@pytest.mark.parametrize("edit, share", [(SQUARE, 0.05), (MOVING, 0.05), (NOTHING, 0.0), (EVERYTHING, 1.0)])
def test_an_edit_changes_its_share_of_the_pixels(edit, share):
    edits = Edits(torch.randn(1, 3, 200, 200), edit, share, torch.Generator().manual_seed(0))
    images = [edits.next() for _ in range(15)]  # the moving square turns round at the edge
    shares = [float((a != b).any(1).float().mean()) for a, b in pairwise(images)]
    assert shares == pytest.approx([edits.share] * 14) and abs(edits.share - share) < 0.005


def test_rows_of_a_stream():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    variants = [Variant(SQUARE, 0.05, EXACT), Variant(NOTHING, 0.0, EXACT), Variant(EVERYTHING, 1.0, EXACT)]
    case = Case("small", "small", lambda: net, lambda: torch.randn(1, 3, 40, 40), variants)
    square, nothing, everything = measure(case, SHORT)
    assert square.edited == 81 / 1600 and 5 < square.theory < 20
    assert everything.theory == 1 and nothing.theory == math.inf
    assert everything.dense_name == "channels_last eager" and nothing.dense_ms == square.dense_ms > 0
    assert all(
        row.kept_mb > 0 and row.ours_ms > 0 and row.last_error < 1e-5 for row in (square, nothing, everything)
    )


def test_newer_rows_take_the_place_of_older_ones(tmp_path):
    row, other = (
        video.Trial("net", SQUARE, 0.05, spread=spread, dense_ms=2.0, ours_ms=ms)
        for spread, ms in (("2", 1.0), ("exact", 2.0))
    )
    tables.write([row, other], "A machine.", tmp_path / "out")
    again = tables.load(tmp_path / "out.csv")
    assert again == [row, other] and again[0].speedup == 2
    row.ours_ms = 0.5
    assert [found.ours_ms for found in tables.merged(again, [row])] == [0.5, 2.0]
    text = (tmp_path / "out.md").read_text()
    assert text.startswith("A machine.\n") and "2.00x" in text


def test_a_library_that_is_missing_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(Case, "is_installed", property(lambda case: not case.library))
    command.main(["--only", "ddpm", "vae", "--out", str(tmp_path)])
    assert capsys.readouterr().out.count("diffusers is not installed") == 2


def test_names_choose_rows():
    names = [name for name, _ in command._named(quick=False)]
    assert len(set(names)) == len(names) and {name.partition(":")[0] for name in names} >= {
        c.name for c in all_cases()
    }


@pytest.mark.skipif(not masks.has_photograph(), reason="needs matplotlib")
def test_frames_of_the_videos():
    window = video.frames(video.WINDOW_VIDEO, 3)
    assert window[0].shape == (1, 3, video.SIZE, video.SIZE)
    assert 0.1 < video._changed(window[0], window[1], (0, 0)) < 0.2
    camera = video.frames(video.CAMERA_VIDEO, 3)
    assert (
        video._changed(camera[0], camera[1], (0, 0)) > 0.9
        and video._changed(camera[0], camera[1], (0, -8)) < 0.1
    )
