"""The occupancy bound against values of NVIDIA's occupancy calculator, and the parsers against what the tools print."""

import pytest

pytest.importorskip("triton")

from benchmarks.gpu.audit import nvcc, rules, sass
from benchmarks.gpu.audit.compiled import Binary, Product, product
from benchmarks.gpu.audit.occupancy import occupancy


@pytest.mark.parametrize(
    "arch, threads, registers, shared, warps, limited_by",
    [
        (80, 256, 32, 0, 64, "warps"),
        (80, 256, 64, 0, 32, "registers"),
        (80, 128, 255, 0, 8, "registers"),
        (80, 1024, 64, 0, 32, "registers"),
        (80, 128, 96, 0, 20, "registers"),  # 21 warps have registers; each of the SM's parts holds 5
        (80, 192, 168, 0, 12, "registers"),
        (80, 32, 16, 0, 32, "blocks"),
        (80, 256, 33, 0, 48, "registers"),  # as 40 registers
        (80, 128, 32, 48 * 1024, 12, "shared"),  # three blocks: CUDA takes 1 KiB of each
        (90, 128, 32, 48 * 1024, 16, "shared"),
        (80, 256, 32, 81 * 1024, 16, "shared"),  # two blocks of 82 KiB are all there is
        (80, 256, 32, 81 * 1024 + 1, 8, "shared"),
        (80, 256, 32, 163 * 1024, 8, "shared"),
        (90, 256, 32, 227 * 1024, 8, "shared"),
        (90, 384, 168, 0, 12, "registers"),
        (90, 512, 255, 0, 0, "registers"),  # no block fits
    ],
)
def test_bound(arch, threads, registers, shared, warps, limited_by):
    bound = occupancy(arch, threads, registers, shared)
    assert (bound.warps, bound.limited_by) == (warps, limited_by)
    assert bound.share == warps / 64 and bound.blocks * threads == 32 * warps


def test_tensor_memory_bounds_blocks():
    assert occupancy(100, 128, 32, 0, tensor_columns=256).blocks == 2
    assert occupancy(100, 128, 32, 0, tensor_columns=512).limited_by == "tensor memory"


PTXAS = """\
ptxas info    : 29 bytes gmem
ptxas info    : Compiling entry function '_ZN6dynops4cuda10write_keysIlEEvPKT_llibPiS5_' for 'sm_90'
ptxas info    : Function properties for _ZN6dynops4cuda10write_keysIlEEvPKT_llibPiS5_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
ptxas info    : Compile time = 21.731 ms
ptxas info    : Compiling entry function '_ZN3cub5sweepEv' for 'sm_90'
ptxas info    : Function properties for _ZN3cub5sweepEv
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers, 28160 bytes smem, 400 bytes cmem[0]
"""


def test_what_ptxas_says():
    assert nvcc.entries(PTXAS) == {
        "_ZN6dynops4cuda10write_keysIlEEvPKT_llibPiS5_": {
            "registers": 32,
            "stack": 0,
            "local": 0,
            "shared": 0,
        },
        "_ZN3cub5sweepEv": {"registers": 80, "stack": 16, "local": 20, "shared": 28160},
    }


@pytest.mark.parametrize(
    "name, parts",
    [
        ("void dynops::cuda::write_keys<long>(long const*, int*)", ("write_keys", "<long>")),
        ("dynops::cuda::(anonymous namespace)::fit(int const*)", ("fit", "")),
        ("void cub::D::sweep<cub::P<int, (cub::Order)0>, int>(int*)", ("sweep", "<P<int, (Order)0>, int>")),
    ],
)
def test_names_of_cuda_kernels(name, parts):
    assert nvcc.parted(name) == parts


SASS = """\
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
                                                                     /* 0x0000001000047824 */
        /*0020*/             @UP1 LDG.E.U16 R5, desc[UR4][R2.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R4], desc[UR4][R2.64] ;
        /*0040*/                   LDGSTS.E.LTC128B [R4], desc[UR4][R2.64] ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0070*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], idesc[UR9], !UPT ;
        /*10080*/                  STL [R1], R0 ;
"""


def test_instructions_are_counted():
    counts = {name: n for name, n in sass.count(SASS).items() if n}
    assert counts == {
        "HMMA": 1, "HGMMA": 1, "UTCMMA": 1, "LDGSTS": 2, "LDGSTS.128": 1, "LDG": 2, "LDG.128": 1, "STL": 1,
    }  # fmt: skip


def test_the_largest_product_is_found():
    ttir = """
      %1 = tt.dot %a, %b, %c : tensor<32x64xbf16> * tensor<64x16xbf16> -> tensor<32x16xf32> loc(#loc1)
      %2 = tt.dot %d, %e, %f, inputPrecision = tf32 : tensor<64x32xf32> * tensor<32x64xf32> -> tensor<64x64xf32>
    """
    found = product(ttir)
    assert found == Product(64, 64, 32, "f32", "tf32") and found.on_tensor_cores
    assert not Product(64, 64, 32, "f32", "ieee").on_tensor_cores
    assert product("%1 = tt.load %0") is None


def binary(
    arch=90, product=None, registers=64, stack=0, local=0, shared=0, tensor_columns=0, **counts
) -> Binary:
    every = dict.fromkeys(sass.INSTRUCTIONS, 0) | counts
    return Binary(arch, registers, stack, local, shared, 128, tensor_columns, every, product)


def test_the_rules():
    half, small, ieee = (
        Product(64, 64, 32, "bf16", "ieee"),
        Product(32, 64, 32, "f16", "ieee"),
        Product(64, 64, 16, "f32", "ieee"),
    )
    sound = [
        binary(stack=8), binary(shared=227 * 1024), binary(product=half, HGMMA=1), binary(product=small, HMMA=1),
        binary(80, half, HMMA=1), binary(100, half, UTCMMA=1, tensor_columns=512), binary(product=ieee, FFMA=1),
    ]  # fmt: skip
    assert [rules.problems(some) for some in sound] == [[]] * len(sound)
    wrong = [
        binary(stack=16), binary(local=4), binary(shared=227 * 1024 + 1), binary(product=half, HMMA=1),
        binary(product=small, FFMA=1), binary(100, half, HGMMA=1), binary(100, tensor_columns=513),
        binary(80, half, FFMA=1),
    ]  # fmt: skip
    assert [len(rules.problems(some)) for some in wrong] == [1] * len(wrong)
    assert len(rules.problems(binary(), vectors=True)) == 2  # neither loads nor stores
    assert rules.problems(binary(**{"LDG.128": 1, "STG.128": 1}), vectors=True) == []
    assert rules.problems(binary(product=half, HGMMA=1, TMA=1), vectors=True) == []
