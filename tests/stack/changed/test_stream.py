"""The options and the state of a stream, and its report."""

import pytest
import torch
import torch.nn.functional as F
from edits import assert_dense, edited, frames_of, model_of, run
from torch import nn

import dynops
from dynops.stack.changed.frame import Frame


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.setattr(Frame, "_dense_is_faster", lambda *_: False)


def net(stride: int = 1, **layers):
    layers = {
        "c": nn.Conv2d(3, 4, 3, stride, 1),
        "d": nn.Conv2d(4, 4, 3, padding=1),
        "norm": nn.BatchNorm2d(4),
        "e": nn.Conv2d(4, 5, 3, padding=1),
    } | layers
    return model_of(lambda m, x: m.e(F.relu(m.norm(m.d(F.relu(m.c(x)))))), **layers)


def image(n: int = 1, size: int = 20) -> torch.Tensor:
    return torch.randn(n, 3, size, size)


# ------------------------------------------------------------------------------------------ state


def test_reset_forgets_and_bytes_say_what_is_kept():
    model, stream, x = net(), dynops.Stream(), image()
    assert stream.bytes == 0
    run(model, [x, y := edited(x)], stream)
    kept = stream.bytes
    assert kept >= x.numel() * 4 and kept == stream.report().bytes + x.numel() * 4
    run(model, [y], stream)
    assert stream.bytes == kept
    stream.reset()
    assert stream.bytes == 0
    with pytest.raises(RuntimeError, match="expected a call"):
        stream.report()
    run(model, [x, y], stream)


def test_to_returns_the_stream_and_the_next_call_is_right():
    model, stream, x = net(), dynops.Stream(), image()
    run(model, [x], stream)
    assert stream.to("cpu") is stream
    run(model, [edited(x), x], stream)


def test_streams_and_models_are_apart():
    models, streams = [net(), net()], [dynops.Stream(), dynops.Stream()]
    videos = {(m, s): frames_of(image(), 4) for m in models for s in streams}
    for i in range(4):
        for (model, stream), frames in videos.items():
            run(model, [frames[i]], stream)


def test_each_step_has_a_state_of_its_own():
    model, stream = net(), dynops.Stream()
    x, y = image(), image()
    for _ in range(3):
        for step, frame in ((0, x), (torch.tensor(7), y)):
            with stream.at(step=step):
                made = model(frame)
            assert_dense(made, model, frame)
            assert stream.report().rows[0].share in ((1.0,) if _ == 0 else (pytest.approx(0.1, abs=0.1),))
        x, y = edited(x), edited(y)
    with pytest.raises(TypeError):
        stream.at(step=[1])


def test_inner_streams_hold_and_inner_models_belong_to_the_outer():
    model, (a, b), x = net(), (dynops.Stream(), dynops.Stream()), image()
    with a:
        with b:
            model(x)
        assert a.bytes == 0 < b.bytes
        model(x)
    outer = model_of(lambda m, x: m.inner(x) + m.inner(x.flip(3)), inner=model)
    stream = run(outer, frames_of(x, 4))
    assert len(stream._all_tapes()) == 1


# ------------------------------------------------------------------------------------------ masks


def test_a_told_mask_is_believed():
    model, stream, x = net(), dynops.Stream(), image(2)
    run(model, [x], stream)
    y, mask = x.clone(), torch.zeros(20, 20)
    y[:, :, 4:8, 4:9], mask[4:8, 4:9] = 0, 1
    with stream.changed(mask):
        made = model(y)
    assert_dense(made, model, y)
    assert stream.report().rows[0].share == 6 * 7 / 400
    with stream.changed(torch.zeros(2, 1, 20, 20, dtype=torch.bool)):
        assert torch.equal(model(x), made)  # the caller's error
    with stream.changed(torch.ones(1, 10, 10)):
        assert_dense(model(x), model, x)
    with stream.at(step=1).changed(mask):
        assert_dense(model(y), model, y)


