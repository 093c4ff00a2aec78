"""``make wheel`` gives one wheel that installs and computes beside every supported torch; no compiler is there."""

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCHES = {
    "2.11": ["torch==2.11.0", "triton==3.6.0", "numpy<2.4"],
    "2.13": ["torch==2.13.0"],
    "2.14": ["torch==2.14.1"],
}
SETUPTOOLS = ("61.0.0", "65.5.0", "69.5.1", "77.0.3", "")  # "": the newest

SMOKE = """
import sys, torch, dynops
from dynops.testing import assert_within_budget, random_mask, random_tensor

assert torch.__version__.startswith(sys.argv[1] + "."), torch.__version__
assert "site-packages" in dynops.__file__ and dynops.build_info()["version"] == dynops.__version__

mask = random_mask((2, 12, 12))
x, weight = random_tensor(2, 16, 12, 12), random_tensor(32, 16, 3, 3)
for layout in (torch.contiguous_format, torch.channels_last):
    def gradients(call, dtype):
        values = [t.to(dtype, memory_format=layout).requires_grad_() for t in (x, weight)]
        out = call(*values)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), values)]

    def dense(x, weight):
        return torch.nn.functional.conv2d(x, weight, padding=1) * mask[:, None]

    def sparse(x, weight):
        return dynops.ops.sparse_conv2d(x, weight, None, dynops.PixelPlan.from_mask(mask), padding=1, backend="cpp")

    for actual, exact, yardstick in zip(
        gradients(sparse, torch.float32), gradients(dense, torch.float64), gradients(dense, torch.float32)
    ):
        assert_within_budget(actual, exact, yardstick)

index = torch.randint(0, 4, (10, 2))
tokens, experts = random_tensor(10, 8), random_tensor(4, 6, 8)
sums = dynops.ops.grouped_linear(
    tokens, experts, dynops.ExpertPlan.from_topk(index, 4), packed_out=False, backend="cpp"
)
yardsticks = [torch.einsum("ti,tkoi->to", tokens.to(d), experts.to(d)[index]) for d in (torch.float64, torch.float32)]
assert_within_budget(sums, *yardsticks)
"""


def run(*command: object, **options) -> subprocess.CompletedProcess:
    """Runs a command that must succeed; what it said is in the failure."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def require_index(*requirements: str) -> None:
    """Skips where pip finds no such packages, as it does offline; CI has to have them."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-deps",
        "--ignore-installed",
        *requirements,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and not os.environ.get("CI"):
        pytest.skip(f"pip does not find {requirements}: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """What ``make wheel`` makes; it runs once, in the first process that asks."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all processes of this run
    with (folder / "wheel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "wheel.made").exists():
            run("make", "wheel", f"PYTHON={sys.executable}", cwd=ROOT)
            (folder / "wheel.made").touch()
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return max((ROOT / "dist").glob(f"dynops-*-{python}-{python}-*.whl"), key=os.path.getmtime)


@pytest.mark.release
def test_the_wheel_holds_the_package_and_nothing_of_torch(wheel):
    assert "manylinux" in wheel.name
    names = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n and not n.endswith("/")]
    assert {name.split("/")[0] for name in names} == {"dynops"}
    assert [Path(name).name.split(".")[0] for name in names if not name.endswith((".py", ".json"))] == ["_C"]
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "dynops").rglob("*.py")}
    assert sources == {name for name in names if name.endswith(".py")}


@pytest.mark.release
def test_the_source_archive_holds_every_source(wheel):
    archive = max((ROOT / "dist").glob("dynops-*.tar.gz"), key=os.path.getmtime)
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    folders = [path for folder in ("csrc", "dynops") for path in (ROOT / folder).rglob("*")]
    sources = {
        str(path.relative_to(ROOT)) for path in folders if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
    }
    assert sources <= names and {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names


@pytest.mark.release
@pytest.mark.parametrize("version", TORCHES)
def test_it_computes_with(version, wheel, tmp_path):
    require_index(*TORCHES[version])
    home = tmp_path / "environment"
    try:
        venv.create(home, with_pip=True)
        python = home / "bin" / "python"
        # without PYTHONPATH, where pip would find this tree and take it for the installed package
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        run(python, "-m", "pip", "install", "--no-compile", *TORCHES[version], wheel, env=environment)
        # only the environment's own programs: nothing can be compiled
        run(
            python, "-c", SMOKE, version, cwd=tmp_path, env={"PATH": str(home / "bin"), "HOME": str(tmp_path)}
        )
    finally:
        shutil.rmtree(home, ignore_errors=True)  # up to 6 GB


@pytest.mark.slow
@pytest.mark.parametrize("version", SETUPTOOLS)
def test_pip_builds_with_setuptools(version, tmp_path):
    """Of the sources bindings.cpp alone is compiled: what is tested is how setuptools reads the project."""
    if version == "61.0.0" and sys.version_info >= (3, 12):
        pytest.skip("setuptools 61 needs pkgutil.ImpImporter, which Python 3.12 removed")
    package = f"setuptools=={version}" if version else "setuptools"
    require_index(package)
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "tools", package)
    tree = tmp_path / "tree"
    for name in ("dynops", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    for source in (tree / "csrc").rglob("*.cpp"):
        if source.name != "bindings.cpp":
            source.unlink()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "tools"), "FORCE_CUDA": "0"}
    command = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, "."]
    run(sys.executable, *command, cwd=tree, env=environment)
    (made,) = tmp_path.glob("dynops-0.*.whl")
    names = zipfile.ZipFile(made).namelist()
    assert any(name.startswith("dynops/_C.") for name in names) and "dynops/ops/__init__.py" in names
    assert any(name.endswith("LICENSE") for name in names)
