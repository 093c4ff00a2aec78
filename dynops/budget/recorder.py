"""Recorder: what gates, exits, halting and routers do over a data set, without waiting for the device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import context
from ..nn import (
    ChannelConv2d,
    ChannelGatedConv2d,
    ChannelLinear,
    ConvExperts,
    Experts,
    ParallelExperts,
    Skip,
    SparseBlocks,
    SparseConv2d,
    SparseConvTranspose2d,
    SparseSequential,
    TopKRouter,
)
from ..ops import probing
from ..plans import BlockPlan, ChannelPlan, ExpertPlan
from . import plots as pictures
from .counters import Histogram, Tally
from .dense_rules import argument
from .tracker import Call, Tracker

_PIXELS = (SparseConv2d, SparseConvTranspose2d, SparseSequential, SparseBlocks)
_CHANNELS = (ChannelConv2d, ChannelLinear)
_EXPERTS = (Experts, ParallelExperts, ConvExperts)


class Recorder(Tracker):
    """Context manager that records what a model decides::

        with Recorder(model, num_classes=10) as recorder:
            for x, y in loader:
                recorder.labels = y
                model(x)
        recorder.save("report")

    Recorded, by the names of ``model.named_modules()``:

    * rates: of Skip's gates, of masks of pixels, blocks and channels that layers get, of ChannelGatedConv2d's
      gates, of SkipRNN's updates, and of every :class:`dynops.gates.Decision` that a module returns: open /
      all;
    * exits of EarlyExit, Cascade and TokenExit, and steps of Halting and SpatialHalting: histograms;
    * expert load: the choices of routers, and those that Experts and ConvExperts get (where a capacity drops,
      after it);
    * pictures of the last call: masks ``[N, 1, H, W]`` and ponder maps, of the first samples.

    Everything is added up on the model's device, in memory of a fixed size; only :meth:`summary` and
    :meth:`save` read it back.

    Args:
        model: a module. Other threads that run it are not recorded.
        num_classes: C; with it and ``labels`` all counts are kept for each class too.
        maps: samples whose maps are kept.
        batch_dim: where the samples are in the model's first tensor argument.

    Attributes:
        labels: int ``[N]`` in [0, C) of the batch that comes next, or None: no class (like values outside).
            Set it before each batch. A layer that runs on some of the samples gets theirs.

    Raises:
        TypeError, ValueError: ``labels`` that do not fit, at the call of the model.
    """

    def __init__(
        self, model: nn.Module, num_classes: int | None = None, *, maps: int = 8, batch_dim: int = 0
    ):
        super().__init__(model, batch_dim)
        for name, value, least in (("num_classes", num_classes, 1), ("maps", maps, 0)):
            wrong = not isinstance(value, int) or isinstance(value, bool) or value < least
            if wrong and (value is not None or name == "maps"):
                raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
        self.num_classes, self.maps = num_classes or 0, maps
        self.labels: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets what was recorded."""
        self._rates: dict[str, Tally] = {}
        self._histograms: dict[str, dict[str, Histogram]] = {"exits": {}, "steps": {}, "experts": {}}
        self._maps: dict[str, dict[str, Tensor]] = {"mask": {}, "ponder": {}}

    # -------------------------------------------------------------------------------------- calls

    def called(self, call: Call, args: tuple, kwargs: dict, out: Any) -> None:
        if probing.by() is not None:
            return
        with torch.no_grad():
            self._record(call.module, self._names[call.module], args, kwargs, out)

    def _record(self, module: nn.Module, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        if isinstance(module, Skip):
            self._rate(name, argument(args, kwargs, 1, "gate"))
        elif isinstance(module, _PIXELS):
            self._rate(name, _mask(args, kwargs, out))
        elif isinstance(module, _CHANNELS):
            self._rate(name, argument(args, kwargs, 2, "out_plan"))
        elif isinstance(module, ChannelGatedConv2d):
            self._rate(name, module._open)
        elif isinstance(module, _EXPERTS):
            self._load(name, module, argument(args, kwargs, 1, "topk_index"), kwargs.get("capacity"))
        elif isinstance(module, TopKRouter):
            self._histogram("experts", name, out.index, module.num_experts)
        elif isinstance(out, tuple):
            self._named(module, name, out)

    def _named(self, module: nn.Module, name: str, out: tuple) -> None:
        """Decisions, exits, steps, updates, by name; and the plan of a head of GroupedDynamicConv2d."""
        if len(out) == 2 and isinstance(out[1], ChannelPlan):
            self._rate(name, out[1])
        if isinstance(mask := getattr(out, "mask", None), Tensor):
            self._rate(name, mask)
        if isinstance(updates := getattr(out, "updates", None), Tensor):
            self._rate(name, updates if module.batch_first else updates.transpose(0, 1))
        if isinstance(exits := getattr(out, "exits", None), Tensor) and hasattr(module, "num_exits"):
            self._histogram("exits", name, exits, module.num_exits)
        if isinstance(steps := getattr(out, "steps", None), Tensor) and hasattr(out, "ponder"):
            most = getattr(module, "max_steps", None) or len(module.halts) + 1
            self._histogram("steps", name, steps, most + 1)
            if out.ponder.dim() == 4:
                self._keep("ponder", name, out.ponder)

    def _rate(self, name: str, decision: Any) -> None:
        if decision is None:
            return
        if isinstance(decision, BlockPlan):
            decision = decision.blocks()
        elif isinstance(decision, ChannelPlan) and decision.shared:
            decision = decision.mask()[None]
        elif not isinstance(decision, Tensor):
            decision = decision.mask()
        if decision.dim() == 0 or decision.numel() == 0:
            return
        is_open = decision != 0
        if is_open.dim() in (3, 4) and (is_open.dim() == 3 or is_open.shape[1] == 1):
            self._keep("mask", name, is_open)
        if name not in self._rates:
            self._rates[name] = Tally(self.num_classes, is_open.device)
        rows = is_open.reshape(len(is_open), -1)
        self._rates[name].add(rows.sum(1), rows.shape[1], self._classes(len(rows)))

    def _load(self, name: str, module: nn.Module, index: Any, capacity: int | None) -> None:
        if index is None:
            return
        experts = len(module.branches) if isinstance(module, ConvExperts) else module.num_experts
        if not isinstance(index, ExpertPlan) and capacity is not None:
            rows = index.reshape(-1, index.shape[-1]) if index.dim() > 1 else index
            index = ExpertPlan.from_topk(rows, experts, capacity)
        if isinstance(index, ExpertPlan):
            chose = torch.full_like(index.order, experts).scatter(0, index.order.long(), index.expert)
            index = torch.where(index.position.flatten() >= 0, chose, experts).view(index.position.shape)
        self._histogram("experts", name, index, experts)

    def _histogram(self, kind: str, name: str, values: Tensor, bins: int) -> None:
        if values.dim() == 0 or values.numel() == 0:
            return
        table = self._histograms[kind]
        if name not in table:
            table[name] = Histogram(self.num_classes, bins, values.device)
        rows = values.reshape(values.shape[0], -1)
        table[name].add(rows, self._classes(len(rows)))

    def _keep(self, kind: str, name: str, map_: Tensor) -> None:
        if self.maps:
            map_ = map_ if map_.dim() == 3 else map_[:, 0]
            self._maps[kind][name] = map_[: self.maps].detach().clone()

    def _classes(self, rows: int) -> Tensor | None:
        """int64 ``[rows]``, the class of each row of the innermost frame's; C for none."""
        if not self.num_classes or self.labels is None:
            return None
        root = self._frames[0]
        values = _checked_labels(self.labels, root.rows).to(root.sums.device)
        for frame in self._frames[1:]:
            values = None if values is None else frame.way.values(values)
        if values is not None:
            values = self._frames[-1].way_from(None, rows).values(values)
        if values is None:
            return None
        return torch.where((values < 0) | (values >= self.num_classes), self.num_classes, values)

    # ------------------------------------------------------------------------------------ results

    def summary(self) -> dict[str, dict[str, dict]]:
        """Returns what was recorded as plain numbers; reads it back from the device.

        ``{"rates": {layer: {"rate", "calls", "p50", "p99", "classes"}}, "exits" | "steps" | "experts":
        {layer: {"counts", "mean", "classes"}}}``. p50 and p99: of the rates of single calls, to 1 %.
        ``classes``: the rate (None without samples) or the counts of each class, empty without
        ``num_classes``. Counts of steps begin at 0 steps.
        """
        result: dict[str, dict[str, dict]] = {"rates": {n: t.read() for n, t in self._rates.items()}}
        for kind, table in self._histograms.items():
            result[kind] = {name: histogram.read() for name, histogram in table.items()}
        return result

    def save(self, folder: str | Path) -> list[Path]:
        """Writes ``summary.json``, and as PNG the maps, the histograms and the rates of each class.

        Returns:
            The files.

        Raises:
            ImportError: there is something to draw and matplotlib is not installed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        summary = self.summary()
        files = [folder / "summary.json"]
        files[0].write_text(json.dumps(summary, indent=1))
        for kind, maps in self._maps.items():
            for name, map_ in maps.items():
                files.append(pictures.maps(folder / f"{_file(name)}.{kind}.png", map_, f"{name}: {kind}"))
        for kind in self._histograms:
            for name, values in summary[kind].items():
                path = folder / f"{_file(name)}.{kind}.png"
                files.append(pictures.bars(path, values["counts"], f"{name}: {kind}"))
        by_class = _by_class(summary["rates"])
        if by_class:
            files.append(pictures.table(folder / "rates.png", by_class, "share of open gates"))
        return files


def _mask(args: tuple, kwargs: dict, out: Tensor):
    """The mask or plan of a layer that computes pixels: the one passed, else that of ``dynops.use_mask``."""
    mask, active = argument(args, kwargs, 1, "mask_or_plan"), context.current()
    if isinstance(mask, (list, tuple)):  # output_size of a transposed convolution
        mask = None
    batch = out.shape[0] if out.dim() == 4 else 1
    if mask is None and active is not None:
        return active.plan((batch, *out.shape[-2:]), out.device)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        mask = mask[None]
    if mask is not None and mask.shape[0] == 1:  # one for all samples
        mask = mask.expand(batch, *mask.shape[1:]) if isinstance(mask, Tensor) else mask.expand(batch)
    return mask


def _checked_labels(labels: Any, rows: int) -> Tensor:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected ints [N], got {getattr(labels, 'dtype', type(labels).__name__)}")
    if tuple(labels.shape) != (rows,):
        raise ValueError(f"labels: expected [{rows}], as the batch has, got shape {tuple(labels.shape)}")
    return labels.long()


def _file(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name) or "model"


def _by_class(rates: Mapping[str, dict]) -> dict[str, list]:
    return {name: values["classes"] for name, values in rates.items() if values["classes"]}
