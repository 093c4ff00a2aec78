"""Experts sharded over processes equal those of one process: values, gradients, training steps, state dicts."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from process_groups import Processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dynops.nn import Experts, MoE, ParallelExperts, TopKRouter
from dynops.nn.experts import shards as expert_shards
from dynops.testing import assert_within_budget, random_tensor

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
HIDDEN, INNER = 24, 20


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, tmp_path_factory):
    group = Processes(request.param, tmp_path_factory.mktemp("ranks"), __name__)
    yield group
    group.stop()


def oracle(x, up, down, index, weight):
    """SwiGLU experts by masks: every expert on every token."""
    out = torch.zeros_like(x)
    for e in range(up.shape[0]):
        gate, value = (x @ up[e].T).chunk(2, 1)
        share = (weight * (index == e)).sum(1, keepdim=True).to(x.dtype)
        out = out + share * ((F.silu(gate) * value) @ down[e].T)
    return out


def make_case(experts: int, topk: int, tokens: list[int], choose: str, dtype: torch.dtype):
    """The same whole on every rank: experts, and tokens of which each rank takes its own."""
    total = sum(tokens)
    index = {
        "any": torch.randint(0, experts + 1, (total, topk)),  # with drops, and an expert twice
        "one": torch.full((total, topk), experts - 1),
        "none": torch.full((total, topk), experts),
        "all": torch.rand(total, experts).argsort(1)[:, :topk],
    }[choose]
    whole = Experts(experts, HIDDEN, INNER, dtype=dtype)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(random_tensor(*parameter.shape) / parameter.shape[-1] ** 0.5)
    bounds = [sum(tokens[:r]) for r in range(len(tokens) + 1)]
    return SimpleNamespace(
        whole=whole,
        x=random_tensor(total, HIDDEN, dtype=dtype),
        weight=random_tensor(total, topk),
        grad=random_tensor(total, HIDDEN, dtype=dtype),
        index=index,
        own=slice(bounds[dist.get_rank()], bounds[dist.get_rank() + 1]),
    )


def oracle_results(case, dtype):
    """Output and the gradients of tokens, routing weights and experts of one process that has everything."""
    tensors = (case.x, case.whole.gate_up_proj, case.whole.down_proj, case.weight)
    wide = [t.detach().to(torch.promote_types(t.dtype, dtype)).requires_grad_() for t in tensors]
    x, up, down, weight = wide
    out = oracle(x, up, down, case.index, weight)
    return out.detach(), *torch.autograd.grad(out, (x, weight, up, down), case.grad.to(out.dtype))


def check_layer(experts, topk, tokens, choose, dtype):
    case = make_case(experts, topk, tokens, choose, dtype)
    layer = ParallelExperts.from_experts(case.whole)
    x, weight = (t[case.own].clone().requires_grad_() for t in (case.x, case.weight))
    out = layer(x, case.index[case.own], weight)
    out.backward(case.grad[case.own])
    with torch.no_grad():
        once_more = layer(x, case.index[case.own], weight)
    assert_within_budget(once_more, *(r[0][case.own] for r in both(case)), "without gradients")
    actual = (out, x.grad, weight.grad, layer.experts.gate_up_proj.grad, layer.experts.down_proj.grad)
    mine = (case.own, case.own, case.own, *[slice(layer.local.start, layer.local.stop)] * 2)
    names = ("output", "tokens", "routing weights", "up", "down")
    for name, own, got, exact, dense in zip(names, mine, actual, *both(case), strict=True):
        assert_within_budget(got, exact[own], dense[own], name)


def both(case):
    return oracle_results(case, torch.float64), oracle_results(case, case.x.dtype)


CASES = {  # experts, choices, tokens of each rank, which experts
    "usual": (8, 3, [45, 25, 35, 30], "any"),
    "uneven shards": (5, 2, [20, 45, 25, 30], "all"),
    "a rank without tokens": (7, 2, [0, 55, 0, 30], "any"),
    "no tokens": (4, 2, [0, 0, 0, 0], "any"),
    "one expert": (6, 1, [35, 40, 30, 25], "one"),
    "all dropped": (6, 2, [5, 4, 3, 2], "none"),
    "every expert": (4, 4, [30, 20, 25, 15], "all"),
    "more choices than ranks": (16, 9, [30, 8, 20, 16], "all"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(processes, name, dtype):
    experts, topk, tokens, choose = CASES[name]
    processes.run(check_layer, experts, topk, tokens[: processes.ranks], choose, dtype)


def check_messages():
    """A token crosses once to each rank that has experts of its choice, and results do not depend on the run."""
    case = make_case(8, 5, [6] * dist.get_world_size(), "any", torch.float32)
    layer, rows = ParallelExperts.from_experts(case.whole), []
    layer.experts.register_forward_pre_hook(lambda module, arguments: rows.append(arguments[0]))
    out = layer(case.x[case.own], case.index[case.own], case.weight[case.own])
    wanted = ((case.index >= layer.local.start) & (case.index < layer.local.stop)).any(1)
    assert torch.equal(rows[0], case.x[wanted])
    assert torch.equal(out, layer(case.x[case.own], case.index[case.own], case.weight[case.own]))


def check_arguments():
    case = make_case(8, 2, [5] * dist.get_world_size(), "all", torch.float32)
    layer = ParallelExperts.from_experts(case.whole)
    x, index, weight = case.x[case.own], case.index[case.own], case.weight[case.own]
    folded = layer(x[None], index[None], weight[None])  # leading sizes
    assert folded.shape == (1, 5, HIDDEN) and torch.equal(folded[0], layer(x, index.to(torch.uint8), weight))
    assert torch.equal(layer(x, index), layer(x, index, torch.ones_like(weight)))
    twin = copy.deepcopy(layer)
    assert twin.group is layer.group and twin.experts.down_proj is not layer.experts.down_proj
    assert torch.equal(twin(x, index, weight), layer(x, index, weight))
    strided = torch.stack((x, x), 2).flatten(1)[:, ::2]
    assert torch.equal(layer(strided, index, weight), layer(x, index, weight))
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x, index, weight)
    exact, dense = (r[0][case.own] for r in (both(case)[0], oracle_results(bfloat16(case), torch.bfloat16)))
    assert_within_budget(half, exact, dense, "autocast")
    eight, whole = layer.quantized(), case.whole.quantized()
    assert eight.experts.down_proj.dtype == torch.int8 and eight.local == layer.local
    close(eight(x, index, weight), whole(x, index, weight), 1e-6)


def check_compiled():
    """torch.compile breaks the graph at the exchanges and compiles the rest."""
    case = make_case(8, 2, [25] * dist.get_world_size(), "all", torch.float32)
    layer = ParallelExperts.from_experts(case.whole)
    x, index, weight = case.x[case.own].requires_grad_(), case.index[case.own], case.weight[case.own]
    expected = layer(x, index, weight)
    actual = torch.compile(layer, backend="eager")(x, index, weight)
    close(actual, expected, 1e-6)
    gradients = [torch.autograd.grad(y, x, case.grad[case.own])[0] for y in (actual, expected)]
    close(*gradients, 1e-6)


def bfloat16(case):
    whole = copy.deepcopy(case.whole).bfloat16()
    return SimpleNamespace(**vars(case) | {"whole": whole, "x": case.x.bfloat16()})


def close(actual, expected, limit):
    """Relative in the Euclidean norm."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).norm() <= limit * expected.norm()


