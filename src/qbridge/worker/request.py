"""One message of a typed task on its way through a worker: decoded once, and kept if it is given up.

What becomes of it after a run that failed is decided in the worker's own process, before it is acknowledged: it is sent
again if a process was lost with it, it becomes a dead letter if nobody will try it again although somebody might, and
else it has failed, as with Celery.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from celery.exceptions import Ignore, Reject, Retry
from celery.utils.log import get_logger
from celery.worker import state

from qbridge.backends.base import TAKEN_FROM
from qbridge.backends.storing import OutcomeNotStored
from qbridge.dead_letters import Reason
from qbridge.dead_letters.letter import HEADER_LOSSES, HEADER_UNSTORED_SINCE
from qbridge.due_by import deadline_of
from qbridge.exceptions import TaskFailed
from qbridge.retrying import given_up
from qbridge.standing import AGAIN, HOLDER, TOKEN
from qbridge.worker.resending import headers_of, losses_of, pause_of, put_off, queue_of, send_again
from qbridge.worker.running import AdoptingRequest

__all__ = ["TypedRequest"]

logger = get_logger(__name__)

_PAUSE = 1.0  # seconds until a task whose process was lost comes again


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
        info, came = self._delivery_info, message.delivery_info
        consumer = getattr(message, "consumer", None)  # under defaults="celery" there is none of ours
        if consumer is not None:
            # the task is told its queue, and its next attempt goes there: a routing key may be what a pattern matched
            info[TAKEN_FROM] = came.get(TAKEN_FROM) or queue_of(consumer, message)
        if app.holder:
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

    def revoked(self) -> bool:
        """Tell whether the task is not to be run: as Celery's, by the results, or lost with too many workers."""
        if self._lost or super().revoked():
            return True
        if self.id in getattr(getattr(self.message, "consumer", None), "revocations", ()):
            logger.info("Discarding revoked task: %s[%s]", self.name, self.id)
            self._announce_revoked("revoked", False, None, False)
            return True
        if getattr(self.message, "lost", False):
            self._lost = True
            self.on_failure(_lost(losses_of(self.message)))
        return self._lost

    def maybe_expire(self) -> bool:
        """Tell whether the task has expired; Celery takes its id for a revoked one then, and a replay could not run."""
        expires: Any = self.expires
        return expires is not None and datetime.now(UTC if expires.tzinfo else None) > expires

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """End a task that is not to be run; one that has expired is kept first, where that was asked for."""
        letters = getattr(getattr(self.message, "consumer", None), "dead_letters", None)
        app: Any = self._app
        if expired and letters is not None and app.worker_config is not None and app.worker_config.keep_expired:

            def again(message: Any) -> None:
                self._announce_revoked(reason, terminated, signum, expired)

            if not letters.keep(self.message, "expired", None, again, attempts=self._attempts - 1):
                return  # it stays in its queue, and has expired the next time too
        super()._announce_revoked(reason, terminated, signum, expired)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """End a task that has failed; its message is sent again, or kept, or leaves its queue for good.

        A ``MemoryError`` ends this task alone. Celery takes one for its own and ends the worker. It is the task's: an
        array too large to be had, say. The message stays unacknowledged, and so the next worker would run it, and end.
        A run whose outcome nobody has stored gives its message back; Celery acknowledges it.
        A ``WorkerLostError`` that the task itself raises, of another one that it has waited for, is a failure as any.
        """
        error = _raised(exc_info)
        if isinstance(error, OutcomeNotStored) and self.task.acks_late:
            state.task_ready(self)
            return self._give_back(error)
        anothers = return_ok and isinstance(error, WorkerLostError)  # return_ok: the task has told it, and stored it
        if isinstance(error, MemoryError):
            self._take_from_celery(exc_info)
        elif isinstance(error, SystemExit | KeyboardInterrupt) and not self._ended_by_us:
            exc_info = self._worker_lost_info(error)
        lost = (
            isinstance(_raised(exc_info), WorkerLostError) and not anothers and self.task.max_redeliveries is not None
        )
        if lost and self._ended_by_us:
            state.task_ready(self)
            return None
        if lost and not self.acknowledged and self._success_was_stored():
            lost = False  # Celery acknowledges it
        elif lost and self._comes_again(exc_info):
            return None
        reason = self._reason(_raised(exc_info), lost)
        if reason is not None and not self._kept(reason, exc_info, send_failed_event, return_ok):
            return None
        if anothers:
            self._take_from_celery(exc_info)
        return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)

    def _take_from_celery(self, exc_info: Any) -> None:
        """Put an error in the place of one that Celery would take for the worker's own; what it was is stored."""
        error = _raised(exc_info)
        exc_info.exception = TaskFailed(
            type(error).__qualname__, str(error), str(exc_info.traceback or ""), str(self.id)
        )

    def _give_back(self, error: BaseException) -> None:
        """Give the message back to its queue, to run again after a pause that grows: its results may be away for long.

        RabbitMQ counts what returns as lost, and a new message from 0.
        """
        if self.task.max_redeliveries is None:
            logger.error("Task %s[%s] goes back to its queue: %s", self.name, self.id, error)
            return self.reject(requeue=True)
        consumer: Any = self.message.consumer
        consumer.let_go([self])
        headers = headers_of(self.message)
        since, pause = pause_of(headers, HEADER_UNSTORED_SINCE)
        logger.error("Task %s[%s] goes back to its queue for %.1f s: %s", self.name, self.id, pause, error)
        headers = {**headers, HEADER_LOSSES: losses_of(self.message), HEADER_UNSTORED_SINCE: since, AGAIN: True}
        try:
            if not put_off(consumer, self.message, pause, headers):
                send_again(self._app, self.message, headers, "", queue_of(consumer, self.message))
        except Exception as trouble:  # noqa: BLE001 - then it goes back as it is
            logger.warning("Cannot send task %s[%s] anew: %s", self.name, self.id, trouble)
            return self.reject(requeue=True)
        return self.acknowledge()

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Say that a time limit is over; a message that is still to be kept is not acknowledged yet."""
        if soft or not self._held:
            super().on_timeout(soft, timeout)

    _held = False
    _lost = False

    def _announce_cancelled(self, emit_retry: bool = True) -> None:
        """Say that the run was ended here; Celery notes it when all is said, and says nothing if that fails.

        The process is gone by then: found dead, it would be one that was lost, and the task be sent again, beside the
        message that its broker delivers again.
        """
        self._already_cancelled = True
        super()._announce_cancelled(emit_retry=emit_retry)

    @property
    def _ended_by_us(self) -> bool:
        return bool(self._already_cancelled or self._already_revoked)

    def _reason(self, error: BaseException, lost: bool) -> Reason | None:
        """Return why the message is to be kept; None if it is not."""
        if lost:
            return "crashed"
        if isinstance(error, Retry | Ignore | Reject):
            return None
        told = given_up(error, str(self.id))
        if told is not None:
            return told.reason
        policy = self.task.policy
        if policy is None:
            return None
        if isinstance(error, TimeLimitExceeded):
            return "timed_out"
        # an error that cannot be pickled comes from a child without what was noted on it
        used_up = policy.bounded and policy.where == "broker" and self._attempts >= policy.attempts
        return "exhausted" if used_up else None

    @property
    def _attempts(self) -> int:
        return int(self._request_dict.get("retries") or 0) + 1

    def _kept(self, reason: Reason, exc_info: Any, *rest: bool) -> bool:
        letters = getattr(getattr(self.message, "consumer", None), "dead_letters", None)
        if letters is None:  # under defaults="celery" the consumer is Celery's
            return True
        error = _raised(exc_info)
        told = given_up(error, str(self.id))
        kept: bool = letters.keep(
            self.message,
            reason,
            error,
            lambda message: self.on_failure(exc_info, *rest),
            attempts=self._attempts if told is None else told.attempts,
            crashes=losses_of(self.message) + (reason == "crashed" and not self._lost),
            traceback="" if reason == "crashed" else str(exc_info.traceback or ""),
            late=bool(self.task.acks_late),
        )
        self._held = not kept
        return kept

    def _comes_again(self, exc_info: Any) -> bool:
        """Send the message again whose process was lost; False if it has been lost too often.

        Attempts of ``Retry`` are counted apart: the message says how many runs were lost, and nothing else changes.
        """
        losses = losses_of(self.message) + 1
        if self.acknowledged or not self.task.acks_late or losses > self.task.max_redeliveries:
            return False
        state.task_ready(self)
        consumer, headers = self.message.consumer, {**headers_of(self.message), HEADER_LOSSES: losses}
        consumer.let_go([self])
        try:
            if not put_off(consumer, self.message, _PAUSE, headers):
                send_again(self._app, self.message, headers, "", queue_of(consumer, self.message))
        except Exception as error:  # noqa: BLE001 - whatever the broker does: it has the message still
            logger.warning("Cannot send task %s[%s] again, it goes back to its queue: %s", self.name, self.id, error)
            self.reject(requeue=True)
            return True
        self._tell_of_retry(exc_info)
        self.acknowledge()
        return True

    def _tell_of_retry(self, exc_info: Any) -> None:
        error = _raised(exc_info)
        logger.warning("A process was lost with task %s[%s], it is run again: %s", self.name, self.id, error)
        try:
            if self.store_errors:
                self.task.backend.mark_as_retry(self.id, error, exc_info.traceback, request=self._context)
        except Exception as trouble:  # noqa: BLE001 - it is run again, whether that can be seen or not
            logger.warning("Cannot store that task %s[%s] is run again: %s", self.name, self.id, trouble)
        self.send_event("task-retried", exception=repr(error), traceback=str(exc_info.traceback))


def _raised(exc_info: Any) -> BaseException:
    """Return the exception itself: what came from a child is wrapped."""
    error: BaseException = getattr(exc_info.exception, "exc", exc_info.exception)
    return error


def _lost(times: int) -> Any:
    try:
        raise WorkerLostError(f"Given up: {times} workers were lost while they had it.")
    except WorkerLostError:
        return ExceptionInfo()
