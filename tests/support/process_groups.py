"""Processes with a gloo group for tests: they live on from test to test, as starting one takes seconds."""

import datetime
import os
import pathlib
import queue
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 60  # seconds, of a test and of a collective that waits for a rank that failed


def _serve(rank: int, ranks: int, store: str, tasks, results) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty is NaN then
    limit = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=limit)
    while (task := tasks.get()) is not None:
        function, arguments = task
        try:
            torch.manual_seed(0)
            function(*arguments)
            dist.barrier()
            results.put((rank, None))
        except BaseException:
            results.put((rank, traceback.format_exc()))
    dist.destroy_process_group()


class Processes:
    """``ranks`` processes in one gloo group. ``run(function, *arguments)`` calls a function of ``modules`` on all of them."""

    def __init__(self, ranks: int, folder: pathlib.Path, *modules: str):
        self.ranks, self.folder, self.modules, self.started = ranks, folder, list(modules), 0
        self.workers: list = []

    def start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(self.modules)  # import once, not in each process
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(
                "PYTHONPATH", os.pathsep.join(filter(None, sys.path))
            )  # where the server looks for them
            forkserver.ensure_running()
        self.started += 1
        store, self.results = str(self.folder / f"store{self.started}"), context.Queue()
        self.tasks = [context.Queue() for _ in range(self.ranks)]
        self.workers = [
            context.Process(target=_serve, args=(rank, self.ranks, store, tasks, self.results), daemon=True)
            for rank, tasks in enumerate(self.tasks)
        ]
        for worker in self.workers:
            worker.start()

    def run(self, function: Callable, *arguments) -> None:
        """Raises the first failure; the processes then are started anew for the next test, as the group is broken."""
        if not self.workers:
            self.start()
        for tasks in self.tasks:
            tasks.put((function, arguments))
        for _ in range(self.ranks):
            try:
                rank, failure = self.results.get(timeout=TIMEOUT)
            except queue.Empty:
                rank, failure = "some", f"no answer in {TIMEOUT} seconds"
            if failure is not None:
                self.stop(kill=True)
                raise AssertionError(f"rank {rank} of {self.ranks}:\n{failure}")

    def stop(self, kill: bool = False) -> None:
        for worker, tasks in zip(self.workers, self.tasks if self.workers else [], strict=True):
            if kill:
                worker.kill()
            else:
                tasks.put(None)
        for worker in self.workers:
            worker.join(TIMEOUT)
        self.workers = []
