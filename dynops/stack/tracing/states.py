"""What a forward may set outside of its module: modes of torch, and random numbers."""

from __future__ import annotations

import contextlib
import random
import sys

import torch

from ... import context


@contextlib.contextmanager
def modes_of(training: bool):
    """Gradients and autocast: on and off in eval mode, off and on in training mode, whatever holds around."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(context._scope.only(()))
        stack.enter_context(torch.inference_mode(training))
        stack.enter_context(torch.set_grad_enabled(not training))
        for device in ("cpu", "cuda"):
            enabled = torch.is_autocast_enabled(device)
            stack.callback(torch.set_autocast_enabled, device, enabled)
            torch.set_autocast_enabled(device, training)
        yield


def modes_now() -> tuple:
    c = torch._C
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
        torch.get_autocast_dtype("cuda"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.is_anomaly_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.fp32_precision,  # the older getter raises where this was set
        torch.autograd.forward_ad._current_level,
        c._len_torch_function_stack(),
        c._len_torch_dispatch_stack(),
        c._autograd._top_saved_tensors_default_hooks(True),
        c._functorch.maybe_current_level(),
        context._scope.values(),
    )


def random_now() -> tuple:
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else ()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ()
    return (
        random.getstate(),
        tuple(part.tobytes() if hasattr(part, "tobytes") else part for part in state),
        torch.get_rng_state().numpy().tobytes()
        if numpy is not None
        else bytes(torch.get_rng_state().tolist()),
        tuple(bytes(part.tolist()) for part in cuda),
    )


def set_random(state: tuple) -> None:
    own, of_numpy, of_torch, of_cuda = state
    random.setstate(own)
    if of_numpy:
        numpy = sys.modules["numpy"]
        keys = numpy.frombuffer(of_numpy[1], dtype=numpy.uint32)
        numpy.random.set_state((of_numpy[0], keys, *of_numpy[2:]))
    torch.set_rng_state(torch.frombuffer(bytearray(of_torch), dtype=torch.uint8).clone())
    for device, part in enumerate(of_cuda):
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(part), dtype=torch.uint8).clone(), device)
