"""A bound sequence as the binary runs it: plans, weights that are looked at in each call, addresses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import backends
from ...kept import Mark, kept
from ...kernels.cpu.engine import setup_of
from ...kernels.cpu.prepared import Prepared, StepKind, bilinear_table, key_of, sequence, weight_shape
from ..layers.base import Rows
from ..layers.resample import Padded
from ..norm import tensors_of, uses_batch_statistics
from ..staleness import by_space, hooked
from .bound import Bound
from .steps import Step, as_kernel

_WINDOWS = (
    *(StepKind.MAX_POOL, StepKind.MEAN_POOL, StepKind.INNER_MEAN_POOL),
    *(StepKind.NEAREST, StepKind.BILINEAR),
)


class _Made(NamedTuple):
    """What the binary runs. A run holds all of it: another thread may make it anew meanwhile."""

    settings: tuple
    mark: Mark
    capsule: object
    memory: tuple  # that the capsule reads


class Running(Bound):
    """A sequence that is bound to sizes, and run."""

    def __init__(self, sequence, inputs: tuple):
        super().__init__(sequence, inputs)
        self.checks = by_space(self.settings)
        self._made: dict[tuple[bool, ...], _Made] = {}  # by the plans that have Winograd's tiles

    def run(self, run, found: list[Rows]) -> bool:
        """See :meth:`.sequence.Sequence.run`; ``found``: the inputs."""
        if any(module.training for module in self.idle) or not self._calls_hold():
            return False
        plans = self._plans(run, found)
        tensors = None if plans is None else self._tensors()
        if tensors is None:
            return False
        tiled = self.tiled
        quads = [run.quads(plan, tiled[i]) if i in tiled else None for i, plan in enumerate(plans)]
        made = self._made_for(tensors, tuple(q is not None for q in quads))
        if made is None:
            return False
        arguments = []
        for plan, tiles in zip(plans, quads, strict=True):
            arguments += (
                plan.index.data_ptr(), run.inverse(plan).data_ptr(),
                0 if tiles is None else tiles.data_ptr(), len(plan), 0 if tiles is None else tiles.shape[0],
                plan.shape[1] * plan.shape[2],
            )  # fmt: skip
        rows = dict(zip(self.inputs, found, strict=True))
        for value in self.outputs:
            plan = plans[self.slots[self._sizes[value]]]
            rows[value] = Rows(found[0].values.new_empty((len(plan), self._channels[value])), plan)
        arguments += [one.values.data_ptr() for one in rows.values()]
        backends._C.run_sequence(made.capsule, len(plans), *arguments)
        for value, result in self.results.items():
            out = rows[result] if type(result) is int else result[0]
            if value in self._pads:
                pad = self._pads[value][1]
                out = Padded(out, plans[self.slots[pad.out_shape]], pad)
            run.env[value] = out
        return True

    def _calls_hold(self) -> bool:
        """True where the modules that layers call are those that were bound, with nothing set on them."""
        if any(children.get(name) is not child for children, name, child in self.called):
            return False
        if not all(conv.holds() for conv in self.constant):
            return False
        if any(hooked(inner) or type(inner) is not kind for inner, kind in self.leaves):
            return False
        try:
            return all(get(state) == value for get, state, value in self.checks)
        except KeyError:  # one is gone
            return False

    def _plans(self, run, found: list[Rows]) -> list | None:
        """The plan of each size; None where one is empty, or not that of an input."""
        active, device, plans = run.policy.active, found[0].plan.device, []
        for size, geometry, ceil in self.makers:
            plan = active.plan(size, device) if geometry is None else active.after(geometry, device, ceil)
            if plan.count is not None or len(plan) == 0:
                return None
            plans.append(plan)
        for value, rows in zip(self.inputs, found, strict=True):
            if rows.plan is not plans[self.slots[self._sizes[value]]]:
                return None
        return plans

    def _tensors(self) -> list[Tensor | None] | None:
        """Every weight and statistic; None where a norm has the statistics of the batch."""
        tensors: list[Tensor | None] = []
        for step in self.steps:
            if (weights := step.weights) is not None:
                if weights.norm is not None and uses_batch_statistics(weights.norm):
                    return None
                if not all(isinstance(t, Tensor) for t in weights.scaled_by()):
                    return None
                tensors += weights.tensors()
            tensors += step.norm_tensors()
        return tensors

    def _made_for(self, tensors: list, quads: tuple[bool, ...]) -> _Made | None:
        """What the binary runs, made again where a tensor changed; None where one is of another kind."""
        if kept.stepped:
            kept.clear()
        norms = (step.layer_norm if step.weights is None else step.weights.norm for step in self.steps)
        now = kept.epoch, *[norm.eps for norm in norms if norm is not None]
        made = self._made.get(quads)
        if made is not None and made.settings == now and made.mark.holds(*tensors):
            return made
        if not self._are_plain(tensors):
            return None
        mark = Mark(*tensors)
        prepared = [None if step.weights is None else self._prepare(step, quads) for step in self.steps]
        for one, step in zip(prepared, self.steps, strict=True):
            if one is None and step.weights is not None:
                return None
        capsule, tables = self._capsule(prepared)
        made = self._made[quads] = _Made(now, mark, capsule, (prepared, tensors, tables))
        return made

    def _are_plain(self, tensors: list) -> bool:
        """True for tensors on the CPU, of which those of layer norms can be read as they lie."""
        for t in tensors:
            if t is not None and (type(t) not in (Tensor, nn.Parameter) or not t.is_cpu):
                return False
        for step in self.steps:
            for t in step.norm_tensors():
                plain = t is None or (t.dtype is torch.float32 and t.is_contiguous())
                if not plain or (t is not None and t.numel() != self._channels[step.out]):
                    return False
        return True

    def _prepare(self, step: Step, quads: tuple[bool, ...]) -> Prepared | None:
        weights, channels, value = step.weights, self._channels[step.out], step.inputs[0]
        g, conv, activation = weights.geometry, weights.conv, weights.activation
        # each row by itself: depthwise, by ones
        weight = torch.ones(channels, 1, 1, 1, device="cpu") if conv is None else as_kernel(conv)
        bias = None if conv is None else conv._parameters["bias"]
        if weight.dtype is not torch.float32 or not (bias is None or bias.dtype is torch.float32):
            return None
        if weight.shape != weight_shape(g, self._channels[value], channels) or not weights.scales_as_bound():
            return None
        setup = setup_of(g, weight.shape, torch.float32, True)
        stays = self._sizes[value] == self._sizes[step.out] and g.is_pointwise and not g.transposed
        pointwise = step.kind is StepKind.EACH or stays
        as_quads = setup.winograd and quads[self.slots[self._sizes[step.out]]]

        def make() -> Prepared:
            affine = weights.affine(channels)
            return Prepared(weight, bias, g, setup, activation, *affine, pointwise, as_quads)

        if conv is None or weights.scale is not None:
            return make()
        eps, tensors = (0.0, ()) if weights.norm is None else (weights.norm.eps, tensors_of(weights.norm))
        return kept.get((eps, *key_of(g, pointwise, activation, as_quads)), make, weight, bias, *tensors)

    def _capsule(self, prepared: list):
        number, last = self.number, {}
        for i, step in enumerate(self.steps):
            last.update(dict.fromkeys((*step.inputs, step.out), i))
        steps, tables = [], []
        for i, (step, one) in enumerate(zip(self.steps, prepared, strict=True)):
            freed = [number[v] for v, at in last.items() if at == i and v not in self.outputs]
            geometry = step.geometry if step.kind in _WINDOWS else None
            inputs = [number[v] for v in step.inputs]
            vectors = (*(0 if t is None else t.data_ptr() for t in step.norm_tensors() or (None, None)),)
            vectors += (0.0 if step.layer_norm is None else step.layer_norm.eps,)
            channels = step.channels
            if step.linear is not None:
                tables.append(table := bilinear_table(step.geometry, *step.linear))
                channels, vectors = table.first, table.vectors()
            steps.append((step.kind, inputs, number[step.out], one, geometry, freed, channels, vectors))
        values = [(self.slots[size], self._channels[v]) for v, size in self._sizes.items()]
        ends = [[number[v] for v in these] for these in (self.inputs, self.outputs)]
        return sequence(values, *ends, steps), tables
