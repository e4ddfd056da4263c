"""One message of a typed task on its way through a worker: decoded once."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from celery.utils.log import get_logger
from celery.worker import state

from qbridge.backends.storing import OutcomeNotStored
from qbridge.due_by import deadline_of
from qbridge.exceptions import TaskFailed
from qbridge.standing import HOLDER, TOKEN
from qbridge.worker.running import AdoptingRequest

__all__ = ["TypedRequest"]

logger = get_logger(__name__)


class TypedRequest(AdoptingRequest):
    """Celery's request, which hands the pool the body that the strategy has read instead of bytes to read again.

    Without a content type the tracer takes the body as ``(args, kwargs, embed)``.
    """

    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(message, *args, **kwargs)
        due: datetime | None = deadline_of(message.headers)
        expires: Any = getattr(self, "expires")  # noqa: B009
        if due is not None and (expires is None or due < expires):
            # a task past its deadline is a task that has expired: not run, REVOKED
            self._expires = due
        app: Any = self._app
        if app.holder:
            info, came = self._delivery_info, message.delivery_info
            attempt = message.headers.get("retries")
            info[HOLDER] = came.get(HOLDER) or (f"{app.holder}-{attempt}" if attempt else app.holder)
            if TOKEN in came:
                info[TOKEN] = came[TOKEN]

    @property
    def body(self) -> Any:
        """The decoded body; of protocol 1 what Celery has made of it."""
        return self._body if self._decoded else self._message.payload

    @property
    def content_type(self) -> None:
        """None: nothing is left to decode."""
        return

    @property
    def content_encoding(self) -> None:
        """None: nothing is left to decode."""
        return

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """End a task that has failed; for a ``MemoryError`` too this task alone.

        Celery takes one for its own and ends the worker. It is the task's: an array too large to be had, say. The
        message stays unacknowledged, and so the next worker would run it, and end.
        A run whose outcome nobody has stored gives its message back; Celery acknowledges it.
        """
        error = getattr(exc_info.exception, "exc", exc_info.exception)  # what came from a child is wrapped
        if isinstance(error, OutcomeNotStored) and self.task.acks_late:
            logger.error("Task %s[%s] goes back to its queue: %s", self.name, self.id, error)
            state.task_ready(self)
            return self.reject(requeue=True)
        if isinstance(error, MemoryError):
            exc_info.exception = TaskFailed(
                type(error).__qualname__, str(error), str(exc_info.traceback or ""), str(self.id)
            )
        return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
