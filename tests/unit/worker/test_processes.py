"""Which tasks of a process that is gone were lost, and which were only on their way to it?

How it comes to that cannot be had on demand: the process has to die between its word that it begins and the moment at
which the parent, woken by a timer, reads it. On a busy machine it was one of some dozens.
"""

from __future__ import annotations

import os
import signal
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.pool import EX_RECYCLE
from celery.concurrency.asynpool import AsynPool

from qbridge.worker.processes import _Pool


class Job:
    """What the pool knows of a task."""

    _job = 1

    def __init__(self) -> None:
        self.acked_by: list[int] = []
        self.ended: list[bool] = []

    def _ack(self, number: Any, moment: float, pid: int, fd: Any) -> None:
        self.acked_by.append(pid)

    def _set(self, number: Any, value: tuple[bool, Any]) -> None:
        self.ended.append(value[0])


@pytest.mark.parametrize(
    ("exitcode", "lost"),
    [
        (-signal.SIGKILL, True),
        (-signal.SIGSEGV, True),
        (1, True),
        (0, False),
        (EX_RECYCLE, False),
        (-signal.SIGTERM, False),
        (None, False),
    ],
)
def test_a_task_of_a_killed_process_is_lost(exitcode: int | None, lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a process that has ended in good order goes to another, and counts as never begun."""
    pool: Any = object.__new__(_Pool)
    pool.outbound_buffer = deque()
    monkeypatch.setattr(AsynPool, "on_partial_read", lambda self, job, proc: self.outbound_buffer.appendleft(job))
    job = Job()
    pool.on_partial_read(job, SimpleNamespace(exitcode=exitcode, pid=7))
    assert (list(pool.outbound_buffer), job.acked_by, job.ended) == (([], [7], [False]) if lost else ([job], [], []))
    pool.outbound_buffer.clear()


def test_a_task_that_had_begun_is_celerys_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not put back, and counted where Celery counts it."""
    pool: Any = object.__new__(_Pool)
    pool.outbound_buffer = deque()
    monkeypatch.setattr(AsynPool, "on_partial_read", lambda self, job, proc: None)
    job = Job()
    pool.on_partial_read(job, SimpleNamespace(exitcode=-9, pid=7))
    assert (job.acked_by, job.ended) == ([], [])


def test_the_end_of_a_process_is_watched_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery forgets one that it finds dead with a task on its way: each left a descriptor open in the worker."""
    pool: Any = object.__new__(_Pool)
    pool.outbound_buffer = deque()
    monkeypatch.setattr(AsynPool, "on_partial_read", lambda self, job, proc: None)
    removed: list[int] = []
    pool._loop = SimpleNamespace(remove=removed.append)
    watched, other = os.pipe()
    pool.on_partial_read(Job(), process := SimpleNamespace(exitcode=-9, pid=7, _sentinel_poll=watched))
    pool.on_partial_read(Job(), process)  # and once only: its number may be another's by then
    assert removed == [watched]
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(watched)
    os.close(other)