@pytest.mark.parametrize("mask", [torch.zeros(3, 20, 20), torch.zeros(20), "mask", torch.zeros(1, 2, 20, 20)])
def test_a_mask_that_does_not_fit_raises(mask):
    model, stream, x = net(), dynops.Stream(), image(2)
    run(model, [x], stream)
    with pytest.raises((ValueError, TypeError), match="mask"), stream.changed(mask):
        model(x)
    run(model, [edited(x)], stream)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_a_given_spread_computes_the_dilated_mask_and_nothing_else(k):
    model, stream, x = net(), dynops.Stream(spread=k), image()
    before = run(model, [x], stream) and model(x)
    y = x.clone()
    y[:, :, 8:10, 9:12] = 1
    with stream:
        made = model(y)
    near = torch.zeros(20, 20, dtype=torch.bool)
    near[8 - k : 10 + k, 9 - k : 12 + k] = True
    assert torch.equal(stream.report().masks[20, 20][0], near)
    torch.testing.assert_close(made[0, :, ~near], before[0, :, ~near])
    exact = model(y)
    if k == 3:
        torch.testing.assert_close(made, exact)
    else:
        assert (made - exact).abs().max() > 1e-3


def test_a_given_spread_is_any_pooled_at_lower_resolutions():
    model, stream, x = net(stride=2), dynops.Stream(spread=1), image()
    run(model, [x], stream)
    y = x.clone()
    y[:, :, 9, 9] += 1
    with stream:
        model(y)
    near = torch.zeros(10, 10, dtype=torch.bool)
    near[3:6, 3:6] = True
    assert torch.equal(stream.report().masks[10, 10][0], near)


# ------------------------------------------------------------------------------------- thresholds


def test_small_moves_are_owed_until_they_add_up():
    model = model_of(lambda m, x: m.c(x), c=nn.Conv2d(1, 1, 1, bias=False))
    model.c.weight.fill_(1.0)
    stream = dynops.Stream(threshold={"c*": 0.25})
    x = torch.zeros(1, 1, 4, 4)
    made = []
    for i in range(6):
        frame = x.clone()
        frame[0, 0, 1, 1] = 0.125 * i
        with stream:
            made.append(float(model(frame)[0, 0, 1, 1]))
        owed = stream.report().owed
    assert made == [0.0, 0.0, 0.0, 0.375, 0.375, 0.375]
    assert owed == 0.25


def test_the_input_has_a_threshold_too():
    model = model_of(lambda m, x: m.c(x), c=nn.Conv2d(1, 1, 1, bias=False))
    model.c.weight.fill_(1.0)
    stream, x = dynops.Stream(threshold={"input": 0.25}), torch.zeros(1, 1, 4, 4)
    made = []
    for _ in range(5):
        x = x + 0.125
        x[0, 0, 0, 0] = 0
        with stream:
            made.append(float(model(x)[0, 0, 1, 1]))
    assert made == [0.125, 0.125, 0.125, 0.5, 0.5]
    assert stream.report().owed == 0.25


def test_noise_everywhere_does_not_spread_past_a_threshold():
    model, x = net(), image(2)
    stream = run(model, [x], threshold={"[ce]*": 0.1})
    y = x + 1e-4 * torch.randn(x.shape)
    y[0, :, 9, 9] += 5
    with stream:
        made = model(y)
    report = stream.report()
    assert 0.5 < report.rows[0].share <= 1 and 0 < report.rows[2].share < 0.05 and 0 < report.owed <= 0.1
    assert (made - model(y)).abs().max() < 0.1


@pytest.mark.parametrize("threshold", [1e-3, {"c*": 1e-2}, {"*": 1e-3}])
@pytest.mark.parametrize("relative", [False, True])
def test_a_threshold_bounds_the_error_of_a_video(threshold, relative):
    model, frames = net(), frames_of(image(), 3)
    frames += [f + 1e-4 * torch.randn(f.shape) for f in frames]
    stream = dynops.Stream(threshold=threshold, relative=relative)
    for frame in frames:
        with stream:
            y = model(frame)
        dense = model(frame)
        assert (y - dense).norm() < 0.05 * dense.norm()
    assert 0 < stream.report().owed < 0.1


