"""Every Triton kernel compiled ahead of time for sm_80, sm_90 and sm_100, with the tiles that ship.

No GPU is needed: the launchers run on CPU tensors, their launches are recorded instead of made, and
what would have been launched is compiled. Checked are registers, spills, shared memory and the
tensor-core instructions.
"""

from __future__ import annotations

import os
import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels are decorated for the interpreter", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dynops import BlockPlan, ChannelPlan, ExpertPlan, PixelPlan, SamplePlan, ops  # noqa: E402
from dynops.geometry import ConvGeometry  # noqa: E402
from dynops.kernels import (  # noqa: E402
    blocks,
    channels,
    channels_weight,
    experts,
    experts_weight,
    gemm,
    pixels,
    rows,
    tiling,
)
from dynops.kernels.pixels_weight import weight_grad_kernel  # noqa: E402

BIN = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# wgmma and tcgen05 need 64 rows; a smaller tile takes the older instruction
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA"}
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@pytest.fixture
def launches(monkeypatch):
    """The launches made in the test: (kernel, positional arguments, keyword arguments)."""
    recorded = []

    def run(self, *args, grid, warmup, **kwargs):
        recorded.append((self, args, kwargs))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    return recorded


def compile_launch(kernel, args, kwargs, arch: int):
    """What Triton would compile for this launch, with its specialisation of the arguments."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        number = "fp32" if isinstance(value, float) else "i32"
        signature[name] = f"*{TYPES[value.dtype]}" if is_tensor else number
        if is_tensor or (specialized and number == "i32" and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def check(launch, arch: int, tmp_path, tensor_cores: bool, vectors: bool = False, frame: int = 0) -> None:
    kernel, args, kwargs = launch
    compiled = compile_launch(kernel, args, kwargs, arch)
    named = ("M", "N", "K", "UNIT", "ADD", "WIDE")
    what = f"{kernel.__name__} sm_{arch} { ({k: v for k, v in kwargs.items() if k in named}) }"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", cuobjdump("-res-usage", cubin)))
    assert int(usage["REG"]) <= 255 and usage["LOCAL"] == "0", f"{what}: spills: {usage}"
    assert int(usage["STACK"]) <= frame, f"{what}: spills: {usage}"
    assert compiled.metadata.shared <= SHARED_LIMIT[arch], f"{what}: {compiled.metadata.shared} bytes shared"
    if tensor_cores:
        expected = TENSOR_CORES[arch] if kwargs["M"] >= 64 else "HMMA"
        assert re.search(rf"\b{expected}\b", cuobjdump("-sass", cubin)), f"{what}: no {expected}"
    if vectors:
        words = cuobjdump("-sass", cubin)
        for access in (r"LDG\.E\S*\.128", r"STG\.E\S*\.128"):
            assert re.search(access, words), f"{what}: no {access}"


def cuobjdump(option: str, path) -> str:
    return subprocess.run(
        [f"{BIN}/cuobjdump", option, path], capture_output=True, text=True, check=True
    ).stdout


def run_all(
    dtype, c: int = 256, groups: int = 1, transposed: int = 0, epilogue: bool = False, grads: bool = True
) -> None:
    """Forward, with ``epilogue`` everything that it can fuse, and the input and weight gradients."""
    s = 2 if transposed else 1
    g = ConvGeometry(2, 8, 8, 8 * s, 8 * s, 3, 3, s, s, 1, 1, 1, 1, groups, transposed)
    x = torch.zeros(2, c, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(c, c // groups, 3, 3, dtype=dtype)
    plan = PixelPlan.full(g.out_shape)
    count, channels = torch.tensor([len(plan)], dtype=torch.int32), torch.zeros(c, dtype=dtype)
    out = torch.zeros(2, c, 8 * s, 8 * s, dtype=dtype).contiguous(memory_format=torch.channels_last)
    fused = [channels, channels, channels[:1].expand(len(plan)), out.flatten(2).transpose(1, 2).flatten(0, 1)]
    fused = fused if epilogue else [None] * 4
    pixels.conv(x, weight, channels, plan.index, count, None, list(g), "silu", *fused, None, False)
    if not grads:
        return
    pixels.conv_input_grad(out, weight, plan.index, count, None, 0, list(g), False)
    pixels.conv_weight_grad(out, x, plan.index, count, None, list(weight.shape), list(g), False)


def use(monkeypatch, arch: int, kind: str, tile=None) -> None:
    """Launches take this architecture, precision and tile."""
    monkeypatch.setattr(tiling, "device_facts", lambda device: (arch, 1))
    monkeypatch.setattr(tiling, "precision", lambda dtype, product="conv": kind)
    if tile is not None:
        monkeypatch.setattr(tiling, "TILES", {(arch, kind): (tile,)})


def distinct(launches) -> list:
    """One launch for each kernel and form of its arguments (a key kernel is launched again and again)."""
    forms = ((k, a, kw, [getattr(v, "dtype", type(v)) for v in a]) for k, a, kw in launches)
    return list({(id(k), str(kw), str(form)): (k, a, kw) for k, a, kw, form in forms}.values())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
def test_products(arch, kind, launches, monkeypatch, tmp_path):
    """The kernels with a matrix product: every tile of the table in bfloat16, the large ones in float32."""
    tiles, dtype = tiling.TILES[arch, kind], torch.bfloat16 if kind == "half" else torch.float32
    use(monkeypatch, arch, kind)
    run_all(dtype, epilogue=True)
    run_all(dtype, c=261, epilogue=True)  # not a multiple of 16
    plain = tiles if kind == "half" else tiles[:1]
    for tile in plain:
        use(monkeypatch, arch, kind, tile)
        run_all(dtype, grads=tile.m * tile.n > 32 * 32)  # the ragged run has those of small ones
    products = [launch for launch in launches if launch[0] in (pixels.conv_kernel, weight_grad_kernel)]
    assert len(products) == 6 + sum(3 if tile.m * tile.n > 32 * 32 else 1 for tile in plain)
    for launch in products:
        check(launch, arch, tmp_path, tensor_cores=kind != "ieee")


@pytest.mark.parametrize("arch", ARCHS)
def test_other_kernels(arch, launches, monkeypatch, tmp_path):
    """Depthwise, transposed (rows in the order of their taps), gather and scatter."""
    use(monkeypatch, arch, "half")
    for dtype in (torch.float16, torch.float32):
        run_all(dtype, c=64, groups=64, epilogue=True)
    run_all(torch.float16, transposed=1, epilogue=True)
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.float64):
        x, plan = torch.zeros(2, 32, 8, 8, dtype=dtype), PixelPlan.full((2, 8, 8))
        rows = pixels.gather_rows(x, plan.index, None)
        pixels.scatter_rows(rows, plan.index, None, [2, 8, 8], None)
    names = {launch[0].__name__ for launch in launches}
    assert {"direct_conv_kernel", "direct_weight_grad_kernel", "tap_key_kernel"} <= names
    assert {"gather_rows_kernel", "scatter_rows_kernel"} <= names
    for launch in distinct(launches):
        check(launch, arch, tmp_path, tensor_cores=False)


def run_blocks(dtype, c: int, layout=torch.channels_last) -> None:
    """Gather with a halo, and scatter: replacing, onto a base, and adding tiles that overlap."""
    x = torch.zeros(2, c, 32, 32, dtype=dtype).contiguous(memory_format=layout)
    plan = BlockPlan.from_mask(torch.ones(2, 32, 32), 8)
    g = plan.geometry.widened((1, 1, 1, 1))
    tiles = blocks.gather_tiles(x, plan.index, None, list(g))
    blocks.scatter_tiles(tiles[:, :, 1:-1, 1:-1], plan.index, None, list(plan.geometry), None, False)
    blocks.scatter_tiles(tiles[:, :, 1:-1, 1:-1], plan.index, None, list(plan.geometry), x, False)
    blocks.scatter_tiles(tiles, plan.index, None, list(g), None, True)
    blocks.scatter_tiles(tiles, plan.index, None, list(g), x, True)


@pytest.mark.parametrize("arch", ARCHS)
def test_blocks_move_vectors(arch, launches, monkeypatch, tmp_path):
    """Channels a multiple of 8 (of 4 in float32) are moved in words of 16 bytes."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        run_blocks(dtype, c=24)
    monkeypatch.setattr(gemm, "INT32_LIMIT", 1)
    run_blocks(torch.bfloat16, c=24)
    every = distinct(launches)
    assert {kwargs["UNIT"] for _, _, kwargs in every} == {4, 8} and len(every) == 17
    for launch in every:
        check(launch, arch, tmp_path, tensor_cores=False, vectors=True)


