"""Forwards that a trace cannot hold, forwards that it can, and changes that make one stale."""

import functools
import math
import random
import types
import typing

import numpy as np
import torch
import torch.nn.functional as F
import torch.nn.utils.prune  # not imported by torch
from torch import nn
from torch.utils.checkpoint import checkpoint

FLAG, COUNTS, STATE, RNG = True, [], types.SimpleNamespace(calls=0), random.Random(0)


class Net(nn.Module):
    """Modules and attributes for the forwards below."""

    tally = 0
    shared: typing.ClassVar[list] = []

    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu, self.on, self.calls = nn.BatchNorm2d(4), nn.ReLU(True), True, 0
        self.feats, self.cache, self.rng, self.extra = [], {}, random.Random(1), torch.full((1,), 2.0)
        self.config = types.SimpleNamespace(k=2, names=["a"])
        self.function, self.part = F.relu, functools.partial(F.leaky_relu, negative_slope=0.3)
        self.register_buffer("seen", torch.ones(1))
        self.more = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.ReLU()])
        nn.init.normal_(self.norm.bias)
        self.__class__ = type("Net", (Net,), {"forward": forward})

    def helper(self, x):
        return self.a(x)

    def all(self, x):
        for layer in self.more[:]:
            x = layer(x)
        return x


def no_grad(s, x):
    with torch.no_grad():
        y = s.a(x)
    return s.b(y)


def enable_grad(s, x):
    with torch.enable_grad():
        y = s.a(x)
    return s.b(y)


def autocast_off(s, x):
    with torch.autocast("cpu", enabled=False):
        return s.b(s.a(x.float()))