def test_a_relative_threshold_is_in_units_of_the_layer():
    frames = frames_of(image(), 2)
    frames.append(frames[-1] + 1e-3)
    made = []
    for scale in (1.0, 8.0):
        model = model_of(lambda m, x: m.c(x), c=nn.Conv2d(3, 4, 3, bias=False))
        torch.manual_seed(3)
        model.c.weight.copy_(torch.randn(4, 3, 3, 3) * scale)
        stream = dynops.Stream(threshold={"c*": 1e-2}, relative=True)
        for frame in frames:
            with stream:
                y = model(frame)
        made.append(y / scale)
    torch.testing.assert_close(*made)


# ---------------------------------------------------------------------------------------- options


def test_refresh_computes_everything_every_few_calls():
    model, stream, x = net(), dynops.Stream(refresh=3, spread=0), image()
    shares = []
    for _ in range(7):
        with stream:
            y = model(x)
        shares.append(stream.report().rows[0].share)
        if shares[-1] == 1:
            assert_dense(y, model, x)
        x = edited(x)
    assert [s == 1 for s in shares] == [True, False, False, True, False, False, True]


def test_blocks_widen_what_is_computed():
    model, stream, x = net(), dynops.Stream(block=4), image()
    y = x.clone()
    y[:, :, 9, 9] = 3
    run(model, [x, y], stream)
    assert [r.share for r in stream.report().rows if "conv" in r.name] == [16 / 400, 64 / 400, 64 / 400] or (
        stream.report().rows[0].share == 16 / 400
    )
    mask = stream.report().masks[20, 20][0]
    blocks = mask.view(5, 4, 5, 4).permute(0, 2, 1, 3).flatten(2)
    assert torch.equal(blocks.any(2), blocks.all(2))


@pytest.mark.parametrize(
    "keep", [[], ["c*"], ["*relu*"], lambda name, size: "d" in name, lambda name, size: size < 9]
)
def test_what_is_not_kept_is_computed_where_it_is_read(keep):
    def forward(m, x):
        y = m.c(x)
        return m.e(F.relu(m.norm(m.d(F.relu(y))))) + m.c(x + 1)[:, :1] + F.max_pool2d(y, 3, 1, 1)[:, :1]

    model = net()
    model.function = forward
    frames = frames_of(image(2, 12), 6)
    assert run(model, frames, keep=keep).bytes < run(model, frames).bytes


def test_keep_is_asked_with_the_names_of_the_report():
    asked = {}
    stream = run(net(), frames_of(image(), 3), keep=lambda name, size: asked.setdefault(name, size) > 0)
    assert asked and set(asked) <= {row.name for row in stream.report().rows}
    assert all(size >= 20 * 20 * 4 * 4 for size in asked.values())


def test_kept_statistics_are_those_of_the_first_call():
    model = net(norm=nn.GroupNorm(2, 4))
    x = image()
    stream = run(model, [x], statistics="kept")
    y = x.clone()
    y[:, :, 5:8, 5:8] += 4
    with stream:
        made = model(y)
    hidden = model.d(F.relu(model.c(x))).view(1, 2, -1)
    mean, var = hidden.mean(2), hidden.var(2, unbiased=False)
    now = model.d(F.relu(model.c(y)))
    mean, var = (t.repeat_interleave(2, 1)[:, :, None, None] for t in (mean, var))
    normed = (now - mean) / (var + 1e-5).sqrt() * model.norm.weight[:, None, None] + model.norm.bias[
        :, None, None
    ]
    torch.testing.assert_close(made, model.e(F.relu(normed)), atol=1e-4, rtol=1e-4)
    assert stream.report().theory > 2
    stream.reset()
    run(model, [y], stream)


