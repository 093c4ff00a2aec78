"""Kernels that the audit must find fault with, and their launchers' forms."""

import torch
import triton
import triton.language as tl

from benchmarks.gpu.audit.launches import Form


@triton.jit
def softmax_kernel(x, out, N: tl.constexpr):
    """Every value is held in a register while all are summed."""
    at = tl.arange(0, N)
    power = tl.exp(tl.load(x + at))
    tl.store(out + at, power / tl.sum(power, 0))


@triton.jit
def product_kernel(a, b, out, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """The sum of ``steps`` products of contiguous blocks."""
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    k = tl.arange(0, K)
    acc = tl.zeros([M, N], tl.float32)
    for step in range(steps):
        left = tl.load(a + step * M * K + m * K + k[None, :])
        acc = tl.dot(left, tl.load(b + step * N * K + k[:, None] * N + n), acc)
    tl.store(out + m * N + n, acc)


@triton.jit
def strided_kernel(x, out, stride, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.load(x + at * stride))


def _numbers(dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(4096, dtype=dtype)


def softmax(dtype: torch.dtype) -> None:
    """One warp, and 32 registers for the 64 values of each of its threads."""
    softmax_kernel[(1,)](_numbers(dtype), _numbers(dtype), N=2048, num_warps=1, maxnreg=32)


def product(
    dtype: torch.dtype, m: int = 64, n: int = 64, k: int = 32, warps: int = 4, stages: int = 2
) -> None:
    x = _numbers(dtype)
    product_kernel[(1,)](x, x, x.float(), 64, M=m, N=n, K=k, num_warps=warps, num_stages=stages)


SPILLS = Form("softmax", softmax, (torch.float32,))
SOUND = Form("product", product, (torch.bfloat16,), vectors=("product_kernel",))
# wgmma is an instruction of four warps: two get the older one
TWO_WARPS = Form("product", lambda dtype: product(dtype, warps=2), (torch.bfloat16,))
TEN_STAGES = Form("product", lambda dtype: product(dtype, 128, 128, 64, 8, stages=10), (torch.bfloat16,))
STRIDED = Form(
    "strided",
    lambda dtype: strided_kernel[(1,)](_numbers(dtype), _numbers(dtype), 3, N=1024),
    (torch.float32,),
    vectors=("strided_kernel",),
)
