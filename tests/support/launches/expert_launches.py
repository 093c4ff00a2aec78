"""Launches of the expert kernels: their tensors, and the reference that they are compared with."""

import os
from dataclasses import dataclass

import launch_checks
import torch

from dynops import ExpertPlan, ops
from dynops.testing import random_tensor

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
PLAIN = ("", "relu", "relu6", "silu", "gelu", "gelu_tanh", "hardswish", "relu2")
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """A routing and a grouped linear layer.

    ``routing``: "random" (some pairs dropped), "kept" (none), "one" (all to one expert), "dropped" (all are),
    "crowded" (one expert has nearly all rows). ``weight``: "whole", "slice" of a larger one, "shared" by all
    experts, "int8".
    """

    t: int = 9
    k: int = 3
    e: int = 5
    i: int = 20
    o: int = 26
    routing: str = "random"
    capacity: int | None = None
    weight: str = "whole"
    packed_in: bool = False
    packed_out: bool = True
    transposed: bool = False
    weighted: bool = False

    def plan(self) -> ExpertPlan:
        index = torch.randint(0, self.e + (self.routing == "random"), (self.t, self.k))
        if self.routing in ("one", "dropped"):
            index[:] = self.e if self.routing == "dropped" else self.e // 2
        elif self.routing == "crowded":
            index[: self.t - 1] = 1
        return ExpertPlan.from_topk(index.to(DEVICE), self.e, self.capacity)


CASES = {
    "plain": Case(),
    "weighted": Case(weighted=True),
    "summed": Case(packed_out=False),
    "summed-weighted": Case(packed_out=False, weighted=True),
    "one-choice": Case(k=1, packed_out=False, weighted=True),
    "every-expert": Case(k=5, routing="kept", packed_out=False, weighted=True),
    "packed": Case(packed_in=True, weighted=True),
    "packed-in": Case(packed_in=True, packed_out=False, weighted=True),
    "transposed": Case(transposed=True, weighted=True),
    "transposed-packed": Case(transposed=True, packed_in=True, packed_out=False),
    "capacity": Case(capacity=3, packed_out=False, weighted=True),
    "capacity-none": Case(capacity=0, packed_out=False, weighted=True),
    "int8": Case(weight="int8"),
    "int8-transposed": Case(weight="int8", transposed=True, packed_in=True, packed_out=False, weighted=True),
    "slice": Case(weight="slice"),
    "slice-transposed": Case(weight="slice", transposed=True),
    "shared": Case(weight="shared"),
    "aligned": Case(i=32, o=48, t=16, k=2, weighted=True),
    "tall": Case(t=75, k=2, e=3, i=17, o=33),
    "crowded": Case(t=40, k=2, e=7, routing="crowded", weighted=True),
    "one-expert": Case(routing="one"),
    "dropped": Case(routing="dropped", weighted=True),
    "dropped-summed": Case(routing="dropped", packed_out=False),
    "single": Case(t=1, k=1, e=1, i=1, o=1, routing="kept", weighted=True),
    "no-tokens": Case(t=0, packed_out=False),
    "no-inputs": Case(i=0),
    "no-outputs": Case(o=0),
}
HALF = ("weighted", "summed-weighted", "int8", "int8-transposed", "aligned", "one-choice")
of_cases = launch_checks.of_cases(CASES, HALF)


def weight_of(case: Case, outputs: int, inputs: int, dtype) -> tuple:
    """The weight and its scale."""
    shape = (case.e, inputs, outputs) if case.transposed else (case.e, outputs, inputs)
    if case.weight == "int8":
        return tuple(ops.quantize_experts(random_tensor(*shape).to(DEVICE), case.transposed))
    weight = random_tensor(*shape, dtype=dtype).to(DEVICE)
    if case.weight == "slice":
        weight = torch.nn.functional.pad(weight, (1, 2, 3, 0, 1, 1), value=NAN)[1:-1, 3:, 1:-2]
    elif case.weight == "shared":
        weight = weight[:1].expand(shape)
    return weight, None


class Inputs:
    """The tensors of a case. Rows that only dropped pairs name are NaN, and must not be read."""

    def __init__(self, case: Case, dtype: torch.dtype):
        self.case, self.dtype, self.plan = case, dtype, case.plan()
        self.indices = (self.plan.order, self.plan.offsets, self.plan.position)
        self.weight, self.scale = weight_of(case, case.o, case.i, dtype)
        self.bias = random_tensor(case.e, case.o, dtype=dtype).to(DEVICE)
        self.row_weight = random_tensor(case.t, case.k).to(DEVICE) if case.weighted else None
        self.x = self.rows(case.i, case.packed_in)
        self.grad = self.rows(case.o, case.packed_out)

    def rows(self, size: int, packed: bool):
        live = self.plan.expert < self.plan.num_experts if packed else (self.plan.position >= 0).any(1)
        return torch.where(live[:, None], random_tensor(len(live), size, dtype=self.dtype).to(DEVICE), NAN).to(self.dtype)  # fmt: skip

    def linear(self, run, double: bool = False, activation: str = ""):
        tensors = (self.x, self.weight, self.scale, self.bias, self.row_weight)
        options = (self.case.packed_in, self.case.packed_out, self.case.transposed, activation)
        return run(*wide(tensors, double), *self.indices, *options)

    def weight_grad(self, run, double: bool = False):
        options = (self.case.packed_out, self.case.packed_in, self.case.transposed, True)
        return run(*wide((self.grad, self.x, self.row_weight), double), *self.indices, *options)


def wide(tensors, double: bool) -> list:
    """The tensors, floating ones in float64 where that is wanted."""
    return [t.double() if double and t is not None and t.is_floating_point() else t for t in tensors]


def calling(tensors, *others):
    """A method for :func:`check`: the kernel or the reference called with these."""
    return lambda run, double=False: run(*wide(tensors, double), *others)


def mlp(case: Case, dtype, activation, gated, interleaved, bias: bool):
    """The MLP of a case, whose ``o`` is the inner size, as a method for :func:`check`."""
    inputs, columns = Inputs(case, dtype), case.o * (2 if gated else 1)
    up, up_scale = weight_of(case, columns, case.i, dtype)
    down, down_scale = weight_of(case, case.i, case.o, dtype)
    biases = [random_tensor(case.e, n, dtype=dtype).to(DEVICE) if bias else None for n in (columns, case.i)]
    options = (activation, gated, interleaved, case.transposed, case.transposed, 1.702, 0.7)
    tensors = (inputs.x, up, down, up_scale, down_scale, *biases, inputs.row_weight)
    return calling(tensors, *inputs.indices, *options)
