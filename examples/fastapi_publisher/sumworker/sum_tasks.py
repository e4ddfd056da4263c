"""The worker project: it has the task that the web project declares."""

from __future__ import annotations

from qbridge import Bridge

bridge = Bridge()
app = bridge.celery


@bridge.task(name="sums.add", queue="sum-queue")
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b
