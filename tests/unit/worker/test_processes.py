"""Which tasks of a process that is gone were lost, and which were only on their way to it?

How it comes to a lost one cannot be had on demand: the process has to die between its word that it begins and the
moment at which the parent, woken by a timer, reads it. On a busy machine it was one of some dozens.
"""

from __future__ import annotations

import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.pool import EX_RECYCLE
from celery.concurrency.asynpool import AsynPool
from kombu.asynchronous import Hub, get_event_loop, set_event_loop

from qbridge.testing.waiting import wait_until
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


def gone(exitcode: int | None) -> Any:
    """A process that has ended."""
    return SimpleNamespace(exitcode=exitcode, pid=7, outqR_fd=3)


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
    pool._fileno_to_outq = {}
    monkeypatch.setattr(AsynPool, "on_partial_read", lambda self, job, proc: self.outbound_buffer.appendleft(job))
    job = Job()
    pool.on_partial_read(job, gone(exitcode))
    assert (list(pool.outbound_buffer), job.acked_by, job.ended) == (([], [7], [False]) if lost else ([job], [], []))
    pool.outbound_buffer.clear()


def test_a_task_that_had_begun_is_celerys_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not put back, and counted where Celery counts it."""
    pool: Any = object.__new__(_Pool)
    pool.outbound_buffer = deque()
    pool._fileno_to_outq = {}
    monkeypatch.setattr(AsynPool, "on_partial_read", lambda self, job, proc: None)
    job = Job()
    pool.on_partial_read(job, gone(-9))
    assert (job.acked_by, job.ended) == ([], [])


@pytest.fixture
def loop() -> Iterator[Any]:
    """An event loop such as a worker has."""
    before = get_event_loop()
    set_event_loop(hub := Hub())
    yield hub
    hub.close()
    set_event_loop(before)


class Turning:
    """A pool of processes in an event loop, which turns while something is waited for."""

    def __init__(self, loop: Any, processes: int) -> None:
        self.loop = loop
        self.pool: Any = _Pool(processes=processes, threads=False)
        self.pool.register_with_event_loop(loop)
        self.until(lambda: len(self.pool._all_inqueues) == processes, "the processes to be up")

    def until(self, there: Callable[[], bool], what: str) -> None:
        def turn() -> bool:
            self.loop.run_once()
            return there()

        wait_until(turn, 20, what=what)

    def on_its_way(self) -> tuple[Any, Any]:
        """A task that was written to a process which has stopped, and that process."""
        for each in self.pool._pool:
            os.kill(each.pid, signal.SIGSTOP)
        job = self.pool.apply_async(int)
        self.until(lambda: job._write_to is not None and not self.pool._active_writes, "the task to be on its way")
        return job, job._write_to

    def connect_again(self) -> None:
        """What a worker does with its loop when its connection to the broker was lost."""
        self.loop.reset()
        set_event_loop(self.loop)
        self.pool.register_with_event_loop(self.loop)


@pytest.fixture
def of_processes(loop: Any) -> Iterator[Callable[[int], Turning]]:
    """Pools of so many processes, ended afterwards."""
    made: list[Turning] = []

    def make(processes: int) -> Turning:
        made.append(Turning(loop, processes))
        return made[-1]

    yield make
    for each in made:
        for process in each.pool._pool:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)  # one that has stopped hears nothing else
        each.pool.terminate()
        each.pool.join()


def test_nothing_stays_of_a_process_that_died_with_a_task_on_its_way(of_processes: Callable[[int], Turning]) -> None:
    """Celery leaves open what watches its end, and goes on to list its pipe of results by number.

    At the worker's next connection to a broker the loop read as results what had that number by then.
    """
    low = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]  # closed later, for the next pipes to have these numbers
    turning = of_processes(1)
    _, gone = turning.on_its_way()
    numbers = {gone.outqR_fd, gone._sentinel_poll}
    for each in low:
        os.close(each)
    os.kill(gone.pid, signal.SIGKILL)
    turning.until(lambda: gone not in turning.pool._pool and bool(turning.pool._all_inqueues), "another in its place")
    foreign: list[socket.socket] = []
    try:
        while not numbers <= {each.fileno() for each in foreign}:
            assert len(foreign) < 64, "a number is not free"
            foreign.extend(socket.socketpair())
        turning.connect_again()
        assert not numbers & set(turning.loop.readers)
    finally:
        for other in foreign:
            other.close()


def test_a_process_that_dies_while_another_is_reaped_does_not_end_the_worker(
    of_processes: Callable[[int], Turning],
) -> None:
    """Its task is looked after before itself; a connection lost at that moment ended the worker."""
    turning = of_processes(2)
    job, gone = turning.on_its_way()
    os.kill(gone.pid, signal.SIGKILL)
    wait_until(lambda: not gone._is_alive(), 10, what="the process to be gone")
    turning.pool.on_job_process_down(job, gone.pid)  # as Celery does for all tasks when it has reaped any process
    turning.connect_again()
    turning.until(lambda: gone not in turning.pool._pool, "the process to be reaped")
    assert gone._sentinel_poll is None


def test_a_process_whose_end_was_told_too_early_does_not_end_the_worker(of_processes: Callable[[int], Turning]) -> None:
    """Its files close before the system says that it has ended; a connection lost in between ended the worker."""
    turning = of_processes(1)
    (process,) = turning.pool._pool
    before = len(turning.loop.timer.queue)
    turning.pool._event_process_exit(turning.loop, process)  # of one that cannot be reaped yet
    assert process in turning.pool._pool
    assert len(turning.loop.timer.queue) == before + 1, "nobody looks again soon"
    turning.connect_again()
    os.kill(process.pid, signal.SIGKILL)
    turning.until(lambda: process not in turning.pool._pool, "the process to be reaped")
