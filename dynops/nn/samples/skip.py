"""Skip: a layer that each sample of a batch runs, or does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ... import modes
from ...geometry import is_share
from ...ops import gather_samples, scatter_samples
from ...ops.samples import scatter_over
from ...plans import SamplePlan, check_keep, most_of, named
from ...stack.sample_stack import SampleStack
from ..apart import apart
from ..dtypes import Returned

MODES = ("residual", "replace")
PATHS = (None, "samples", "rows")


class Skip(nn.Module):
    """Runs a module on those samples of a batch that a gate keeps.

    Called as ``layer(x, gate)``. With g the gate of a sample, F the module and s the shortcut::

        residual:   s(x) + g * F(x)               (ConvNet-AIG)
        replace:    g * F(x) + (1 - g) * s(x)     (SkipNet)

    where F is run on a batch of the samples with g != 0 only, and in the second form s on the others only. With every
    sample kept nothing is gathered; with none kept F does not run, and its parameters get no gradient.

    Args:
        module: F, ``[K, ...] -> [K, ...]`` for any K >= 1, which treats each sample by itself. In training mode a
            BatchNorm in it takes its statistics from the kept samples, however few: over one sample of a 1x1 map it
            raises, over one sample of a larger map it works on that sample's statistics. Train with ``dense=True``
            for statistics of the whole batch.
        shortcut: s, a module; None: the identity.
        mode: "residual" or "replace".
        dense: computes F for every sample and multiplies by the gate. The output is the same; the gate's gradient is
            exact for every sample. Without it the gate of a skipped sample gets no gradient through this
            layer, only through losses on the gate itself; the gates of kept samples get the exact one.
            Published methods train dense; measure, deploy and fine-tune without. An attribute: it may be
            changed at any time.
        max_fraction: the largest share of the batch that runs, ``floor(max_fraction * N)`` samples, the first ones in
            the batch; those that find no place are skipped. (:func:`dynops.budget.cap` chooses by score.) On a GPU and
            under ``torch.compile`` the plan then has the capacity form: F always runs on that many samples, and
            nothing waits for the device.
        path: "samples" gathers the kept samples, calls F on them and scatters. "rows" runs F as
            :class:`SparseBlocks` does, on the pixels of the kept samples where they lie; its last convolution
            writes into the output. F must then consist of convolutions, norms in eval mode, activations and sums
            that torch.fx can trace. The shortcut must be the identity, and gates 0 and 1. Other calls gather. None takes the
            faster path. On a CPU, without gradients, that is rows if a 3x3 convolution of F runs as Winograd's.
            Else it is a gathered batch, in float32 with the norms in the weights. An attribute.

    Shape:
        - x: ``[N, ...]``, any rank and memory format, or with a module that takes and returns it a pytree of such tensors.
        - gate: ``[N]`` or ``[N, 1, ...]``: bool or integer (nonzero = kept, and g = 1), or floating, for example the
          hard-forward, soft-backward mask of :mod:`dynops.gates` (``decision.mask``). Or a :class:`~dynops.SamplePlan` that several
          layers share (g = 1).
        - output: the shape that s and F return; both must return the same.

    F and s are functions of values: ``x`` stays as it is where one of them writes into its input in place
    (``ReLU(inplace=True)``, ``x += 1``). The output has the dtype of the formula for every gate. If F or s
    did not run, and its dtype is wider than the other's, the output is widened. (To know its dtype, a module that has
    not run yet runs once on two samples, without gradients.) With all samples kept or none, the output may be
    the tensor that F or s returned; with an identity it may be ``x`` itself.

    A parameter of F gets no gradient (None) where no sample ran: wrap a model in ``DistributedDataParallel`` with
    ``find_unused_parameters=True`` where a rank may skip F (or s), or train with ``dense=True``.

    On a GPU each call without ``max_fraction`` reads the number of kept samples back to the host.
    ``torch.compile`` of a surrounding model breaks its graph here: the size of the small batch depends on
    data. With ``dense`` or ``max_fraction`` it does not.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came; NaN in a gate.

    Papers: Veit and Belongie, Convolutional Networks with Adaptive Inference Graphs (ECCV 2018); Wang et al., SkipNet
    (ECCV 2018); Wu et al., BlockDrop (CVPR 2018).
    """

    def __init__(
        self,
        module: nn.Module,
        shortcut: nn.Module | None = None,
        mode: str = "residual",
        *,
        dense: bool = False,
        max_fraction: float | None = None,
        path: str | None = None,
    ):
        super().__init__()
        for name, value in (("module", module), ("shortcut", shortcut)):
            if not callable(value) and (name == "module" or value is not None):
                raise TypeError(f"{name}: expected a module, got {type(value).__name__}")
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
        if max_fraction is not None and not is_share(max_fraction):
            raise ValueError(f"max_fraction: expected a number in [0, 1] or None, got {max_fraction!r}")
        self.module = module
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        if path not in PATHS:
            raise ValueError(f"path: expected one of {PATHS}, got {path!r}")
        self.mode, self.dense, self.max_fraction, self.path = mode, dense, max_fraction, path
        self._stack: SampleStack | None = None  # F, traced
        self._returned = Returned()

    def forward(self, x: Any, gate: Tensor | SamplePlan) -> Any:
        _check_gate(gate, x)
        if self.dense:
            return self._dense(x, gate)
        if self.max_fraction is None and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return modes.outside_graph(self._compacted, x, gate)
        return self._compacted(x, gate)

    def plan(self, gate: Tensor | SamplePlan) -> SamplePlan:
        """The plan of the samples that a gate ``[N]`` makes run: at most ``max_fraction`` of them."""
        if isinstance(gate, SamplePlan):
            return gate
        keep = check_keep(gate, "gate")
        if self.max_fraction is None:
            return named("gate", "keep", SamplePlan.from_mask, keep)
        most = most_of(self.max_fraction, keep.shape[0])
        if keep.is_cuda or modes.sizes_are_fixed(keep):
            return named("gate", "keep", SamplePlan.from_mask, keep, most)
        plan = named("gate", "keep", SamplePlan.from_mask, keep)
        return plan if plan.num_rows <= most else SamplePlan(plan.index[:most], plan.batch)

    def _compacted(self, x: Any, gate: Tensor | SamplePlan) -> Any:
        plan = self.plan(gate)
        scale, trains = None, False  # of the kept samples; None: 1
        if isinstance(gate, Tensor) and gate.is_floating_point():
            trains = modes.differentiated(gate)
            if trains or not _is_hard(gate):
                scale = gather_samples(gate.reshape(-1), plan)
        if plan.is_empty:
            out = self._returned.widened(self._below(x), self.module, x)
            # none of F, but the gate has its place in the graph and gets zeros
            return (
                scatter_samples(gather_samples(out, plan), plan, out, add=True, scale=scale)
                if trains
                else out
            )
        if scale is None and (stack := self._traced()) is not None and (path := stack.path(x, self.path)):
            return stack.run(path, x, plan)
        out = self._branch(x) if plan.is_full else self._branch(gather_samples(x, plan), own=True)
        if self.mode == "residual":
            out, below = _agree(out, self._below(x))
            return scatter_samples(out, plan, below, add=True, scale=scale)
        if scale is None and plan.is_full:
            return self._returned.widened(out, self.shortcut, x)
        if scale is None and not isinstance(self.shortcut, nn.Identity):
            dropped = plan.dropped()
            out, below = _agree(out, self._below(gather_samples(x, dropped), own=True))
            return scatter_over(out, plan, scatter_samples(below, dropped))  # its copy is this layer's own
        out, below = _agree(out, self._below(x))
        return scatter_samples(out, plan, below, scale=scale)

    def _branch(self, x: Any, own: bool = False) -> Any:
        """F(x); ``own``: nobody else reads x."""
        out = self.module(x) if own else apart(self.module, x)
        self._returned.note(self.module, x, out)
        return out

    def _below(self, x: Any, own: bool = False) -> Any:
        """s(x)."""
        if type(self.shortcut) is nn.Identity:
            return x
        out = self.shortcut(x) if own else apart(self.shortcut, x)
        self._returned.note(self.shortcut, x, out)
        return out

    def _dense(self, x: Any, gate: Tensor | SamplePlan) -> Any:
        if isinstance(gate, SamplePlan):
            gate = gate.mask()
        elif self.max_fraction is not None:
            gate = torch.where(self.plan(gate).mask(), gate.reshape(-1), 0)
        gate = gate.reshape(-1)
        if gate.is_floating_point() and modes.may_look(gate) and bool(gate.isnan().any()):
            raise ValueError("gate: expected numbers, got NaN in it")

        def merge(value: Tensor, below: Tensor) -> Tensor:
            share = gate.to(value.dtype) if gate.is_floating_point() else (gate != 0).to(value.dtype)
            share = share.view(-1, *[1] * (value.dim() - 1))
            return share * value + (below if self.mode == "residual" else (1 - share) * below)

        return _map(merge, *_agree(apart(self.module, x), apart(self.shortcut, x)))

    def _traced(self) -> SampleStack | None:
        """F as a stack of layers, where this call may run without calling it."""
        if self.path == "samples" or type(self.shortcut) is not nn.Identity or torch.compiler.is_compiling():
            return None
        if (self.path is None and torch.is_grad_enabled()) or modes.transformed():
            return None
        if self._stack is None or not self._stack.holds(self.module, self.mode):
            self._stack = SampleStack(self.module, self.mode)
        return self._stack

    def __getstate__(self):
        return {**self.__dict__, "_stack": None, "_returned": Returned()}

    def extra_repr(self) -> str:
        text = f"mode={self.mode!r}, dense={self.dense}"
        return text if self.max_fraction is None else f"{text}, max_fraction={self.max_fraction}"


def _is_hard(gate: Tensor) -> bool:
    """True if every gate is 0 or 1 and looking costs nothing: F can then run on rows, and nothing is multiplied."""
    return modes.may_look(gate) and bool(((gate == 0) | (gate == 1)).all())


def _map(function, *trees: Any) -> Any:
    """``function`` of the tensors of trees that are alike."""
    if isinstance(trees[0], Tensor):
        return function(*trees)
    return pytree.tree_map(lambda a, *rest: function(a, *rest) if isinstance(a, Tensor) else a, *trees)


def _agree(out: Any, below: Any) -> tuple[Any, Any]:
    """The outputs of module and shortcut in the wider of their dtypes (autocast runs one of them narrower)."""
    if not isinstance(out, Tensor):
        if pytree.tree_structure(out) != pytree.tree_structure(below):
            raise ValueError(
                "shortcut: expected the module's output, "
                f"{pytree.tree_structure(out)}, got {pytree.tree_structure(below)}"
            )
        pairs = [
            _agree(*pair) if isinstance(pair[0], Tensor) else pair
            for pair in zip(pytree.tree_leaves(out), pytree.tree_leaves(below), strict=True)
        ]
        tree = pytree.tree_structure(out)
        return tuple(pytree.tree_unflatten(side, tree) for side in zip(*pairs, strict=True))
    if not isinstance(below, Tensor) or out.shape[1:] != below.shape[1:]:
        what = tuple(below.shape[1:]) if isinstance(below, Tensor) else type(below).__name__
        raise ValueError(
            f"shortcut: expected samples of shape {tuple(out.shape[1:])}, as module has them, got {what}"
        )
    if out.dtype == below.dtype:
        return out, below
    dtype = torch.promote_types(out.dtype, below.dtype)
    return out.to(dtype), below.to(dtype)


def _check_gate(gate: Tensor | SamplePlan, x: Any) -> None:
    leaf = x if isinstance(x, Tensor) else next(filter(_is_tensor, pytree.tree_leaves(x)), None)
    if leaf is None or leaf.dim() == 0:
        what = "a number" if leaf is not None else type(x).__name__
        raise TypeError(f"x: expected a tensor [N, ...] or a pytree of them, got {what}")
    batch = leaf.shape[0]
    if isinstance(gate, SamplePlan):
        if gate.batch != batch:
            raise ValueError(f"gate: expected a plan of {batch} samples, as x has, got {gate}")
    elif not isinstance(gate, Tensor):
        hint = " (pass its .mask)" if isinstance(getattr(gate, "mask", None), Tensor) else ""
        raise TypeError(f"gate: expected a tensor [N] or a SamplePlan, got {type(gate).__name__}{hint}")
    elif gate.numel() != batch or gate.dim() == 0 or gate.shape[0] != batch:
        raise ValueError(
            f"gate: expected [{batch}] or [{batch}, 1, ...], as x has, got shape {tuple(gate.shape)}"
        )
    if gate.device != leaf.device:
        raise ValueError(f"gate: expected it on x's device {leaf.device}, got {gate.device}")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)
