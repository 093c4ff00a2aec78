"""Values of the kernels with weights of their own in Triton's interpreter, or on a GPU. Run by ``test_triton_interpreter.py``."""

import interpreter  # noqa: F401 (mends the interpreter)
import pytest
import torch
from channel_launches import DEVICE
from launch_checks import DTYPES, check_named_backends
from weight_launches import Case, check_local, check_mixed, check_own

from dynops import ops
from dynops.kernels.triton import channels_weight_grad, tiling
from dynops.testing import random_tensor

pytestmark = pytest.mark.usefixtures("poisoned")
FLOAT, BFLOAT, HALF = DTYPES
OWN = {
    "samples": (Case(), FLOAT),
    "samples-bfloat16": (Case(c=32, o=16, stride=2), BFLOAT),
    "groups": (Case(c=34, o=36, h=4, groups=2, nchw=True), HALF),
    "depthwise": (Case(c=11, o=22, groups=11), BFLOAT),
    "shared": (Case(each=False, bias_of_each=True), FLOAT),
    "regions": (Case(c=16, regions=3, each=False), BFLOAT),
    "regions-of-samples": (Case(c=16, regions=2, kind="areas", stride=2), FLOAT),
    "regions-depthwise": (Case(c=21, o=21, groups=21, regions=3, nchw=True), FLOAT),
    "regions-biases": (Case(c=8, o=8, regions=2, kernel=1, each=False, bias_of_each=True), FLOAT),
}


@pytest.mark.parametrize("name", OWN)
def test_weights_of_samples_and_regions(name):
    check_own(*OWN[name])


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
def test_mixed_weights(dtype):
    check_mixed(Case(c=16, groups=1 if dtype == FLOAT else 2), dtype)


LOCAL = {
    "groups": (Case(c=12, groups=3), FLOAT, 1),
    "upsampled": (Case(c=32, n=2, nchw=True), BFLOAT, 2),
    "strided": (Case(c=7, groups=7, stride=2), HALF, 3),
}


@pytest.mark.parametrize("name", LOCAL)
def test_filters_of_pixels(name):
    check_local(*LOCAL[name])


def test_pixels_of_a_weight_in_slices(monkeypatch):
    """As on a GPU with SMs to spare: a weight gradient is the sum of several copies."""
    monkeypatch.setattr(tiling, "device_facts", lambda device: (90, 64))
    slices = []
    prepared = channels_weight_grad._prepared
    monkeypatch.setattr(
        channels_weight_grad, "_prepared", lambda *a: slices.append(prepared(*a)) or slices[-1]
    )
    for regions in (0, 2):
        case = Case(c=6, o=6, n=2, h=18, w=18, kernel=1, regions=regions, each=not regions, kind="areas")
        check_own(case, FLOAT)
    assert [entry[2] > 1 for entry in slices] == [True] * len(slices)


@pytest.mark.parametrize("name", ["mixed", "regions", "local"])
def test_a_named_backend_runs_the_kernels(name):
    """Gradients of a mix and of mixed weights too, which are sums of those of the samples."""
    region = torch.randint(0, 3, (3, 6, 5)).to(DEVICE)
    x, weight, bias = random_tensor(3, 16, 5, 4), random_tensor(3, 8, 16, 2, 2), random_tensor(3, 8)
    calls = {
        "mixed": (ops.mixed_conv2d, (x, weight, random_tensor(3, 3), bias)),
        "regions": (lambda x, w, b, **o: ops.region_conv2d(x, w, region, b, **o), (x, weight, bias)),
        "local": (
            lambda x, k, **o: ops.local_conv2d(x, k, 3, groups=2, **o),
            (x, random_tensor(3, 18, 5, 4)),
        ),
    }
    call, tensors = calls[name]
    check_named_backends(lambda *t, **o: call(*t, padding=1, **o), [t.to(DEVICE) for t in tensors])
