"""Tracks which rows a layer runs on: a frame opens for each batch that a model makes smaller, and closes with it.

Everything that compacts a batch goes through ``ops.gather_samples``, which tells its observers. So a tensor
that was gathered is known, and so is the output of a module that was called with it; the module runs in a
frame of its own, whose counts go to the frame around it when the call ends. An unknown tensor is placed by
its first size: the rows of the frame, a multiple of them (in order), as many as were gathered last, or, where
nothing fits, an equal share for everyone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from ..nn import Cascade, ConvExperts, EarlyExit, Halting, JumpReader, Skip, SpatialHalting
from ..plans import ExpertPlan, SamplePlan
from .dense_rules import argument
from .mac_sums import Sums, slope
from .row_maps import Chain, Even, Gated, Owners, Repeat, Same, Shares, Times


def first_tensor(tree: Any) -> Tensor | PackedSequence | None:
    """The first tensor with a batch in the arguments of a call."""
    if isinstance(tree, (Tensor, PackedSequence)):
        return tree if isinstance(tree, PackedSequence) or tree.dim() > 0 else None
    if isinstance(tree, (tuple, list)):
        values = tree
    elif isinstance(tree, dict):
        values = tree.values()
    elif pytree.tree_is_leaf(tree):
        return None
    else:
        values = pytree.tree_leaves(tree)
    return next((t for t in map(first_tensor, values) if t is not None), None)


def rows_of(value: Tensor | PackedSequence | None, dim: int = 0) -> int:
    if value is None:
        return 1
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0]) if len(value.batch_sizes) else 0
    return value.shape[dim if value.dim() > dim else 0]


def device_of(value: Tensor | PackedSequence | None) -> torch.device:
    if value is None:
        return torch.device("cpu")
    return (value.data if isinstance(value, PackedSequence) else value).device


class Frame:
    """A batch of ``rows`` and the MACs on it; ``way`` leads to the rows of the frame around it."""

    def __init__(self, rows: int, device: torch.device, way: Same | None = None, dense: float = 1.0):
        self.sums = Sums(rows, device)
        self.way, self.dense = way or Same(), dense
        self._known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._recent: dict[int, Owners] = {}

    @property
    def rows(self) -> int:
        return self.sums.rows

    # ------------------------------------------------------------------------------ whose rows

    def know(self, tensor: Tensor, way: Owners) -> None:
        self._known[tensor] = way
        self._recent[tensor.shape[0]] = way

    def known(self, tensor) -> Owners | None:
        return self._known.get(tensor) if isinstance(tensor, Tensor) else None

    def way_from(self, tensor, rows: int) -> Same:
        """Maps the ``rows`` of a tensor to those of this frame."""
        known = self.known(tensor)
        if known is not None and len(known.owner) == rows:
            return known
        if rows == self.rows:
            return Same()
        if rows in self._recent:
            return self._recent[rows]
        if self.rows and rows and rows % self.rows == 0:
            return Repeat(rows // self.rows)
        for few, owners in self._recent.items():
            if few and rows and rows % few == 0:
                return Chain(Repeat(rows // few), owners)
        return Even(rows, self.rows)

    def gathered(self, x: Any, plan: SamplePlan, rows: Any) -> None:
        made: dict[int, Owners | None] = {}
        for before, after in zip(pytree.tree_leaves(x), pytree.tree_leaves(rows), strict=True):
            if not isinstance(before, Tensor):
                continue
            way = self.way_from(before, before.shape[0])
            key = id(way) if isinstance(way, Owners) else 0
            if key not in made:
                made[key] = _smaller(way, plan, self.rows)
            if made[key] is not None and after is not before:
                self.know(after, made[key])

    def told(self, plan: SamplePlan) -> None:
        """A module in this frame was called with a plan: as many rows as that has are its samples'."""
        if self.rows and plan.batch and plan.batch % self.rows == 0:
            whole = Same() if plan.batch == self.rows else Repeat(plan.batch // self.rows)
            self._recent[plan.num_rows] = _smaller(whole, plan, self.rows)

    # --------------------------------------------------------------------------------- calls in it

    def enter(self, module: nn.Module, value) -> Frame | None:
        """The frame of a call inside this one, where it needs one: what it reads was gathered."""
        way = self.known(value)
        return None if way is None else Frame(rows_of(value), device_of(value), way)

    def leave(self, below: Frame, module: nn.Module) -> None:
        """A call inside this one has ended."""
        self.sums.take(below.sums, below.way, below.dense)

    def close(self, module: nn.Module, args: tuple, kwargs: dict, out: Any, counter) -> None:
        """This call has ended."""


def _smaller(way: Same, plan: SamplePlan, above: int) -> Owners | None:
    index = plan.index.long()
    dead, at = index < 0, index.clamp(min=0)
    if isinstance(way, Owners):
        return Owners(torch.where(dead, -1, way.owner[at]), above, way.full)
    if isinstance(way, Repeat):
        return Owners(torch.where(dead, -1, at // way.times), above, way.full)
    return Owners(index, above) if type(way) is Same else None


# ------------------------------------------------------------------------------------------ Skip


class SkipFrame(Frame):
    """A call of :class:`dynops.nn.Skip`: the module's MACs times the gate, in the dense form too."""

    def __init__(self, layer: Skip, args: tuple, kwargs: dict, rows: int, device: torch.device):
        super().__init__(rows, device)
        self.layer, self.gate, self.ran = layer, argument(args, kwargs, 1, "gate"), False

    def enter(self, module: nn.Module, value) -> Frame | None:
        if module is not self.layer.module:
            return super().enter(module, value)
        self.ran = True
        way = self.known(value)
        rows = self.rows if way is None else rows_of(value)
        return Frame(rows, self.sums.device, Gated(self._open(way), way))

    def _open(self, way: Owners | None) -> Tensor:
        """float64 ``[N]``: who runs, with the gate's gradient."""
        gate, layer = self.gate, self.layer
        if isinstance(gate, SamplePlan):
            return gate.mask().double()
        flat = gate.reshape(-1)
        if way is not None:
            kept = way.vector(None)[0]
        elif layer.dense:
            kept = layer.plan(gate).mask() if layer.max_fraction is not None else flat.detach() != 0
            kept = kept.double()
        else:
            kept = torch.full_like(flat, 1.0 if self.ran else 0.0, dtype=torch.float64, requires_grad=False)
        return kept + slope(flat) if flat.requires_grad else kept

    def close(self, module, args, kwargs, out, counter) -> None:
        if self.ran or not isinstance(self.layer.module, nn.Module) or self.rows == 0:
            return
        price = counter.price(self.layer.module, (argument(args, kwargs, 0, "x"),))
        self.sums.take(price, Gated(self._open(None), None))


# --------------------------------------------------------------------------------------- Halting


class HaltingFrame(Frame):
    """A call of a layer that repeats a step, or runs units, until everything has halted.

    The ponder cost has a gradient: that of the mean cost of a step.
    """

    def __init__(self, layer: nn.Module, rows: int, device: torch.device):
        super().__init__(rows, device)
        self.layer = layer
        self.parts = {m: n for n in ("step", "halt") if isinstance(m := getattr(layer, n, None), nn.Module)}
        self.held: list[tuple[str, int, Frame]] = []
        self.called: set[nn.Module] = set()

    def enter(self, module: nn.Module, value) -> Frame | None:
        self.called.add(module)
        frame = super().enter(module, value)
        if module not in self.parts:
            return frame
        if frame is None:
            rows = rows_of(value)
            frame = Frame(rows, self.sums.device, self.way_from(value, rows))
        part = self.parts[module]
        self.held.append((part, self._times(part) + 1, frame))
        return frame

    def _times(self, part: str) -> int:
        return sum(held[0] == part for held in self.held)

    def leave(self, below: Frame, module: nn.Module) -> None:
        if module not in self.parts:
            super().leave(below, module)

    def close(self, module, args, kwargs, out, counter) -> None:
        steps = out.steps.detach()
        if isinstance(self.layer, Halting):
            self._repeat(steps)
        else:
            self._price_rest(out, counter)
        if out.ponder.requires_grad and self.rows:
            per = steps.reshape(self.rows, -1).sum(1).double().clamp(min=1)
            grows = 1 + slope(out.ponder).reshape(self.rows, -1).sum(1) / per
            self.way = Chain(Times(grows), self.way)

    def _repeat(self, steps: Tensor) -> None:
        layer, most = self.layer, self.layer.max_steps
        done = self._times("step")
        if "step" not in self.parts.values() and self.sums.dense and self.rows:  # what a function called
            done = int(steps.max())
            share = steps.reshape(self.rows, -1).double().mean(1) / most
            self._rescale(Times(share) if layer.dense else Same(), most / max(done, 1))
        full = {"step": most / max(done, 1), "halt": (most - 1) / max(self._times("halt"), 1)}
        for part, n, frame in self.held:
            way = frame.way
            if layer.dense and frame.rows:
                ran = (steps.flatten() >= n).double()
                share = ran if len(ran) == frame.rows else ran.view(frame.rows, -1).mean(1)
                way = Chain(Times(share), way)
            self.sums.take(frame.sums, way, full[part])

    def _rescale(self, way: Same, dense: float) -> None:
        before, self.sums = self.sums, Sums(self.rows, self.sums.device)
        self.sums.take(before, way, dense)

    def _price_rest(self, out, counter) -> None:
        """A layer that no pixel reached costs nothing, but belongs to the dense cost."""
        for part in (*self.layer.units, *self.layer.halts):
            if part not in self.called and self.rows:
                for name, number in counter.price(part, (out.output,)).dense.items():
                    self.sums.add_dense(name, number)


# --------------------------------------------------------------------------------------- reading


class ReaderFrame(Frame):
    """A call of JumpReader, which packs sequences in an order of its own: the steps that each read, its decisions.

    With every gate open each step is read, once, and every jump decided on.
    """

    def __init__(self, layer: nn.Module, args: tuple, kwargs: dict, rows: int, device: torch.device):
        super().__init__(rows, device)
        self.steps = argument(args, kwargs, 0, "x").shape[1]
        self.most = {layer.rnn: self.steps, layer.encoder: self.steps, layer.policy: layer.max_jumps}
        self.held: list[tuple[nn.Module, float, Frame]] = []

    def enter(self, module: nn.Module, value) -> Frame | None:
        if module not in self.most:
            return super().enter(module, value)
        each = len(value.batch_sizes) if isinstance(value, PackedSequence) else 1  # steps of its dense cost
        self.held.append((module, each, Frame(rows_of(value), self.sums.device)))
        return self.held[-1][2]

    def leave(self, below: Frame, module: nn.Module) -> None:
        if module not in self.most:
            super().leave(below, module)

    def close(self, module, args, kwargs, out, counter) -> None:
        decided = (out.actions >= 0).sum(1)
        priced: set[nn.Module] = set()
        for part, each, frame in self.held:
            counts = decided if part is module.policy else out.read
            share = counts / counts.sum().clamp(min=1).double()
            self.sums.take(frame.sums, Shares(share, frame.rows))
            if part not in priced:
                priced.add(part)
                for name, number in frame.sums.dense.items():
                    self.sums.add_dense(name, number * self.most[part] / each)


# ----------------------------------------------------------------------------------------- exits


class ExitsFrame(Frame):
    """A call of EarlyExit or Cascade. What no sample reached costs nothing, but belongs to the dense cost."""

    def __init__(self, layer: nn.Module, rows: int, device: torch.device):
        super().__init__(rows, device)
        self.missing = set(layer.stages if isinstance(layer, EarlyExit) else layer.models)

    def enter(self, module: nn.Module, value) -> Frame | None:
        self.missing.discard(module)
        return super().enter(module, value)

    def close(self, module, args, kwargs, out, counter) -> None:
        if self.missing and self.rows:
            price = counter.price(module, (argument(args, kwargs, 0, "x"), True))
            self.sums.dense = dict(price.dense)


# ------------------------------------------------------------------------------------- branches


class BranchesFrame(Frame):
    """A call of :class:`dynops.nn.ConvExperts`: the samples of each branch; the weights give a gradient."""

    def __init__(
        self, layer: ConvExperts, args: tuple, kwargs: dict, rows: int, device: torch.device, counter
    ):
        super().__init__(rows, device)
        self.layer, self.counter = layer, counter
        self.chosen = (argument(args, kwargs, 1, "topk_index"), argument(args, kwargs, 2, "topk_weight"))
        self.number = {branch: i for i, branch in enumerate(layer.branches)}
        self.ran: set[nn.Module] = set()

    def enter(self, module: nn.Module, value) -> Frame | None:
        if module not in self.number:
            return super().enter(module, value)
        self.ran.add(module)
        index, weight = (
            self.chosen if self.chosen[0] is not None else self.counter.returned[self.layer.gate][:2]
        )
        rows = rows_of(value)
        way = self._way(index, weight, self.number[module], rows)
        return Frame(rows, self.sums.device, way)

    def _way(self, index: Tensor | ExpertPlan, weight: Tensor | None, number: int, rows: int) -> Owners:
        if isinstance(index, ExpertPlan):
            chose = torch.full_like(index.order, index.num_experts)
            chose[index.order.long()] = index.expert
            live = index.position.flatten() >= 0
            index = torch.where(live, chose, index.num_experts).view(index.position.shape)
        mine = (index.reshape(self.rows, -1) == number).flatten()
        order = mine.to(torch.uint8).argsort(dim=0, descending=True, stable=True)[:rows]  # reads nothing back
        live = mine[order]
        owner = torch.where(live, order // max(mine.numel() // max(self.rows, 1), 1), -1)
        ones = None
        if weight is not None and weight.requires_grad:
            ones = 1 + slope(weight).flatten()[order]
        if len(order) < rows:  # nobody chose anything, and the branch ran for the shape of its output
            owner = torch.cat([owner, owner.new_full((rows - len(order),), -1)])
            ones = None
        return Owners(owner, self.rows, 1.0, ones)

    def close(self, module, args, kwargs, out, counter) -> None:
        for branch in self.layer.branches:
            if branch not in self.ran and self.rows:
                price = counter.price(branch, (argument(args, kwargs, 0, "x"),))
                for name, number in price.dense.items():
                    self.sums.add_dense(name, number)


def special_frame(module: nn.Module, args: tuple, kwargs: dict, value, counter) -> Frame | None:
    """The frame of a layer that decides who runs, None for any other."""
    rows, device = rows_of(value), device_of(value)
    if isinstance(module, Skip):
        return SkipFrame(module, args, kwargs, rows, device)
    if isinstance(module, ConvExperts):
        return BranchesFrame(module, args, kwargs, rows, device, counter)
    if isinstance(module, (EarlyExit, Cascade)):
        return ExitsFrame(module, rows, device)
    if isinstance(module, JumpReader):
        return ReaderFrame(module, args, kwargs, rows, device)
    if isinstance(module, (Halting, SpatialHalting)):
        return HaltingFrame(module, rows, device)
    return None
