"""Runs things in threads and in fresh interpreters, for tests of all floors."""

import contextlib
import os
import pathlib
import subprocess
import sys
import textwrap
import threading

import torch

import dynops
from dynops import backends

ROOT = pathlib.Path(dynops.__file__).parent


def run_script(script: str, timeout: float = 60, **env) -> str:
    """Runs a script in a fresh interpreter that finds this dynops; returns what it printed."""
    path = os.pathsep.join(str(p) for p in (ROOT.parent, os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def in_threads(count: int, work) -> None:
    """Runs ``work(i)`` in ``count`` threads that start together; raises the first error."""
    errors, start = [], threading.Barrier(count)

    def body(i):
        try:
            start.wait()
            work(i)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextlib.contextmanager
def torch_threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same_on_any_threads(run, counts=(1, 2, 3)) -> None:
    """``run()``, a tensor or a list of them, has the same bits whatever the number of threads."""
    results = []
    for count in counts:
        with torch_threads(count):
            out = run()
        results.append([out] if isinstance(out, torch.Tensor) else out)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def all_isas() -> list[str]:
    return [] if backends._C is None else list(dynops.build_info()["cpu_isas"])
