"""MacCounter: the MACs of a model's forward pass, sample by sample, with the gradients of its gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..ops import probing
from .dense_rules import Cost
from .mac_sums import Sums
from .row_maps import Same
from .row_tracking import Frame, device_of, first_tensor
from .rules import rule_of, saliency_heads
from .tracker import Call, Tracker


class LayerMacs(NamedTuple):
    """A layer's MACs over a batch: ``computed`` float64 ``[]``, with a gradient; ``dense``: all gates open."""

    computed: Tensor
    dense: float


class MacCounter(Tracker):
    """Context manager that counts what a model computes::

        with MacCounter(model) as macs:
            loss = criterion(model(x), y)
        loss = loss + (macs.total / macs.dense - target) ** 2

    Counted are PyTorch's convolutions, linear and recurrent layers, recurrent cells and
    ``nn.MultiheadAttention``, all layers of :mod:`dynops.nn`, ``ops.interpolate_pixels``, and the experts and routers of
    transformers' models, whatever their ``experts_implementation``. A gate is made of such layers, so it counts too.
    What a module computes by functions (``F.conv2d``, ``torch.matmul``, attention written by hand) is not counted:
    give its class a rule.

    What counts is what must be computed: every tap at each output pixel (of a transposed convolution at each input pixel, and an
    active output pixel has its share of these), halos included, and of a layer in its dense-masked training form
    (``Skip`` and ``Halting`` with ``dense=True``) what the compact form would compute. A gate's value counts
    as open (nonzero) or closed; its gradient is what it opens. Each sample of a ``Skip`` gets the MACs of the
    module for that sample. A skipped sample gets the mean of those that ran, or, where none ran, the module's
    cost with every gate open. (To learn it the module runs once on two samples, without
    gradients; where no sample reaches an exit, a branch or a unit, so does that.) Masks of pixels, blocks and
    channels, ``gate`` and ``scale`` of the layers that have them, ``updates`` of SkipRNN, the weights of
    ConvExperts and the ponder cost of Halting have gradients likewise. The gates inside of
    ChannelGatedConv2d and GroupedDynamicConv2d, and routers of Experts, have none.

    A layer that runs on some of the samples counts for those: whatever was gathered by
    ``ops.gather_samples`` is traced to its samples. Rows of unknown origin (a table that is computed once for
    the batch, an ``index_select`` of one's own) count for all samples alike.

    Counts add up over the calls inside the context; :meth:`reset` begins anew. One that raises counts nothing.

    Args:
        model: a module; its submodules count also where they are called by themselves. Hooks are set on it
            while the context is open. Other threads that run it are not counted.
        rules: ``{class: rule}`` for modules that compute by functions, and their subclasses;
            ``rule(module, args, kwargs, output)`` returns a :class:`Cost` (rows, MACs of each) or None. It
            takes the place of a rule that there is; layers inside the module still count.
        batch_dim: where the samples are in the model's first tensor argument.

    Attributes, float64, with gradients (reading them makes no copy to the host):
        per_sample: ``[N]``, MACs of each sample.
        total: ``[]``, of the batch. flops: 2 * total.
        dense: a float, of the batch with every gate open: all samples, pixels, channels, experts, exits and
            steps.
        layers: ``{name: LayerMacs}``, by the names of ``model.named_modules()``.

    Not for compiled models: hooks break their graphs.

    Raises:
        TypeError: ``model`` is no module. RuntimeError: entered twice. ValueError: ``per_sample`` of calls
            with different batches.
    """

    def __init__(self, model: nn.Module, *, rules: Mapping[type, Callable] | None = None, batch_dim: int = 0):
        super().__init__(model, batch_dim)
        self._own_rules = dict(rules or {})
        self._rules: dict[nn.Module, Callable] = {}
        self._prices: dict = {}
        self.reset()

    def reset(self) -> None:
        """Forgets what was counted."""
        self._results: dict[int, Sums] = {}

    def opened(self, name: str, module: nn.Module) -> None:
        own = [self._own_rules[kind] for kind in type(module).__mro__ if kind in self._own_rules]
        if (rule := own[0] if own else rule_of(module)) is not None:
            self._rules[module] = rule

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._rules = {}

    def called(self, call: Call, args: tuple, kwargs: dict, out: Any) -> None:
        rule = self._rules.get(call.module)
        if rule is None:
            return
        extra = (self.returned,) if rule is saliency_heads else ()
        cost = rule(call.module, args, kwargs, out, *extra)
        if cost is not None:
            self._add(self._names[call.module], cost, call.value)

    def _add(self, name: str, cost: Cost, value) -> None:
        frame = self._frames[-1]
        way = frame.way_from(value, cost.rows)
        vector, factor = way.vector(cost.live)
        frame.sums.add(name, cost.each * factor, vector)
        frame.sums.add_dense(name, (cost.each if cost.dense is None else cost.dense) * way.full)

    def finished(self, frame: Frame) -> None:
        known = self._results.get(frame.rows)
        if known is None:
            self._results[frame.rows] = frame.sums
        else:
            known.take(frame.sums, Same())

    def filled(self, plan, channels: int, mode: str, kernel_size: int) -> None:
        """A Gaussian fill blurs each channel and the weights along both axes; the nearest value is free."""
        if mode != "gaussian" or not self._frames or self._foreign():
            return
        n, h, w = plan.shape
        name = self._names[self._calls[-1].module]
        cost = Cost(n, 2.0 * kernel_size * (channels + 1) * h * w)
        self._add(f"{name}.interpolate_pixels".lstrip("."), cost, None)

    # -------------------------------------------------------------------------------------- price

    def price(self, module: nn.Module, args: tuple) -> Sums:
        """The MACs of one sample with every gate open, of a module that did not run: by a run on two samples.

        Two, as a norm of vectors refuses one in training mode; on copies of the buffers, which a norm
        changes, and without a trace in the random state.
        """
        shapes = tuple(tuple(t.shape[1:]) for t in pytree.tree_leaves(args) if isinstance(t, Tensor))
        key = (module, shapes)
        if key not in self._prices:
            self._prices[key] = self._probe(module, args)
        numbers = self._prices[key]
        sums = Sums(1)
        for name, number in numbers.items():
            sums.add(name, number)
            sums.add_dense(name, number)
        return sums

    def _probe(self, module: nn.Module, args: tuple) -> dict[str, float]:
        value = first_tensor(args)
        two = pytree.tree_map_only(Tensor, lambda t: torch.cat([t[:1], t[:1]]) if t.dim() else t, args)
        frame = Frame(2, device_of(value))
        saved = self._frames, self._calls
        self._frames, self._calls = [frame], []
        devices = [value.device] if value.device.type == "cuda" else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), probing.probing(self):
                buffers = {name: b.clone() for name, b in module.named_buffers()}
                torch.func.functional_call(module, buffers, two)
        finally:
            self._frames, self._calls = saved
        return frame.sums.dense

    # ------------------------------------------------------------------------------------ results

    @property
    def per_sample(self) -> Tensor:
        if len(self._results) > 1:
            raise ValueError(
                f"per_sample: expected calls with one batch, got batches of {list(self._results)}"
            )
        if not self._results:
            raise ValueError("per_sample: expected a call of the model inside the context, got none")
        return next(iter(self._results.values())).per_row()

    @property
    def total(self) -> Tensor:
        sums = [sums.per_row().sum() for sums in self._results.values()]
        return torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64, device="cpu")

    @property
    def flops(self) -> Tensor:
        return 2 * self.total

    @property
    def dense(self) -> float:
        return float(sum(sum(sums.dense.values()) * sums.rows for sums in self._results.values()))

    @property
    def layers(self) -> dict[str, LayerMacs]:
        out: dict[str, LayerMacs] = {}
        for sums in self._results.values():
            computed = sums.of_layers()
            for name in {**computed, **sums.dense}:
                before = out.get(
                    name, LayerMacs(torch.zeros((), dtype=torch.float64, device=sums.device), 0.0)
                )
                dense = sums.dense.get(name, 0.0) * sums.rows
                out[name] = LayerMacs(before.computed + computed.get(name, 0.0), before.dense + dense)
        return out
