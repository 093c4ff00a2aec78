"""A whole mixture-of-experts layer: router, experts, perhaps a shared expert, and the losses that train the router."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..apart import apart
from .experts import Experts
from .losses import importance_loss, load_balance_loss, load_loss, real_tokens, z_loss
from .parallel import ParallelExperts
from .routers import Routing, TopKRouter

LOSSES = {
    "load_balance": lambda routing, mask: load_balance_loss(routing.probs, routing.index, mask),
    "importance": lambda routing, mask: importance_loss(
        routing.weight, routing.index, routing.probs.shape[-1], mask
    ),
    "load": lambda routing, mask: load_loss(routing.load),  # the router left padding out
    "z": lambda routing, mask: z_loss(routing.logits, mask),
}


class MoEOutput(NamedTuple):
    """``output`` ``[..., H]``; ``losses``: each times its coefficient, empty in eval mode; ``routing``: the router's decision."""

    output: Tensor
    losses: dict[str, Tensor]
    routing: Routing


class SharedExpert(nn.Module):
    """The gated MLP that every token runs: ``down_proj(silu(gate_proj(x)) * up_proj(x))``."""

    def __init__(self, hidden: int, intermediate: int, device=None, dtype=None):
        super().__init__()
        factory = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(hidden, intermediate, **factory)
        self.up_proj = nn.Linear(hidden, intermediate, **factory)
        self.down_proj = nn.Linear(intermediate, hidden, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """A mixture-of-experts layer: ``experts(x, *router(x)) + sigmoid(shared_gate(x)) * shared(x)``.

    ``output, losses, routing = moe(x)``; in training add ``sum(losses.values())`` to the loss. The ``state_dict`` keys are
    those of transformers' Mixtral, Qwen-MoE and OLMoE blocks: ``gate.weight``, ``experts.…``, ``shared_expert.…``,
    ``shared_expert_gate.weight``. :meth:`from_sizes` builds the parts.

    Args:
        router: a module ``[..., H] -> Routing``, as :class:`TopKRouter`; it gets ``attention_mask=`` where there is one.
        experts: a module ``(x, topk_index, topk_weight, capacity=…) -> [..., H]``, as :class:`Experts`.
        shared: a module ``[..., H] -> [..., H]`` that every token runs, or None.
        shared_gate: a module ``[..., H] -> [..., 1]`` whose sigmoid multiplies ``shared`` (Qwen2-MoE), or None.
        capacity_factor: an expert takes at most ``ceil(capacity_factor * T * K / E)`` tokens, the others are dropped (see
            ``ExpertPlan.from_topk`` for the order); None: no limit.
        losses: the coefficient of each loss wanted: "load_balance", "importance", "load" (of a noisy router) and "z", see
            ``dynops.nn.load_balance_loss`` and its neighbours. They are computed in training mode.
        group: the ``torch.distributed`` process group over whose ranks the experts are sharded, see
            :class:`ParallelExperts`: whole ``experts`` are replaced by this rank's part. Capacity and losses are those of a
            rank's own tokens. None: each process has all experts.

    Shape:
        - x: ``[..., H]``; its leading sizes are the tokens. A part that writes into x in place gets a copy of its own.
        - attention_mask: bool or numbers ``[...]`` (or flat), nonzero = a token, 0 = padding: it counts in no loss, runs no
          expert and takes no token's place in one (the output there is the shared expert's, or zero). None: no padding.
        - output: :class:`MoEOutput`.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: sparsely-gated mixture of experts (ICLR 2017), GShard (ICLR 2021), Switch Transformers (JMLR 2022).
    """

    def __init__(
        self,
        router: nn.Module,
        experts: nn.Module,
        shared: nn.Module | None = None,
        *,
        shared_gate: nn.Module | None = None,
        capacity_factor: float | None = None,
        losses: Mapping[str, float] | None = None,
        group: ProcessGroup | None = None,
    ):
        super().__init__()
        if group is not None and not isinstance(experts, ParallelExperts):
            experts = ParallelExperts.from_experts(experts, group)
        sizes = [getattr(part, "num_experts", None) for part in (router, experts)]
        if None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                f"router, experts: expected the same number of experts, got {sizes[0]} and {sizes[1]}"
            )
        if shared is None and shared_gate is not None:
            raise ValueError("shared_gate: expected None without a shared expert")
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise ValueError(f"capacity_factor: expected a positive number or None, got {capacity_factor!r}")
        if losses is not None and not isinstance(losses, Mapping):
            raise TypeError(f"losses: expected a dict of coefficients by name, got {type(losses).__name__}")
        losses = dict(losses or {})
        if unknown := set(losses) - set(LOSSES):
            raise ValueError(f"losses: expected some of {tuple(LOSSES)}, got {sorted(unknown)}")
        if "load" in losses and isinstance(router, TopKRouter) and router.noise_weight is None:
            raise ValueError("losses: expected a router with noise=True for 'load'")
        self.gate, self.experts, self.shared_expert, self.shared_expert_gate = (
            router,
            experts,
            shared,
            shared_gate,
        )
        self.capacity_factor, self.losses = capacity_factor, losses

    @classmethod
    def from_sizes(
        cls,
        hidden: int,
        intermediate: int,
        num_experts: int,
        top_k: int,
        *,
        activation: str | None = "silu",
        shared_intermediate: int | None = None,
        shared_gate: bool = False,
        router: Mapping | None = None,
        group: ProcessGroup | None = None,
        device=None,
        dtype=None,
        **options,
    ) -> MoE:
        """Builds the router, gated experts without biases and the shared expert.

        Args:
            hidden, intermediate, num_experts, top_k, activation: as in :class:`Experts` and :class:`TopKRouter`.
            shared_intermediate: the features inside the shared expert; None: there is none.
            shared_gate: gives the shared expert a gate.
            router: keywords of :class:`TopKRouter`.
            group: as above; only this rank's experts are built.
            options: keywords of :class:`MoE`.
        """
        factory = {"device": device, "dtype": dtype}
        gate = shared = None
        if shared_intermediate is not None:
            shared = SharedExpert(hidden, shared_intermediate, **factory)
        if shared_gate:
            gate = nn.Linear(hidden, 1, bias=False, **factory)
        router = TopKRouter(hidden, num_experts, top_k, **(router or {}), **factory)
        sizes = (num_experts, hidden, intermediate, activation)
        if group is None:
            experts = Experts(*sizes, **factory)
        else:
            experts = ParallelExperts.from_sizes(*sizes, group=group, **factory)
        return cls(
            router,
            experts,
            shared,
            shared_gate=gate,
            **options,
        )

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> MoEOutput:
        padding = {} if attention_mask is None else {"attention_mask": attention_mask}
        routing = apart(self.gate, x, options=padding)
        if isinstance(routing, Tensor):
            raise TypeError("router: expected a module that returns a Routing, as TopKRouter, got a tensor")
        index = routing.index
        if attention_mask is not None:
            real = real_tokens(attention_mask, math.prod(index.shape[:-1])).view(*index.shape[:-1], 1)
            index = index.masked_fill(~real, routing.probs.shape[-1])
        options = {"capacity": self._capacity(routing)}
        out = apart(self.experts, x, index, routing.weight, options=options)
        if self.shared_expert is not None:
            shared = apart(self.shared_expert, x)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(apart(self.shared_expert_gate, x)) * shared
            out = out + shared
        losses = {}
        if self.training:
            losses = {name: f * LOSSES[name](routing, attention_mask) for name, f in self.losses.items()}
        return MoEOutput(out, losses, routing)

    def _capacity(self, routing: Routing) -> int | None:
        if self.capacity_factor is None:
            return None
        return math.ceil(self.capacity_factor * routing.index.numel() / routing.probs.shape[-1])

    def extra_repr(self) -> str:
        return "" if self.capacity_factor is None else f"capacity_factor={self.capacity_factor}"
