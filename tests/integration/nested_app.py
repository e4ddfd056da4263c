"""What the worker of test_results_rpc_nested.py runs: a task that sends another one, whose result nobody waits for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery.signals import worker_ready

from qbridge import Bridge
from qbridge.testing.contracts.kit import READY

bridge = Bridge()


@worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def ready(sender: Any = None, **rest: object) -> None:
    """Tell the test that this worker consumes."""
    Path(os.environ[READY]).write_text(str(sender.hostname))


@bridge.task(name="nested.add")
def add(a: int, b: int) -> int:
    """Return the sum."""
    return a + b


@bridge.task(name="nested.fan")
def fan(number: int) -> int:
    """Send a task, and do not wait for it."""
    add.delay(number, 1)
    return number
