"""Recorder: its counts against numpy's, and its files."""

import builtins
import json
import threading
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dynops
from dynops.budget import MacCounter, Recorder
from dynops.nn import ChannelConv2d, ChannelGatedConv2d, ConvExperts, Experts, MoE, Skip, SparseConv2d


class Decision(NamedTuple):  # what dynops.gates returns
    mask: Tensor
    score: Tensor


class Pixels(nn.Module):
    """A gate, a masked convolution and a Skip of another one."""

    class Gate(nn.Module):
        def forward(self, x):
            return Decision((x[:, :1] > 0).float(), x[:, :1])

    def __init__(self):
        super().__init__()
        self.gate, self.conv = self.Gate(), SparseConv2d(3, 3, 1)
        self.skip = Skip(self.Inner())

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = ChannelConv2d(3, 4, 1)

        def forward(self, x):
            return x + self.conv(x, None, x.mean((2, 3))[:, [0, 1, 2, 0]] > 0).mean(1, keepdim=True)

    def forward(self, x, keep):
        return self.skip(self.conv(x, self.gate(x).mask), keep)


def batches(count: int):
    for _ in range(count):
        yield torch.randn(6, 3, 5, 5), torch.rand(6) < 0.6, torch.randint(0, 4, (6,))


def test_rates_of_layers_and_classes():
    model, masks, keeps, labels = Pixels(), [], [], []
    with Recorder(model, num_classes=4) as recorder:
        for x, keep, y in batches(5):
            recorder.labels = y
            model(x, keep)
            masks.append((x[:, 0] > 0).flatten(1).float().mean(1).numpy())
            keeps.append(keep.float().numpy())
            labels.append(y.numpy())
    summary = recorder.summary()["rates"]
    y = np.concatenate(labels)
    for name, values in (("gate", masks), ("conv", masks), ("skip", keeps)):
        rates, found = np.concatenate(values), summary[name]
        assert found["rate"] == pytest.approx(rates.mean())
        assert found["classes"] == pytest.approx([rates[y == c].mean() for c in range(4)])
        calls = np.sort([round(v.mean() * 100) / 100 for v in values])
        assert found["calls"] == 5 and found["p50"] == pytest.approx(calls[2]) and found["p99"] == calls[4]


def test_layers_inside_of_a_skip_have_the_classes_of_their_samples():
    model = Pixels()
    open_, all_ = np.zeros(4), np.zeros(4)
    seen = []
    model.skip.module.conv.register_forward_pre_hook(lambda m, args: seen.append(args[2].numpy()))
    with Recorder(model, num_classes=4) as recorder:
        for x, keep, y in batches(4):
            recorder.labels = y
            model(x, keep)
            if keep.any():
                np.add.at(open_, y[keep].numpy(), seen[-1].sum(1))
                np.add.at(all_, y[keep].numpy(), 4)
    assert recorder.summary()["rates"]["skip.module.conv"]["classes"] == [
        pytest.approx(o / a) if a else None for o, a in zip(open_, all_, strict=True)
    ]


def test_without_labels_and_with_labels_of_no_class():
    model = Pixels()
    x, keep, _ = next(batches(1))
    with Recorder(model, num_classes=2) as recorder:
        model(x, keep)
        recorder.labels = torch.tensor([0, 1, 2, -1, 100, 1])
        model(x, keep)
    found = recorder.summary()["rates"]["skip"]
    assert found["rate"] == pytest.approx(keep.float().mean())
    assert found["classes"] == pytest.approx([float(keep[0]), float(keep[[1, 5]].float().mean())])
    recorder.reset()
    assert recorder.summary()["rates"] == {}


def test_other_decisions():
    model = nn.ModuleDict({
        "gated": ChannelGatedConv2d(8, 8, 3, p=4, th=0.0).eval(),
        "active": SparseConv2d(3, 3, 1),
        "shared": ChannelConv2d(3, 4, 1),
    })  # fmt: skip
    mask = torch.rand(2, 6, 6) < 0.5
    with Recorder(model) as recorder:
        model["gated"](torch.randn(2, 8, 6, 6))
        with dynops.active(mask):
            model["active"](torch.randn(2, 3, 6, 6))
        model["shared"](
            torch.randn(2, 3, 6, 6), None, dynops.ChannelPlan.from_mask(torch.tensor([1, 0, 1, 1]))
        )
    rates = {name: value["rate"] for name, value in recorder.summary()["rates"].items()}
    expected = {
        "gated": model["gated"]._open.float().mean().item(),
        "active": mask.float().mean().item(),
        "shared": 0.75,
    }
    assert rates == pytest.approx(expected)


def test_expert_load():
    model = nn.ModuleDict({
        "moe": MoE.from_sizes(8, 6, 4, 2, capacity_factor=0.5),
        "experts": Experts(4, 8, 6),
        "branches": ConvExperts([nn.Identity(), nn.Identity()]),
    })  # fmt: skip
    index, chosen = torch.randint(0, 5, (6, 2)), torch.tensor([0, 1, 1, 2, 1, 0])
    with Recorder(model, num_classes=2) as recorder:
        routing = model["moe"](torch.randn(6, 8)).routing
        recorder.labels = torch.tensor([0, 0, 0, 1, 1, 1])
        model["experts"](torch.randn(6, 8), index)
        model["branches"](torch.randn(6, 8), chosen)
    load = recorder.summary()["experts"]
    assert load["moe.gate"]["counts"] == np.bincount(routing.index.flatten(), minlength=4).tolist()
    assert (
        max(load["moe.experts"]["counts"]) <= 2 and sum(load["moe.experts"]["counts"]) < 12
    )  # 3 pairs each, cut to ceil(1.5)
    assert load["experts"]["counts"] == np.bincount(index.flatten(), minlength=5)[:4].tolist()
    assert load["experts"]["classes"][1] == np.bincount(index[3:].flatten(), minlength=5)[:4].tolist()
    assert load["branches"]["classes"] == [[1, 2], [1, 1]]
    plan = dynops.ExpertPlan.from_topk(index, 4)
    with Recorder(model) as again:
        model["experts"](torch.randn(6, 8), plan)
    assert again.summary()["experts"]["experts"]["counts"] == load["experts"]["counts"]


