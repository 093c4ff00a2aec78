"""changed_blocks: what two maps differ in, and that a stream which computes only that never drifts."""

import pytest
import torch
from torch import nn

from dynops import changed_blocks
from dynops.nn import SparseBlocks
from dynops.testing import assert_within_budget, random_tensor


def blocks_of(pixels, shape, block_size):
    """The mask of blocks [N, GH, GW] that hold one of ``pixels`` (n, y, x)."""
    n, h, w = shape
    out = torch.zeros(n, -(-h // block_size[0]), -(-w // block_size[1]), dtype=torch.bool)
    for i, y, x in pixels:
        out[i, y // block_size[0], x // block_size[1]] = True
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.bool])
@pytest.mark.parametrize("block_size", [(4, 4), (5, 3), (1, 1), (100, 100)])
def test_blocks_with_a_changed_pixel(block_size, dtype):
    previous = (random_tensor(2, 3, 13, 10) * 100).to(dtype)
    pixels = [(0, 0, 0), (0, 12, 9), (1, 7, 2), (1, 7, 3)]
    current = previous.clone()
    for n, y, x in pixels:
        value = current[n, 1, y, x]
        current[n, 1, y, x] = ~value if dtype == torch.bool else value + 1
    plan = changed_blocks(previous, current, block_size)
    assert plan.shape == (2, 13, 10) and plan.block_size == block_size
    assert torch.equal(plan.blocks(), blocks_of(pixels, (2, 13, 10), block_size))
    assert changed_blocks(previous, previous.clone(), block_size).num_blocks == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.int64])
def test_tolerance_is_what_a_change_must_exceed(dtype):
    previous = torch.full((1, 2, 4, 4), 200).to(dtype)
    current = previous.clone()
    current[0, 0, 0, 0] -= 3
    current[0, 1, 1, 3] += 3  # up and down: unsigned integers would wrap
    current[0, 1, 3, 0] += 4
    assert changed_blocks(previous, current, 1, 2.5).num_blocks == 3
    assert changed_blocks(previous, current, 1, 3).index.tolist() == [12]
    assert changed_blocks(previous, current, 1, float("inf")).num_blocks == 0


@pytest.mark.parametrize("tolerance", [0.0, 0.5, float("inf")])
@pytest.mark.parametrize("where", ["previous", "current", "both"])
def test_nan_has_changed(where, tolerance):
    maps = {"previous": torch.zeros(1, 2, 4, 4), "current": torch.zeros(1, 2, 4, 4)}
    for name in maps if where == "both" else [where]:
        maps[name][0, 1, 2, 3] = torch.nan
    assert changed_blocks(**maps, block_size=1, tolerance=tolerance).index.tolist() == [11]


def test_equal_infinities_have_not_changed():
    x = torch.full((1, 1, 2, 2), torch.inf)
    assert changed_blocks(x, x.clone(), 1).num_blocks == 0


def test_no_batch_and_gradients():
    x = torch.randn(0, 3, 8, 8, requires_grad=True)
    assert changed_blocks(x, x * 2, 4).shape == (0, 8, 8)
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    assert changed_blocks(x, x * 2, 4, 0.1).is_full


def test_compiles():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(previous, current):
        return changed_blocks(previous, current, (3, 2), 0.1).blocks()

    previous = random_tensor(2, 3, 7, 8)
    current = previous.clone()
    current[1, 2, 6, 5] += 1
    assert torch.equal(run(previous, current), blocks_of([(1, 6, 5)], (2, 7, 8), (3, 2)))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "previous: expected a tensor", {"previous": [1]}),
        (ValueError, r"previous: expected \[N, C, H, W\], got shape \(3, 8, 8\)", {"previous": torch.ones(3, 8, 8)}),
        (ValueError, "current: expected the shape of previous", {"current": torch.ones(1, 3, 8, 9)}),
        (TypeError, "current: expected the dtype of previous", {"current": torch.ones(1, 3, 8, 8).half()}),
        (ValueError, "on the device of previous cpu", {"current": torch.ones(1, 3, 8, 8, device="meta")}),
        (ValueError, "tolerance: expected a number >= 0, got -1", {"tolerance": -1}),
        (ValueError, "tolerance: expected a number >= 0, got nan", {"tolerance": float("nan")}),
        (ValueError, "tolerance: expected a number >= 0, got '1'", {"tolerance": "1"}),
        (ValueError, "block_size: expected an int or a pair of ints >= 1, got 0", {"block_size": 0}),
        (TypeError, "layer: expected a dynops.nn.SparseBlocks, got Conv2d", {"layer": nn.Conv2d(3, 3, 1)}),
        (ValueError, r"block_size: expected the layer's \(4, 4\), got 8", {"layer": SparseBlocks(nn.Conv2d(3, 3, 1), 4), "block_size": 8}),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(error, message, arguments):
    fitting = {"previous": torch.ones(1, 3, 8, 8), "current": torch.ones(1, 3, 8, 8), "block_size": 4}
    with pytest.raises(error, match=message):
        changed_blocks(**{**fitting, **arguments})


def test_a_stream_equals_the_whole_output_at_every_frame():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.Conv2d(4, 5, 3),
    ).eval()
    layer = SparseBlocks(net, 8)
    frame = random_tensor(2, 3, 48, 40)
    with torch.no_grad():
        output, shares = layer(frame), []
        for step in range(8):
            previous, frame = frame, frame.clone()
            frame[step % 2, :, 5 * step : 5 * step + 4, 4 * step : 4 * step + 3] *= -1
            plan = changed_blocks(previous, frame, 8, layer=layer)
            output = layer(frame, plan, base=output)
            shares.append(plan.density)
            assert_within_budget(output, net.double()(frame.double()), net.float()(frame), f"frame {step}")
    assert 0 < max(shares) < 0.4