def check_gradients_of_some(frozen: str):
    """Nothing waits for a rank where only some of the tensors need a gradient."""
    case = make_case(6, 2, [5, 0, 4, 3][: dist.get_world_size()], "one", torch.float64)
    layer = ParallelExperts.from_experts(case.whole).requires_grad_(frozen != "experts")
    x = case.x[case.own].requires_grad_(frozen != "tokens")
    weight = case.weight[case.own].requires_grad_(frozen != "routing weights")
    layer(x, case.index[case.own], weight).backward(case.grad[case.own])
    _, dx, dw, *_ = oracle_results(case, torch.float64)
    if frozen != "tokens":
        close(x.grad, dx[case.own], 1e-12)
    if frozen != "routing weights":
        close(weight.grad.double(), dw[case.own].double(), 1e-6)


def check_refusals():
    ranks, layer = dist.get_world_size(), ParallelExperts.from_sizes(8, HIDDEN, INNER)
    x, index, weight = torch.ones(3, HIDDEN), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    for error, match, arguments in (
        (ValueError, r"index: expected values in \[0, 8\], got 0 to 9", (x, index + torch.tensor([0, 9]))),
        (TypeError, "index: expected integers", (x, index.float())),
        (ValueError, r"topk_index: expected \[3, K\], a row for each token, got \(2, 2\)", (x, index[:2])),
        (ValueError, r"topk_weight: expected \(3, 2\), got \(3, 1\)", (x, index, weight[:, :1])),
        (TypeError, "topk_weight: expected a floating dtype", (x, index, index)),
        (TypeError, "x: expected a floating tensor, got torch.int64", (index, index)),
        (ValueError, r"x: expected \[\.\.\., 24\] .*, got shape \(3, 5\)", (x[:, :5], index)),
    ):
        with pytest.raises(error, match=match):
            layer(*arguments)
    with pytest.raises(
        ValueError, match=f"num_experts: expected an int >= {ranks}, one for each rank, got 1"
    ):
        ParallelExperts.from_sizes(1, HIDDEN, INNER)
    with pytest.raises(ValueError, match=f"experts: expected this rank's {8 // ranks} of 8, got 3"):
        ParallelExperts(Experts(3, HIDDEN, INNER), 8)
    first = dist.new_group([0])
    if dist.get_rank():
        with pytest.raises(ValueError, match="group: expected a process group that this rank is in"):
            ParallelExperts.from_sizes(8, HIDDEN, INNER, group=first)


