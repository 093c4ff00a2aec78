"""What ``dynops.active`` holds for: threads, tasks and generators that take turns."""

import asyncio
import contextlib
import gc
import threading

import pytest
import torch
from torch import nn

import dynops
from dynops import context
from dynops.scope import Scope

CONV = nn.Conv2d(3, 4, 3, padding=1)
SPARSE = dynops.nn.SparseConv2d.from_dense(CONV)
X = torch.randn(1, 3, 9, 8, generator=torch.Generator().manual_seed(0))


def mask(seed: int) -> torch.Tensor:
    return torch.rand(1, 9, 8, generator=torch.Generator().manual_seed(seed)) < 0.4


MASKS = [mask(i) for i in range(4)]


@torch.no_grad()
def sees(index: int | None, layer=SPARSE) -> bool:
    """Whether the layer computes the pixels of that mask, or everything."""
    out = layer(X)
    dense = CONV(X)
    return torch.allclose(out, dense if index is None else dense * MASKS[index], atol=1e-5)


def steps(index: int):
    """A generator that tells at each step whether it has its own mask."""
    with dynops.active(MASKS[index]):
        yield sees(index)
        yield sees(index)
    yield sees(None)


def test_generators_take_turns():
    a, b = steps(0), steps(1)
    for _ in range(2):
        assert next(a) and sees(None) and next(b) and sees(None)
    assert next(a) and next(b) and sees(None)
    assert context._scope.values() == ()


def test_generators_inside_a_context():
    a, b = steps(0), steps(1)
    assert next(a)
    with dynops.active(MASKS[2]):
        assert sees(2) and next(a) and sees(2) and next(b) and sees(2)
        assert next(b) and sees(2)
        assert not next(a)  # it has left its own: the mask is its caller's
        assert sees(2)
    assert sees(None)


def test_a_generator_that_runs_another():
    def outer():
        inner = steps(1)
        assert next(inner)
        with dynops.active(MASKS[0]):
            yield sees(0)
            yield next(inner) and sees(0)
            with dynops.active(MASKS[2]):
                yield sees(2)
            yield sees(0)

    assert all(outer()) and sees(None)


def test_delegation_and_helpers():
    def helper(index):
        with dynops.active(MASKS[index]):
            return sees(index)

    def outer():
        with contextlib.ExitStack() as stack:
            stack.enter_context(dynops.active(MASKS[0]))
            yield sees(0)
            yield helper(3) and sees(0)
            yield from (good for good in list(steps(1))[:2])
            yield sees(0)

    generator = outer()
    for good in generator:
        assert good and sees(None)


def test_a_generator_that_is_left_or_thrown_away():
    a, b = steps(0), steps(1)
    assert next(a) and next(b)
    a.close()
    assert next(b) and sees(None)
    del b
    gc.collect()
    assert sees(None) and not context._scope._eager.now


@contextlib.contextmanager
def managed(index):
    with dynops.active(MASKS[index]):
        yield


@pytest.fixture
def fixture():
    with dynops.active(MASKS[3]):
        yield


