"""Every Python block of README.md and of docs/ runs, and every number comes from the committed results."""

import csv
import re
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import pytest

from benchmarks import __main__ as cli

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if BLOCK.search(path.read_text())
]


@pytest.fixture
def one_rank(monkeypatch):
    """What torchrun tells a process that is alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_runs(page, one_rank, tmp_path, monkeypatch):
    text = page.read_text()
    if "from transformers" in text and find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), names)


def test_pages_with_code():
    assert len(PAGES) >= 20  # the pattern still finds them


def test_numbers_are_those_of_the_results(tmp_path):
    pages = ("README.md", "docs/benchmarks.md")
    for page in pages:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    cli.write_readme(tmp_path, ROOT / "benchmarks" / "results")
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), (
            f"{page}: python -m benchmarks readme"
        )


def test_numbers_of_real_models_are_those_of_the_tables():
    page = (ROOT / "docs" / "howto" / "sparse-resnet.md").read_text()
    said = re.findall(r"^\| `(models-.*?\.csv)` \|(.*)\|$", page, re.MULTILINE)
    assert len(said) == 2
    for name, cells in said:
        rows = list(csv.DictReader((ROOT / "benchmarks" / "results" / name).open()))
        slowest = min(rows, key=lambda row: float(row["speedup"]))
        speedup, realised = (median(float(row[key]) for row in rows) for key in ("speedup", "realised"))
        right = f"{len(rows)} | {rows[0]['batch']} | {speedup:.2f}x | {realised:.2f} | "
        right += f"{float(slowest['speedup']):.2f}x, {slowest['model'].rpartition('.')[2]}"
        assert cells.strip() == right, name
    compiled = csv.DictReader((ROOT / "benchmarks" / "results" / "models-compiled-intel-xeon.csv").open())
    line = re.search(r"speed-ups are (.*?) at batch 8", page, re.DOTALL).group(1)
    assert re.findall(r"\d+\.\d+", line) == [f"{float(row['speedup']):.2f}" for row in compiled]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_links_between_files_exist():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
