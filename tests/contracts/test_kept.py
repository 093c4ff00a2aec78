"""What is made of weights, norms and plans is made again when these change, however they are written."""

import pytest
import torch
import torch.nn.functional as F
from masked_conv import Net, assert_near, in_place, unseen
from processes import run_script
from torch import nn

import dynops
from dynops.kept import Kept, Mark, kept, refresh
from dynops.kernels.cpu import engine
from dynops.testing import available_backends, random_mask, random_tensor

needs_binary = pytest.mark.skipif(
    "cpp" not in available_backends(), reason="without a binary nothing is kept"
)


def part_in_place(net):
    with torch.no_grad():
        net.weight[3].add_(1)


def through_a_view(net):
    net.weight.detach().view(-1).neg_()


def optimiser(make):
    def change(net):
        net.weight.grad = torch.ones_like(net.weight)
        make([net.weight]).step()

    return change


def data_swap_where_memory_is_reused(net):
    """The second swap is likely to get the address that the first one freed."""
    shape = net.weight.shape
    net.weight.data = torch.empty(0)
    net.weight.data = random_tensor(*shape) * 5


def memory_format(net):
    net.to(memory_format=torch.channels_last)


def same_data_other_strides(net):
    with torch.no_grad():
        square = net.weight.data.as_strided(net.weight.shape, (9, 9 * 24, 1, 3))
    net.weight.data = square


def through_data(net):
    """As an exponential moving average is swapped in, or a critic's weights are clamped."""
    net.weight.data.mul_(0.5).add_(1)


def one_slice_through_data(net):
    """Half of a weight: pruning of filters."""
    net.weight.data[::2] = 0
    net.weight.data[1::2] += 1


def swap(net):
    """What ``module.to`` does where ``torch.__future__.set_swap_module_params_on_conversion`` is set."""
    torch.utils.swap_tensors(net.weight, nn.Parameter(net.weight.detach() * 2))


def swap_on_conversion(net):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.bfloat16().float()
        net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def refilled_storage(net):
    """As FSDP2 frees and gathers a weight, at another or at the same address."""
    new, storage = net.weight.detach() + 1, net.weight.untyped_storage()
    with torch.autograd._unsafe_preserve_version_counter(net.weight):
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        net.weight.data.copy_(new)


def averaged(net):
    average = torch.optim.swa_utils.AveragedModel(net)
    average.update_parameters(net)
    with torch.no_grad():
        torch._foreach_mul_(list(average.module.parameters()), 1.5)
        for weight, mean in zip(net.parameters(), average.module.parameters(), strict=True):
            weight.data.copy_(mean)


