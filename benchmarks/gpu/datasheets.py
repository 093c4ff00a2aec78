"""What the GPUs can do at most, as their makers' datasheets say: rates of products, memory, sizes.

Rates are dense ones: a datasheet's figure "with sparsity" (2:4 structured weights) is twice that. Bytes and FLOPs are
decimal (1 TB/s is 1e12 bytes a second); caches and shared memory are binary. Sources, by title:

* A100: "NVIDIA A100 Tensor Core GPU" datasheet (80 GB SXM) and the "NVIDIA A100 Tensor Core GPU Architecture" whitepaper.
* H100: "NVIDIA H100 Tensor Core GPU" datasheet (SXM5) and the "NVIDIA H100 Tensor Core GPU Architecture" whitepaper. The
  datasheet prints 1979 and 989 TFLOP/s with sparsity; the whitepaper's dense 989.4 and 494.7 are taken. It gives
  66.9 for float32, the datasheet 67.
* H200: "NVIDIA H200 Tensor Core GPU" datasheet: the H100's chip with other memory.
* B200: "NVIDIA Blackwell Architecture Technical Brief", the column HGX B200 (1000 W). It gives 1100 TFLOP/s for
  tf32 where half of bfloat16 would be 1125; the 1200 W part of a GB200 has 2500 and 1250. SMs (148)
  and L2 (126 MB) are not in it: they are what the device reports, after published measurements; other pages print 192
  SMs and 96 MB.

Shared memory of an SM: "CUDA C++ Programming Guide", technical specifications of compute capabilities 8.0, 9.0, 10.0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Sheet:
    """The ceilings of one GPU.

    Attributes:
        half, tf32, single: FLOP/s of products of bfloat16 or float16, of float32 rounded to tf32, and of float32
            multiply-adds outside the tensor cores.
        bandwidth: bytes a second, read and written together.
        l2: bytes of the second-level cache.
        processors: SMs.
        shared: bytes of shared memory that the blocks of one SM have together.
        measured: names of the ceilings that were measured and replace the datasheet's.
    """

    name: str
    half: float
    tf32: float
    single: float
    bandwidth: float
    l2: int
    processors: int
    shared: int
    measured: tuple[str, ...] = ()

    def rate(self, dtype: str, unit: str) -> float:
        """FLOP/s of a product.

        Args:
            dtype: "bfloat16", "float16" or "float32".
            unit: "conv" or "matmul", a product on the tensor cores where torch's defaults put it there (float32
                convolutions are tf32, float32 matrix products are not); "vector": multiply-adds in float32.

        Raises:
            ValueError: another dtype or unit.
        """
        if unit not in ("conv", "matmul", "vector"):
            raise ValueError(f"unit: expected conv, matmul or vector, got {unit!r}")
        if dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype: expected bfloat16, float16 or float32, got {dtype!r}")
        if unit == "vector":
            return self.single
        if dtype != "float32":
            return self.half
        return self.tf32 if unit == "conv" else self.single

    def with_ceilings(self, **ceilings: float) -> Sheet:
        """This GPU with ceilings that were measured on it: ``bandwidth`` of a large copy (bytes read and bytes written),
        ``half``, ``tf32``, ``single`` of a large matrix product.

        Raises:
            ValueError: another name, or a ceiling that is not positive.
        """
        for name, value in ceilings.items():
            if name not in ("half", "tf32", "single", "bandwidth") or not value > 0:
                raise ValueError(
                    f"ceilings: expected positive half, tf32, single or bandwidth, got {name}={value!r}"
                )
        return replace(self, **ceilings, measured=tuple(dict.fromkeys((*self.measured, *ceilings))))


A100 = Sheet("A100", 312e12, 156e12, 19.5e12, 2.039e12, 40 * MIB, 108, 164 * KIB)
H100 = Sheet("H100", 989.4e12, 494.7e12, 66.9e12, 3.35e12, 50 * MIB, 132, 228 * KIB)
H200 = replace(H100, name="H200", bandwidth=4.8e12)
B200 = Sheet("B200", 2250e12, 1100e12, 80e12, 8e12, 126 * MIB, 148, 228 * KIB)
SHEETS = {sheet.name: sheet for sheet in (A100, H100, H200, B200)}

# Parts of the same name with less memory bandwidth or fewer SMs, which no sheet here describes.
_OTHERS = ("PCIE", "NVL", "MIG", "40GB", "GH200", "GB200")


def sheet_of(device: str) -> Sheet | None:
    """The sheet of a device by the name that ``torch.cuda.get_device_name`` gives, or None where there is none.

    "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200" and "NVIDIA B200" have one.
    """
    words = device.upper().replace("-", " ").replace("_", " ").split()
    if any(other in word for word in words for other in _OTHERS):
        return None
    return next((sheet for name, sheet in SHEETS.items() if name in words), None)
