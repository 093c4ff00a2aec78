"""Two ranks with gloo: what is made of weights follows collectives, FSDP2 and DistributedDataParallel; synchronised norms."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from process_groups import Processes
from torch import nn

import dynops
from dynops.testing import random_mask

SIZE = 12


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    group = Processes(2, tmp_path_factory.mktemp("ranks"), __name__)
    yield group
    group.stop()


def network() -> nn.ModuleList:
    torch.manual_seed(1)
    return nn.ModuleList(
        dynops.nn.SparseConv2d(64, 64, 3, padding=1) for _ in range(3)
    )  # too large to be hashed whole


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2 + dist.get_rank())
    return torch.randn(1, 64, SIZE, SIZE), random_mask((1, SIZE, SIZE), 0.5)


class Net(nn.Module):
    """Each layer is compared with itself without a mask: the dense layer on the weights as they are just then."""

    def __init__(self):
        super().__init__()
        self.layers, self.norm = network(), nn.BatchNorm2d(64)

    def forward(self, x, mask):
        for layer in self.layers:
            with torch.no_grad():
                assert_as_dense(layer, x, mask)
            x = self.norm(torch.relu(layer(x, mask))) * mask[:, None]
        return x


def assert_as_dense(layer: nn.Module, x, mask, what: str = "") -> None:
    dense = layer(x) * mask[:, None]
    torch.testing.assert_close(
        layer(x, mask), dense, rtol=1e-4, atol=1e-4 * float(dense.abs().max()), msg=what
    )


def check_collectives() -> None:
    conv, (x, mask) = network()[0], sample()
    writes = {
        "broadcast": lambda p: dist.broadcast(p, 0),
        "all_reduce": lambda p: dist.all_reduce(p),
        "all_gather_into_tensor": lambda p: dist.all_gather_into_tensor(
            p.view(-1), p.view(-1)[: p.numel() // 2].clone() * 2
        ),
    }
    with torch.no_grad():
        for p in conv.parameters():
            p.add_(dist.get_rank())
        for name, write in writes.items():
            conv(x, mask)
            before = conv.weight.clone()
            for p in conv.parameters():
                write(p)
            moved = dist.get_rank() or name != "broadcast"
            assert not moved or not torch.equal(before, conv.weight), name
            assert_as_dense(conv, x, mask, name)


def train(net: nn.Module, make_optimizer) -> None:
    optimizer, (x, mask) = make_optimizer(net.parameters()), sample()
    losses = []
    for step in range(5):
        net.train(step % 2 == 0)
        loss = (net(x, mask) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        net.eval()
        with torch.no_grad():
            net(x, mask)
        losses.append(loss.item())
    assert losses[-1] != losses[0]


def fully_sharded(reshard: bool):
    def wrap(net):
        from torch.distributed.fsdp import fully_shard

        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for layer in net.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
        return fully_shard(net, mesh=mesh, reshard_after_forward=reshard)

    return wrap


WRAPS = {
    "ddp": nn.parallel.DistributedDataParallel,
    "fsdp2": fully_sharded(False),
    "fsdp2_resharded": fully_sharded(True),
}


def check_training(name: str) -> None:
    train(WRAPS[name](Net()), lambda p: torch.optim.SGD(p, lr=0.5))
    train(WRAPS[name](Net()), lambda p: torch.optim.AdamW(p, lr=0.01, fused=True))


def test_collectives(processes):
    processes.run(check_collectives)


@pytest.mark.parametrize("name", WRAPS)
def test_training(processes, name):
    processes.run(check_training, name)


def check_synchronised_norms(densities: tuple[float, float], capacity: int | None, tracks: bool) -> None:
    """Each rank has one sample. Values, gradients and statistics are those of both samples in one process."""
    warnings.simplefilter("error", FutureWarning)  # torch's, which a user would see
    rank = dist.get_rank()
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, track_running_stats=tracks), nn.ReLU()
    whole = nn.Sequential(*layers, nn.Conv2d(6, 4, 3, padding=1)).double().train()
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(whole))
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    mask = torch.cat([random_mask((1, SIZE, SIZE), density) for density in densities])
    dynops.convert_(whole)
    dynops.convert_(shared)
    own = dynops.PixelPlan.from_mask(mask[rank : rank + 1], capacity)
    with dynops.use_mask(mask):
        expected = whole(x)
    with dynops.use_mask(own):
        out = shared(x[rank : rank + 1])
    torch.testing.assert_close(out, expected[rank : rank + 1])
    expected.square().sum().backward()
    out.square().sum().backward()
    for (name, p), q in zip(whole.named_parameters(), shared.parameters(), strict=True):
        dist.all_reduce(q.grad)
        torch.testing.assert_close(q.grad, p.grad, msg=f"{name}: gradient {q.grad}, expected {p.grad}")
    for (name, a), b in zip(whole.named_buffers(), shared.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=f"{name}: {b}, expected {a}")


@pytest.mark.parametrize("capacity", [None, SIZE * SIZE])
def test_norms_are_over_the_active_pixels_of_all_ranks(processes, capacity):
    processes.run(check_synchronised_norms, (0.5, 0.2), capacity, True)
    processes.run(check_synchronised_norms, (0.5, 0.0), capacity, False)
    processes.run(check_synchronised_norms, (0.0, 0.0), capacity, True)
