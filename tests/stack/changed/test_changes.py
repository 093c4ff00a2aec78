"""What ends a stream's state: another size, dtype, weight or mode, an exception, a model that goes; copies and threads."""

import contextlib
import copy
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from edits import assert_dense, edited, frames_of, model_of, run
from torch import nn

import dynops


def forward(m, x):
    return m.d(F.relu(m.norm(m.c(x))))


def net():
    layers = {
        "c": nn.Conv2d(3, 4, 3, padding=1),
        "d": nn.Conv2d(4, 4, 3, padding=1),
        "norm": nn.BatchNorm2d(4),
    }
    return model_of(forward, **layers)


def image(n: int = 2, size: int = 12) -> torch.Tensor:
    return torch.randn(n, 3, size, size)


@contextlib.contextmanager
def warned(text: str = ""):
    """One warning with this text; none without one."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield
    texts = [str(w.message) for w in seen]
    assert len(texts) == bool(text) and all(text in t for t in texts), texts
    assert all(w.filename.endswith(("edits.py", "test_changes.py")) for w in seen), [w.filename for w in seen]


def assign(model):
    model.load_state_dict({k: v.clone() * 2 for k, v in model.state_dict().items()}, assign=True)


def other_layer(model):
    model.c = nn.Conv2d(3, 4, 3, padding=1).eval().requires_grad_(False)


WRITES = {
    "in place": lambda m: m.c.bias.add_(1),
    "through data": lambda m: m.c.weight.data.mul_(2),
    "another memory": lambda m: setattr(m.d.weight, "data", m.d.weight.data * 2),
    "a running mean": lambda m: m.norm.running_mean.add_(1),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "assign": lambda m: (assign(m), m.requires_grad_(False)),
    "a layer": other_layer,
    "a parameter": lambda m: setattr(m.c, "bias", nn.Parameter(torch.zeros(4), requires_grad=False)),
    "no bias": lambda m: setattr(m.c, "bias", None),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_written_weight_begins_anew(name):
    model, x = net(), image()
    stream = run(model, [x, edited(x)])
    WRITES[name](model)
    with warned("a parameter or buffer changed"):
        run(model, frames_of(x, 3), stream)


def test_another_size_batch_or_dtype_begins_anew():
    model, x = net(), image()
    stream = run(model, [x, edited(x)])
    for other in (image(2, 11), image(1, 11), image(3, 11)):
        with warned("the size, dtype or device"):
            run(model, [other, edited(other)], stream)
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float32):
        model.to(dtype)
        with warned("the size, dtype or device"):
            run(model, [x.to(dtype), edited(x).to(dtype)], stream)


def test_another_structure_of_arguments_begins_anew():
    model = model_of(
        lambda m, x, y=None: m.c(x) if y is None else m.c(x) + y, c=nn.Conv2d(3, 4, 3, padding=1)
    )
    x = image()
    stream = run(model, [x])
    with warned("changed"):
        run(model, [(x, torch.ones(1, 1, 1, 1))], stream)
    with warned("changed"):
        run(model, [x], stream)


def test_training_mode_keeps_nothing_and_warns_once():
    model, x = net(), image()
    stream = run(model, [x])
    model.train()
    with warned("eval mode"), stream:
        for _ in range(3):
            model(x)
    assert stream.bytes == 0
    model.eval()
    run(model, frames_of(x, 3), stream)
    model.norm.train()
    with warned("eval mode"), stream:
        model(x)


def test_gradients_raise():
    model, stream = net(), dynops.Stream()
    with stream, pytest.raises(RuntimeError, match="without gradients"):
        model(image().requires_grad_())
    model.requires_grad_(True)
    with stream, pytest.raises(RuntimeError, match="without gradients"):
        model(image())
    with stream, torch.no_grad():
        assert not model(image()).requires_grad
    model(image()).sum().backward()
    assert model.c.weight.grad is not None


def test_an_exception_drops_the_state():
    leaks = []

    def forward(m, x):
        y = m.c(x)
        leaks.append(y)
        if m.breaks:
            raise KeyError("inside")
        return m.d(y)

    model = model_of(forward, c=nn.Conv2d(3, 4, 3), d=nn.Conv2d(4, 4, 3))
    model.breaks, frames = False, frames_of(image(), 5)
    stream = run(model, frames[:2])
    model.breaks = True
    with pytest.raises(KeyError), stream:
        model(frames[2])
    assert stream.bytes == 0
    after = leaks[-1] + 0
    assert type(after) is torch.Tensor
    torch.testing.assert_close(after, model.c(frames[2]))
    model.breaks = False
    with warned():
        run(model, frames[2:], stream)


def test_what_is_kept_goes_with_stream_and_model():
    model, x, stream = net(), image(), dynops.Stream()
    run(model, [x, edited(x), x, x], stream)
    tape = weakref.ref(stream._all_tapes()[0])
    gc.disable()
    try:
        del stream
        assert tape() is None
    finally:
        gc.enable()
    stream, gone = run(model, [x, edited(x), x, x]), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and stream.bytes == 0


def test_copies_of_a_stream_are_empty_and_of_a_model_incremental():
    model, x = net(), image()
    stream = dynops.Stream(threshold=0.1, align=(1, 2), refresh=3, block=2)
    run(model, [x], stream)
    run(model, frames_of(x, 4))
    for other in (copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))):
        assert other.bytes == 0
        assert other.__reduce__() == stream.__reduce__()
    bound = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval().requires_grad_(False)
    dynops.incremental_(bound)
    run(bound, frames_of(x, 4))
    twin, loaded = copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))
    for other in (twin, loaded, copy.deepcopy(nn.Sequential(bound))[0]):
        assert list(other.state_dict()) == list(bound.state_dict())
        other[0].weight.mul_(2)
        run(other, frames_of(x, 4))
    run(bound, frames_of(x, 3))
    dynops.revert_(bound)
    assert type(bound) is nn.Sequential and set(bound.__dict__) == set(nn.Sequential().__dict__)


def test_threads_have_streams_of_their_own():
    model, videos, errors = net(), [frames_of(image(), 6) for _ in range(4)], []

    def work(frames):
        try:
            run(model, frames)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(frames,)) for frames in videos]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_one_call_at_a_time():
    inside, go = threading.Event(), threading.Event()

    def forward(m, x):
        inside.set()
        go.wait(10)
        return m.c(x)

    model, stream, x = model_of(forward, c=nn.Conv2d(3, 4, 3)), dynops.Stream(), image()

    def work():
        with stream:
            model(x)

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(10)
    try:
        with stream, pytest.raises(RuntimeError, match="one call at a time"):
            model(x)
    finally:
        go.set()
        thread.join()
    run(model, [edited(x)], stream)


def test_inference_mode_and_back():
    model, frames = net(), frames_of(image(), 6)
    with torch.inference_mode():
        stream = run(model, frames[:3])
        with stream:
            model(frames[3]).add_(1)
    run(model, frames[3:], stream)
    with torch.inference_mode():
        run(model, [f.clone() for f in frames], stream)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(dtype, inside):
    def cast(m, x):
        with torch.autocast("cpu", dtype, inside):
            y = m.c(x)
        return F.relu(m.norm(m.d(F.silu(m.group(y.float())) + x.mean())))

    layers = {"c": nn.Conv2d(3, 4, 3, padding=1), "d": nn.Conv2d(4, 4, 3, padding=1)}
    model = model_of(cast, **layers, norm=nn.BatchNorm2d(4), group=nn.GroupNorm(2, 4))
    stream, outside = dynops.Stream(), contextlib.nullcontext() if inside else torch.autocast("cpu", dtype)
    frames = frames_of(image(), 7)
    for frame in frames:
        with outside:
            with stream:
                y = model(frame)
            dense = model(frame)
        assert y.dtype == dense.dtype and (y - dense).norm() < 2e-2 * dense.norm()
    if not inside:
        with warned("autocast changed"), stream:
            y = model(frame)
        torch.testing.assert_close(y, model(frame))


def test_nothing_changes_outside_of_a_stream_or_of_incremental():
    model, x = net(), image()
    keys, y = list(model.state_dict()), model(x)
    dynops.incremental_(model)
    dynops.revert_(model)
    assert list(model.state_dict()) == keys and torch.equal(model(x), y)
    with pytest.warns(UserWarning, match="incremental_"), dynops.Stream():
        assert torch.equal(model(x), y)
    for bad in (3, torch.jit.trace(nn.ReLU(), x)):
        with pytest.raises(TypeError, match=r"^model: expected"):
            dynops.incremental_(bad)
    assert_dense(model(x), model, x)
