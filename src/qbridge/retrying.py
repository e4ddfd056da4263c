"""How does a task's next attempt get to the broker, with all that it must know, and what if the broker is away?

The old message is acknowledged after the new one is confirmed, so a retry may be repeated but not lost. Celery drops
the message when the new one cannot be sent (``Task.retry``, ``Reject(requeue=False)``); here it goes back to its queue
with the state that it came with, and the attempt is run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NoReturn

from celery.exceptions import Reject
from celery.exceptions import Retry as CeleryRetry
from celery.utils.log import get_task_logger

from qbridge.dead_letters.letter import HEADERS_OF_ONE_MESSAGE
from qbridge.due_by import instant
from qbridge.exceptions import BrokerUnavailable
from qbridge.options import CELERY_HEADERS
from qbridge.sending import is_broker_error, is_connection_error
from qbridge.serialization.locked_messages import BROKERS, NOT_SIGNED
from qbridge.serialization.results import error_text
from qbridge.standing import AGAIN, HEADER_ONCE

__all__ = [
    "HEADER_ATTEMPTS_SINCE",
    "HEADER_RETRY",
    "GivenUp",
    "History",
    "give_up",
    "given_up",
    "hand_over",
    "kept_headers",
]

logger = get_task_logger(__name__)

HEADER_ATTEMPTS_SINCE = "qbridge_first_attempt"
"""Message header with the time of the first attempt (ISO 8601), for policies that end after a time."""

HEADER_RETRY = "qbridge_retry"
"""Message header with the rest of the story: ``idle`` (seconds waited so far), ``error`` (text of the last error)."""

# Notes about a message that was delayed or delivered again: the broker's, and ours. Where there are keys they are not
# signed: who may write to the broker could tell a task anything in them.
_ADDED = (AGAIN, HEADER_ONCE, *BROKERS)
_NOT_KEPT = CELERY_HEADERS.union(NOT_SIGNED, HEADERS_OF_ONE_MESSAGE)

_ERROR_CHARACTERS = 200
# A broken connection in the pool is replaced in less. If the broker itself has gone, so has the worker's connection:
# the message is delivered again, and what was sent after that would be a second next attempt.
_AWAY = 1.0
# A broker that is there and does not take the message (an alarm, a full queue) is waited for in the slot: the first
# time this long, then twice as long each time, so that bounds on redeliveries are not used up in a minute.
_REFUSED, _DOUBLINGS = 10.0, 5
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0


@dataclass(frozen=True)
class History:
    """What the message of an attempt says about those before it.

    Args:
        attempt: number of the running attempt; the first is 1.
        first: when the first began, in seconds since 1970.
        idle: seconds waited between attempts so far.
    """

    attempt: int
    first: float
    idle: float = 0.0

    @classmethod
    def of(cls, request: Any, began: float) -> History:
        """Read the history of the running request; this attempt began at ``began``."""
        headers = request.headers or {}
        first = instant(headers.get(HEADER_ATTEMPTS_SINCE))
        told = headers.get(HEADER_RETRY)
        idle = told.get("idle") if isinstance(told, Mapping) else None
        return cls(
            attempt=(request.retries or 0) + 1,
            first=began if first is None else first.timestamp(),
            idle=float(idle) if isinstance(idle, int | float) and idle >= 0 else 0.0,
        )

    @property
    def elapsed(self) -> float:
        """Seconds since the first attempt began."""
        return max(0.0, time.time() - self.first)

    def headers_after(self, error: BaseException | None, wait: float) -> dict[str, Any]:
        """Return the headers of the next attempt, which begins after ``wait`` seconds."""
        told: dict[str, Any] = {"idle": round(self.idle + wait, 3)}
        if error is not None:
            told["error"] = f"{type(error).__qualname__}: {error_text(error)}"[:_ERROR_CHARACTERS]
        return {HEADER_ATTEMPTS_SINCE: datetime.fromtimestamp(self.first, UTC).isoformat(), HEADER_RETRY: told}


def kept_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headers that neither the protocol nor the broker has added, nor a worker for this message alone."""
    return {key: value for key, value in headers.items() if key not in _NOT_KEPT and not str(key).startswith(_ADDED)}


