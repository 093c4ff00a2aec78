"""suggest_block_size: the fastest candidate, remembered, and nothing touched."""

import copy
import gc
import time

import pytest
import torch
from torch import nn

from dynops import suggest_block_size, tune
from dynops.testing import random_mask


class FakeBlocks:
    """Stands for SparseBlocks: refuses odd block sizes, and the fastest one is ``best``."""

    best, log = 16, []

    def __init__(self, module, block_size):
        if block_size % 2:
            raise ValueError("block_size: expected an even one")
        self.module, self.block_size = module, block_size

    def __call__(self, x, mask):
        assert torch.is_inference_mode_enabled()
        self.log.append(self.block_size)
        if self.block_size != self.best:
            time.sleep(0.002)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(tune, "SparseBlocks", FakeBlocks)
    monkeypatch.setattr(tune, "_SECONDS", 0.01)
    monkeypatch.setattr(FakeBlocks, "log", [])
    return FakeBlocks


def case(density=0.3, kind="random"):
    return torch.randn(1, 4, 32, 32), random_mask((1, 32, 32), density, kind)


@pytest.mark.parametrize("best", [4, 8, 16, 32])
def test_the_fastest_wins(fake, monkeypatch, best):
    monkeypatch.setattr(fake, "best", best)
    assert suggest_block_size(nn.Conv2d(4, 4, 3, padding=1), *case()) == best
    assert fake.log[:4] == [4, 8, 16, 32] and len(fake.log) >= 4 * (1 + tune._LEAST_ROUNDS)
    assert fake.log[4:12] == [4, 8, 16, 32] * 2  # they take turns


def test_the_answer_is_remembered(fake):
    module, (x, mask) = nn.Conv2d(4, 4, 3, padding=1), case()
    assert suggest_block_size(module, x, mask) == 16
    fake.log.clear()
    again = mask.clone()
    again[0, 0, :2] ^= True  # the same density, to 5 %
    for same in (mask, again, mask[:, None].float() * 3):
        assert suggest_block_size(module, torch.randn_like(x), same) == 16
    assert not fake.log


@pytest.mark.parametrize(
    "change",
    ["module", "shape", "dtype", "memory format", "density", "clustered", "candidates", "threads"],
)
def test_another_problem_is_measured_again(fake, change):
    module, (x, mask) = nn.Conv2d(4, 4, 3, padding=1), case()
    suggest_block_size(module, x, mask, (8, 16))
    fake.log.clear()
    threads, candidates = torch.get_num_threads(), (8, 16)
    if change == "module":
        module = copy.deepcopy(module)
    elif change == "shape":
        x, mask = torch.randn(2, 4, 32, 32), random_mask((2, 32, 32), 0.3)
    elif change == "dtype":
        x = x.bfloat16()
    elif change == "memory format":
        x = x.contiguous(memory_format=torch.channels_last)
    elif change == "density":
        mask = random_mask((1, 32, 32), 0.6)
    elif change == "clustered":
        mask = mask.view(-1).sort().values.view_as(mask)  # as many pixels, in one piece
    elif change == "candidates":
        candidates = (4, 16)
    elif change == "threads":
        torch.set_num_threads(2)
    try:
        suggest_block_size(module, x, mask, candidates)
    finally:
        torch.set_num_threads(threads)
    assert fake.log


def test_the_memory_goes_with_the_module(fake):
    module = nn.Conv2d(4, 4, 1)
    suggest_block_size(module, *case())
    before = len(tune._remembered)
    del module
    gc.collect()
    assert len(tune._remembered) == before - 1


def test_sizes_that_do_not_fit_are_left_out(fake):
    module, (x, mask) = nn.Conv2d(4, 4, 1), case()
    assert suggest_block_size(module, x, mask, [3, 8, 5, 8]) == 8
    assert fake.log == [8]  # alone it needs no timing
    with pytest.raises(
        ValueError, match="candidates: expected a block size that fits the module, got 3, 5: block_size"
    ):
        suggest_block_size(module, x, mask, (3, 5))


def test_sizes_that_split_an_enlarged_pixel_are_left_out():
    module, (x, _) = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Upsample(scale_factor=8)), case()
    mask = random_mask((1, 256, 256), 0.3, "square")
    assert suggest_block_size(module, x, mask, (4, 8, 12)) == 8
    with pytest.raises(
        ValueError, match=r"fits the module, got 4: block_size: expected a multiple of .*; 12: "
    ):
        suggest_block_size(module, x, mask, (4, 12))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, r"module: expected an nn\.Module, got builtin", {"module": torch.relu}),
        (TypeError, "x: expected a tensor", {"x": [1]}),
        (ValueError, r"x: expected \[N, C, H, W\], got shape \(4, 32, 32\)", {"x": torch.ones(4, 32, 32)}),
        (TypeError, "mask: expected a tensor", {"mask": None}),
        (ValueError, "mask: expected", {"mask": torch.ones(1, 2, 32, 32)}),
        (ValueError, r"candidates: expected block sizes, ints >= 1, got \(\)", {"candidates": ()}),
        (ValueError, "candidates: expected block sizes", {"candidates": (4, 0)}),
        (ValueError, "candidates: expected block sizes", {"candidates": 8}),
        (ValueError, "candidates: expected block sizes", {"candidates": (4.0,)}),
    ],
)
def test_arguments_that_do_not_fit(error, message, arguments):
    x, mask = case()
    with pytest.raises(error, match=message):
        suggest_block_size(**{"module": nn.Conv2d(4, 4, 1), "x": x, "mask": mask, **arguments})


def test_a_mask_of_another_size_is_the_reason():
    x, mask = case()
    with pytest.raises(ValueError, match="expected a block size that fits the module, got 4, 8: "):
        suggest_block_size(nn.Conv2d(4, 4, 3), x, mask, (4, 8))  # the output is 30x30


def test_nothing_is_touched():
    module = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 1, 1))
    module.eval()[2].train()
    before, (x, mask) = copy.deepcopy(module), case()
    state = torch.random.get_rng_state()
    assert suggest_block_size(module, x, mask, (8, 16)) in (8, 16)
    assert [m.training for m in module.modules()] == [m.training for m in before.modules()]
    assert torch.equal(torch.random.get_rng_state(), state)
    for key, value in before.state_dict().items():
        assert torch.equal(module.state_dict()[key], value)
    module(x.requires_grad_()).sum().backward()  # what was kept is no obstacle to training
    assert x.grad.isfinite().all()