def test_context_managers_hand_it_to_their_caller(fixture):
    assert sees(3)
    with managed(1):
        assert sees(1)
        with managed(2):
            assert sees(2)
        assert sees(1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(managed(1))
        assert sees(1)
    assert sees(3)


def test_context_managers_inside_generators():
    def managed_steps(index):
        with managed(index):
            yield sees(index)
            yield sees(index)

    a, b = managed_steps(0), managed_steps(1)
    for _ in range(2):
        assert next(a) and sees(None) and next(b) and sees(None)


def test_an_object_that_keeps_it_open():
    class Session:
        def __enter__(self):
            self.held = dynops.active(MASKS[0])
            self.held.__enter__()

        def __exit__(self, *error):
            self.held.__exit__(*error)

    with Session():
        assert sees(0)
    assert sees(None)


def test_exits_in_another_order():
    a, b = dynops.active(MASKS[0]), dynops.active(MASKS[1])
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert sees(1)
    b.__exit__(None, None, None)
    assert sees(None)
    b.__exit__(None, None, None)  # nothing is left to be taken away


def test_one_context_in_two_generators():
    shared = dynops.active(MASKS[0])

    def run():
        with shared:
            yield sees(0)
            yield sees(0)
        yield sees(None)

    a, b = run(), run()
    assert next(a) and next(b) and next(a) and next(a) and next(b) and next(b)


def test_tasks_take_turns():
    async def task(index):
        seen = [sees(2)]  # where it was made
        with dynops.active(MASKS[index]):
            for _ in range(3):
                seen.append(sees(index))
                await asyncio.sleep(0)
            seen.append(sees(index))
        return [*seen, sees(2)]

    async def main():
        with dynops.active(MASKS[2]):
            tasks = [asyncio.create_task(task(i)) for i in range(2)]
            await asyncio.sleep(0)
            assert sees(2)
        return await asyncio.gather(*tasks)

    assert all(all(seen) for seen in asyncio.run(main())) and sees(None)


def test_asynchronous_generators_and_managers():
    async def stream(index):
        with dynops.active(MASKS[index]):
            yield sees(index)
            await asyncio.sleep(0)
            yield sees(index)

    @contextlib.asynccontextmanager
    async def manager(index):
        with dynops.active(MASKS[index]):
            yield

    async def main():
        a, b = stream(0), stream(1)
        for _ in range(2):
            assert await anext(a) and sees(None) and await anext(b) and sees(None)
        async with manager(2):
            assert sees(2)
        return sees(None)

    assert asyncio.run(main())


def test_a_thread_begins_without_a_mask():
    seen = []
    with dynops.active(MASKS[0]):
        thread = threading.Thread(target=lambda: seen.append(sees(None)))
        thread.start()
        thread.join()
        assert sees(0)
    assert seen == [True]


def test_compiled_layers_see_the_same():
    compiled = torch.compile(SPARSE, fullgraph=True, backend="eager")

    def compiled_steps(index):
        with dynops.active(MASKS[index]):
            yield sees(index, compiled)
            yield sees(index, compiled)

    async def task(index):
        with dynops.active(MASKS[index]):
            good = sees(index, compiled)
            await asyncio.sleep(0)
            return good and sees(index, compiled)

    async def main():
        return await asyncio.gather(task(0), task(1))

    a, b = compiled_steps(0), compiled_steps(1)
    for _ in range(2):
        assert next(a) and sees(None, compiled) and next(b) and sees(None, compiled)
    assert all(asyncio.run(main())) and sees(None, compiled)


def test_entered_in_a_compiled_function_inside_a_context():
    @torch.compile(fullgraph=True, backend="eager")
    def run(x, inner):
        before = SPARSE(x)
        with dynops.active(inner):
            return before, SPARSE(x)

    with torch.no_grad():
        dense = CONV(X)
        for index in (None, 0, 1):
            with contextlib.nullcontext() if index is None else dynops.active(MASKS[index]):
                before, inside = run(X, MASKS[2])
                assert sees(index)
            torch.testing.assert_close(before, dense if index is None else dense * MASKS[index])
            torch.testing.assert_close(inside, dense * MASKS[2])


def test_a_graph_break_inside_the_block():
    def body(x):
        with dynops.active(MASKS[0]):
            y = SPARSE(x)
            torch._dynamo.graph_break()
            with dynops.active(MASKS[1]):
                torch._dynamo.graph_break()
                z = SPARSE(x)
            return y, z, SPARSE(x)

    with torch.no_grad():
        outs = torch.compile(body, backend="eager")(X)
        for out, expected in zip(outs, body(X), strict=True):
            torch.testing.assert_close(out, expected)
    assert sees(None)


def test_counters_count_their_own_task():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))

    async def count(calls):
        with dynops.budget.MacCounter(model) as counter:
            for _ in range(calls):
                model(X)
                await asyncio.sleep(0)
        return float(counter.total)

    async def main():
        return await asyncio.gather(count(1), count(3))

    one, three = asyncio.run(main())
    assert three == 3 * one > 0


def test_a_scope_has_no_value_where_nothing_was_entered():
    scope = Scope("test")
    assert scope.innermost() is None and scope.values() == ()
    with scope.only(("a", "b")):
        assert scope.innermost() == "b" and scope.values() == ("a", "b")
        with scope.only(()):
            assert scope.innermost() is None
    assert scope.values() == ()
