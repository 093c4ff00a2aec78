"""Masks and float64 maps for tests of maps under a mask."""

import torch

SIZE, CELLS, C = (8, 12), (4, 6), 6


def close(a, b, tolerance=1e-11):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).norm() <= tolerance * max(b.norm().item(), 1e-12)


def masks(n=2, share=0.4, seed=0):
    return torch.rand(n, *CELLS, generator=torch.Generator().manual_seed(seed)) < share


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
