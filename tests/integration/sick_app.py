"""What the workers of test_watchdog.py run: one that falls ill on demand."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from celery.signals import worker_ready

from qbridge import Bridge
from qbridge.testing.contracts.kit import READY

bridge = Bridge()

ILLNESS = os.environ.get("ILLNESS", "")


@worker_ready.connect(weak=False)  # type: ignore[untyped-decorator]  # celery has no types
def fall_ill(sender: Any = None, **rest: object) -> None:
    """Tell the test that this worker consumes, and fall ill."""
    Path(os.environ[READY]).write_text(str(sender.hostname))
    if ILLNESS == "loop":  # a call in the loop that does not come back
        sender.hub.call_later(0.2, time.sleep, 600)
    if ILLNESS == "delivery":  # the server forgets the consumer, and the worker does not know
        consumer = sender.task_consumer
        for tag in dict(consumer._active_tags).values():
            consumer.channel.basic_cancel(tag)


@bridge.task(name="sick.add")
def add(a: int, b: int) -> int:
    """Show that a worker is well."""
    return a + b
