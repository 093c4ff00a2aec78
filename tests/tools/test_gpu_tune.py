"""Tuned tiles: how a launch finds them, and how ``python -m benchmarks.gpu tune`` does. No GPU is needed."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from benchmarks.gpu.audit import forms_channels, forms_experts, forms_pixels  # noqa: E402
from benchmarks.gpu.tune import break_even, problems, tiles, tune  # noqa: E402
from dynops import ExpertPlan  # noqa: E402
from dynops.kernels import configs  # noqa: E402
from dynops.kernels.configs import Config  # noqa: E402
from dynops.kernels.triton import experts, tiling  # noqa: E402
from dynops.kernels.triton.tiling import Tile  # noqa: E402

CPU = torch.device("cpu")
X = torch.zeros(1, dtype=torch.bfloat16)


def entry(
    tile: Tile | None,
    rows=4096,
    n=64,
    k=64,
    batch=1,
    family="pixels",
    kind="half",
    most=32768,
    indirect=False,
):
    request = tiles.Request(family, kind, most, indirect, rows, n, k, batch)
    return {**request._asdict(), "tile": None if tile is None else tile._asdict()}


def chosen(rows=4096, n=64, k=64, batch=1, family="pixels", **options) -> dict:
    return tiling.choose(X, rows, n, k, batch, **{"family": family, "indirect": False, **options})[0]


TUNED = Tile(64, 32, 32, 8, 5)
FOUND = {"M": 64, "N": 32, "K": 32, "num_warps": 8, "num_stages": 5}


def test_a_measured_tile_is_taken_where_it_is_near():
    with configs.use("cpu", Config({}, [entry(TUNED)], [])):
        assert chosen() == FOUND
        assert chosen(rows=2049) == chosen(rows=4096 * 8, n=64) == chosen(rows=8000, n=128, k=32) == FOUND
        for far in ({"rows": 4096 * 16}, {"rows": 200}, {"rows": 1000, "n": 256}, {"batch": 64}):
            assert chosen(**far) == _built_in(**far), far
        for other in ({"family": "experts"}, {"indirect": True}, {"short": True}):
            assert chosen(**other) == _built_in(**other), other
    assert chosen() == _built_in() != FOUND


def _built_in(**options) -> dict:
    with configs.use("cpu", None):
        return chosen(**options)


def test_the_nearest_of_two_and_the_built_in_where_that_won():
    rows = entry(TUNED), entry(None, rows=65536), entry(TUNED._replace(stages=2), rows=512)
    with configs.use("cpu", Config({}, list(rows), [])):
        assert chosen(rows=8192) == FOUND
        assert chosen(rows=700)["num_stages"] == 2
        assert chosen(rows=32768) == _built_in(rows=32768)


@pytest.mark.parametrize(
    "limit", [{"n": 16}, {"tallest": 32}, {"largest": {"half": 32768}, "n": 16}], ids=str
)
def test_limits_hold_for_a_measured_tile(limit):
    """A tile that this launch has no registers or columns for is not taken."""
    with configs.use("cpu", Config({}, [entry(TUNED)], [])):
        assert chosen(**limit) == _built_in(**limit)


def test_a_config_survives_its_file(tmp_path, monkeypatch):
    sizes = {"kind": "half", "form": "conv", "taps": 9, "inputs": 64, "outputs": 64, "pixels": 4096}
    config = Config(
        {"gpu": "one"}, [entry(TUNED), entry(None, rows=8)], [{**sizes, "shares": {"pixels": 0.8}}]
    )
    (tmp_path / "sm_91.json").write_text(config.as_json())
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    again = configs.shipped.__wrapped__("sm_91")
    assert (again.measured_on, again.tiles, again.break_even) == (
        config.measured_on,
        config.tiles,
        config.break_even,
    )
    assert again.shares("half", "conv", 9, 64, 64, 4000) == {"pixels": 0.8}
    assert again.shares("tf32", "conv", 9, 64, 64, 4000) is None
    assert configs.shipped.__wrapped__("sm_92") is None
    (tmp_path / "empty.json").write_text(Config({}, [], []).as_json())
    assert configs.shipped.__wrapped__("empty").tiles == []


def test_a_limit_of_registers(tmp_path, monkeypatch):
    """It is a part of a launch; files of before there was one load; no compiler takes any number."""
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    old = entry(TUNED)
    del old["tile"]["maxnreg"]
    for written, found in ((old, FOUND), (entry(TUNED._replace(maxnreg=128)), {**FOUND, "maxnreg": 128})):
        (tmp_path / "sm_93.json").write_text(Config({}, [written], []).as_json())
        with configs.use("cpu", configs.shipped.__wrapped__("sm_93")):
            assert chosen() == found
    for bad in (0, 23, 256, "128", 128.0, True):
        text = json.dumps(
            {"measured_on": {}, "tiles": [entry(TUNED._replace(maxnreg=bad))], "break_even": []}
        )
        (tmp_path / "sm_93.json").write_text(text)
        with pytest.raises(
            ValueError, match="maxnreg: expected None or a number of registers from 24 to 255"
        ):
            configs.shipped.__wrapped__("sm_93")


def test_use_ends_with_its_block():
    one, two = Config({}, [], []), Config({}, [], [])
    with configs.use("cpu", one):
        with configs.use("cpu", two):
            assert configs.of(CPU) is two
        assert configs.of(CPU) is one
    assert configs.of(CPU) is None


@pytest.mark.parametrize("file", sorted(configs.FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_what_ships_can_be_launched(file):
    """Its tiles have the fields of Tile, and blocks that fit an SM."""
    config = Config(**json.loads(file.read_text()))
    assert config.measured_on["gpu"].startswith("NVIDIA")
    for row in config.tiles:
        assert row["tile"] is None or tiles.may_fit(Tile(**row["tile"]), row["kind"], 227 * 1024), row


def test_every_launcher_names_its_kernel(monkeypatch):
    """Whatever kernel has a product asks for a tile under a name of its own."""
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda *args, **kwargs: None)
    trial = tiles.Trial()
    some = {forms_pixels: "3x3", forms_channels: "3x3, compact", forms_experts: "gated"}
    with configs.use("cpu", trial):
        for module, name in some.items():
            next(form for form in module.FORMS if form.name == name).run(torch.bfloat16)
    names = {"pixels", "channels", "experts"}
    assert {request.family for request in trial.asked} == names | {f"{name}_weight" for name in names}


def test_the_built_in_choice_counts_waves(monkeypatch):
    """Large tiles for many rows, small ones for few, and none that keeps SMs idle in a last wave for nothing."""
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 132))
    sizes = lambda tile: (tile["M"], tile["N"])  # noqa: E731
    assert sizes(chosen(rows=401408, n=64)) == (128, 64)
    assert sizes(chosen(rows=200704, n=512, k=512)) == (128, 256)
    assert sizes(chosen(rows=12, n=512, k=512)) == (32, 16)
    # 12544 rows of 128: 98 tiles of 128x128 in one wave, 196 of 128x64 in two
    assert sizes(chosen(rows=12544, n=128, k=128)) == (128, 128)
    # 25088 rows of 256: 196 tiles of 128x256 in two waves, 392 of 128x128 in three, which load a third more from L2
    assert sizes(chosen(rows=25088, n=256, k=256)) == (128, 256)
    # programs of a short reduction overlap: two fit an SM
    assert chosen(rows=50176, n=256, k=64) == {"M": 128, "N": 256, "K": 64, "num_warps": 8, "num_stages": 4}
    short = chosen(rows=50176, n=256, k=64, short=True)
    assert short == {"M": 128, "N": 128, "K": 64, "num_warps": 8, "num_stages": 3, "maxnreg": 128}
    assert "maxnreg" not in chosen(rows=50176, n=256, k=64, short=True, family="channels")
    # a weight gradient cuts its rows into slices: few tiles need not be small
    assert sizes(chosen(rows=64, n=64, k=50176, batch=9, family="pixels_weight")) == (64, 64)
    assert sizes(chosen(rows=64, n=64, k=50176, batch=9)) == (32, 16)


@pytest.mark.parametrize(
    "tokens,tile,programs",
    [(1, (16, 64), 8 * 32), (16, (16, 64), 68 * 32), (128, (32, 64), 94 * 32), (256, (64, 128), 95 * 16), (8192, (128, 256), 576 * 8)],
)  # fmt: skip
def test_experts_take_tiles_of_their_rows(tokens, tile, programs, monkeypatch):
    """No taller than the rows that an expert rarely has more of, and no more programs than the pairs may need."""
    launched = []

    def run(self, *args, grid, warmup, **options):
        launched.append(((options["M"], options["N"]), *grid))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 132))
    plan = ExpertPlan.from_topk(torch.rand(tokens, 64).topk(8).indices, 64)
    x, weight = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((tokens, 2048), (64, 2048, 2048)))
    plan = (plan.order, plan.offsets, plan.position)
    experts.linear(x, weight, None, None, None, *plan, False, True, False, "")
    assert launched == [(tile, programs, 1, 1)]


class Clock:
    """Time by a formula of the tile that a call takes; each call takes a second of :meth:`now`."""

    def __init__(self, milliseconds):
        self.milliseconds, self.seconds, self.taken = milliseconds, 0.0, None

    def now(self) -> float:
        return self.seconds

    def medians(self, calls, rounds):
        times = {}
        for name, call in calls.items():
            call()
            self.seconds += 1
            times[name] = self.milliseconds(self.taken)
        return times


def problem(clock: Clock, spoil=lambda tile: None, **sizes) -> problems.Problem:
    """A stand-in for an op: it asks for its tile as a launcher does, and ``spoil`` may break it by its tile."""
    right = torch.randn(32, 32)

    def make(device):
        def call(dtype, backend):
            def run():
                if backend == "reference":
                    return right.to(dtype)
                clock.taken = chosen(**sizes)
                changed = spoil(clock.taken)
                return right.to(dtype) if changed is None else changed

            return run

        return call

    return problems.Problem("stand-in", sizes.get("family", "pixels"), torch.bfloat16, make)


def search(clock, found, seconds=10**6):
    log = []
    found = found if isinstance(found, list) else [found]
    return list(tiles.search_all(found, CPU, clock, seconds, log.append)), log


def test_the_fastest_tile_wins():
    """Also one that is in no table: found by one step at a time from the built-in one."""
    clock = Clock(lambda t: 1 + (t["num_stages"] != 4) + (t["num_warps"] != 8) + (t["N"] != 32))
    (row,), _ = search(clock, problem(clock))
    assert (row["tile"]["stages"], row["tile"]["warps"], row["tile"]["n"]) == (4, 8, 32)
    assert row["ms"] == 1 and row["built_in_ms"] > 1 and row["rows"] == 4096
    with configs.use("cpu", Config({}, [row], [])):
        assert chosen()["num_stages"] == 4


def test_noise_does_not_win():
    clock = Clock(lambda t: 1 - 0.003 * (t["num_stages"] == 4) - 0.003 * (t["num_warps"] == 8))
    (row,), _ = search(clock, problem(clock))
    assert row["tile"] is None and row["ms"] == row["built_in_ms"]


def _wrong(tile):
    return torch.full((32, 32), 3.0, dtype=torch.bfloat16)


def _partly_written(tile):
    return torch.empty(32, 32, dtype=torch.bfloat16)


def _fails(tile):
    raise RuntimeError("out of resource: shared memory\nRequired: 1")


def _spills(tile):
    triton.runtime.jit.JITFunction.run(None)


@pytest.mark.parametrize("broken", [_wrong, _partly_written, _fails, _spills])
def test_a_broken_tile_never_wins(broken, monkeypatch):
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda *args: SimpleNamespace(n_spills=3))
    clock = Clock(lambda t: 1 if t["num_stages"] == 4 else 2 if t["num_warps"] == 8 else 3)
    found = problem(clock, lambda tile: broken(tile) if tile["num_stages"] == 4 else None)
    (row,), log = search(clock, found)
    assert row["tile"]["warps"] == 8 and row["tile"]["stages"] != 4 and row["ms"] == 2
    reason = {_fails: "shared memory", _spills: "3 registers spill"}.get(broken, "WRONG RESULT")
    assert any("4 stages rejected" in line and reason in line for line in log)
    assert triton.runtime.jit.JITFunction.run().n_spills == 3, "the launch is not as it was"


def test_nothing_is_measured_against_a_wrong_result():
    clock = Clock(lambda t: 1)
    rows, log = search(clock, problem(clock, _wrong))
    assert rows == [] and "WRONG RESULT of the built-in" in log[-1]


def test_the_time_is_kept_and_shared():
    """The first problem does not use up everything, and what was not reached is said."""
    clock = Clock(lambda t: 1)
    found = [problem(clock, rows=4096 << i) for i in range(8)]
    rows, log = search(clock, found, seconds=24)
    assert clock.seconds <= 24 + 5 and 4 <= len(rows) <= 8
    (few, log) = search(clock, found, seconds=0)
    assert few == [] and log == ["not reached: 8 of 8 problems, stand-in the first"]


@pytest.mark.parametrize("arch, kind", tiling.TILES)
def test_candidates_are_tiles_that_a_launcher_takes(arch, kind):
    for tile in tiling.table(arch, kind, "experts"):
        assert tiles.may_fit(tile, kind, 227 * 1024), "a tile that ships is no candidate"
        for near in tiles.neighbours(tile):
            changed = [a != b for a, b in zip(tile, near, strict=True)]
            assert sum(changed) == 1 and all(value & (value - 1) == 0 for value in near[:4])


@pytest.mark.parametrize(
    "times, dense, expected",
    [((4, 6, 8, 10), 7, 0.7), ((4, 6, 8, 10), 20, 1.0), ((8, 12, 16, 20), 4, 0.2), ((5, 5, 5, 15), 10, 0.9)],
)
def test_break_even(times, dense, expected):
    points = list(zip((0.4, 0.6, 0.8, 1.0), times, strict=True))
    assert break_even._break_even(points, dense) == pytest.approx(expected)


def test_every_problem_has_a_name_of_its_own():
    names = [found.name + str(found.dtype) for found in problems.every_problem()]
    assert len(set(names)) == len(names) > 80
    assert len({layer.name for layer in break_even.layers()}) == len(break_even.layers())


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu", "tune", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_dry_run(tmp_path):
    """The whole of it on real kernels in the interpreter: what it writes is a config, and says what it is."""
    done = run("--dry-run", "--seconds", "12", "--out", str(tmp_path))
    assert done.returncode == 0 and "WRONG" not in done.stdout, done.stdout + done.stderr
    config = Config(**json.loads((tmp_path / "cpu.json").read_text()))
    assert "not a measurement" in config.measured_on["gpu"]
    assert config.tiles and {row["family"] for row in config.tiles} <= {
        p.family for p in problems.small_problems()
    }
    assert all(0 < share <= 1.0 for row in config.break_even for share in row["shares"].values())


def test_a_few_problems_have_all_the_time_and_each_is_written_at_once(monkeypatch, tmp_path):
    """And none is lost with the process that finds the next."""
    clock = Clock(lambda t: 1)
    monkeypatch.setattr(
        problems, "small_problems", lambda: [problem(clock, rows=4096 << i) for i in range(6)]
    )
    monkeypatch.setattr(tune, "Clock", lambda device: clock)
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # main sets it
    search, written = tiles.Search.run, []

    def searched(self, until):
        file = tmp_path / "cpu.json"
        tiles_there = len(json.loads(file.read_text())["tiles"]) if file.exists() else None
        written.append((tiles_there, until - clock.now()))
        return search(self, until)

    monkeypatch.setattr(tiles.Search, "run", searched)
    tune.main(["--dry-run", "--problems", "3", "--seconds", "60", "--out", str(tmp_path)])
    assert [count for count, _ in written] == [None, 1, 2] and written[0][1] == 2 * 60 / 3
    assert json.loads((tmp_path / "cpu.json").read_text())["break_even"] == []
    with pytest.raises(SystemExit):
        tune.main(["--problems", "0"])


def test_a_dry_run_is_not_shipped(capsys):
    with pytest.raises(SystemExit):
        tune.main(["--dry-run"])
    assert "expected --out" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_problem_on_a_gpu():
    """One problem by the device's own clock."""
    device, log = torch.device("cuda", torch.cuda.current_device()), []
    rows = list(tiles.search_all(problems.problems()[:1], device, tune.Clock(device), 20, log.append))
    assert len(rows) == 1 and rows[0]["ms"] > 0, log
