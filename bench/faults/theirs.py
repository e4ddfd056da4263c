"""The same task on plain Celery, with its defaults or with ``acks_late``; imports nothing of qbridge."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery
from celery.signals import worker_ready

from bench.faults.recorder import Again
from bench.faults.work import do, say_ready
from bench.faults.workload import ATTEMPTS, QUEUE, TASK

__all__ = ["app", "work"]

app = Celery("faults", broker=os.environ["FAULTS_BROKER"], backend=os.environ["FAULTS_RESULTS"])
app.conf.task_default_queue = QUEUE
if os.environ["FAULTS_SYSTEM"] == "celery-late":
    app.conf.task_acks_late = True


@app.task(name=TASK, bind=True, max_retries=ATTEMPTS - 1)  # type: ignore[untyped-decorator]  # celery has no types
def work(self: Any, number: int, pieces: int = 0, pause: float = 0.0, failures: int = 0) -> int:
    """Run one attempt."""
    attempt = self.request.retries + 1
    try:
        return do(number, attempt, pieces, pause, failures)
    except Again as error:
        raise self.retry(exc=error, countdown=min(2.0, 0.5 * 2 ** (attempt - 1))) from error


@worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]
def _say_ready(sender: Any = None, **_: Any) -> None:
    say_ready(str(sender.hostname))
