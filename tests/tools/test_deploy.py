"""examples/deploy: a converted model as a package of AOTInductor, run by Python and by a C++ program."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from dynops import backends
from examples.deploy import package

FOLDER = Path(package.__file__).parent
BUILDS = all(map(shutil.which, ("cmake", "g++"))) and (torch.version.cuda is None or shutil.which("nvcc"))


def net() -> nn.Module:
    """With a layer for Winograd, one that is depthwise, a pool over the mask, and a norm to fold."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1), nn.SiLU(),
        nn.Conv2d(32, 32, 3, 1, 1, groups=32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """The path of a package, and what the eager model makes of each input."""
    folder, model = tmp_path_factory.mktemp("deploy"), net()
    path = package.package(model, torch.randn(2, 3, 32, 48), torch.rand(2, 4, 6) < 0.5, folder / "model.pt2")
    masked, cases = package.Masked(model), []
    for shape, cells, density in (
        ((2, 32, 48), (4, 6), 0.5),
        ((3, 45, 50), (45, 50), 0.2),
        ((2, 32, 32), (7, 7), 0),
    ):
        n, *size = shape
        inputs = torch.randn(n, 3, *size), torch.rand(n, *cells) < density
        with torch.inference_mode():
            cases.append((inputs, masked(*inputs)))
    return path, cases


@pytest.mark.slow
def test_python_runs_the_package(packaged):
    path, cases = packaged
    run = torch._inductor.aoti_load_package(str(path))
    for inputs, expected in cases:
        torch.testing.assert_close(run(*inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not BUILDS, reason="needs cmake and g++, and nvcc with a torch that was built for CUDA")
def test_a_program_in_cpp_runs_the_package(packaged, tmp_path):
    path, cases = packaged
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    for command in (["cmake", "-S", FOLDER, "-B", tmp_path, prefix], ["cmake", "--build", tmp_path]):
        subprocess.run(command, check=True, capture_output=True, timeout=600)
    for inputs, expected in cases:
        torch.save(inputs, tmp_path / "inputs.pt")
        command = [
            tmp_path / "run",
            path,
            backends._C.__file__,
            tmp_path / "inputs.pt",
            tmp_path / "outputs.pt",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), (expected,), rtol=1e-4, atol=1e-5)