def test_kept_keys_change_where_tokens_do_and_move_no_others():
    def forward(m, x):
        tokens = m.c(x).flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in m.qkv(tokens).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    model = model_of(forward, c=nn.Conv2d(3, 8, 1), qkv=nn.Linear(8, 24))
    x = image(1, 8)
    stream = run(model, [x], attention="kept")
    y = x.clone()
    y[:, :, 2, 3:5] += 2
    with stream:
        made = model(y)
    before, after, at = model(x), model(y), torch.zeros(64, dtype=torch.bool)
    at[19:21] = True
    torch.testing.assert_close(made[:, at], after[:, at])
    torch.testing.assert_close(made[:, ~at], before[:, ~at])


# ------------------------------------------------------------------------------------------ video


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("pool", [False, True])
def test_a_pan_is_exact_and_moves_what_is_kept(stride, pool):
    model = net(stride)
    if pool:
        model.function = lambda m, x: m.e(F.max_pool2d(F.relu(m.norm(m.d(F.relu(m.c(x))))), 3, 2, 1)) + 0.1
    world, stream, left, top = torch.randn(2, 3, 80, 80), dynops.Stream(), 30, 30
    run(model, [world[:, :, 30:54, 30:56]], stream)
    for i, (dx, dy) in enumerate(((4, 0), (-4, 8), (1, 0), (3, -5), (0, 0), (-2, 2), (0, 24), (-3, -1))):
        left, top = left - dx, top - dy
        x = world[:, :, top : top + 24, left : left + 26].clone()
        if i % 2:
            x[0, :, 3:5, 3:5] = 0
        with stream.aligned(dx, dy):
            y = model(x)
        assert_dense(y, model, x)
        if i < 2:
            assert stream.report().rows[0].share < 0.7


def test_an_alignment_that_is_wrong_costs_time_alone():
    model, frames = net(2), frames_of(image(), 5)
    stream = dynops.Stream(align=(2, -1))
    run(model, frames, stream)


def test_a_pan_with_a_told_mask():
    model, stream, world = net(), dynops.Stream(), torch.randn(1, 3, 20, 40)
    run(model, [world[..., :20]], stream)
    x, mask = world[..., 4:24], torch.zeros(20, 20)
    mask[:, 16:] = 1
    with stream.aligned(-4, 0).changed(mask):
        y = model(x)
    assert_dense(y, model, x)


# ----------------------------------------------------------------------------------------- report


def test_a_report_counts_what_was_computed():
    model, stream, x = net(), dynops.Stream(), image()
    run(model, [x], stream)
    assert stream.report().theory == 1
    run(model, [x], stream)
    assert stream.report().theory == float("inf") and not any(r.share for r in stream.report().rows)
    y = x.clone()
    y[:, :, 9, 9] = 3
    run(model, [y], stream)
    report = stream.report()
    convs = [row for row in report.rows if row.dense_macs]
    assert [row.name.split()[0] for row in convs] == ["c", "d", "e"]
    assert [row.dense_macs for row in convs] == [400 * 108, 400 * 144, 400 * 180]
    assert convs[0].share == 9 / 400 and convs[-1].size == (1, 20, 20)
    assert report.theory == pytest.approx(sum(r.dense_macs for r in convs) / sum(r.macs for r in convs))
    assert report.theory > 4 and report.owed == 0 and report.seconds > 0
    assert report.bytes == sum(row.bytes for row in report.rows)
    picture = report.picture()
    assert picture.dtype == torch.uint8 and picture.shape == (20, 20) and int((picture == 255).sum()) == 49
    with pytest.raises(ValueError, match="size"):
        report.picture((3, 3))
    assert "theory" in str(report)


@pytest.mark.parametrize(
    "options",
    [
        *({"spread": s} for s in ("near", -1, 1.5, True)),
        *({"threshold": t} for t in (-1, "a", {"a": -1}, float("nan"), None)),
        *({"refresh": r} for r in (0, 1.5)),
        *({"block": b} for b in (0, (1, 2, 3), "x", 1.5)),
        *({"statistics": "x"}, {"attention": None}, {"keep": 3}),
        *({"align": a} for a in (3, (1,), (0.5, 1))),
    ],
)
def test_arguments_that_do_not_fit_are_named(options):
    with pytest.raises((ValueError, TypeError), match=f"^{next(iter(options))}: expected"):
        dynops.Stream(**options)
