"""MacCounter's calls, hooks, threads and errors."""

import threading

import pytest
import torch
from counting import BLOCK, block, count, hooks, images
from torch import nn

import dynops
from dynops.budget import MacCounter
from dynops.nn import Skip


def test_counts_add_up_until_reset():
    layer = Skip(block())
    with MacCounter(layer) as macs:
        layer(images(2), torch.tensor([1, 0]))
        layer(images(2), torch.tensor([1, 1]))
        assert macs.per_sample.tolist() == [2 * BLOCK, BLOCK]
        layer(images(3), torch.tensor([1, 1, 1]))
        assert float(macs.total) == 6 * BLOCK and macs.dense == 7 * BLOCK
        with pytest.raises(
            ValueError, match=r"per_sample: expected calls with one batch, got batches of \[2, 3\]"
        ):
            macs.per_sample  # noqa: B018
        macs.reset()
        layer(images(3), torch.tensor([0, 1, 0]))
        assert macs.per_sample.tolist() == [0, BLOCK, 0]
    layer(images(3), torch.tensor([1, 1, 1]))
    assert macs.total == BLOCK  # what is called outside does not count
    with pytest.raises(ValueError, match="expected a call of the model"):
        MacCounter(layer).per_sample  # noqa: B018


def test_parts_that_are_called_by_themselves():
    model = nn.ModuleDict({"policy": nn.Linear(4, 2), "net": nn.Linear(4, 3)})
    with MacCounter(model) as macs:
        model["policy"](torch.randn(2, 4))
        model["net"](torch.randn(2, 4))
    assert macs.per_sample.tolist() == [20, 20]


def test_hooks_are_removed_and_contexts_nest():
    model = nn.Sequential(block(), block())
    with MacCounter(model) as outer:
        with MacCounter(model) as inner, MacCounter(model[1]) as part:
            model(images(2))
        model(images(2))
        assert hooks(model) > 0
    assert (outer.total, inner.total, part.total) == (8 * BLOCK, 4 * BLOCK, 2 * BLOCK)
    assert hooks(model) == 0 and not dynops.ops.observers.observers()
    with pytest.raises(RuntimeError, match="entered already"), outer, outer:
        pass
    assert hooks(model) == 0


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.fails = Skip(nn.Sequential(block(), self.Last(self))), False

    class Last(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = [model]

        def forward(self, x):
            if self.model[0].fails:
                raise KeyError("on purpose")
            return x

    def forward(self, x, g):
        return self.inner(x, g)


def test_exceptions():
    model, g = Fails(), torch.tensor([1, 0])
    with MacCounter(model) as macs:
        model.fails = True
        with pytest.raises(KeyError, match="on purpose"):
            model(images(2), g)
        assert macs.total == 0
        model.fails = False
        model(images(2), g)
        assert macs.per_sample.tolist() == [BLOCK, 0]
    with pytest.raises(KeyError), MacCounter(model):
        model.fails = True
        model(images(2), g)
    assert hooks(model) == 0 and not dynops.ops.observers.observers()


def test_other_threads_and_other_models_do_not_count():
    model, other = Skip(block()), Skip(block())
    g = torch.tensor([1, 0, 1])
    results = {}

    def run():
        with MacCounter(other) as macs:
            for _ in range(20):
                model(images(3), g)
                other(images(3), 1 - g)
        results["other"] = macs.per_sample.tolist()

    thread = threading.Thread(target=run)
    with MacCounter(model) as macs:
        thread.start()
        for _ in range(20):
            model(images(3), g)
            other(images(3), g)
        thread.join()
    assert macs.per_sample.tolist() == [20 * BLOCK, 0, 20 * BLOCK]
    assert results["other"] == [0, 20 * BLOCK, 0]
    assert hooks(model) == hooks(other) == 0


def test_nothing_is_known_where_gradients_are_off():
    with torch.inference_mode():
        macs = count(Skip(block()), images(2), torch.tensor([1.0, 0.0]))
    assert macs.per_sample.tolist() == [BLOCK, 0] and not macs.total.requires_grad


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        MacCounter(3)
