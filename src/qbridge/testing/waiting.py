"""How does a test wait: on a condition, with a deadline, never on the clock?"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["wait_until"]

T = TypeVar("T")


def wait_until(
    condition: Callable[[], T], timeout: float = 10.0, *, what: str = "the condition", interval: float = 0.02
) -> T:
    """Call ``condition`` until it returns something true, and return that.

    Args:
        condition: looked at again and again; what it raises is raised here at once.
        timeout: seconds until giving up; the condition is looked at once more at the very end.
        what: names the condition in the error.
        interval: seconds between two looks; grows to ten times that while waiting.

    Returns:
        The first true value of ``condition``.

    Raises:
        TimeoutError: if the condition is still false after ``timeout`` seconds; shows its last value.
    """
    deadline = time.monotonic() + timeout
    pause = interval
    while True:
        last_look = time.monotonic() >= deadline
        value = condition()
        if value:
            return value
        if last_look:
            raise TimeoutError(f"waited {timeout:g} s for {what}; last seen: {value!r}")
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(pause * 1.2, interval * 10)
