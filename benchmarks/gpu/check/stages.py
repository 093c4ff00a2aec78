"""Stages of the check: commands with a time limit, their outcomes, and the time that is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
GRACE = 6.0  # seconds of its limit in which an interrupted command may write what it has (pytest: its XML)


@dataclass
class Stage:
    """The outcome of one stage: ``passed``, ``failed`` or ``not run``, and the reason."""

    name: str
    outcome: str
    seconds: float
    detail: str = ""
    values: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return {**asdict(self), "seconds": round(self.seconds, 1)}

    def __str__(self) -> str:
        return f"{self.name}: {self.outcome} in {self.seconds:.0f} s. {self.detail}".rstrip()


class Clock:
    """The time that is left of a budget of seconds from now on, or from the time ``begun``."""

    def __init__(self, seconds: float, begun: float | None = None):
        self.end = (time.monotonic() if begun is None else begun) + seconds

    @property
    def left(self) -> float:
        return max(self.end - time.monotonic(), 0.0)


@dataclass(frozen=True)
class Finished:
    """A command that ended, or was ended."""

    code: int
    timed_out: bool
    seconds: float
    text: str  # its output, both streams

    @property
    def ok(self) -> bool:
        return self.code == 0 and not self.timed_out

    def why(self, limit: float) -> str:
        """The reason why it is not ``ok``, with the last line that it wrote."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        reason = f"no end within {limit:.0f} s" if self.timed_out else f"exit code {self.code}"
        return f"{reason}: {lines[-1][:300]}" if lines else reason


def run(
    command: list[str],
    seconds: float,
    log: Path,
    folder: Path,
    watch: Callable[[], object] = int,
    **environment: str,
) -> Finished:
    """Runs a command in ``folder`` with its output in ``log``, and calls ``watch`` every second.

    It is interrupted shortly before the end of ``seconds``, and killed at their end with its children. It is a process of
    its own, so that neither a hang nor a device that was lost in it reaches the next one.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    end = begun + seconds
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        except OSError as error:
            return Finished(127, False, 0.0, str(error))
        timed_out = not _ended(process, end - min(GRACE, seconds / 2), watch)
        if timed_out:
            _stop(process, end)
    text = log.read_text(errors="replace")
    return Finished(process.returncode, timed_out, time.monotonic() - begun, text)


def _ended(process: subprocess.Popen, end: float, watch: Callable[[], object] = int) -> bool:
    """True where the process ends before the time ``end``."""
    try:
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(left, 1.0))
                return True
            watch()
    except BaseException:  # the check itself is interrupted
        _signal(process, signal.SIGKILL)
        raise
    return process.poll() is not None


def _stop(process: subprocess.Popen, end: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        # the command alone: its children would tell it of errors that are none
        process.send_signal(signal.SIGINT)
    _ended(process, end)
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
