"""The pool of processes: a task whose process was killed at once is one that was lost, not one that was never begun.

A process says that it has begun a task before it runs it. One that is killed within a millisecond may be found dead
before that word is read. Celery then hands the task to another process, as if it had only been on its way: no crash is
counted, and a task that kills its process each time goes on and on.
"""

from __future__ import annotations

import signal
import time
from typing import Any

from billiard.pool import EX_RECYCLE
from celery.concurrency import prefork
from celery.concurrency.asynpool import AsynPool

__all__ = ["ProcessPool"]

# What a process ends with that was asked to, or had run as many tasks as it may.
_IN_ORDER = (None, 0, EX_RECYCLE, -signal.SIGTERM)


class _Pool(AsynPool):
    """Celery's, which tells a process that was killed from one that has ended."""

    def on_partial_read(self, job: Any, proc: Any) -> None:
        """End a task that was written to a process that is gone; Celery's hook."""
        super().on_partial_read(job, proc)
        if proc.exitcode in _IN_ORDER or job not in self.outbound_buffer:
            return
        self.outbound_buffer.remove(job)
        job._ack(None, time.time(), proc.pid, None)  # else the pool waits for the word of the one that is gone
        self.mark_as_worker_lost(job, proc.exitcode)


class ProcessPool(prefork.TaskPool):
    """Celery's prefork pool, with the above."""

    Pool = _Pool
