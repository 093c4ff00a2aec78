"""Sums of many products: within twice the error of the dense layer in its more exact format."""

import pytest

from benchmarks import errors
from dynops import backends
from dynops.testing import assert_within_budget

pytestmark = pytest.mark.skipif(not backends.has_binary(), reason="the binary is not built")

DEPTHS = (198, 1152, 4608)


def check(kind: str, depth: int) -> None:
    for what, ours, exact, dense in errors.sums(kind, depth):
        assert_within_budget(ours, exact, dense, f"{kind}, {what} of {depth} products")


@pytest.mark.parametrize("kind", errors.KINDS)
def test_sums(kind):
    for depth in DEPTHS:
        check(kind, depth)


@pytest.mark.parametrize("depth", [9216, 18432])
@pytest.mark.parametrize("kind", ["pixels", "pixels 1x1", "experts 8"])
def test_the_longest(kind, depth):
    check(kind, depth)
