"""The tasks of the package. Configuration comes from the environment: QBRIDGE_BROKER, QBRIDGE_RESULTS."""

from __future__ import annotations

import time

from qbridge import Bridge

bridge = Bridge()
app = bridge.celery


@bridge.task
def slow_sum(numbers: list[int], seconds: float = 5.0) -> int:
    """Add numbers, slowly."""
    time.sleep(seconds)
    return sum(numbers)
