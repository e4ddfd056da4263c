"""What the workers of test_dead_letters_timed_out.py run: tasks that take longer than their hard time limit."""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery.signals import worker_ready

from qbridge import Bridge, Retry
from qbridge.testing.contracts.kit import READY

bridge = Bridge()


@worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def say_ready(sender: object = None, **rest: object) -> None:
    """Tell the test that this worker consumes."""
    Path(os.environ[READY]).write_text(str(getattr(sender, "hostname", "worker")))


def note_and_sleep(path: str, seconds: float) -> float:
    """Say that a run began, and sleep."""
    with Path(path).open("a") as file:
        file.write(f"{os.getpid()} {time.time()} \n")
    time.sleep(seconds)
    return seconds


@bridge.task(name="limits.tried", time_limit=1, retry=Retry(on=OSError, attempts=3, wait_initial=0.1))
def tried(path: str, seconds: float) -> float:
    """Be worth another attempt, for other errors."""
    return note_and_sleep(path, seconds)


@bridge.task(name="limits.plain", time_limit=1)
def plain(path: str, seconds: float) -> float:
    """Be a failure only."""
    return note_and_sleep(path, seconds)
