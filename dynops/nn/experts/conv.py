"""Experts that are modules, one or a few for each sample: branches of a convolutional network."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ... import modes
from ...ops import combine_pairs, gather_pairs
from ...ops.experts import checks as expert_checks
from ...ops.samples import SampleLayout
from ...plans import ExpertPlan, named
from ..apart import apart
from ..dtypes import Returned


class ConvExperts(nn.Module):
    """Branches, and a gate that chooses the branches of each sample.

    A chosen branch runs once, on a batch of the samples that chose it; a branch that no sample chose does not run. The
    output is the weighted sum of the chosen branches (DRNet). With ``combine="concat"`` it has all branches side by side,
    zero if a sample does not run one, for a combiner that comes next (HydraNet).

    Args:
        branches: E modules ``[n, C, ...] -> [n, O, ...]`` of equal output shape, which treat each sample by itself. A norm
            in training mode takes its statistics from the samples of its branch.
        gate: a module ``x -> (index, weight, ...)``, for example a Sequential of pooling, ``nn.Flatten`` and
            :class:`TopKRouter`; None: index and weight are arguments. For a router's losses call it outside.
        combine: "sum" or "concat".

    Shape:
        - x: ``[N, C, ...]``, any number of dimensions, either memory format.
        - topk_index: int ``[N, K]`` or ``[N]`` in ``[0, E]``, E means dropped; or an ``ExpertPlan`` of N tokens, which several
          layers can share.
        - topk_weight: ``[N, K]``, any floating dtype; None: 1.
        - output: ``[N, O, ...]``, with "concat" ``[N, E * O, ...]``; zero where nothing ran. ``x``, the branches and
          ``topk_weight`` get their gradients.

    Each call reads the number of samples of each branch back to the host. If no sample chose a branch, the first branch runs
    on two samples of zeros for the shape of the output. The output's dtype is the widest that any branch returns, chosen or
    not. If it would be narrower than float32, a branch that has not run yet runs on two samples, once. The gradient of a
    branch that no sample chose is None: DistributedDataParallel needs ``find_unused_parameters=True``.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: HydraNets (CVPR 2018), Dynamic Routing Networks (WACV 2021).
    """

    def __init__(self, branches: Iterable[nn.Module], gate: nn.Module | None = None, *, combine: str = "sum"):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        if len(self.branches) == 0:
            raise ValueError("branches: expected at least one module, got none")
        if combine not in ("sum", "concat"):
            raise ValueError(f"combine: expected 'sum' or 'concat', got {combine!r}")
        self.gate, self.combine = gate, combine
        self._returned = Returned()

    def forward(
        self,
        x: Tensor,
        topk_index: Tensor | ExpertPlan | None = None,
        topk_weight: Tensor | None = None,
    ) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
            what = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a floating tensor [N, C, ...], got {what}")
        if (topk_index is None) == (self.gate is None):
            expected = (
                "[N, K], as the layer has no gate" if self.gate is None else "None, as the layer has a gate"
            )
            raise ValueError(f"topk_index: expected {expected}, got {type(topk_index).__name__}")
        modes.refuse_fixed_sizes(x, "ConvExperts")
        if topk_index is None:
            topk_index, topk_weight, *_ = apart(self.gate, x)
        plan = self._plan(x, topk_index)
        expert_checks.topk_weight_of(topk_weight, plan)
        rows, layout = self._run(x, plan)
        if self.combine == "sum":
            return layout.samples(combine_pairs(rows, plan, topk_weight))
        return _side_by_side(self._slots(rows, plan, topk_weight), layout)

    def _plan(self, x: Tensor, topk_index: Tensor | ExpertPlan) -> ExpertPlan:
        experts = len(self.branches)
        plan = topk_index
        if not isinstance(plan, ExpertPlan):
            plan = named("topk_index", "index", ExpertPlan.from_topk, topk_index, experts)
        if plan.num_experts != experts or plan.tokens != x.shape[0]:
            raise ValueError(f"topk_index: expected {x.shape[0]} samples and {experts} experts, got {plan}")
        return plan

    def _run(self, x: Tensor, plan: ExpertPlan) -> tuple[Tensor, SampleLayout]:
        """The outputs ``[P, F]`` in the plan's order, and how they become samples."""
        counts = plan.counts.tolist()
        layout = SampleLayout.of(x)
        packed, start = gather_pairs(layout.rows(x), plan), 0
        outputs, out_layout, idle = [], None, []
        for i, (branch, count) in enumerate(zip(self.branches, counts, strict=True)):
            part, start = packed[start : start + count], start + count
            if count == 0:
                idle.append(branch)
                continue
            y = apart(branch, layout.samples(part))  # autograd takes the parts for one tensor
            self._returned.note(branch, x, y)
            out_layout = out_layout or SampleLayout.of(y)
            if y.shape != (len(part), *out_layout.shape):
                raise ValueError(
                    f"branches: expected {(len(part), *out_layout.shape)} from branch {i}, got {tuple(y.shape)}"
                )
            outputs.append(out_layout.rows(y))
        like = outputs[0] if outputs else self._output_of_none(x)
        if out_layout is None:
            out_layout = SampleLayout(like.shape[1:], layout.channels_last)
        for other in outputs[1:]:
            like = like.to(torch.promote_types(like.dtype, other.dtype))
        for branch in idle:  # the dtype is that of all branches, whoever was chosen
            like = self._returned.widened(like, branch, x)
        outputs.append(like.new_zeros(plan.num_rows - start, out_layout.shape.numel()))
        return torch.cat([rows.to(like.dtype) for rows in outputs]), out_layout

    def _output_of_none(self, x: Tensor) -> Tensor:
        """Returns the output where no sample chose a branch: zeros, like the first branch's.

        Two of them, as a norm of vectors refuses one in training mode; on copies of the buffers, which a norm changes. (The meta
        device would cost nothing, but not every module runs there.)
        """
        branch = self.branches[0]
        buffers = {name: buffer.clone() for name, buffer in branch.named_buffers()}
        with torch.no_grad():
            return torch.func.functional_call(branch, buffers, (x.new_zeros(2, *x.shape[1:]),))

    def _slots(self, rows: Tensor, plan: ExpertPlan, topk_weight: Tensor | None) -> Tensor:
        """``[N, E, F]``: each row at its sample and branch, added where a sample names a branch twice."""
        live = int(plan.offsets[-1])
        rows = rows[:live]
        if topk_weight is not None:
            rows = (rows * topk_weight.reshape(-1)[plan.order[:live].long()][:, None]).to(rows.dtype)
        where = plan.token[:live].long(), plan.expert[:live].long()
        slots = rows.new_zeros(plan.tokens, plan.num_experts, rows.shape[1])
        return slots.index_put(where, rows, accumulate=True)

    def __getstate__(self):
        return {**self.__dict__, "_returned": Returned()}

    def extra_repr(self) -> str:
        return f"combine={self.combine!r}"


def _side_by_side(slots: Tensor, layout: SampleLayout) -> Tensor:
    """``[N, E * O, ...]`` from ``[N, E, F]``."""
    n, experts, _ = slots.shape
    if not layout.channels_last:
        return slots.reshape(n, experts * layout.shape[0], *layout.shape[1:])
    c, h, w = layout.shape
    return slots.reshape(n, experts, h, w, c).permute(0, 2, 3, 1, 4).flatten(3).permute(0, 3, 1, 2)
