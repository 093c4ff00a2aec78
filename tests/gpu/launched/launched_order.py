"""What is kept between calls, and work beside the current stream, come in order on every stream."""

import threading
from unittest import mock

import pytest
import torch
from driver.order import Race
from driver.streams import Stream
from driver.watch import watch
from gpu_calls import CALLS
from torch import nn

import dynops
from dynops import context, kept
from dynops.kernels.triton import rows

QUICK = ("sparse_conv2d", "channel_conv2d", "experts_mlp, 16 tokens")


def on_another_stream(name: str) -> None:
    """A call on the default stream, and again on another one, which waits for the arguments alone."""
    call, side = CALLS[name], torch.cuda.Stream()
    with watch.fresh():
        plan, tensors = call.plan("cuda", True), call.tensors("cuda", torch.bfloat16)
        made = torch.cuda.current_stream().record_event()
        results = [both_ways(call, plan, tensors)]
        side.wait_event(made)
        with torch.cuda.stream(side):
            results.append(both_ways(call, plan, tensors))
        torch.cuda.synchronize()


def both_ways(call, plan, tensors) -> tuple:
    out = call.run(plan, *tensors)
    return out * 1, torch.autograd.grad(out, tensors, torch.empty_like(out), allow_unused=True)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CALLS]
)
def test_a_second_stream_waits_for_what_the_first_one_keeps(name):
    on_another_stream(name)


def test_a_packed_weight_that_another_stream_does_not_wait_for():
    with (
        mock.patch.object(kept._Entry, "on_this_stream", lambda entry: entry.made),
        pytest.raises(Race, match="copy_"),
    ):
        on_another_stream("sparse_conv2d")


def test_what_a_plan_keeps_is_waited_for():
    side, plan = torch.cuda.Stream(), CALLS["gather_pixels, scatter_pixels"].plan("cuda", True)
    plan.inverse()
    with torch.cuda.stream(side):
        with (
            mock.patch.object(kept.Made, "on_this_stream", lambda made: made.made),
            pytest.raises(Race, match="copy_"),
        ):
            plan.inverse() + 1
        plan.inverse() + 1


def test_a_fill_that_the_convolution_does_not_wait_for():
    wait = Stream.wait_stream

    def forgotten(self, other):
        if other == torch.cuda.default_stream():
            wait(self, other)

    with mock.patch.object(Stream, "wait_stream", forgotten), pytest.raises(Race, match="fill_kernel"):
        on_another_stream("sparse_conv2d")


def under_one_mask_on_two_streams(size: int = 32) -> None:
    """A model on two streams, which wait for the plan alone, under one context: maps of 32, then of ``size``.

    Of the capacity form, as a compact plan reads its size back: the host then waits for the first stream.
    """
    last = {"memory_format": torch.channels_last}  # weights are not packed
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()).to("cuda", torch.bfloat16, **last)
    dynops.convert_(model)
    maps = [torch.zeros(2, 64, n, n, dtype=torch.bfloat16, device="cuda").to(**last) for n in (32, size)]
    plan = dynops.PixelPlan.from_mask(torch.zeros(1, 16, 16, device="cuda"), 256)
    made, active = torch.cuda.current_stream().record_event(), None
    for x in maps:
        stream = torch.cuda.Stream()
        stream.wait_event(made)
        with torch.no_grad(), torch.cuda.stream(stream):
            active = active or dynops.use_mask(plan)
            with active:
                model(x)
    torch.cuda.synchronize()


@pytest.mark.parametrize("kind,size", [(dynops.PixelPlan, 32), (torch.Tensor, 64)])
def test_what_a_mask_keeps_is_waited_for(kind, size):
    value = context._value

    def forgotten(found):
        return found.made if type(found) is kept.Made and isinstance(found.made, kind) else value(found)

    with watch.fresh():
        under_one_mask_on_two_streams(size)
    with mock.patch.object(context, "_value", forgotten), pytest.raises(Race):
        under_one_mask_on_two_streams(size)


def test_each_thread_fills_on_a_stream_of_its_own():
    device, found = torch.device("cuda", 0), []
    threads = [threading.Thread(target=lambda: found.append(rows._side_stream(device))) for _ in range(2)]
    for thread in threads:
        thread.start(), thread.join()
    assert len({stream.stream_id for stream in (*found, rows._side_stream(device))}) == 3
    assert rows._side_stream(device) is rows._side_stream(device)