class DataSgd(torch.optim.Optimizer):
    """An optimiser that writes through ``.data``."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.at = 7

    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data.view(-1)[self.at] += 1000


# Loading, other dtypes and numpy are in test_kept_training.py
CHANGES = {
    f.__name__: f
    for f in (
        in_place, part_in_place, through_a_view, data_swap_where_memory_is_reused, memory_format,
        same_data_other_strides, through_data, one_slice_through_data, swap, swap_on_conversion, refilled_storage,
        averaged,
    )
} | {
    "sgd": optimiser(lambda p: torch.optim.SGD(p, lr=1.0)),
    "adam_fused": optimiser(lambda p: torch.optim.Adam(p, lr=1.0, fused=True)),  # bumps no version
    "sgd_fused": optimiser(lambda p: torch.optim.SGD(p, lr=1.0, fused=True)),
    "through_data_in_a_step": optimiser(DataSgd),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_weight_is_seen(change):
    net = Net()
    net.check()
    net.check()
    before = net.weight.detach().clone()
    for _ in range(3):
        change(net)
        net.check()
        assert net.weight.dtype == torch.float32
    assert change is memory_format or not torch.equal(net.weight, before)


@needs_binary
def test_a_layer_that_moved_in_inference_mode_is_packed_once(monkeypatch):
    """``module.to`` there gives its parameters data without a version, and they keep the one that they had."""
    layer, remade = dynops.nn.SparseConv2d(32, 32, 3, padding=1), []
    remake = Kept._remake
    monkeypatch.setattr(Kept, "_remake", lambda self, *a: remade.append(a[0]) or remake(self, *a))
    x, mask = random_tensor(1, 32, 9, 9), random_mask((1, 9, 9), 0.5)
    with torch.inference_mode():
        layer.to(memory_format=torch.channels_last)
        for _ in range(3):
            layer(x, mask)
        assert len(remade) == 1
        layer.weight.mul_(2)
        assert_near(
            layer(x, mask),
            F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1) * mask[:, None],
        )
        assert len(remade) == 2


@needs_binary
def test_an_inference_tensor_is_packed_once():
    with torch.inference_mode():
        weight = torch.rand(8, 8)
        cache, calls = Kept(), []
        for _ in range(3):
            cache.get("key", lambda: calls.append(0) or torch.rand(3), weight)
        assert len(calls) == 1
        weight.add_(1)
        cache.get("key", lambda: calls.append(0) or torch.rand(3), weight)
        assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_that_touches_two_of_64_experts(dtype):
    weight = torch.rand(64, 48, 40).to(dtype)
    mark = Mark(weight)
    assert mark.holds(weight)
    for expert in range(64):
        changed = weight.data  # shares no version with the weight
        changed[expert] += 1
        assert not mark.holds(weight), f"expert {expert}"
        changed[expert] -= 1
        mark = Mark(weight)


def test_a_step_is_seen_where_no_fingerprint_looks():
    weight, calls = nn.Parameter(torch.rand(200, 300)), []
    at = unseen(weight)
    optimizer = DataSgd([weight])
    for place in (7, at, at):
        made = kept.get("copy", lambda: calls.append(0) or weight.detach().clone(), weight)
        assert torch.equal(made, weight)
        optimizer.at = place
        optimizer.step()


def test_refresh():
    net = nn.Sequential(dynops.nn.SparseConv2d(32, 64, 3, padding=1), nn.Identity()).eval()
    x, mask = random_tensor(1, 32, 8, 8), random_mask((1, 8, 8), 0.5)
    with torch.no_grad():
        net[0](x, mask)
        net[0].weight.data.view(-1)[unseen(net[0].weight)] += 1000
        refresh(net)
        assert_near(
            net[0](x, mask),
            F.conv2d(x.double(), net[0].weight.double(), net[0].bias.double(), padding=1) * mask[:, None],
        )
    other = dynops.nn.SparseConv2d(4, 4, 1)
    with torch.no_grad():
        other(random_tensor(1, 4, 4, 4), torch.ones(1, 4, 4))
    size = len(kept)
    refresh(net)
    assert len(kept) == max(size - 1, 0)  # only what was made of the net
    refresh()
    assert len(kept) == 0
    with pytest.raises(TypeError, match=r"expected an nn\.Module or None, got Parameter"):
        refresh(other.weight)


@needs_binary
def test_under_autocast_a_weight_that_is_trained_is_packed_once(monkeypatch):
    layer = dynops.nn.SparseConv2d(32, 32, 3, padding=1)
    x, mask = random_tensor(1, 32, 12, 12), random_mask((1, 12, 12), 0.3)
    pack, calls = engine.CPP.pack_weight, []
    monkeypatch.setattr(engine.CPP, "pack_weight", lambda *a: calls.append(0) or pack(*a))
    grads = []
    for _ in range(3):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x, mask)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        grads.append(layer.weight.grad)
    assert len(calls) == 1  # the input needs no gradient
    assert grads[0].dtype == torch.float32 and torch.equal(grads[0], grads[2])
    wide = layer.weight.detach().double().requires_grad_()
    (F.conv2d(x.double(), wide, layer.bias.double(), padding=1) * mask[:, None]).square().sum().backward()
    assert (grads[0] - wide.grad).norm() < 0.02 * wide.grad.norm()


@needs_binary
def test_another_process_writes_shared_memory():
    out = run_script("""
        import torch, dynops, torch.multiprocessing as mp
        from torch.nn.functional import conv2d
        def write(weight): weight.add_(1)
        layer = dynops.nn.SparseConv2d(8, 8, 3, padding=1).share_memory()
        x, mask = torch.rand(1, 8, 9, 9), torch.ones(1, 9, 9); mask[:, 0] = 0
        with torch.no_grad():
            layer(x, mask)
            process = mp.get_context("fork").Process(target=write, args=(layer.weight,))
            process.start(); process.join()
            exact = conv2d(x, layer.weight, layer.bias, padding=1) * mask[:, None]
            print(float((layer(x, mask) - exact).abs().max() / exact.abs().max()) < 1e-5)
    """)
    assert out.split() == ["True"]