@pytest.mark.parametrize("arch", ARCHS)
def test_blocks_of_any_channels(arch, launches, tmp_path):
    """NCHW with a halo, and odd channels: element by element."""
    run_blocks(torch.bfloat16, c=24, layout=torch.contiguous_format)
    run_blocks(torch.float32, c=13)
    every = distinct(launches)
    assert {kwargs["UNIT"] for _, _, kwargs in every} >= {1, 4}
    for launch in every:
        check(launch, arch, tmp_path, tensor_cores=False)


@pytest.mark.parametrize("arch", ARCHS)
def test_samples_move_vectors(arch, launches, tmp_path):
    """Whole samples: a part of one row to a program, in words of 16 bytes."""
    plan = SamplePlan.full(4)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.zeros(4, 16 * 2048, dtype=dtype)
        for scale, mix in ((None, False), (torch.zeros(4), False), (torch.zeros(4), True)):
            rows.merge_rows(x, plan.index, None, x, scale, mix)
        rows.scatter_rows(x, plan.index, None, [4, 1, 1], None)
    every = list(launches)
    assert len(every) == 8 and all(kwargs["M"] == 1 for _, _, kwargs in every)
    for launch in every:  # one word at most, with which ptxas stays at 32 registers on sm_100
        check(launch, arch, tmp_path, tensor_cores=False, vectors=True, frame=8)
    launches.clear()
    rows.merge_rows(x[:, :19], plan.index, None, x[:, :19], torch.zeros(4, dtype=torch.bfloat16), True)
    (short,) = launches
    check(short, arch, tmp_path, tensor_cores=False, frame=8)


