"""What if the result backend does not take a task's outcome? It is offered again, or the task runs again.

In Celery the attempt to store it fails after a while, the message is acknowledged, and what the task did is known to
nobody. Here it depends on who stores:

- A run in a process or a thread of the pool keeps its slot and its message, and offers its outcome again and again,
  for ``worker.store_timeout`` seconds. Whatever ends the worker meanwhile, the message is still there.
- A run in the worker's own loop (the solo pool) must not wait: the connection to the broker would starve. Its message
  goes back, and the task runs again.
- The loop itself, which stores the failure of a task whose process died, hands it to a thread that offers it again.
- States on the way (STARTED, PROGRESS, RETRY) are not worth any of it: the run goes on without.
- What the backend refuses for good, however often it is offered, is not lost either: a failure is stored with less of
  its traceback, or as one that says so; a value that is refused becomes the failure of its task.

No message goes back at once: what is refused quickly would run again and again as fast as the worker can.

Who reads results, or stores them outside of a worker, gets the error as ever.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from celery import _state, states
from celery.exceptions import BackendStoreError
from celery.utils.log import get_logger
from kombu.exceptions import ContentDisallowed, EncodeError

from qbridge.exceptions import ConfigurationError, PayloadError, ResultsUnavailable

if TYPE_CHECKING:
    from celery.backends.base import Backend as _Base
else:
    _Base = object

__all__ = ["KeepsOutcomes", "OutcomeNotStored", "ValueRefused"]

logger = get_logger(__name__)

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 5.0
"""Seconds between two offers; each of them has the bounds of its backend besides."""
_KEPT = 10_000
"""Outcomes that wait for the thread at most: of a worker's crashed tasks, all there will ever be."""
_EXCERPT = 2_000
"""Characters of a traceback that is offered again in ASCII."""
_STORED = "qbridge_retry_is_stored"
"""Attribute of a request."""
_VALUE_FAULTS = (EncodeError, ContentDisallowed, TypeError, ValueError)


class OutcomeNotStored(ResultsUnavailable):
    """A task has ended, and the result backend has not taken its outcome; its message has to go back.

    Args:
        what: which task.
        todo: what to try.
    """


class ValueRefused(PayloadError, EncodeError):
    """The result backend will never take this value.

    Celery makes of an ``EncodeError`` here the failure of the task; of any other error, a warning besides.
    """


# That is what callers know, and what is stored.
ValueRefused.__name__ = ValueRefused.__qualname__ = PayloadError.__name__
ValueRefused.__module__ = PayloadError.__module__


