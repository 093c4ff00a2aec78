"""A model in a stream, whose convolutions are Triton kernels in the interpreter. Run by ``test_triton_interpreter.py``."""

import copy

import interpreter  # noqa: F401 (mends the interpreter)
import torch
import torch.nn.functional as F
from edits import frames_of, model_of
from torch import nn

import dynops
from dynops.stack.changed.contents import Contents
from dynops.stack.changed.frame import Frame
from dynops.stack.maps import convolution
from dynops.testing import assert_within_budget


def test_rows_of_a_video_by_triton(monkeypatch):
    own, plans = convolution._pixel_conv, []

    def by_triton(x, weight, bias, plan, in_plan, g, epilogue, base, to_rows, backend, *rest):
        plans.append(plan)
        return own(x, weight, bias, plan, in_plan, g, epilogue, base, to_rows, "triton", *rest)

    monkeypatch.setattr(convolution, "_pixel_conv", by_triton)
    monkeypatch.setattr(convolution.Convolution, "into", lambda *_: False)  # as on a GPU
    monkeypatch.setattr(Contents, "_fused", lambda *_: None)
    monkeypatch.setattr(Frame, "_dense_is_faster", lambda *_: False)
    layers = {
        "a": nn.Conv2d(3, 16, 3, padding=1),
        "norm": nn.BatchNorm2d(16),
        "b": nn.Conv2d(16, 16, 3, 2, 1),
    }
    layers["c"] = nn.Conv2d(16, 8, 1)
    model = model_of(lambda m, x: m.c(F.relu(m.b(F.relu(m.norm(m.a(x)))))), **layers)
    exact, stream = copy.deepcopy(model).double(), dynops.Stream()
    for frame in frames_of(torch.randn(2, 3, 12, 13), 4):
        with stream:
            out = model(frame)
        assert_within_budget(out, exact(frame.double()), model(frame))
    assert len(plans) >= 6
