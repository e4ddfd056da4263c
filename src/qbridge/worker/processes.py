"""The pool of processes: a task whose process was killed at once is one that was lost, not one that was never begun.

A process says that it has begun a task before it runs it. One that is killed within a millisecond may be found dead
before that word is read. Celery then hands the task to another process, as if it had only been on its way: no crash is
counted, and a task that kills its process each time goes on and on.

A process that takes another's place is forked from a parent that is at work by then: it lets go of what the first ones
never had, and the parent lets go of what it had of the one that is gone.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import Any

from billiard.pool import EX_RECYCLE
from celery.concurrency import prefork
from celery.concurrency.asynpool import AsynPool

from qbridge.backends.forking import begin_anew_after_fork

__all__ = ["ProcessPool"]

# What a process ends with that was asked to, or had run as many tasks as it may.
_IN_ORDER = (None, 0, EX_RECYCLE, -signal.SIGTERM)

# Seconds until a process can be reaped whose files are closed: some microseconds, more on a busy machine.
_MOMENT = 0.1


class _Pool(AsynPool):
    """Celery's, which tells a process that was killed from one that has ended."""

    on_process_down: Any
    _loop: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        begin_anew_after_fork(self)  # before the first processes are made
        super().__init__(*args, **kwargs)

    def register_with_event_loop(self, hub: Any) -> None:
        """Begin to work in an event loop; Celery calls it at each start of the consumer."""
        super().register_with_event_loop(hub)
        self._loop = hub

    def _create_process_handlers(self, hub: Any) -> None:
        super()._create_process_handlers(hub)
        down = self.on_process_down

        def on_process_down(proc: Any) -> None:
            down(proc)
            # Celery skips this for one that it found dead with a task on its way: it stayed open for ever
            self._untrack_child_process(proc, hub)

        self.on_process_down = on_process_down

    def _event_process_exit(self, hub: Any, proc: Any) -> None:
        """Reap a process whose pipe says that it has ended, now or in a moment.

        Its files close before the system lets it be reaped; Celery looks again after five seconds.
        """
        super()._event_process_exit(hub, proc)
        if proc in self._pool:
            hub.call_later(_MOMENT, self.maintain_pool)

    def _track_child_process(self, proc: Any, hub: Any) -> None:
        """Watch for a process's end, also if it was told already and the process could not be reaped at that moment.

        Celery ends the worker at its next connection then: it takes the None of one that is watched no longer for
        something to watch.
        """
        if getattr(proc, "_sentinel_poll", 0) is None:
            del proc._sentinel_poll
        super()._track_child_process(proc, hub)

    def after_fork(self) -> None:
        """In a new process: close what belongs to the parent's event loop and to the other processes.

        One that takes another's place is forked from a parent that has all of that, and is to have no more than the
        first ones had.
        """
        processes: list[Any] = list(getattr(self, "_pool", ()))
        if not processes or processes[-1]._popen is not None:
            return  # not a process of the pool: something else has forked
        *others, me = processes
        for process in others:
            if process._popen is not None:
                process._popen.close()
            watched = getattr(process, "_sentinel_poll", None)  # the loop's copy of the pipe by which it sees its end
            if watched is not None:
                with suppress(OSError):
                    os.close(watched)
                process._sentinel_poll = None
        pipes: dict[Any, Any] = self._queues
        for queues, owner in pipes.items():
            if owner is not me:
                for queue in filter(None, queues):
                    for end in (queue._reader, queue._writer):
                        end.close()
        # kombu closes what wakes the loop only where a child runs the loop itself
        waker = getattr(self._loop, "_waker", None)
        if waker is not None:
            waker.close()
            self._loop._waker = None

    def on_partial_read(self, job: Any, proc: Any) -> None:
        """End a task that was written to a process that is gone; Celery's hook."""
        super().on_partial_read(job, proc)
        # Celery has closed its pipes by now, and goes on to list this one by number: at the next start of the consumer
        # the loop would read as results whatever has that number by then, and hang in a socket to Redis, say.
        if self._fileno_to_outq.get(proc.outqR_fd) is proc:
            del self._fileno_to_outq[proc.outqR_fd]
        if proc.exitcode in _IN_ORDER or job not in self.outbound_buffer:
            return
        self.outbound_buffer.remove(job)
        job._ack(None, time.time(), proc.pid, None)  # else the pool waits for the word of the one that is gone
        self.mark_as_worker_lost(job, proc.exitcode)


class ProcessPool(prefork.TaskPool):
    """Celery's prefork pool, with the above."""

    Pool = _Pool