def autocast_on(s, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = s.a(x)
    return s.b(y.float())


def checkpointed(s, x):
    return s.b(checkpoint(s.a, x, use_reentrant=False))


def checkpointed_reentrant(s, x):
    return s.b(checkpoint(lambda v: s.norm(s.a(v)), x, use_reentrant=True))


def python_random(s, x):
    return s.b(s.a(x)) if random.random() < 0.5 else s.a(x)


def numpy_random(s, x):
    return s.b(s.a(x)) if np.random.rand() < 0.5 else s.a(x)


def torch_random(s, x):
    return s.b(s.a(x)) if torch.rand(()).item() < 0.5 else s.a(x)


def noise(s, x):
    return s.b(s.a(x) + torch.randn(1))


def own_generator(s, x):
    return s.b(s.a(x)) if s.rng.random() < 0.5 else s.a(x)


def global_generator(s, x):
    return s.b(s.a(x)) if RNG.random() < 0.5 else s.a(x)


def appends(s, x):
    s.feats.append(s.a(x))
    return s.b(s.feats[-1])


def writes_dict(s, x):
    s.cache["y"] = s.a(x)
    return s.b(s.cache["y"])


def counts(s, x):
    s.calls += 1
    return s.b(s.a(x)) if s.calls % 2 else s.a(x)


def counts_in_class(s, x):
    Net.tally += 1
    return s.b(s.a(x)) if Net.tally % 2 else s.a(x)


def appends_to_class(s, x):
    s.shared.append(1)
    return s.b(s.a(x)) if len(s.shared) % 2 else s.a(x)


def appends_to_global(s, x):
    COUNTS.append(s.a(x))
    return s.b(COUNTS[-1])


def counts_in_global(s, x):
    STATE.calls += 1
    return s.b(s.a(x)) if STATE.calls % 2 else s.a(x)


def counts_in_default(s, x, calls=[]):  # noqa: B006
    calls.append(1)
    return s.b(s.a(x)) if len(calls) % 2 else s.a(x)


def counts_in_config(s, x):
    s.config.k += 1
    return s.b(s.a(x)) if s.config.k % 2 else s.a(x)


def writes_buffer(s, x):
    s.seen.mul_(2)
    return s.b(s.a(x)) * s.seen


def writes_input(s, x):
    return s.b(s.a(s.relu(x))) + x


def writes_slice(s, x):
    y = s.a(x)
    F.relu(y[:, :2], inplace=True)
    return s.b(y)


def writes_what_is_read_later(s, x):
    y = s.a(x)
    z = y[:, :2]
    y += s.b(x)
    return s.b(torch.cat([z, z], 1))


def asks_for_a_size(s, x):
    return s.b(s.a(x)) if x.shape[2] > 4 else s.a(x)


def asks_for_a_class(s, x):
    return s.b(s.a(x)) if type(s.b) is not nn.Identity else x


def catches(s, x):
    try:
        return s.b(s.a(x)) if s.a(x).sum() > 0 else s.a(x)
    except TypeError:
        return s.a(x)


def dtype_of_its_parameters(s, x):
    return s.b(s.a(x.to(next(s.parameters()).dtype)))


def appends_and_raises(s, x):
    COUNTS.append(s.a(x))
    return s.b(COUNTS[-1]) if x.sum() > 0 else s.a(x)


def math_of_sizes(s, x):
    return s.b(s.a(x)) * math.sqrt(x.shape[1])


UNHOLDABLE = [no_grad, torch.no_grad()(lambda s, x: s.b(s.a(x))), enable_grad, autocast_off, autocast_on, checkpointed,
              checkpointed_reentrant, python_random, numpy_random, torch_random, noise, own_generator, global_generator,
              appends, writes_dict, counts, counts_in_class, appends_to_class, appends_to_global, counts_in_global,
              counts_in_default, counts_in_config, writes_buffer, writes_input, writes_slice, writes_what_is_read_later, asks_for_a_size,
              asks_for_a_class, catches, dtype_of_its_parameters, appends_and_raises, math_of_sizes]  # fmt: skip


def residual(s, x):
    return x + s.b(s.relu(s.a(x)))


def normed_residual(s, x):
    return F.relu(s.norm(s.a(x)) + x)


def concatenated(s, x):
    return torch.cat([x, s.b(s.a(x))], 1)


def shifted(s, x):
    return s.b(torch.sigmoid(s.a(x)) + 1)


def viewed(s, x):
    return s.a(x).view(x.shape[0], -1)


def lists_its_input(s, x):
    if isinstance(x, torch.Tensor):
        x = [x]
    return s.b(s.a(torch.cat(x, 1)))


def writes_in_place(s, x):
    y = s.a(x)
    y += s.b(x)
    z = y
    y *= 2
    return z + y


def has_options(s, x, y=None, *, z=3):
    return s.b(s.a(x)) if y is None else y


HOLDABLE = [
    residual,
    normed_residual,
    concatenated,
    shifted,
    viewed,
    lists_its_input,
    has_options,
    writes_in_place,
]


def chain(s, x):
    return s.b(s.relu(s.norm(s.a(x))))


CHANGES = {
    "attribute": (lambda s, x: s.b(s.a(x)) if s.on else s.a(x), lambda m: setattr(m, "on", False)),
    "config": (lambda s, x: s.b(s.a(x)) if s.config.k else s.a(x), lambda m: setattr(m.config, "k", 0)),
    "list": (lambda s, x: s.b(s.a(x)) * len(s.config.names), lambda m: m.config.names.append("b")),
    "global": (lambda s, x: s.b(s.a(x)) if FLAG else s.a(x), lambda m: globals().__setitem__("FLAG", False)),
    "class": (lambda s, x: s.b(s.a(x)) if s.tally == 0 else s.a(x), lambda m: setattr(m, "tally", 5)),
    "function": (lambda s, x: s.b(s.function(s.a(x))), lambda m: setattr(m, "function", torch.tanh)),
    "partial": (lambda s, x: s.b(s.part(s.a(x))), lambda m: setattr(m, "part", functools.partial(F.elu, alpha=2.0))),
    "tensor": (lambda s, x: s.b(s.a(x) * s.extra), lambda m: setattr(m, "extra", torch.full((1,), 3.0))),
    "padding": (lambda s, x: s.a(x), lambda m: setattr(m.a, "padding", (0, 0))),
    "dilation": (chain, lambda m: (setattr(m.a, "dilation", (2, 2)), setattr(m.a, "padding", (2, 2)))),
    "eps": (chain, lambda m: setattr(m.norm, "eps", 0.5)),
    "list of children": (lambda s, x: s.all(s.a(x)), lambda m: m.more.append(nn.Conv2d(4, 4, 1))),
    "child": (chain, lambda m: setattr(m, "b", nn.Identity())),
    "activation": (chain, lambda m: setattr(m, "relu", nn.Tanh())),
    "forward": (chain, lambda m: setattr(m.b, "forward", lambda x: x * 2)),
    "forward of the class": (chain, lambda m: setattr(type(m).__mro__[1], "forward", lambda s, x: s.a(x))),
    "method": (lambda s, x: s.b(s.helper(x)), lambda m: setattr(m, "helper", lambda x: m.a(x) * 2)),
    "hook": (chain, lambda m: m.a.register_forward_hook(lambda layer, args, out: out * 2)),
    "pre-hook": (chain, lambda m: m.a.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))),
    "pruning": (chain, lambda m: nn.utils.prune.l1_unstructured(m.a, "weight", 0.5)),
    "spectral norm": (chain, lambda m: nn.utils.spectral_norm(m.a)),
    "parametrised": (chain, lambda m: nn.utils.parametrizations.weight_norm(m.a)),
}  # fmt: skip


def reset():
    """Brings all that the forwards write to where it was."""
    globals()["FLAG"], Net.tally, STATE.calls = True, 0, 0
    for written in (COUNTS, Net.shared, counts_in_default.__defaults__[0]):
        written.clear()
    RNG.seed(0)


def is_as_it_was(model) -> bool:
    """True where no forward has written anything."""
    own = model.feats or model.cache or model.calls or model.config.k != 2 or model.seen != 1
    return not (own or COUNTS or Net.shared or Net.tally or STATE.calls or counts_in_default.__defaults__[0])
