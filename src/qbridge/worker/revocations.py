"""Which tasks are revoked, of those that the result backend remembers? A worker knows all of them.

Celery's own set forgets: above 50,000 ids it drops the oldest, and those that are older than three hours.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta

from qbridge.backends.claims import REVOKED_FOR

__all__ = ["Revocations"]


class Revocations:
    """Ids of revoked tasks, each for as long as its task may come.

    Args:
        expires: for how long results are kept, and revocations with them if that is longer; a number is seconds.
    """

    def __init__(self, expires: float | timedelta | None = None) -> None:
        kept = expires.total_seconds() if isinstance(expires, timedelta) else expires or 0.0
        self._keep = max(REVOKED_FOR, kept)
        self._learnt: dict[str, float] = {}  # when; the oldest first

    def __contains__(self, task_id: object) -> bool:
        return task_id in self._learnt

    def learn(self, ids: Iterable[str]) -> None:
        """Add ids, and forget what is too old; one thread does this, others look meanwhile.

        Args:
            ids: of tasks.
        """
        now = time.monotonic()
        for task_id in ids:
            self._learnt.pop(task_id, None)
            self._learnt[task_id] = now
        while self._learnt:
            task_id, learnt = next(iter(self._learnt.items()))
            if now - learnt <= self._keep:
                return
            del self._learnt[task_id]