def check_initial_values():
    """Ranks seeded alike have different experts, and generators in one state, though their shards differ in size."""
    layer = ParallelExperts.from_sizes(5, HIDDEN, INNER, bias=True)
    weights = expert_shards.full_state_dict(layer)["gate_up_proj"]
    assert weights.flatten(1).unique(dim=0).shape[0] == 5 and weights.isfinite().all()
    draws = torch.empty(dist.get_world_size())
    dist.all_gather_into_tensor(draws, torch.rand(1))
    assert draws.unique().numel() == 1


@pytest.mark.parametrize("check", [check_messages, check_arguments, check_refusals, check_initial_values])
def test_layer(processes, check):
    processes.run(check)


def test_compiled(processes):
    if processes.ranks > 2:
        pytest.skip("takes seconds, and nothing differs from 2 processes")
    processes.run(check_compiled)


@pytest.mark.parametrize("frozen", ["tokens", "experts", "routing weights"])
def test_gradients_of_some(processes, frozen):
    processes.run(check_gradients_of_some, frozen)


def test_needs_torch_distributed():
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        ParallelExperts.from_sizes(4, HIDDEN, INNER)


class Net(nn.Module):
    def __init__(self, group=None):
        super().__init__()
        self.stem = nn.Linear(6, HIDDEN)
        self.moe = MoE.from_sizes(
            HIDDEN, INNER, 6, 2, shared_intermediate=7, shared_gate=True, group=group,
            capacity_factor=1.5, losses={"load_balance": 0.1, "z": 0.01},
        )  # fmt: skip
        self.head = nn.Linear(HIDDEN, 3)
        self.double()

    def forward(self, x):
        hidden = self.stem(x)
        out, losses, _ = self.moe(hidden)
        return self.head(hidden + out).square().mean() + sum(losses.values())


def make_nets(group):
    whole, net = Net(), Net(group)
    net.load_state_dict(expert_shards.shard_state_dict(net, whole.state_dict()))
    return whole, net


def batches(step: int):
    generator = torch.Generator().manual_seed(step)
    return [
        torch.randn(5 + 2 * r, 6, dtype=torch.float64, generator=generator)
        for r in range(dist.get_world_size())
    ]