def run_channels(
    dtype, c=256, h=28, n=8, kernel=1, groups=1, heads=1, packed=False, epilogue=False, grads=True
) -> None:
    """Forward, with ``epilogue`` everything that it can fuse, and the gradients; other lists in each sample."""
    g = ConvGeometry(n, h, h, h, h, kernel, kernel, 1, 1, kernel // 2, kernel // 2, 1, 1, groups, 0)
    x = torch.zeros(n, c, h, h, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(c, c // groups, kernel, kernel, dtype=dtype)
    ins = ChannelPlan.from_mask(torch.ones((n, c) if heads == 1 else (n, heads, c)))
    outs = ChannelPlan.from_mask(torch.ones(n, c))
    lists = (ins.index, ins.count, outs.index, outs.count)
    fused = (torch.zeros(n, c, dtype=dtype), None if packed else x) if epilogue else (None, None)
    width = c if packed else -1
    channels.conv(x, weight, weight[:, 0, 0, 0], *lists, list(g), heads, "silu", *fused, packed, width)
    if grads:
        channels.conv_input_grad(x, weight, *lists, list(g), heads, width, packed)
        channels.conv_weight_grad(x, x, *lists, list(weight.shape), list(g), heads, packed, packed, True)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
def test_channel_products(arch, kind, launches, monkeypatch, tmp_path):
    """The largest tile for compact operands, for channels taken through lists, and with an epilogue."""
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    use(monkeypatch, arch, kind)
    run_channels(dtype, kernel=3)  # x and the weight compact
    run_channels(dtype, h=7, n=64)  # neither
    run_channels(dtype, c=261, h=7, n=64, packed=True, epilogue=True, grads=False)
    run_channels(dtype, c=261, h=7, n=64, epilogue=True, grads=False)
    if kind == "half":
        run_channels(dtype, h=7, n=64, kernel=3)  # x compact
        run_channels(dtype, c=64, kernel=3, groups=2)
        run_channels(dtype, c=64, kernel=3, heads=2)
    products = (channels.conv_kernel, channels_weight.weight_grad_kernel)
    every = [
        launch for launch in distinct(launches) if launch[0] in products and not launch[2].get("first_job")
    ]
    assert len(every) == (17 if kind == "half" else 8)
    for (
        launch
    ) in every:  # one word at most, with which ptxas stays at 80, 96 or 168 registers on sm_80 and sm_90
        check(launch, arch, tmp_path, tensor_cores=kind != "ieee", frame=8)
    if kind == "half":
        assert re.search(r"LDGSTS\S*\.128", sass(every[0], arch, tmp_path)), "compact operands are no vectors"


def sass(launch, arch: int, tmp_path) -> str:
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compile_launch(*launch, arch).asm["cubin"])
    return cuobjdump("-sass", cubin)


@pytest.mark.parametrize("arch", ARCHS)
def test_other_channel_kernels(arch, launches, monkeypatch, tmp_path):
    """Depthwise, moving channels by their lists, and adding the copies of the weight gradient."""
    use(monkeypatch, arch, "half")
    run_channels(torch.float16, c=64, kernel=3, groups=64, epilogue=True)
    run_channels(torch.float32, c=64, kernel=3, groups=64, packed=True)
    for dtype in (torch.bfloat16, torch.float32):
        run_channels(dtype, c=64, kernel=3)
        for layout in (torch.channels_last, torch.contiguous_format):
            x = torch.zeros(2, 64, 8, 8, dtype=dtype).contiguous(memory_format=layout)
            plan = ChannelPlan.from_mask(torch.ones(2, 64))
            packed = channels.gather(x, plan.index, plan.count, 64)
            channels.scatter(packed, plan.index, plan.count, 64, x)
    products = (channels.conv_kernel, channels_weight.weight_grad_kernel)
    every = [launch for launch in distinct(launches) if launch[0] not in products]
    names = {launch[0].__name__ for launch in every}
    assert names == {
        "direct_conv_kernel", "direct_weight_grad_kernel", "gather_channels_kernel", "scatter_channels_kernel",
        "pack_weight_kernel", "slots_kernel", "add_copies_kernel",
    }  # fmt: skip
    for launch in every:
        check(launch, arch, tmp_path, tensor_cores=False)


def run_experts(
    dtype,
    h=256,
    i=256,
    activation="silu",
    interleaved=False,
    transposed=False,
    int8=False,
    topk=2,
    grads=False,
) -> None:
    """The MLP of 512 rows for each expert, and with ``grads`` the weight gradient, packed and gathered."""
    tokens, count = 1024 // topk, 2
    plan = ExpertPlan.from_topk(torch.arange(1024).view(tokens, topk) % count, count)
    indices = (plan.order, plan.offsets, plan.position)
    x, weights = torch.zeros(tokens, h, dtype=dtype), torch.zeros(tokens, topk)
    shapes = ((h, 2 * i), (i, h)) if transposed else ((2 * i, h), (h, i))
    up, down = ((torch.zeros(count, *shape, dtype=dtype), None) for shape in shapes)
    if int8:
        up, down = (ops.quantize_experts(weight, transposed) for weight, _ in (up, down))
    biases = (torch.zeros(count, n, dtype=dtype) for n in (2 * i, h))
    options = (activation, True, interleaved, transposed, transposed, 1.702, 7.0)
    experts.mlp(x, up[0], down[0], up[1], down[1], *biases, weights, *indices, *options)
    if grads:
        rows = torch.zeros(plan.num_rows, i, dtype=dtype)
        experts.weight_grad(x, rows, weights, *indices, False, True, transposed, True)
        experts.weight_grad(rows, x, None, *indices, True, False, transposed, False)


EXPERT_PRODUCTS = (experts.linear_kernel, experts_weight.weight_grad_kernel)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", ["half", "tf32", "ieee"])
def test_expert_products(arch, kind, launches, monkeypatch, tmp_path):
    """The largest tile for each layout and form of the weight, and with what else takes registers."""
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    use(monkeypatch, arch, kind)
    run_experts(dtype, grads=True)
    if kind != "tf32":
        run_experts(dtype, int8=True)
    run_experts(dtype, h=261, i=261, activation="gelu", topk=1, grads=kind == "half")
    if kind == "half":
        run_experts(dtype, activation="clamped_swiglu", interleaved=True, transposed=True)
        run_experts(dtype, activation="gelu", topk=1)
    every = [launch for launch in launches if launch[0] in EXPERT_PRODUCTS]
    assert len(every) == {"half": 14, "tf32": 6, "ieee": 8}[kind]
    for (
        launch
    ) in every:  # one word at most: Triton 3.6's ptxas stays at 80 registers on sm_90, as with channels
        check(launch, arch, tmp_path, tensor_cores=kind != "ieee", frame=8)
    if kind == "half":  # gate and up of the first product, gathered and in vectors
        assert re.search(r"LDGSTS\S*\.128", sass(every[0], arch, tmp_path)), "rows or weights are no vectors"


@pytest.mark.parametrize("arch", ARCHS)
def test_small_expert_tiles(arch, launches, monkeypatch, tmp_path):
    """The tiles of few rows, with gate and up in one."""
    small = [tile for tile in tiling.TILES[arch, "half"] if tile.m * tile.n <= 64 * 64]
    for tile in small:
        use(monkeypatch, arch, "half", tile)
        run_experts(torch.bfloat16)
    every = [launch for launch in launches if launch[2].get("GATED")]
    assert len(every) == len(small) == 4
    for launch in every:
        check(launch, arch, tmp_path, tensor_cores=True)


@pytest.mark.parametrize("arch", ARCHS)
def test_other_expert_kernels(arch, launches, monkeypatch, tmp_path):
    """The gradient of the bias, activations and their gradients, gather, combine and dots."""
    use(monkeypatch, arch, "half")
    for dtype in (torch.bfloat16, torch.float32) if arch == 80 else (torch.bfloat16,):
        run_experts(dtype, grads=True)
        plan = ExpertPlan.from_topk(torch.arange(64).view(32, 2) % 4, 4)
        indices, weights = (plan.order, plan.offsets, plan.position), torch.zeros(32, 2)
        x = torch.zeros(32, 256, dtype=dtype)
        rows = experts.gather(x, weights, *indices)
        experts.combine(rows, weights, *indices)
        experts.dots(x, rows, False, *indices)
        experts.dots(rows, rows, True, *indices)
        for activation, interleaved in (("clamped_swiglu", True), ("gelu", False)):
            options = (activation, True, interleaved, 1.702, 7.0)
            experts.activation_grad(experts.activation(rows, *options), rows, *options)
    every = [launch for launch in distinct(launches) if launch[0] not in EXPERT_PRODUCTS]
    assert {launch[0].__name__ for launch in every} == {
        "bias_grad_kernel", "activation_kernel", "activation_grad_kernel", "gather_pairs_kernel",
        "combine_pairs_kernel", "pair_dots_kernel",
    }  # fmt: skip
    for launch in every:  # bias_grad_kernel: one word, with which ptxas stays at 40 registers on sm_100
        check(launch, arch, tmp_path, tensor_cores=False, frame=8)
