"""Does this run still count? Another may have begun after it, or the task may have succeeded already.

A message is delivered again when its worker was taken for dead. Then two runs of a task may go on at once, and the
later one counts: what the older one brings is not stored, and no attempt follows it. For that the later run has left a
claim. A first delivery leaves none and asks for none, but for a run that is long enough to have been taken for dead.
"""

from __future__ import annotations

import time
from typing import Any

from celery import states
from celery.exceptions import Ignore
from celery.utils.log import get_task_logger

from qbridge.backends.claims import ANYBODY, Claim, ClaimStore, Wanted, claim_store
from qbridge.exceptions import TaskRevoked, UnsupportedFeature

__all__ = ["AGAIN", "HEADER_ONCE", "HOLDER", "TOKEN", "WAITED", "Standing", "comes_again"]

logger = get_task_logger(__name__)

HOLDER, TOKEN = "holder", "token"
"""In the ``delivery_info`` of a request: who runs it, where claims are kept; the token of a claim made before."""

AGAIN = "qbridge_again"
"""Message header of a copy that counts as delivered again; ``WAITED``: that has waited once."""

WAITED = "waited"

HEADER_ONCE = "qbridge_once"
"""Message header of what was sent under a key: there may be two messages of it on any broker."""

_LONG = 1.0
"""Seconds after which a run may have been taken over: before, whoever has a copy of the message waits."""
_LOOK = 0.5
"""Seconds between two looks at whether a running task was revoked."""
_ATTEMPT = 2**20
"""Tokens for each attempt, where the broker's counts are all there is."""


def comes_again(info: Any, headers: Any) -> bool:
    """Return whether a message was delivered before.

    Args:
        info: its ``delivery_info``.
        headers: its headers.
    """
    return bool((info or {}).get("redelivered")) or AGAIN in (headers or {})


class Standing:
    """Where one run stands among the runs of its task.

    Args:
        task: the Celery task.
        request: of the run.
    """

    __slots__ = ("_began", "_info", "_look_after", "_request", "_task", "_token", "again", "holder")

    def __init__(self, task: Any, request: Any) -> None:
        self._began = time.monotonic()
        self._task = task
        self._request = request
        info = request.delivery_info or {}
        self._info = info
        self.holder: str = info.get(HOLDER) or ""
        self.again: bool = comes_again(info, request.headers)
        self._token: int | None = info.get(TOKEN)
        self._look_after = self._began
        if self.again and self.holder and self._token is None:
            self.holder = f"{self.holder}/{self._deliveries}"

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._began

    @property
    def _deliveries(self) -> int | None:
        counts = [(self._request.headers or {}).get(name) for name in ("x-acquired-count", "x-delivery-count")]
        return max((count for count in counts if isinstance(count, int)), default=None)

    def _store(self) -> ClaimStore | None:
        return claim_store(self._task.backend) if self.holder else None

    def begin(self) -> None:
        """Claim the run of a message that was delivered before; others leave no trace.

        Raises:
            celery.exceptions.Ignore: if the task has succeeded: the message is acknowledged without a run.
        """
        if not self.again:
            return
        store = self._store()
        if store is None:
            return
        try:
            if self._token is None:
                self._claim(store)
            ended = not self._task.ignore_result and self._task.backend.get_state(self._request.id) == states.SUCCESS
        except Exception as error:  # noqa: BLE001 - whatever a driver raises: to run is the promise
            logger.warning("Cannot see whether task %s has run already: %s", self._request.id, error)
            return
        if ended:
            logger.info("Task %s came again although it has succeeded; it is not run", self._request.id)
            raise Ignore

    def _claim(self, store: ClaimStore) -> Claim:
        # The lease on a claim of a running task is its worker's business, which renews it where that matters.
        wanted = Wanted(str(self._request.id), self.holder, 0.0, running=self.elapsed, over=ANYBODY)
        (claim,) = store.take("run", [wanted])
        if claim.holder == self.holder:
            self._token = claim.token
        return claim

    def end(self) -> None:
        """Refuse the outcome of a run that was taken over.

        Raises:
            celery.exceptions.Ignore: if another run has begun after this one.
        """
        elapsed = self.elapsed
        if not (self.again or elapsed > _LONG):
            return
        store = self._store()
        if store is None:
            return
        try:
            claim = store.look("run", str(self._request.id))
        except Exception as error:  # noqa: BLE001 - whatever a driver raises: a run that cannot be judged counts
            logger.warning("Cannot see whether task %s was taken over: %s", self._request.id, error)
            return
        if claim is not None and claim.holder != self.holder and claim.age < elapsed:
            logger.warning(
                "Task %s was taken over by another worker while it ran here, for %.1f s; what this run brought is not "
                "stored. Was this worker stopped, or cut off?", self._request.id, elapsed,
            )  # fmt: skip
            raise Ignore

    def token(self) -> int:
        """Return a number that is larger than that of every run of this task that began before.

        Raises:
            TaskRevoked: if another run has begun after this one.
            UnsupportedFeature: if neither the result backend nor the broker can tell.
        """
        if self._token is None:
            store = self._store()
            if store is None:
                self._token = self._counted()
            else:
                claim = self._claim(store)
                if claim.holder != self.holder:
                    task_id = str(self._request.id)
                    raise TaskRevoked(f"task {task_id} was taken over by another worker while it ran", "", task_id)
        return self._token or 0

    def _counted(self) -> int:
        deliveries = self._deliveries
        if self.again and deliveries is None:
            raise UnsupportedFeature(
                "a fencing token needs Redis or database results, or a broker that counts deliveries",
                "Set results to redis:// or a database, or use a quorum queue.",
            )
        return int(self._request.retries or 0) * _ATTEMPT + (deliveries or 0) + 1

    def is_revoked(self) -> bool:
        """Return whether the task was revoked; asks the result backend, at most twice a second."""
        now = time.monotonic()
        if now < self._look_after:
            return False
        self._look_after = now + _LOOK
        store = self._store()
        if store is None:
            return False
        try:
            return store.is_revoked(str(self._request.id))
        except Exception as error:  # noqa: BLE001 - whatever a driver raises: the task goes on
            logger.warning("Cannot see whether task %s was revoked: %s", self._request.id, error)
            return False
