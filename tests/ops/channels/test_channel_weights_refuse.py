"""What convolutions with weights of samples, regions and mixtures refuse."""

import pytest
import torch

from dynops import ops
from dynops.testing import (
    random_tensor,
)

X, W, B = random_tensor(3, 6, 9, 10), random_tensor(3, 4, 3, 3, 3), random_tensor(3, 4)
REGION, MIX = torch.randint(0, 3, (3, 9, 10)), random_tensor(3, 3)
META = torch.device("meta")


@pytest.mark.parametrize("error, match, changed", [
    (TypeError, r"x: expected a floating dtype, got torch.int64", {"x": X.long()}),
    (ValueError, r"x: expected 6 channels.*\(3, 4, 9, 10\)", {"x": X[:, :4]}),
    (TypeError, r"weight: expected a tensor \[N, O.*NoneType", {"weight": None}),
    (ValueError, r"weight: expected \[N, O.*\(4, 3, 3, 3\)", {"weight": W[0]}),
    (ValueError, r"weight: .*kernel.*\(3, 4, 3, 0, 3\)", {"weight": W[:, :, :, :0]}),
    (ValueError, r"weight: expected one for each of 3 samples, got shape \(2, 4, 3, 3, 3\)", {"weight": W[:2]}),
    (TypeError, r"weight: expected x's dtype torch.float32, got torch.bfloat16", {"weight": W.bfloat16()}),
    (TypeError, r"bias: .*float32.*float64", {"bias": B.double()}),
    (ValueError, r"bias: expected \[N, O\] = \(3, 4\) or \[O\] = \(4,\), got shape \(3, 3\)", {"bias": B[:, :3]}),
    (ValueError, r"groups: .*got 3", {"groups": 3}),
    (ValueError, r"activation: .*'tanh'", {"activation": "tanh"}),
])  # fmt: skip
def test_errors_of_sample(error, match, changed):
    arguments = {"x": X, "weight": W, "bias": B, "padding": 1, "groups": 2}
    ops.sample_conv2d(**arguments)
    with pytest.raises(error, match=match):
        ops.sample_conv2d(**arguments | changed)


@pytest.mark.parametrize("error, match, changed", [
    (ValueError, r"weights: expected \[N, R.*or \[R.*\(4, 3, 3, 3\)", {"weights": W[0]}),
    (ValueError, r"weights: expected one for each of 3 samples", {"weights": W[:2, None]}),
    (TypeError, r"region: expected a tensor.*int", {"region": 3}),
    (TypeError, r"region: expected an integer dtype, got torch.float32", {"region": REGION.float()}),
    (TypeError, r"region: expected an integer dtype, got torch.bool", {"region": REGION.bool()}),
    (ValueError, r"region: expected the output's \[N, H, W\] = \(3, 9, 10\), got \(3, 9, 9\)", {"region": REGION[..., 1:]}),
    (ValueError, r"region: .*meta", {"region": REGION.to(META)}),
    (ValueError, r"region: expected values in \[0, 3\), got 0 to 3", {"region": REGION + (REGION == 2)}),
    (ValueError, r"region: expected values in \[0, 3\), got -1 to 1", {"region": REGION - 1}),
    (ValueError, r"bias: expected \[R, O\] = \(3, 4\), got shape \(4,\)", {"bias": B[0]}),
])  # fmt: skip
def test_errors_of_region(error, match, changed):
    arguments = {"x": X, "weights": W, "region": REGION, "bias": B, "padding": 1, "groups": 2}
    ops.region_conv2d(**arguments)
    with pytest.raises(error, match=match):
        ops.region_conv2d(**arguments | changed)


@pytest.mark.parametrize("error, match, changed", [
    (ValueError, r"weights: expected \[E, O.*\(4, 3, 3, 3\)", {"weights": W[0]}),
    (ValueError, r"weights: expected at least one to mix.*\(0, 4, 3, 3, 3\)", {"weights": W[:0]}),
    (TypeError, r"mix: expected a tensor \[N, E\], got NoneType", {"mix": None}),
    (TypeError, r"mix: expected a floating dtype, got torch.int64", {"mix": MIX.long()}),
    (ValueError, r"mix: expected shape \(3, 3\), got \(3, 2\)", {"mix": MIX[:, 1:]}),
    (ValueError, r"mix: .*meta", {"mix": MIX.to(META)}),
    (ValueError, r"bias: expected \[E, O\] = \(3, 4\) or \[O\] = \(4,\), got shape \(2, 4\)", {"bias": B[:2]}),
])  # fmt: skip
def test_errors_of_mixed(error, match, changed):
    arguments = {"x": X, "weights": W, "mix": MIX, "bias": B, "padding": 1, "groups": 2}
    ops.mixed_conv2d(**arguments)
    with pytest.raises(error, match=match):
        ops.mixed_conv2d(**arguments | changed)


def test_the_fused_activation_refuses_to_be_differentiated():
    x, g = X.clone().requires_grad_(), [3, 9, 10, 9, 10, 3, 3, 1, 1, 1, 1, 1, 1, 2, 0]
    with pytest.raises(RuntimeError, match="activation has no gradient"):
        torch.ops.dynops.weighted_conv(x, W[:, None], None, None, g, "relu", "")
    with pytest.raises(RuntimeError, match="activation has no gradient"):
        torch.ops.dynops.mixed_conv(x, W, MIX, None, g, "relu", "")