class KeepsOutcomes(_Base):
    """For Celery result backends, first among their bases."""

    _later: _Later | None = None

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        """Store a state; the outcome of a run is offered for longer than the backend's own retries take.

        Raises:
            OutcomeNotStored: if a run has to give its message back.
            Exception: the backend's own, if that is the value's fault, or outside of a worker.
        """
        given = (task_id, result, state, traceback, request)
        try:
            return self._store_now(*given, **kwargs)
        except Exception as raised:
            in_run = _in_run(request)
            in_loop = bool(getattr(self.app, "safe", False)) and _here() == self.app.worker_loop
            if not (in_run or in_loop):
                raise
            error = raised
        # Outside of `except`: what is being handled is the task's own exception again.
        if not self._may_wait(error):
            self._store_less(given, kwargs, error)
        elif state not in states.READY_STATES:
            logger.warning("State %s of task %s is not stored: %s", state, task_id, error)
        elif in_loop and not in_run:
            self._store_later(given, kwargs, error)
        else:
            self._offer(given, kwargs, error, 0.0 if in_loop else self._patience)
        return result

    def mark_as_failure(self, task_id: str, exc: Any, *args: Any, **kwargs: Any) -> Any:
        """Store a failure, but not that an outcome could not be stored: the task did not fail."""
        if isinstance(exc, OutcomeNotStored):
            return None
        return super().mark_as_failure(task_id, exc, *args, **kwargs)

    def store_retry(self, request: Any, exc: Any, traceback: str) -> None:
        """Store that a running task waits for its next attempt, before anybody can have that.

        Celery stores it afterwards: over the outcome of an attempt that was faster, and whoever waits for it waits on.

        Args:
            request: of the run.
            exc: what it has ended with.
            traceback: of that.
        """
        self.mark_as_retry(request.id, exc, traceback, request=request)
        setattr(request, _STORED, True)

    def mark_as_retry(self, task_id: str, exc: Any, traceback: Any = None, request: Any = None, **kwargs: Any) -> Any:
        """Store the state, unless that was done before the next attempt was sent."""
        if getattr(request, _STORED, False):
            return None
        return super().mark_as_retry(task_id, exc, traceback, request=request, **kwargs)

    def _get_result_meta(
        self, result: Any, state: str, traceback: Any, request: Any, format_date: bool = True, encode: bool = False
    ) -> Any:
        """Return what is stored: what Celery makes of it, which looks up a setting at length each time."""
        if getattr(self.app, "extends_results", True):
            return super()._get_result_meta(result, state, traceback, request, format_date, encode)
        done = self.app.now() if state in self.READY_STATES else None
        meta = {
            "status": state,
            "result": result,
            "traceback": traceback,
            "children": self.current_task_children(request),
            "date_done": done.isoformat() if done is not None and format_date else done,
        }
        if getattr(request, "group", None):
            meta["group_id"] = request.group
        if getattr(request, "parent_id", None):
            meta["parent_id"] = request.parent_id
        return meta

    def _store_now(self, *given: Any, **kwargs: Any) -> Any:
        """Store with the backend's own bounds."""
        return super().store_result(*given, **kwargs)

    def _is_values_fault(self, error: BaseException) -> bool:
        """Tell whether this value can never be stored."""
        return isinstance(error, _VALUE_FAULTS) and not isinstance(error, ConfigurationError)

    def _may_wait(self, error: Exception) -> bool:
        return bool(getattr(self.app, "safe", False)) and not self._is_values_fault(error)

    @property
    def _patience(self) -> float:
        config = self.app.worker_config
        return 0.0 if config is None else float(config.store_timeout)

    def _offer(self, given: tuple[Any, ...], kwargs: dict[str, Any], error: Exception, patience: float) -> None:
        task_id = given[0]
        logger.error(
            "Task %s has ended, and the result backend does not take its outcome; it is offered again for %g s: %s",
            task_id, patience, error,
        )  # fmt: skip
        end, pause, began = time.monotonic() + patience, _FIRST_PAUSE, time.monotonic()
        while time.monotonic() + pause < end:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            try:
                self._store_now(*given, **kwargs)
            except Exception as again:  # noqa: BLE001 - it is looked at below
                error = again
                if not self._may_wait(again):
                    break
            else:
                logger.warning("The outcome of task %s is stored, %.0f s late", task_id, time.monotonic() - began)
                return
        if not self._may_wait(error):
            self._store_less(given, kwargs, error)
            return
        # A short rest, in the worker's loop too: the message may come back at once, to be refused at once.
        time.sleep(max(0.0, _FIRST_PAUSE - (time.monotonic() - began)))
        raise OutcomeNotStored(
            f"the outcome of task {task_id} is not stored: {type(error).__name__}",
            "Its message goes back, and it runs again; see what is wrong with the result backend.",
        ) from error

    def _store_less(self, given: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> None:
        """Store of a failure what the backend takes, which has refused it for good.

        Raises:
            PayloadError: if it is a value that was refused, not a failure.
            Exception: that with which it was refused, if nothing is taken.
        """
        task_id, result, state, traceback, request = given
        if not getattr(self.app, "safe", False) or state not in states.EXCEPTION_STATES:
            if isinstance(error, BackendStoreError) and state in states.READY_STATES:
                raise self._refused(task_id, state, error) from error
            raise error
        told = str(traceback or "").replace("\x00", "\\x00").encode("ascii", "backslashreplace").decode()
        offers = (
            (result, told if len(told) <= _EXCERPT else f"{told[: _EXCERPT // 2]}\n[...]\n{told[-_EXCERPT // 2 :]}"),
            (result, None),
            (self._refused(task_id, f"{state}, {type(result).__name__}", error), None),
        )
        for less, text in offers:
            try:
                self._store_now(task_id, less, state, text, request, **kwargs)
            except Exception as again:  # noqa: BLE001 - the next is less
                logger.debug("Not taken either: %s", _cause(again))
            else:
                logger.error("The outcome of task %s was refused (%s): less of it is stored", task_id, _cause(error))
                return
        raise error

    def _refused(self, task_id: str, what: str, error: Exception) -> ValueRefused:
        return ValueRefused(
            f"the outcome of task {task_id} ({what}) was refused by the result backend: {_cause(error)}",
            "See the worker's log, and what the columns of the result tables take.",
        )

    def _store_later(self, given: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> None:
        logger.error("The outcome of task %s is stored later: %s", given[0], error)
        if self._later is None or not self._later.is_alive():
            self._later = _Later()
            self._later.start()
        self._later.add(self, given, kwargs)


class _Later(threading.Thread):
    """Offers outcomes for the worker's loop, one after the other, until each is stored."""

    def __init__(self) -> None:
        super().__init__(name="qbridge-store-later", daemon=True)
        self._waiting: deque[tuple[KeepsOutcomes, tuple[Any, ...], dict[str, Any]]] = deque()
        self._woken = threading.Event()

    def add(self, backend: KeepsOutcomes, given: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(self._waiting) >= _KEPT:
            logger.critical("The outcome of task %s is lost: %d others wait to be stored", given[0], _KEPT)
            return
        self._waiting.append((backend, given, kwargs))
        self._woken.set()

    def run(self) -> None:
        while True:
            self._woken.wait()
            self._woken.clear()
            while self._waiting:
                backend, given, kwargs = self._waiting[0]
                try:
                    backend._offer(given, kwargs, ResultsUnavailable("it was away"), backend._patience)
                except Exception:
                    logger.critical("The outcome of task %s is lost", given[0], exc_info=True)
                self._waiting.popleft()


def _cause(error: BaseException) -> str:
    """Say which error it was, without its text, which may hold what was to be stored."""
    while error.__cause__ is not None:
        error = error.__cause__
    error = getattr(error, "orig", None) or error
    code = error.args[0] if error.args and isinstance(error.args[0], int) else getattr(error, "sqlstate", None)
    return type(error).__name__ if code is None else f"{type(error).__name__} {code}"


def _here() -> tuple[int, int]:
    return os.getpid(), threading.get_ident()


def _in_run(request: Any) -> bool:
    """Tell whether a worker's run of a task stores this."""
    return (
        request is not None
        and not getattr(request, "is_eager", False)
        and not getattr(request, "called_directly", False)
        and _state.get_current_task() is not None
    )