def check_training(whole, net, model, max_norm: float = 0.1):
    """Three steps of ``model`` (``net``, wrapped) equal those of ``whole`` on the mean of all ranks' losses."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.9) for m in (whole, net)]
    for step in range(3):
        losses = [whole(x) for x in batches(step)]
        torch.stack(losses).mean().backward()
        loss = model(batches(step)[dist.get_rank()])
        loss.backward()
        close(loss.detach(), losses[dist.get_rank()].detach(), 1e-10)
        expected = nn.utils.clip_grad_norm_(whole.parameters(), max_norm)
        assert expected > max_norm
        close(expert_shards.clip_grad_norm_(net, max_norm), expected, 1e-10)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = expert_shards.full_state_dict(net)
    assert list(state) == list(whole.state_dict())
    for name, expected in whole.state_dict().items():
        close(state[name], expected, 1e-10)


def replicated_nets(size: int):
    """Experts over ``size`` ranks, in as many copies as fill the world."""
    mesh = init_device_mesh(
        "cpu", (dist.get_world_size() // size, size), mesh_dim_names=("replica", "expert")
    )
    whole, net = make_nets(mesh["expert"].get_group())
    expert_shards.prepare_ddp(net, mesh["replica"].get_group())
    return whole, net


def check_ddp(size: int):
    whole, net = replicated_nets(size)
    check_training(whole, net, DistributedDataParallel(net))


def check_accumulation(size: int):
    """Two backward passes, of which the first sends nothing for the shared parameters."""
    whole, net = replicated_nets(size)
    model, rank = DistributedDataParallel(net), dist.get_rank()
    for step in range(2):
        torch.stack([whole(x) for x in batches(step)]).mean().backward()
    with model.no_sync():
        model(batches(0)[rank]).backward()
    model(batches(1)[rank]).backward()
    close(net.stem.weight.grad, whole.stem.weight.grad, 1e-10)
    own = net.moe.experts.local
    expected = whole.moe.experts.gate_up_proj.grad[own.start : own.stop]
    close(net.moe.experts.experts.gate_up_proj.grad, expected, 1e-10)


def check_checkpointing():
    """The exchanges run a second time in the backward pass."""
    whole, net = make_nets(dist.group.WORLD)
    x = batches(0)[dist.get_rank()]
    kept = checkpoint(lambda t: net.moe(net.stem(t)).output, x, use_reentrant=False)
    kept.square().sum().backward()
    sum(whole.moe(whole.stem(t)).output.square().sum() for t in batches(0)).backward()
    own = net.moe.experts.local
    expected = whole.moe.experts.down_proj.grad[own.start : own.stop]
    close(net.moe.experts.experts.down_proj.grad, expected, 1e-10)


def check_replicas_start_alike():
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replica", "expert"))
    torch.manual_seed(dist.get_rank())
    net = Net(mesh["expert"].get_group())
    expert_shards.prepare_ddp(net, mesh["replica"].get_group())
    own = net.moe.experts.experts.down_proj.detach().flatten()
    copies = own.new_empty(2 * own.numel())
    dist.all_gather_into_tensor(copies, own, group=mesh["replica"].get_group())
    assert torch.equal(*copies.chunk(2)) and copies.isfinite().all()


def check_ddp_over_all():
    whole, net = make_nets(dist.group.WORLD)
    expert_shards.prepare_ddp(net)
    check_training(whole, net, DistributedDataParallel(net))
    with pytest.raises(ValueError, match="not prepared yet"):
        expert_shards.prepare_ddp(net)
    pair = init_device_mesh("cpu", (dist.get_world_size() // 2, 2))
    if dist.get_world_size() > 2:
        with pytest.raises(ValueError, match="sharded over 2 of 4 ranks; got None"):
            expert_shards.prepare_ddp(Net(pair.get_group(1)))


def check_fsdp(size: int):
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks // size, size), mesh_dim_names=("replica", "expert"))
    whole, net = make_nets(mesh["expert"].get_group())
    expert_shards.prepare_fsdp(net, mesh["replica"])
    fully_shard(net, mesh=init_device_mesh("cpu", (ranks,)))
    check_training(whole, net, net)


def check_state_dicts():
    whole, net = make_nets(dist.group.WORLD)
    part = net.state_dict()
    assert part["moe.experts.experts.down_proj"].shape[0] == 6 // dist.get_world_size() + (
        6 % dist.get_world_size() > 0 and dist.get_rank() % 2
    )
    for name, value in expert_shards.full_state_dict(net).items():
        assert torch.equal(value, whole.state_dict()[name])
    missing = whole.state_dict() | {"other": torch.ones(1)}
    del missing["moe.experts.down_proj"]
    with pytest.raises(RuntimeError, match=r"(?s)moe.experts.experts.down_proj.*other"):
        net.load_state_dict(expert_shards.shard_state_dict(net, missing))


def check_from_whole_moe():
    """MoE(router, whole experts, group=...) takes its part."""
    whole = Net().moe
    moe = MoE(whole.gate, whole.experts, whole.shared_expert, shared_gate=whole.shared_expert_gate,
              capacity_factor=1.5, group=dist.group.WORLD)  # fmt: skip
    x = torch.randn(2, 3 + dist.get_rank(), HIDDEN, dtype=torch.float64)
    close(moe(x).output, whole(x).output, 1e-12)


def check_correction():
    """The ranks move the router's correction alike, by the choices of all."""
    routers = [TopKRouter(HIDDEN, 6, 2, scoring="sigmoid", correction_bias=True) for _ in range(2)]
    index = torch.randint(0, 6, (dist.get_world_size(), 9, 2))
    routers[0].update_correction(index[dist.get_rank()], 0.1, group=dist.group.WORLD)
    routers[1].update_correction(index, 0.1)
    corrections = [router.e_score_correction_bias for router in routers]
    assert torch.equal(*corrections) and corrections[0].any()


@pytest.mark.parametrize(
    "check",
    [
        check_correction,
        check_replicas_start_alike,
        check_ddp_over_all,
        check_checkpointing,
        check_state_dicts,
        check_from_whole_moe,
    ],
)
def test_model(processes, check):
    processes.run(check)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("check", [check_ddp, check_accumulation, check_fsdp])
def test_training_with_replicas(processes, check, size):
    if size > processes.ranks:
        pytest.skip(f"needs {size} processes")
    processes.run(check, size)


def test_the_command_of_the_documentation(tmp_path):
    root = Path(__file__).parents[2]
    page = (root / "docs" / "howto" / "experts-over-processes.md").read_text()
    script = re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "train.py").write_text(script)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [*torchrun, "train.py"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, check=True, timeout=120,
    )  # fmt: skip
    state = torch.load(tmp_path / "model.pt")
    assert state["moe.experts.gate_up_proj"].shape == (8, 64, 64)
    assert all(value.isfinite().all() for value in state.values())
