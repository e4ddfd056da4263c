"""How does a test have something happen a moment later, in another thread, and not after it is over?"""

from __future__ import annotations

import threading
from typing import Any

__all__ = ["acted", "later"]

_acting: list[threading.Timer] = []


def later(seconds: float, act: Any, *args: Any) -> None:
    """Act in another thread, some time from now."""
    timer = threading.Timer(seconds, act, args)
    _acting.append(timer)
    timer.start()


def acted() -> None:
    """Wait for all that was to happen: what still stores when its test is over would fail in the next."""
    while _acting:
        _acting.pop().join(10)
