"""Experts: the MLPs of a mixture, of which each token runs the ones that a router chose."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...geometry import is_int
from ...ops import QuantizedExperts, experts_mlp, quantize_experts
from ...ops.experts import checks as expert_checks
from ...plans import ExpertPlan, named
from ..exact import ExactBuffers


class Experts(ExactBuffers):
    """E MLPs, gated (SwiGLU and its kin) or plain, and the weighted sum of the chosen ones for each token.

    The parameters have the names and layouts of transformers' expert modules, so that their checkpoints load:

    ==================================  ====================  ======================
    parameter                           shape                 ``transposed``
    ==================================  ====================  ======================
    ``gate_up_proj`` (gated)            ``[E, 2 * I, H]``     ``[E, H, 2 * I]``
    ``up_proj`` (not gated)             ``[E, I, H]``         ``[E, H, I]``
    ``down_proj``                       ``[E, H, I]``         ``[E, I, H]``
    ``gate_up_proj_bias`` (``bias``)    ``[E, 2 * I]``        the same
    ``up_proj_bias`` (``bias``)         ``[E, I]``            the same
    ``down_proj_bias`` (``bias``)       ``[E, H]``            the same
    ==================================  ====================  ======================

    Args:
        num_experts: E.
        hidden: H, the features of a token.
        intermediate: I, the features between an expert's two layers.
        activation: "silu", "gelu", "gelu_tanh", "relu", "relu6", "hardswish", "relu2", None; gated only:
            "clamped_swiglu" (gpt-oss). Or a callable ``[P, 2 * I] -> [P, I]`` (not gated ``[P, I] -> [P, I]``).
        gated: ``down(activation(gate(x)) * up(x))`` instead of ``down(activation(up(x)))``.
        bias: whether the layers have biases.
        interleaved: the outputs of ``gate_up_proj`` are gate and up by turns instead of gate before up.
        transposed: the weights lie ``[E, inputs, outputs]``. gpt-oss has both, and biases.
        alpha, limit: of clamped_swiglu, see ``ops.expert_activation``.

    Shape:
        - x: ``[..., H]``; T is the product of the leading sizes.
        - topk_index: int ``[..., K]`` or ``[T, K]`` in ``[0, E]``, E means dropped; or an ``ExpertPlan`` of T tokens.
        - topk_weight: ``[..., K]`` or ``[T, K]``, any floating dtype; None: 1.
        - output: ``[..., H]``, zero where all choices of a token are dropped.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: sparsely-gated mixture of experts (ICLR 2017), GLU variants improve transformer (2020).
    """

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        activation: str | Callable[[Tensor], Tensor] | None = "silu",
        gated: bool = True,
        bias: bool = False,
        *,
        interleaved: bool = False,
        transposed: bool = False,
        alpha: float = 1.702,
        limit: float = 7.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, size in (("num_experts", num_experts), ("hidden", hidden), ("intermediate", intermediate)):
            if not is_int(size, 1):
                raise ValueError(f"{name}: expected an int >= 1, got {size!r}")
        if not callable(activation):
            expert_checks.activation(activation, gated)
        self.num_experts, self.hidden, self.intermediate = num_experts, hidden, intermediate
        self.activation, self.gated, self.bias = activation, gated, bias
        self.interleaved, self.transposed, self.alpha, self.limit = interleaved, transposed, alpha, limit
        self.up_name = "gate_up_proj" if gated else "up_proj"
        inner = 2 * intermediate if gated else intermediate
        for name, outputs, inputs in ((self.up_name, inner, hidden), ("down_proj", hidden, intermediate)):
            shape = (inputs, outputs) if transposed else (outputs, inputs)
            weight = torch.empty(num_experts, *shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(weight))
            vector = torch.empty(num_experts, outputs, device=device, dtype=dtype) if bias else None
            self.register_parameter(f"{name}_bias", None if vector is None else nn.Parameter(vector))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert's layers as ``nn.Linear`` has them."""
        for name, inputs in ((self.up_name, self.hidden), ("down_proj", self.intermediate)):
            bound = 1 / math.sqrt(inputs)
            nn.init.uniform_(getattr(self, name), -bound, bound)
            if self.bias:
                nn.init.uniform_(getattr(self, f"{name}_bias"), -bound, bound)

    def forward(
        self,
        x: Tensor,
        topk_index: Tensor | ExpertPlan,
        topk_weight: Tensor | None = None,
        *,
        capacity: int | None = None,
    ) -> Tensor:
        """The weighted sum of each token's experts; ``capacity``: the most rows of one, see ``ExpertPlan.from_topk``."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor [..., {self.hidden}], got {type(x).__name__}")
        if x.shape[-1:] != (self.hidden,):
            raise ValueError(f"x: expected [..., {self.hidden}], got shape {tuple(x.shape)}")
        if x.dim() != 2:  # choices may have x's leading sizes or be flat
            topk_index, topk_weight = _flat(topk_index), _flat(topk_weight)
        plan = self._plan(topk_index, capacity)
        out = experts_mlp(
            x.reshape(-1, self.hidden),
            self._weight(self.up_name),
            self._weight("down_proj"),
            plan,
            topk_weight,
            gated=self.gated,
            activation=self.activation,
            up_bias=getattr(self, f"{self.up_name}_bias"),
            down_bias=self.down_proj_bias,
            interleaved=self.interleaved,
            transposed=self.transposed,
            alpha=self.alpha,
            limit=self.limit,
        )
        return out.reshape(x.shape)

    def _plan(self, topk_index: Tensor | ExpertPlan, capacity: int | None) -> ExpertPlan:
        if isinstance(topk_index, ExpertPlan):
            if topk_index.num_experts != self.num_experts or capacity not in (None, topk_index.capacity):
                raise ValueError(
                    f"topk_index: expected a plan of {self.num_experts} experts"
                    f"{'' if capacity is None else f' and capacity {capacity}'}, got {topk_index}"
                )
            return topk_index
        return named("topk_index", "index", ExpertPlan.from_topk, topk_index, self.num_experts, capacity)

    # ------------------------------------------------------------------------------ eight bits

    def quantized(self) -> Experts:
        """The same experts with weights of eight bits, for inference: see ``ops.quantize_experts``.

        The weights become int8 buffers of their names with float32 ``…_scale`` ``[E, outputs]``; the biases are shared with this
        module. Gradients reach ``x`` and ``topk_weight``, not the weights.
        """
        if self._scale("down_proj") is not None:
            return self
        other = Experts(
            self.num_experts,
            self.hidden,
            self.intermediate,
            self.activation,
            self.gated,
            self.bias,
            interleaved=self.interleaved,
            transposed=self.transposed,
            alpha=self.alpha,
            limit=self.limit,
            device="meta",
        )
        for name in (self.up_name, "down_proj"):
            weight, scale = quantize_experts(getattr(self, name), self.transposed)
            delattr(other, name)
            other.register_buffer(name, weight)
            other.register_buffer(f"{name}_scale", scale)
            setattr(other, f"{name}_bias", getattr(self, f"{name}_bias"))
        return other.train(self.training)

    def _scale(self, name: str) -> Tensor | None:
        return self._buffers.get(f"{name}_scale")

    def _weight(self, name: str) -> Tensor | QuantizedExperts:
        weight, scale = getattr(self, name), self._scale(name)
        return weight if scale is None else QuantizedExperts(weight, scale)

    def _exact(self) -> list[str]:
        return [name for name in self._buffers if name.endswith("_scale")]

    def extra_repr(self) -> str:
        options = "".join(
            f", {name}=True" for name in ("bias", "interleaved", "transposed") if getattr(self, name)
        )
        gated = "" if self.gated else ", gated=False"
        eight = "" if self._scale("down_proj") is None else ", int8"
        return f"{self.num_experts}, {self.hidden}, {self.intermediate}, {self.activation!r}{gated}{options}{eight}"


def _flat(choices):
    """A tensor ``[..., K]`` as ``[T, K]``; anything else as it is."""
    if not isinstance(choices, Tensor) or choices.dim() == 2:
        return choices
    return choices[None] if choices.dim() == 1 else choices.flatten(0, -2)