_Reason = Literal["exhausted", "invalid", "too_large"]


@dataclass(frozen=True)
class GivenUp:
    """Why nobody will try a task again, although somebody might have: told by the process that ran it.

    Args:
        reason: ``"exhausted"``: its policy allows no further attempt; ``"invalid"``: its arguments do not fit;
            ``"too_large"``: the message of its next attempt would be.
        task_id: whose run it was; an exception may be an object that several tasks raise.
        attempts: runs that its policy has counted.
    """

    reason: _Reason
    task_id: str
    attempts: int


_GIVEN_UP = "qbridge_given_up"  # attribute of an exception, which goes with it from a process of the pool to its parent


def give_up(error: BaseException, reason: _Reason, request: Any, attempts: int) -> None:
    """Note on an error that it ends its task for good; the worker keeps the message then."""
    with suppress(AttributeError):  # an exception with slots cannot carry it
        setattr(error, _GIVEN_UP, (reason, str(request.id), attempts))


def given_up(error: BaseException, task_id: str) -> GivenUp | None:
    """Return what was noted on an error for this task, if anything was."""
    told = getattr(error, _GIVEN_UP, None)
    return GivenUp(*told) if isinstance(told, tuple) and told[1] == task_id else None


def hand_over(task: Any, wait: float, publish: Callable[[float], Any], late: bool) -> NoReturn:
    """Send the next attempt, and end this one; never returns.

    Args:
        task: the Celery task that runs.
        wait: seconds until the next attempt.
        publish: sends it with the given countdown: Celery's ``Task.retry``, which raises its ``Retry`` when the message
            is sent and ``Reject`` when it is not.
        late: whether the old message is acknowledged after the run; if so it can go back to its queue.

    Raises:
        celery.exceptions.Retry: when the next attempt is sent.
        celery.exceptions.Reject: with ``requeue``, when the broker does not take it: this attempt runs again.
        BrokerUnavailable: if there is no message any more that could go back.
    """
    due = time.time() + wait
    began, pause = time.monotonic(), _FIRST_PAUSE
    while True:
        try:
            publish(max(0.0, due - time.time()))
            raise AssertionError("Celery's retry always raises")
        except CeleryRetry:
            raise
        except Reject as unsent:
            reason = unsent.reason
            if not is_broker_error(task.app, reason):
                raise (reason if isinstance(reason, Exception) else unsent) from None
            waited = time.monotonic() - began
            patience = _patience(task, reason) if late else _REFUSED
            if waited + pause > patience:
                _give_back(task, reason, waited, late)
            logger.warning("The broker did not take the next attempt of task %s: %s", task.request.id, reason)
        time.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)


def _give_back(task: Any, reason: Any, waited: float, late: bool) -> NoReturn:
    name = f"the next attempt of task {task.name}[{task.request.id}]"
    if late:
        logger.error("The broker did not take %s within %.1f s; this attempt goes back to its queue", name, waited)
        raise Reject(reason, requeue=True) from None
    cause = reason if isinstance(reason, BaseException) else None
    raise BrokerUnavailable(
        f"the broker did not take {name} within {waited:.1f} s: {reason}",
        "The task was acknowledged before it ran (at_most_once), so this was its last attempt; send it again.",
        False,
    ) from cause


def _patience(task: Any, reason: Any) -> float:
    if is_connection_error(task.app, reason):
        return _AWAY
    delivered = (task.request.headers or {}).get("x-delivery-count")
    times = delivered if isinstance(delivered, int) and delivered > 0 else 0
    return _REFUSED * float(2 ** min(times, _DOUBLINGS))
