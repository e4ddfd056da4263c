"""What the workers of test_hard_ends.py run: tasks that end in ways that Celery takes for the end of the worker."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from billiard.exceptions import WorkerLostError
from celery.signals import worker_ready

from qbridge import Bridge
from qbridge.testing.contracts.kit import READY

bridge = Bridge()


@worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def say_ready(sender: object = None, **rest: object) -> None:
    """Tell the test that this worker consumes."""
    Path(os.environ[READY]).write_text(str(getattr(sender, "hostname", "worker")))


def note(path: str) -> None:
    """Say that a run began."""
    with Path(path).open("a") as file:
        file.write(f"{os.getpid()}\n")


class OwnBase(BaseException):
    """An exception that no ``except Exception`` sees."""


@bridge.task(name="hard.end")
def end(path: str, how: str) -> None:
    """End in one of the ways."""
    note(path)
    if how == "SystemExit":
        sys.exit("wrong usage")
    if how == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if how == "GeneratorExit":
        raise GeneratorExit
    if how == "MemoryError":
        raise MemoryError("Unable to allocate 7.28 TiB")
    if how == "CancelledError":
        raise asyncio.CancelledError
    if how == "BaseExceptionGroup":
        raise BaseExceptionGroup("both", [KeyboardInterrupt(), ValueError(1)])
    if how == "WorkerLostError":
        raise WorkerLostError("the worker of another task, which this one has waited for")
    raise OwnBase("mine")


@bridge.task(name="hard.async_end")
async def async_end(path: str, how: str) -> None:
    """The same in a coroutine; it may also stop the loop that it runs on."""
    note(path)
    await asyncio.sleep(0)
    if how == "SystemExit":
        sys.exit("wrong usage")
    if how == "KeyboardInterrupt":
        raise KeyboardInterrupt
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0)
    raise OSError("after the loop was stopped")


@bridge.task(name="hard.add")
async def add(a: int, b: int) -> int:
    """Show that the worker is well, and its event loop too."""
    await asyncio.sleep(0)
    return a + b