def test_exit_histograms(tmp_path):
    exits = dynops.nn

    def criterion(logits, exit, state):
        return logits[:, 0] > 0.1

    layer = exits.EarlyExit(
        [nn.Linear(4, 4) for _ in range(3)], [nn.Linear(4, 2) for _ in range(3)], criterion
    )
    labels = torch.randint(0, 3, (20,))
    with Recorder(layer.eval(), num_classes=3) as recorder:
        recorder.labels = labels
        left = layer(torch.randn(20, 4)).exits
    found = recorder.summary()["exits"][""]
    assert found["counts"] == np.bincount(left, minlength=3).tolist()
    assert found["mean"] == pytest.approx(left.float().mean().item())
    assert found["classes"] == [np.bincount(left[labels == c], minlength=3).tolist() for c in range(3)]
    assert tmp_path / "model.exits.png" in recorder.save(tmp_path)


def test_steps_and_ponder_maps(tmp_path):
    halting = dynops.nn
    units = [dynops.nn.SparseSequential(nn.Conv2d(4, 4, 1)) for _ in range(3)]
    layer = halting.SpatialHalting(units, [nn.Sequential(nn.Conv2d(4, 1, 1), nn.Sigmoid()) for _ in range(2)])
    with Recorder(nn.Sequential(layer), maps=1) as recorder:
        out = recorder.model[0](torch.randn(2, 4, 6, 6) * 4)
    assert (
        recorder.summary()["steps"]["0"]["counts"] == np.bincount(out.steps.flatten(), minlength=4).tolist()
    )
    recorder.save(tmp_path)
    assert {"summary.json", "0.ponder.png", "0.steps.png"} <= {p.name for p in tmp_path.iterdir()}


def test_updates_of_steps():
    layer = dynops.nn.SkipRNN(3, 4)
    with Recorder(layer) as recorder:
        updates = layer(torch.randn(5, 2, 3)).updates
    assert recorder.summary()["rates"][""]["rate"] == pytest.approx(updates.mean().item())


def test_files(tmp_path):
    matplotlib = pytest.importorskip("matplotlib.image")
    model = Pixels()
    with Recorder(model, num_classes=4, maps=2) as recorder:
        for x, keep, y in batches(2):
            recorder.labels = y
            model(x, keep)
    files = recorder.save(tmp_path / "report")
    assert {f.name for f in files} == {"summary.json", "gate.mask.png", "conv.mask.png", "rates.png"}
    assert json.loads(files[0].read_text()) == recorder.summary()
    for file in files[1:]:
        picture = matplotlib.imread(file)
        assert picture.std() > 0.01  # something was drawn


def test_no_matplotlib(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    model = Pixels()
    with Recorder(model) as recorder:
        model(*next(batches(1))[:2])
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="matplotlib is needed for pictures: pip install matplotlib"):
        recorder.save(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["rates"]["skip"]["calls"] == 1


def test_memory_does_not_grow():
    model = Pixels()

    def held(recorder):
        tallies = [t for tally in recorder._rates.values() for t in (tally.open, tally.all, tally.calls)]
        return sum(t.numel() for t in (*tallies, *recorder._maps["mask"].values()))

    with Recorder(model, num_classes=4) as recorder:
        sizes = []
        for x, _, y in batches(4):
            recorder.labels = y
            model(x, torch.ones(6))
            sizes.append(held(recorder))
    assert len(set(sizes)) == 1


def test_nothing_is_read_back_while_the_model_runs(monkeypatch):
    """The recorder itself: the model's own plans do read counts."""
    model = nn.Sequential(Pixels.Gate())
    with Recorder(model, num_classes=3) as recorder:
        recorder.labels = torch.tensor([0, 2])
        reads = []
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
            monkeypatch.setattr(Tensor, name, lambda self, *args, name=name: reads.append(name))
        model(torch.randn(2, 3, 4, 4))
        monkeypatch.undo()
    assert reads == []
    assert recorder.summary()["rates"]["0"]["calls"] == 1


def test_hooks_threads_and_a_counter_beside_it():
    model = Pixels()
    x, keep, _ = next(batches(1))
    with Recorder(model) as recorder, MacCounter(model) as macs:
        thread = threading.Thread(target=lambda: model(x, keep))
        thread.start()
        thread.join()
        with torch.no_grad():
            model(x, torch.zeros(6))  # the price of what nobody ran is no decision
    rates = recorder.summary()["rates"]
    assert rates["skip"]["calls"] == 1 and "skip.module.conv" not in rates
    assert macs.layers["skip.module.conv"].dense > 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_wrong_arguments():
    model = Pixels()
    x, keep, _ = next(batches(1))
    with pytest.raises(ValueError, match="num_classes: expected an int >= 1, got 0"):
        Recorder(model, 0)
    with pytest.raises(ValueError, match="maps: expected an int >= 0, got None"):
        Recorder(model, maps=None)
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module"):
        Recorder(None)
    short = torch.zeros(5, dtype=torch.int64)
    for labels, error in ((short, ValueError), (torch.zeros(6), TypeError), ([0] * 6, TypeError)):
        with pytest.raises(error, match="labels: expected"), Recorder(model, 3) as recorder:
            recorder.labels = labels
            model(x, keep)
