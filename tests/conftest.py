"""One thread, the same seeds and, where a test asks for it, poisoned memory."""

import os

# Before torch. Two processes of tests on two cores with two threads each take three times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from spread import long_first, part_of


def pytest_addoption(parser):
    parser.addoption("--part", default="0/1", help="i/n: of n parts of the tests the i-th, counted from 0")


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config, items):
    items[:] = long_first(part_of(items, config.getoption("--part")))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Every tensor that is allocated without values (``torch.empty``) starts as NaN.

    An output that a kernel forgets to write then shows, also from C++.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def fresh_dynamo():
    """Nothing that was compiled before counts, and nothing is left for the next test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
