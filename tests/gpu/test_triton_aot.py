"""The audit of the GPU kernels (``make gpu-audit``) finds what is planted; a few kernels of each kind pass it.

No GPU is needed: launches are recorded on CPU tensors and compiled ahead of time.
"""

import csv
import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are decorated for the interpreter", allow_module_level=True)

import planted_kernels
import torch
from planted_kernels import SOUND, SPILLS, STRIDED, TEN_STAGES, TWO_WARPS

from benchmarks.gpu.audit import audit, forms
from benchmarks.gpu.audit.launches import Form

ARCHS = audit.ARCHS


def row_of(form: Form, arch: int) -> audit.Row:
    """The audit's row of a form that makes one launch."""
    (configuration,) = forms.configurations(arch, {"planted": (form,)})
    (row,) = audit.triton_rows(configuration)
    return row


@pytest.mark.parametrize("arch", ARCHS)
def test_a_sound_product_passes(arch):
    row = row_of(SOUND, arch)
    tensor_cores = {80: "HMMA", 90: "HGMMA", 100: "UTCMMA"}[arch]
    assert row.problems == () and row.binary.counts[tensor_cores] > 0
    assert (row.binary.product.m, row.binary.product.k) == (64, 32) and row.binary.threads == 128
    assert (row.binary.tensor_columns > 0) == (arch == 100)


@pytest.mark.parametrize("arch", ARCHS)
def test_spills_are_found(arch):
    row = row_of(SPILLS, arch)
    assert len(row.problems) == 1 and row.problems[0].startswith(f"spills: {row.binary.stack} bytes")
    assert row.binary.registers <= 32 and row.binary.counts["LDL"] > 10


@pytest.mark.parametrize("arch", [90, 100])
def test_a_missing_tensor_core_instruction_is_found(arch):
    expected = {90: "HGMMA", 100: "UTCMMA"}[arch]
    row = row_of(TWO_WARPS, arch)
    assert len(row.problems) == 1 and row.problems[0].startswith(f"no {expected} in a product of 64x64x32")


@pytest.mark.parametrize("arch, limit", [(80, 163), (90, 227)])
def test_too_much_shared_memory_is_found(arch, limit):
    row = row_of(TEN_STAGES, arch)
    assert row.problems == (
        f"{row.binary.shared} bytes of shared memory, of {limit * 1024} that a block may have",
    )


def test_missing_vectors_are_found():
    assert [problem[:10] for problem in row_of(STRIDED, 90).problems] == ["no LDG.128"]


def test_what_does_not_compile_is_found():
    def run(dtype):  # no matrix product has three rows
        planted_kernels.product(dtype, m=3)

    assert row_of(Form("three rows", run, (torch.bfloat16,)), 90).problems[0].startswith("does not compile")


def test_an_unlaunched_kernel_is_found(tmp_path, monkeypatch):
    package = tmp_path / "lonely"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "rows.py").write_text(
        "import triton\n\n@triton.jit\ndef lonely_kernel(x):\n    pass\n\n@triton.jit\ndef helper(x):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import lonely

    launches = [c.launch for c in forms.configurations(90, {"planted": (SOUND,)})]
    assert forms.unlaunched(launches, lonely) == ["lonely.rows.lonely_kernel"]
    assert "dynops.kernels.triton.pixels.conv_kernel" in forms.unlaunched(launches)


def test_the_forms_launch_every_kernel_and_every_tile():
    every = forms.configurations(90)
    assert forms.unlaunched([c.launch for c in every]) == []
    assert forms.unlaunched_tiles(90, every) == []
    some = [c for c in every if c.launch.title != "pixels.conv_kernel"]
    assert forms.unlaunched([c.launch for c in some]) == ["dynops.kernels.triton.pixels.conv_kernel"]
    assert "half 32x16 w4 | sm_90" in forms.unlaunched_tiles(90, [c for c in every if c.type != "bf16"])


@pytest.mark.parametrize("arch", ARCHS)
def test_a_few_kernels_pass(arch):
    """The heaviest tile of the products over pixels, and a kernel that moves memory."""
    some = [c for c in forms.configurations(arch, {"pixels": forms.FORMS["pixels"][:1]}) if c.type == "bf16"]
    for name in ("pixels.conv_kernel", "pixels_weight_grad.weight_grad_kernel", "gemm.tap_key_kernel"):
        configuration = next(c for c in some if c.launch.title == name)
        (row,) = audit.triton_rows(configuration)
        assert row.problems == (), row.title
        assert row.title.startswith(f"{name} | pixels: 3x3 | bf16 | ")


def test_the_command_fails_and_says_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(forms, "FORMS", {"planted": (SPILLS, SOUND)})
    monkeypatch.setattr(audit.nvcc, "find", lambda: None)
    status = audit.main(["--arch", "90", "--processes", "1", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert status == 1
    spilled = (
        "FAILED planted_kernels.softmax_kernel | planted: softmax | fp32 | 2048 w1 s- r32 | sm_90 | spills: "
    )
    assert spilled in said and "FAILED dynops.kernels.triton.pixels.conv_kernel | no form launches it" in said
    assert "sm_90: 2 binaries of 2 kernels; 1 with a problem" in said
    with (tmp_path / "gpu-audit.csv").open() as file:
        rows = {row["kernel"]: row for row in csv.DictReader(file)}
    assert int(rows["planted_kernels.softmax_kernel"]["stack"]) > 8
    assert rows["planted_kernels.product_kernel"]["problems"] == ""
    assert "ptxas" in rows["planted_kernels.product_kernel"]["compiler"]


def test_the_command_refuses_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set"):
        audit.main([])


def test_the_command_refuses_a_name_that_no_kernel_has(monkeypatch):
    monkeypatch.setattr(audit.nvcc, "find", lambda: None)
    with pytest.raises(SystemExit, match="no kernel has widget in its name"):
        audit.main(["--arch", "90", "--kernel", "widget"])
