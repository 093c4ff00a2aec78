"""Routers: which experts a token goes to, and with what weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ... import modes
from ...geometry import is_int
from ..exact import ExactBuffers
from .losses import real_tokens

NOISE_EPSILON = 1e-2  # the least standard deviation of a noisy router, as in Shazeer's code (tensor2tensor)


class Routing(NamedTuple):
    """A router's decision.

    ``index``: int64 ``[..., K]``, best expert first. ``weight``: ``[..., K]``. ``logits``: ``[..., E]``, without noise. ``probs``:
    ``[..., E]``, the scores as a distribution. ``load``: ``[E]``, the smooth estimate of each expert's tokens, where the
    router is noisy; else None. Floating ones are float32 (float64 for float64 tokens).
    """

    index: Tensor
    weight: Tensor
    logits: Tensor
    probs: Tensor
    load: Tensor | None = None


class TopKRouter(ExactBuffers):
    """A linear layer, scores, and the K experts that score best.

    The defaults are Mixtral's. ``renormalize=False``: OLMoE, Switch (``top_k=1``). ``scoring="sigmoid"`` with ``groups``,
    ``top_groups``, ``correction_bias`` and ``scale``: DeepSeek-V3. ``bias=True``: gpt-oss. ``noise=True``: Shazeer.
    Everything is computed in float32, under autocast too (Switch's selective precision).

    Args:
        hidden: H, the features of a token.
        num_experts: E.
        top_k: K.
        scoring: "softmax" over all experts, or "sigmoid" of each.
        renormalize: divides the K weights by their sum. With ``top_k=1`` the weight is then 1, and no gradient reaches the
            router through it.
        bias: whether the linear layer has a bias.
        noise: in training the choice is made by ``logits + N(0, 1) * softplus(noise_weight x)``, and ``Routing.load``
            estimates each expert's load (Shazeer).
        jitter: in training the router sees its input times uniform values of ``[1 - jitter, 1 + jitter]`` (Switch).
        groups: the experts lie in so many groups of equal size, of which a token may use ``top_groups``: those with the highest
            sum of their ``group_topk`` best scores (DeepSeek-V3: 2, DeepSeek-V2: 1).
        correction_bias: a buffer ``e_score_correction_bias`` ``[E]`` that is added to the scores for the choice only;
            :meth:`update_correction` moves it (balancing without a loss). It is float32, and stays so where the module is cast:
            in bfloat16 steps of 1e-3 would stop at 0.5.
        scale: multiplies the weights, at last.

    Shape:
        - x: ``[..., H]``.
        - attention_mask: bool or numbers ``[...]`` (or flat), nonzero = a token, 0 = padding, which ``Routing.load`` leaves out;
          nothing else depends on it. None: no padding.
        - output: :class:`Routing`.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: sparsely-gated mixture of experts (ICLR 2017), Switch Transformers (JMLR 2022), DeepSeek-V2 and V3 (2024), auxiliary-
    loss-free load balancing (2024).
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: str = "softmax",
        renormalize: bool = True,
        bias: bool = False,
        noise: bool = False,
        jitter: float = 0.0,
        groups: int = 1,
        top_groups: int | None = None,
        group_topk: int = 2,
        correction_bias: bool = False,
        scale: float = 1.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        top_groups = groups if top_groups is None else top_groups
        _check_sizes(hidden, num_experts, top_k, groups, top_groups, group_topk)
        if scoring not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring: expected 'softmax' or 'sigmoid', got {scoring!r}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter: expected it in [0, 1), got {jitter!r}")
        if noise and (top_groups < groups or correction_bias):
            raise ValueError(
                "noise: expected no groups and no correction_bias: the load is that of a plain top-k"
            )
        self.hidden, self.num_experts, self.top_k = hidden, num_experts, top_k
        self.scoring, self.renormalize, self.scale, self.jitter = scoring, renormalize, scale, jitter
        self.groups, self.top_groups, self.group_topk = groups, top_groups, group_topk
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, **factory))
        self.bias = nn.Parameter(torch.empty(num_experts, **factory)) if bias else None
        self.noise_weight = nn.Parameter(torch.empty(num_experts, hidden, **factory)) if noise else None
        correction = torch.zeros(num_experts, device=device, dtype=torch.float32) if correction_bias else None
        self.register_buffer("e_score_correction_bias", correction)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts the weights as ``nn.Linear`` does; the noise starts at the standard deviation softplus(0) for every token."""
        bound = 1 / math.sqrt(self.hidden)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.noise_weight is not None:
            nn.init.zeros_(self.noise_weight)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    def _exact(self) -> tuple[str, ...]:
        return ("e_score_correction_bias",)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Routing:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x: expected a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.shape[-1:] != (self.hidden,):
            raise ValueError(f"x: expected [..., {self.hidden}], got shape {tuple(x.shape)}")
        with modes.without_autocast(x):
            real = None if attention_mask is None else real_tokens(attention_mask, math.prod(x.shape[:-1]))
            return self._route(x.to(torch.promote_types(x.dtype, torch.float32)), real)

    def _route(self, x: Tensor, real: Tensor | None) -> Routing:
        if self.training and self.jitter > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        logits = F.linear(x, self.weight.to(x.dtype), bias)
        if self.noise_weight is None or not self.training:
            scores = self._scores(logits)
            index = self._choose(scores)
            return Routing(index, self._weights(scores, index), logits, self._probs(scores))
        deviation = F.softplus(F.linear(x, self.noise_weight.to(x.dtype))) + NOISE_EPSILON
        noisy = logits + torch.randn_like(logits) * deviation
        scores = self._scores(noisy)
        index = self._choose(scores)
        load = _smooth_load(logits, noisy, deviation, self.top_k, real)
        return Routing(index, self._weights(scores, index), logits, self._probs(scores), load)

    def _scores(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits) if self.scoring == "sigmoid" else torch.softmax(logits, -1)

    def _probs(self, scores: Tensor) -> Tensor:
        """The scores as a distribution (DeepSeek-V3, equation 19, for sigmoids)."""
        return scores if self.scoring == "softmax" else scores / (scores.sum(-1, keepdim=True) + 1e-20)

    def _choose(self, scores: Tensor) -> Tensor:
        """int64 ``[..., K]``."""
        scores = scores.detach()
        if self.e_score_correction_bias is not None:
            scores = scores + self.e_score_correction_bias.to(scores.dtype)
        if self.top_groups < self.groups:
            members = scores.unflatten(-1, (self.groups, -1))  # [..., groups, E / groups]
            standing = members.topk(self.group_topk, -1).values.sum(-1)
            best = standing.topk(self.top_groups, -1).indices
            closed = torch.ones_like(standing, dtype=torch.bool).scatter(-1, best, False)
            scores = members.masked_fill(closed[..., None], -math.inf).flatten(-2)
        return scores.topk(self.top_k, -1).indices

    def _weights(self, scores: Tensor, index: Tensor) -> Tensor:
        weight = scores.gather(-1, index)
        if self.renormalize:
            weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be zero
        return weight if self.scale == 1 else weight * self.scale

    @torch.no_grad()
    def update_correction(
        self, index: Tensor, rate: float = 1e-3, group: dist.ProcessGroup | None = None
    ) -> None:
        """Moves ``e_score_correction_bias`` by ``rate`` towards even use: up for experts with fewer pairs than the mean.

        Args:
            index: int ``[..., K]``, the choices of a step; pairs with index E (padding, dropped) count nowhere.
            rate: DeepSeek-V3's is 1e-3.
            group: the process group whose ranks count their choices together, each with its own; None: these are all.
        """
        if self.e_score_correction_bias is None:
            raise ValueError("correction_bias: expected a router that has one, got correction_bias=False")
        if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex():
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index: expected integers [..., K], got {got}")
        if index.device.type == "cpu" and bool((index < 0).any()):
            raise ValueError(f"index: expected values in [0, {self.num_experts}], got {int(index.min())}")
        counts = torch.bincount(index.flatten(), minlength=self.num_experts)[: self.num_experts].float()
        if group is not None:
            dist.all_reduce(counts, group=group)
        self.e_score_correction_bias += rate * torch.sign(counts.mean() - counts)

    def extra_repr(self) -> str:
        grouped = f", groups={self.groups}, top_groups={self.top_groups}" if self.groups > 1 else ""
        noise = "" if self.noise_weight is None else ", noise=True"
        return (
            f"{self.hidden}, {self.num_experts}, top_k={self.top_k}, scoring={self.scoring!r}, "
            f"renormalize={self.renormalize}{grouped}{noise}"
        )


def _smooth_load(logits: Tensor, noisy: Tensor, deviation: Tensor, top_k: int, real: Tensor | None) -> Tensor:
    """``[E]``: the sum over the tokens of the probability that an expert would be chosen with new noise of its own.

    Its rival is the k-th largest of the others' noisy logits: the k-th of all for who was not chosen, the one after it
    for who was.
    """
    logits, noisy, deviation = (t.reshape(-1, t.shape[-1]) for t in (logits, noisy, deviation))
    if top_k == logits.shape[1]:
        return (
            logits.new_full((top_k,), logits.shape[0])
            if real is None
            else real.sum().to(logits).expand(top_k)
        )
    best = noisy.topk(top_k + 1, 1).values
    last_in, first_out = best[:, top_k - 1, None], best[:, top_k, None]
    rival = torch.where(noisy > first_out, first_out, last_in)
    chance = torch.special.ndtr((logits - rival) / deviation)
    return (chance if real is None else torch.where(real[:, None], chance, 0)).sum(0)


def _check_sizes(hidden, num_experts, top_k, groups, top_groups, group_topk) -> None:
    for name, size in (("hidden", hidden), ("num_experts", num_experts)):
        if not is_int(size, 1):
            raise ValueError(f"{name}: expected an int >= 1, got {size!r}")
    if not is_int(top_k, 1) or top_k > num_experts:
        raise ValueError(f"top_k: expected an int in [1, {num_experts}], got {top_k!r}")
    if not is_int(groups, 1) or num_experts % groups:
        raise ValueError(f"groups: expected a divisor of the {num_experts} experts, got {groups!r}")
    size = num_experts // groups
    least = -(-top_k // size)  # groups that hold top_k experts
    if not is_int(top_groups, 1) or not least <= top_groups <= groups:
        raise ValueError(
            f"top_groups: expected an int in [{least}, {groups}], as {top_k} experts are chosen, got {top_groups!r}"
        )
    if top_groups < groups and (not is_int(group_topk, 1) or group_topk > size):
        raise ValueError(f"group_topk: expected an int in [1, {size}], got {group_topk!r}")
