"""Expert parallelism: the experts of a layer sharded over the ranks of a process group.

Every rank has tokens of its own and experts of its own. A token travels once to each rank that holds some of its experts,
however many those are, with its choices and their weights; that rank runs them and sends their weighted sum
back. The token's own rank adds the sums in float32, in the order of the ranks. What goes where is an
``ExpertPlan`` too: its "experts" are the ranks.

The gradients come out as in one process that has all tokens: those of tokens and routing weights at home, those of an expert
on its rank, *summed* over the losses of all ranks. ``expert_shards`` has what data parallelism needs on top.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...geometry import is_int
from ...ops import combine_pairs, gather_pairs
from ...ops.experts import checks as expert_checks
from ...plans import ExpertPlan, named
from .experts import Experts

# -------------------------------------------------------------------------------------- exchange


def _all_to_all(group, send: list[int], receive: list[int], tensors) -> tuple[Tensor, ...]:
    """The rows that the ranks have for this one, all tensors at once: ``send[r]`` rows go to rank r."""
    tensors = [t.contiguous() for t in tensors]
    out = tuple(t.new_empty(sum(receive), *t.shape[1:]) for t in tensors)
    works = [
        dist.all_to_all_single(o, t, receive, send, group=group, async_op=True)
        for o, t in zip(out, tensors, strict=True)
    ]
    for work in works:
        work.wait()
    return out


class _Exchange(torch.autograd.Function):
    """:func:`_all_to_all`, whose gradient goes the way back.

    One node for all tensors: whichever of them need a gradient, the ranks run the same collectives in the same order.
    """

    @staticmethod
    def forward(ctx, group, send, receive, *tensors):
        ctx.route = group, receive, send
        return _all_to_all(group, send, receive, tensors)

    @staticmethod
    def backward(ctx, *grads):
        return None, None, None, *_Exchange.apply(*ctx.route, *grads)


@torch._disable_dynamo  # a compiled model runs around it; torch.compiler.disable would import the compiler here
def _exchange(group, send: list[int], receive: list[int], *tensors: Tensor) -> tuple[Tensor, ...]:
    return _Exchange.apply(group, send, receive, *tensors)


class _Route(NamedTuple):
    """Sends tokens to ranks: a plan over ranks, its rows to each of them, and the rows that come from each."""

    plan: ExpertPlan
    send: list[int]
    receive: list[int]


@torch._disable_dynamo
def _route(owner: Tensor, group) -> _Route:
    """The route of ``owner`` int64 ``[T, K]``: the rank of each choice, the number of ranks where it is dropped."""
    ranks, (tokens, topk) = dist.get_world_size(group), owner.shape
    used = torch.zeros(tokens, ranks + 1, dtype=torch.bool, device=owner.device).scatter_(1, owner, True)
    numbers = torch.arange(ranks, device=owner.device)
    used = torch.where(used[:, :ranks], numbers, ranks).sort(1).values
    plan = ExpertPlan.from_topk(used[:, : min(topk, ranks)], ranks)
    counts = torch.empty_like(plan.counts)
    dist.all_to_all_single(counts, plan.counts, group=group)
    return _Route(plan, *torch.stack((plan.counts, counts)).tolist())  # the one look at the device


# ----------------------------------------------------------------------------------------- layer


def expert_range(num_experts: int, rank: int, ranks: int) -> range:
    """The experts of a rank: neighbours, the shards' sizes differing by one at most."""
    return range(num_experts * rank // ranks, num_experts * (rank + 1) // ranks)


class ParallelExperts(nn.Module):
    """Experts sharded over the ranks of a process group; called as the whole :class:`Experts` would be.

    Rank r of W holds the experts ``E * r // W`` to ``E * (r + 1) // W``, so E need not be a multiple of W. All ranks call the
    layer together, each with its own tokens (none is fine), and all run its backward or none does: both are collective.

    Args:
        experts: this rank's own, a module ``(x, topk_index, topk_weight) -> x`` that numbers them from 0 and drops their
            number, as :class:`Experts`. :meth:`from_sizes` builds it, :meth:`from_experts` takes it from whole experts.
        num_experts: E of all ranks, at least W.
        group: the process group; None: the default one.

    Shape:
        - x: ``[..., H]``, T tokens of this rank, in at least two dimensions; H is the same on all ranks.
        - topk_index: int ``[..., K]`` or ``[T, K]`` in ``[0, E]``, E means dropped; K is the same on all ranks.
        - topk_weight: ``[..., K]`` or ``[T, K]``, floating; None (on all ranks): 1.
        - output: ``[..., H]``.

    ``capacity`` limits the tokens that this rank sends to an expert (the local groups of GShard). Nothing depends on the
    order in which messages arrive: results are the same in every run. Counting the rows is one synchronisation with a GPU.

    Raises:
        TypeError, ValueError: an argument that does not fit, before anything is sent. The other ranks then wait for
            this one until the group's timeout.

    Papers: GShard (ICLR 2021), Switch Transformers (JMLR 2022).
    """

    def __init__(self, experts: nn.Module, num_experts: int, group: dist.ProcessGroup | None = None):
        super().__init__()
        self.group = _group(group)
        self.num_experts, self.local = num_experts, _own(num_experts, self.group)
        got = getattr(experts, "num_experts", len(self.local))
        if got != len(self.local):
            raise ValueError(f"experts: expected this rank's {len(self.local)} of {num_experts}, got {got}")
        self.experts = experts

    @classmethod
    def from_sizes(
        cls, num_experts: int, *arguments, group: dist.ProcessGroup | None = None, **options
    ) -> ParallelExperts:
        """Builds this rank's part of ``Experts(num_experts, *arguments, **options)``.

        Ranks that were seeded alike draw different experts, and their generators stay alike for the layers to come.
        """
        group = _group(group)
        own = _own(num_experts, group)
        seed = int(torch.randint(2**62, (), device="cpu"))
        device = torch.device(options.get("device") or torch.get_default_device())
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed + own.start)
            experts = Experts(len(own), *arguments, **options)
        return cls(experts, num_experts, group)

    @classmethod
    def from_experts(cls, experts: nn.Module, group: dist.ProcessGroup | None = None) -> ParallelExperts:
        """Takes this rank's part of whole experts, whose parameters and buffers all are ``[E, ...]``; a copy."""
        group, total = _group(group), experts.num_experts
        own = _own(total, group)
        part = copy.copy(experts)
        part._parameters = {name: _part(p, total, own) for name, p in experts._parameters.items()}
        part._buffers = {name: _part(b, total, own) for name, b in experts._buffers.items()}
        part.num_experts = len(own)
        return cls(part, total, group)

    def forward(
        self,
        x: Tensor,
        topk_index: Tensor,
        topk_weight: Tensor | None = None,
        *,
        capacity: int | None = None,
    ) -> Tensor:
        rows, index, weight = self._arguments(x, topk_index, topk_weight)
        plan = named("topk_index", "index", ExpertPlan.from_topk, index, self.num_experts, capacity)
        kept = plan.position >= 0
        index = torch.where(kept, index.long(), self.num_experts)
        ranks = dist.get_world_size(self.group)
        # the last rank whose first expert, E * r // W, is at most the choice
        owner = torch.where(kept, ((index + 1) * ranks - 1) // self.num_experts, ranks)
        route = _route(owner, self.group)
        plan, live = route.plan, sum(route.send)
        way, back = (self.group, route.send, route.receive), (self.group, route.receive, route.send)
        (choices,) = _exchange(*way, index[plan.token[:live].long()].to(torch.int32))
        sent = [gather_pairs(t, plan)[:live] for t in (rows, weight) if t is not None]
        rows, *weights = _exchange(*way, *sent)
        own = (choices >= self.local.start) & (choices < self.local.stop)
        choices = torch.where(own, choices - self.local.start, len(self.local))
        (sums,) = _exchange(*back, self.experts(rows, choices, *weights))
        out = combine_pairs(F.pad(sums, (0, 0, 0, plan.num_rows - live)), plan)
        return out.reshape(x.shape)

    def _arguments(self, x, index, weight) -> tuple[Tensor, Tensor, Tensor | None]:
        """``[T, H]`` in autocast's dtype, ``[T, K]`` and ``[T, K]``."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a floating tensor, got {got}")
        if x.dim() < 2 or x.shape[-1] != getattr(self.experts, "hidden", x.shape[-1]):
            hidden = getattr(self.experts, "hidden", "H")
            raise ValueError(
                f"x: expected [..., {hidden}] of 2 dimensions or more, got shape {tuple(x.shape)}"
            )
        (rows,) = expert_checks.autocast(x.flatten(0, -2))
        if not isinstance(index, Tensor) or index.dim() < 2 or index.shape[:-1].numel() != rows.shape[0]:
            got = tuple(index.shape) if isinstance(index, Tensor) else type(index).__name__
            raise ValueError(f"topk_index: expected [{rows.shape[0]}, K], a row for each token, got {got}")
        index = index.flatten(0, -2)
        if weight is not None:
            if not isinstance(weight, Tensor) or weight.numel() != index.numel():
                got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
                raise ValueError(f"topk_weight: expected {tuple(index.shape)}, got {got}")
            if not weight.is_floating_point():
                raise TypeError(f"topk_weight: expected a floating dtype, got {weight.dtype}")
            weight = weight.reshape(index.shape)
        return rows, index, weight

    def quantized(self) -> ParallelExperts:
        """The same experts with weights of eight bits: see :meth:`Experts.quantized`."""
        return ParallelExperts(self.experts.quantized(), self.num_experts, self.group)

    def __deepcopy__(self, memo) -> ParallelExperts:
        """A process group is shared, as it cannot be copied."""
        other = type(self).__new__(type(self))
        memo |= {id(self): other, id(self.group): self.group}
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def extra_repr(self) -> str:
        ranks = dist.get_world_size(self.group)
        return f"experts {self.local.start} to {self.local.stop} of {self.num_experts}, {ranks} ranks"


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "group: torch.distributed is not initialised (torch.distributed.init_process_group)"
        )
    group = dist.group.WORLD if group is None else group
    if dist.get_rank(group) < 0:
        raise ValueError("group: expected a process group that this rank is in")
    return group


def _own(num_experts: int, group) -> range:
    ranks = dist.get_world_size(group)
    if not is_int(num_experts, ranks):
        raise ValueError(f"num_experts: expected an int >= {ranks}, one for each rank, got {num_experts!r}")
    return expert_range(num_experts, dist.get_rank(group), ranks)


def _part(whole: Tensor | None, total: int, own: range) -> Tensor | None:
    if whole is None:
        return None
    if whole.dim() == 0 or whole.shape[0] != total:
        raise ValueError(f"experts: expected parameters [{total}, ...], got shape {tuple(whole.shape)}")
    part = whole.detach()[own.start : own.stop].clone()
    return nn.Parameter(part, whole.requires_grad) if isinstance(whole, nn.Parameter) else part
