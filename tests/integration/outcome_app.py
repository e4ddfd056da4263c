"""What the workers of test_results_away.py run: a task that ends when the test says so."""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery.signals import worker_ready

from qbridge import Bridge
from qbridge.testing.contracts.kit import READY
from qbridge.testing.waiting import wait_until

bridge = Bridge()


@worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def say_ready(sender: object = None, **rest: object) -> None:
    """Tell the test that this worker consumes."""
    Path(os.environ[READY]).write_text(str(getattr(sender, "hostname", "worker")))


@bridge.task(name="outcome.tell")
def tell(path: str) -> str:
    """Note the run, and end when the test has stopped the result server."""
    with Path(path).open("a") as file:
        file.write(f"{time.time()}\n")
    wait_until(Path(os.environ["ENDING_WHILE"]).exists, 60, what="the test to go on")
    return "told"
