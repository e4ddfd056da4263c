"""Who removes results that have expired from a database? Each worker, now and then; plain Celery needs beat for it."""

from __future__ import annotations

import random
import threading
from typing import Any

from celery.utils.log import get_logger

__all__ = ["Cleanup"]

logger = get_logger(__name__)


class Cleanup:
    """Has the result backend of one worker remove what has expired, in a thread.

    Where there are many workers, each does so, at times that chance spreads: what one has removed costs the next a
    look at an index.

    Args:
        app: of the worker; a backend whose server forgets by itself has no ``cleanup_interval``.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._interval: float | None = getattr(app.backend, "cleanup_interval", None)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._failing = False

    def start(self) -> None:
        """Begin, unless that was done."""
        if self._interval is None or self._thread is not None:
            return
        self._thread = threading.Thread(target=self._run, args=(self._interval,), name="qbridge-cleanup", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Do not begin another removal."""
        self._stopped.set()

    def _run(self, interval: float) -> None:
        wait = random.uniform(0, interval)  # noqa: S311 - workers of one deployment start together
        while not self._stopped.wait(wait):
            self._remove()
            wait = interval * random.uniform(0.9, 1.1)  # noqa: S311 - and would stay together

    def _remove(self) -> None:
        try:
            self._app.backend.cleanup()
        except Exception as error:  # noqa: BLE001 - whatever a driver raises: there is a next time
            say = logger.debug if self._failing else logger.warning
            self._failing = True
            say(
                "Cannot remove expired results from %s: %s. It is tried again; a worker whose account may not delete "
                "needs results.cleanup_interval=None.",
                self._app.backend.as_uri(), error,
            )  # fmt: skip
        else:
            self._failing = False
