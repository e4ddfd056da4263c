"""What the workers of test_retry_restarts.py run: a task that fails until its last attempt, and says when."""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery.signals import worker_ready

from qbridge import Bridge, Retry, TaskContext
from qbridge.testing.contracts.kit import READY

bridge = Bridge()


@worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def say_ready(sender: object = None, **rest: object) -> None:
    """Tell the test that this worker consumes."""
    Path(os.environ[READY]).write_text(str(getattr(sender, "hostname", "worker")))


@bridge.task(
    name="retry.steady",
    context=True,
    retry=Retry(on=OSError, attempts=5, wait_initial=1, wait_exp_base=2, wait_max=4, wait_jitter=0),
)
def steady(ctx: TaskContext, path: str) -> int:
    """Fail four times."""
    with Path(path).open("a") as file:
        file.write(f"{ctx.attempt} {time.time()}\n")
    if not ctx.is_last_attempt:
        raise OSError(f"attempt {ctx.attempt}")
    return ctx.attempt
