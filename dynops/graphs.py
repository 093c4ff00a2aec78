"""``graphed(module)``: a module for inference in CUDA graphs, replayed under changing inputs and masks.

An eager call of an op costs the host 45 to 180 us, more than the GPU needs for most. A replay launches all of a model
at once.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import context
from .geometry import is_int
from .plans import ChannelPlan, ExpertPlan, PixelPlan
from .plans.derived import IndexPlan
from .plans.masks import check_expected

_WARM_UP = 3  # calls before a capture: kernels are compiled, cuDNN chooses
_HINT = (
    "Plans need the capacity form (PixelPlan.from_mask(mask, capacity=n)), Skip needs max_fraction; "
    "layers whose sizes depend on decisions (EarlyExit, Halting) cannot be captured"
)
_torch = str(Path(torch.__file__).parent)


def graphed(
    module: Callable,
    *example: object,
    capacity: int | None = None,
    expected: int | None = None,
    copy_outputs: bool = True,
    max_graphs: int = 8,
) -> Graphed:
    """``module`` for inference on a GPU: captured in a CUDA graph for each signature of inputs, and then replayed.

    The result is called as ``module`` is::

        dynops.convert_(model)
        fast = dynops.graphed(model.eval(), expected=2000)
        with torch.inference_mode(), dynops.use_mask(mask):
            y = fast(x)

    A call copies the inputs to static buffers and replays. The mask of ``dynops.use_mask`` is such an input: the graph
    builds its plans, of the capacity form, from what the mask then holds. A first call of new shapes, dtypes or
    strides runs ``module`` five times: to warm up, once to find whatever waits for the device, and to capture. Weights
    that are updated in place are seen: copies of them in another layout or dtype are made in each replay. A
    channels_last model in the inputs' dtype needs none. Where parameters, buffers or children are replaced, the next
    call captures anew. Settings that are no inputs (TF32, attributes of modules) are those of the capture.

    On inputs of a CPU, which has no graphs, ``module`` runs as it is.

    Args:
        module: an ``nn.Module`` in eval mode, or a function of tensors. It may read no value of the device.
        example: inputs to capture at once, under the mask that holds. Without them the first call captures.
        capacity: the size of the plan of the mask, at its own resolution; pixels past it are dropped. None: room for
            every pixel.
        expected: about how many pixels of the mask are active. Kernels choose tiles by it, see :class:`PixelPlan`.
        copy_outputs: False returns the graph's own tensors, which the next call overwrites.
        max_graphs: signatures that are kept; the least recently used graph is freed.

    Inputs are tensors of one CUDA device, plans of the capacity form (``PixelPlan``, ``BlockPlan``, ``SamplePlan``),
    and hashable values, in trees of lists, tuples and dicts. A plan is built faster inside the graph:
    ``graphed(lambda x, mask: layer(x, PixelPlan.from_mask(mask, n)))``.

    Calls take turns, from whatever thread or stream. While one captures, no other thread may wait for the device.

    Raises:
        TypeError, ValueError: an argument or an input that does not fit.
        RuntimeError: gradients are asked for, or the module is in training mode (``torch.cuda.make_graphed_callables``
            captures training steps). ``module`` waits for the device: the message names the inner module and the line.
    """
    if not callable(module):
        raise TypeError(f"module: expected an nn.Module or a function, got {type(module).__name__}")
    for name, value, least in (("capacity", capacity, 0), ("max_graphs", max_graphs, 1)):
        if not (is_int(value, least) or (value is None and name == "capacity")):
            raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
    check_expected(expected)
    made = Graphed(module, capacity, expected, copy_outputs, max_graphs)
    if example:
        with torch.no_grad():
            made(*example)
    return made


class Graphed:
    """See :func:`graphed`, which makes it."""

    def __init__(self, module: Callable, capacity, expected, copy_outputs: bool, max_graphs: int):
        self.module, self.capacity, self.expected = module, capacity, expected
        self.copy_outputs, self.max_graphs = copy_outputs, max_graphs
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._state: _State | None = None
        # of all graphs, which never run at once: memory for the largest of them and for all outputs
        self._pool = None
        self._lock = threading.RLock()

    def __call__(self, *inputs, **named):
        leaves, tree = pytree.tree_flatten((inputs, named))
        device = next((x.device for x in leaves if isinstance(x, (Tensor, IndexPlan))), None)
        if device is None or device.type != "cuda":
            return self.module(*inputs, **named)
        self._refuse_training(leaves)
        outer, room = context.current(), None
        if outer is not None:
            mask, expected = outer.for_graph()
            capacity = mask.numel() if self.capacity is None else self.capacity
            room = capacity, expected if self.expected is None else self.expected, outer.ragged
            leaves.append(mask)
        key = tree, _modes(), room, *[_signature(i, x, device) for i, x in enumerate(leaves)]
        with self._lock, torch.cuda.device(device):
            if self._state is None or not self._state.holds():
                self.reset()
                self._state = _State(self.module)
            graph = self._graphs.get(key)
            if graph is None:
                graph = self._captured(key, tree, leaves, room)
            self._graphs.move_to_end(key)
            return graph.replay(leaves, self.copy_outputs)

    def reset(self) -> None:
        """Frees all graphs and their memory."""
        with self._lock:
            for graph in self._graphs.values():
                graph.settle()
            self._graphs.clear()
            self._state = None

    def _captured(self, key: tuple, tree, leaves: list, room: tuple | None) -> _Graph:
        while len(self._graphs) >= self.max_graphs:
            self._graphs.popitem(last=False)[1].settle()
        static = [_Static(x) for x in leaves]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()

        def call():
            values = [s.value() for s in static]
            masked = contextlib.nullcontext()
            if room is not None:
                *values, mask = values
                *sizes, ragged = room
                masked = context.use_mask(PixelPlan.from_mask(mask, *sizes), ragged=ragged)
            inputs, named = pytree.tree_unflatten(values, tree)
            with masked:
                return self.module(*inputs, **named)

        with torch.inference_mode(False), torch.no_grad():
            graph = self._graphs[key] = _Graph(static, *capture(call, self.module, self._pool))
        return graph

    def _refuse_training(self, leaves: list) -> None:
        if isinstance(self.module, nn.Module) and self.module.training:
            raise RuntimeError("graphed: expected a module in eval mode, got training mode: call .eval()")
        if torch.is_grad_enabled():
            own = self.module.parameters() if isinstance(self.module, nn.Module) else ()
            if any(isinstance(x, Tensor) and x.requires_grad for x in itertools.chain(leaves, own)):
                raise RuntimeError(
                    "graphed: expected a call without gradients, got inputs or parameters that require them: call it "
                    "under torch.inference_mode(); torch.cuda.make_graphed_callables captures training steps"
                )


def capture(
    call: Callable[[], object], module: object = None, pool=None
) -> tuple[torch.cuda.CUDAGraph, object]:
    """A CUDA graph of ``call()`` on the current device, and its outputs, which each replay writes.

    What waits for the device is found before the capture: in torch 2.11 one that fails leaves the allocator unable to free
    memory, and the random generator in the capture.

    Args:
        module: whose inner modules an error names.
        pool: as ``torch.cuda.CUDAGraph`` takes it.

    Raises:
        RuntimeError: what ``call`` does cannot be captured.
    """
    current, side, graph = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side), _without_autocast_cache():
            for _ in range(_WARM_UP):
                call()
            _try_without_waiting(call, module)
            side.synchronize()
            gc.collect()  # an event that is freed in the capture breaks it
            # not torch.cuda.graph, which empties the allocator's cache: gigabytes to map again for each graph
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                outputs = call()
            finally:
                graph.capture_end()
    finally:  # what the call read may be freed now
        current.wait_stream(side)
    return graph, outputs


def _try_without_waiting(call: Callable, module) -> None:
    """Calls once; whatever waits for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        raise RuntimeError(
            f"graphed: {_who(error.__traceback__, module)} waits for the device, which a CUDA graph cannot capture. {_HINT}"
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _who(traceback: TracebackType | None, module) -> str:
    """The innermost module on a traceback and the line in it; without one, the last line that is not torch's."""
    names = {m: name for name, m in module.named_modules()} if isinstance(module, nn.Module) else {}
    who = line = ""
    for frame, number in _frames(traceback):
        own, at = frame.f_locals.get("self"), f"{frame.f_code.co_filename}:{number}"
        if isinstance(own, nn.Module) and own in names:
            who = f"{names[own] or 'the module'} ({type(own).__name__}), {at}"
        if not at.startswith(_torch):
            line = at
    return who or line


def _frames(traceback: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


@contextlib.contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """A weight that autocast has cast before would be a constant of the graph."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


# ------------------------------------------------------------------------------- inputs, state


class _Static:
    """An input's static buffers. A plan is made anew of its buffers, so that what follows from it is part of the graph."""

    def __init__(self, value):
        self.plan = value if isinstance(value, IndexPlan) else None
        self.constant = None if isinstance(value, (Tensor, IndexPlan)) else value
        with torch.inference_mode(False):
            self.buffers = [torch.empty_like(t, requires_grad=False).copy_(t) for t in _tensors(value)]

    def value(self):
        if self.plan is None:
            return self.buffers[0] if self.buffers else self.constant
        made = self.plan._made(self.buffers[0], getattr(self.plan, self.plan._WHERE), self.buffers[1])
        if isinstance(made, PixelPlan):
            made.expected = self.plan.expected
        return made

    def fill(self, value) -> None:
        for buffer, tensor in zip(self.buffers, _tensors(value), strict=True):
            if buffer.data_ptr() != tensor.data_ptr():
                buffer.copy_(tensor)


class _Graph:
    """A captured graph, its static inputs and outputs."""

    def __init__(self, static: list[_Static], graph: torch.cuda.CUDAGraph, outputs):
        self.static, self.graph = static, graph
        self.outputs = pytree.tree_map_only(Tensor, Tensor.detach, outputs)
        self.stream, self.done = torch.cuda.current_stream(), torch.cuda.Event()

    def replay(self, leaves: list, copies: bool):
        stream = torch.cuda.current_stream()
        if stream != self.stream:
            stream.wait_event(self.done)
            self.stream = stream
        for static, value in zip(self.static, leaves, strict=True):
            static.fill(value)
        self.graph.replay()
        outputs = pytree.tree_map_only(Tensor, Tensor.clone, self.outputs) if copies else self.outputs
        self.done.record(stream)
        return outputs

    def settle(self) -> None:
        """Waits for the last replay."""
        self.done.synchronize()


class _State:
    """The parameters, buffers and children of a module at one moment, and where they lie."""

    def __init__(self, module):
        every = list(module.modules()) if isinstance(module, nn.Module) else []
        self._dicts = [d for m in every for d in (m._parameters, m._buffers, m._modules)]
        self._tensors = [t for d in self._dicts for t in d.values() if isinstance(t, Tensor)]
        if any(m.training for m in every):
            raise RuntimeError("graphed: expected a module in eval mode, got an inner one in training mode")
        # a graph reads it, also where a tensor has got another one by now
        self._memory = [t.detach() for t in self._tensors]
        self._ids, self._places = self._now()

    def _now(self) -> tuple[list[int], list[int]]:
        return [id(v) for d in self._dicts for v in d.values()], [t.data_ptr() for t in self._tensors]

    def holds(self) -> bool:
        """True while nothing was replaced."""
        return (self._ids, self._places) == self._now()


def _tensors(value) -> tuple[Tensor, ...]:
    if isinstance(value, Tensor):
        return (value,)
    return value._indices() if isinstance(value, IndexPlan) else ()


def _modes() -> tuple:
    """The modes that a call depends on."""
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")


def _signature(i: int, value, device: torch.device) -> tuple:
    """An input's part of the key of a graph: of a tensor its layout, of another value itself."""
    if isinstance(value, (Tensor, IndexPlan)) and value.device != device:
        raise ValueError(
            f"inputs: expected all on {device}, as the first tensor, got input {i} on {value.device}"
        )
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.stride()
    if isinstance(value, IndexPlan):
        if value.count is None:
            kind = type(value).__name__
            raise TypeError(
                f"inputs: expected a {kind} of the capacity form, got a compact one: {kind}.from_mask(mask, capacity=n)"
            )
        return type(value), value.index.shape, getattr(value, value._WHERE), getattr(value, "expected", None)
    if isinstance(value, (ExpertPlan, ChannelPlan)):
        kind = type(value).__name__
        raise TypeError(
            f"inputs: expected the tensors that a {kind} is made of, to make it in the graph, got the plan"
        )
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"inputs: expected tensors, plans or hashable values, got {type(value).__name__}"
        ) from None
    return type(value), value
