"""What a running task knows about its own run: the injected ``TaskContext``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NoReturn, Protocol

__all__ = ["PROGRESS_STATE", "Progress", "Retrying", "TaskContext"]

PROGRESS_STATE = "PROGRESS"
"""The Celery state under which progress is stored; custom states are ordinary to Celery's tools."""


@dataclass(frozen=True)
class Progress:
    """How far a task is.

    Args:
        done: units of work finished.
        total: units of work in all.
        note: a word for people, or None.
    """

    done: float
    total: float
    note: str | None = None

    @property
    def fraction(self) -> float:
        """``done / total``, between 0 and 1; 0 where nothing is to be done."""
        return min(1.0, max(0.0, self.done / self.total)) if self.total else 0.0


@dataclass(frozen=True)
class Retrying:
    """A task that has failed and waits for its next attempt.

    Args:
        attempt: number of the attempt that failed; the first is 1.
        next_at: when the next attempt begins, at the earliest.
        error: what the failed attempt said: type and text.
    """

    attempt: int
    next_at: datetime
    error: str


class Run(Protocol):
    """What a context asks of the worker that runs the task."""

    def report(self, state: str, meta: Mapping[str, Any]) -> None:
        """Store an intermediate state."""
        ...

    def check(self) -> None:
        """Raise if the run should end."""
        ...

    def token(self) -> int:
        """Return a number that grows with each run."""
        ...

    def try_again(self, wait: float | None) -> NoReturn:
        """End this attempt and schedule another."""
        ...


class _Detached:
    """The run of a plain call: nobody listens, nothing can be retried."""

    def report(self, state: str, meta: Mapping[str, Any]) -> None:
        """Nobody listens to a plain call."""

    def check(self) -> None:
        """Nobody ends a plain call."""

    def token(self) -> int:
        """Nothing runs beside a plain call that a token could tell it from."""
        return 0

    def try_again(self, wait: float | None) -> NoReturn:
        raise RuntimeError("this task was called directly: there is no worker that could run it again")


@dataclass(frozen=True)
class TaskContext:
    """One run of one task, as the task sees it; the first parameter of a task declared with ``context=True``.

    Called plainly (``task(1, 2)``), a task gets a detached context: attempt 1, no queue, progress goes nowhere.
    """

    task_id: str = ""
    attempt: int = 1
    """Number of this run; the first is 1."""
    max_attempts: int = 1
    queue: str | None = None
    headers: Mapping[str, Any] = field(default_factory=dict)
    """The headers given when sent (``using(headers=...)``)."""
    deadline: datetime | None = None
    """By when the task has to be over, with a time zone; its own or one inherited from the task that sent it."""
    _run: Run = field(default=_Detached(), repr=False, compare=False)

    @property
    def is_last_attempt(self) -> bool:
        """True if a failure of this run will not be retried for want of attempts."""
        return self.attempt >= self.max_attempts

    @property
    def fencing_token(self) -> int:
        """A number that is larger than that of every run of this task that began before.

        Store it beside the effect, and refuse writes with a smaller one: then a worker that was taken for dead, and
        goes on, cannot undo what the next one did. Asked for the first time it costs a round trip to the result
        backend; where that keeps no claims (rpc, none), it is made of the broker's counts. 0 in a plain call.

        Raises:
            TaskRevoked: if another run has begun after this one: there is no use in going on.
            UnsupportedFeature: if neither the result backend keeps claims nor the broker counts deliveries.
        """
        return self._run.token()

    def progress(self, done: float, total: float, note: str | None = None) -> None:
        """Tell callers how far the task is; ``TaskResult.progress()`` returns it.

        Args:
            done: units of work finished.
            total: units of work in all.
            note: a word for people.
        """
        self._run.report(PROGRESS_STATE, {"done": done, "total": total, "note": note})

    def check(self) -> None:
        """Let a long task end where it can, if there is no use in going on; call it between two pieces of work.

        What it raises ends the task as REVOKED, without another attempt. At most twice a second it asks Redis or
        database results whether the task was revoked. Other results do not know: there only the thread pool sees it,
        because a child of the process pool does not hear of it (``revoke(terminate=True)`` ends the task), and the solo
        pool does not listen while a task runs.

        Raises:
            TaskRevoked: if the deadline has passed, or if the task was revoked.
        """
        self._run.check()

    def retry(self, after: float | timedelta | None = None) -> NoReturn:
        """End this attempt and run the task again.

        Args:
            after: seconds or timedelta to wait; None: what the task's ``Retry`` says, or at once without one.

        Raises:
            MaxRetriesExceededError: Celery's, if this is the last attempt of the task's ``Retry``, or if the
                next would begin after the deadline.
            RuntimeError: in a plain call, where there is no worker.
        """
        self._run.try_again(after.total_seconds() if isinstance(after, timedelta) else after)
