"""What a caller holds after sending: the handle on a result that will come, typed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, Protocol, TypeVar

from celery._state import get_current_worker_task, task_join_will_block
from celery.exceptions import TaskPredicate

from qbridge.backends.storing import OutcomeNotStored
from qbridge.context import PROGRESS_STATE, Progress, Retrying
from qbridge.exceptions import ConfigurationError, PayloadError, ResultUnknown, TaskFailed, TaskRevoked

__all__ = ["ResultReader", "TaskResult"]

R_co = TypeVar("R_co", covariant=True)
Meta = Mapping[str, Any]

_LONGEST = 366 * 86400.0
_FINAL = frozenset({"SUCCESS", "FAILURE", "REVOKED"})
_SIGNALS = (StopIteration, StopAsyncIteration, TaskPredicate, OutcomeNotStored)
"""Not raised for another task's sake: they end a loop, a generator or the run of the task that waits, unseen."""


class ResultReader(Protocol):
    """Where handles read from; the bridge provides it."""

    @property
    def default_timeout(self) -> float:
        """Seconds that a ``get()`` without a timeout waits."""
        ...

    def wait(self, task_id: str, timeout: float) -> Meta:
        """Return the stored outcome as soon as there is one."""
        ...

    async def wait_async(self, task_id: str, timeout: float) -> Meta:
        """Do the same without blocking the event loop."""
        ...

    def look(self, task_id: str) -> Meta:
        """Return what is stored now."""
        ...

    async def look_async(self, task_id: str) -> Meta:
        """Do the same without blocking the event loop."""
        ...

    def forget(self, task_id: str) -> None:
        """Delete what is stored."""
        ...

    def revoke(self, task_id: str, *, terminate: bool) -> None:
        """Tell the workers not to run it."""
        ...


class TaskResult(Generic[R_co]):
    """The result of one sent task.

    Args:
        task_id: id of the task.
        reader: where to read from.
        decode: turns the stored JSON into the task's return value.
        task_name: for messages; empty if unknown.
    """

    __slots__ = ("_decode", "_forgotten", "_meta", "_reader", "id", "task_name")

    def __init__(self, task_id: str, reader: ResultReader, decode: Callable[[Any], R_co], task_name: str = "") -> None:
        self.id: str = task_id
        self.task_name: str = task_name
        self._reader = reader
        self._decode = decode
        self._meta: Meta | None = None
        self._forgotten = False

    def get(self, timeout: float | timedelta | None = None) -> R_co:
        """Wait for the result and return it.

        Args:
            timeout: seconds or timedelta; None: the configuration's ``results.timeout``. Never for ever.

        Raises:
            ResultTimeout: if there is no result in time.
            ResultsUnavailable: if the result backend cannot be reached, or cannot answer from here.
            ResultUnknown: if the result was forgotten.
            TaskRevoked: if the task was revoked or had expired before it ran.
            TaskFailed: if the task failed with an error that cannot be rebuilt here; otherwise that error itself.
            PayloadError: if what is stored is not what the task declares.
            ConfigurationError: if ``timeout`` has no end, or none that anybody will see.
            RuntimeError: inside a task: waiting there for another task can stop all workers.
        """
        if self._meta is None:
            _refuse_inside_task()
            self._refuse_forgotten()
            self._meta = self._reader.wait(self.id, self._seconds(timeout))
        return self._outcome(self._meta)

    async def aget(self, timeout: float | timedelta | None = None) -> R_co:
        """Wait for the result without blocking the event loop; else as :meth:`get`."""
        if self._meta is None:
            self._refuse_forgotten()
            self._meta = await self._reader.wait_async(self.id, self._seconds(timeout))
        return self._outcome(self._meta)

    def __await__(self) -> Generator[Any, None, R_co]:
        return self.aget().__await__()

    @property
    def state(self) -> str:
        """Celery's state now: PENDING, STARTED, PROGRESS, RETRY, SUCCESS, FAILURE or REVOKED."""
        return str(self._look()["status"])

    def ready(self) -> bool:
        """Return True once there is an outcome, good or bad; one bounded look."""
        return self.state in _FINAL

    def successful(self) -> bool:
        """Return True if the task has ended well."""
        return self.state == "SUCCESS"

    def failed(self) -> bool:
        """Return True if the task has failed."""
        return self.state == "FAILURE"

    @property
    def result(self) -> R_co | BaseException | None:
        """The value if the task has ended well, its error if it failed, None if it has not ended."""
        meta = self._look()
        if meta["status"] not in _FINAL:
            return None
        try:
            return self._outcome(meta)
        except Exception as error:  # noqa: BLE001 - the outcome may be any error
            return error

    @property
    def traceback(self) -> str | None:
        """The traceback as the worker saw it, if the task has failed."""
        text = self._look().get("traceback")
        return None if text is None else str(text)

    def progress(self) -> Progress | None:
        """Return how far the task says it is, or None if it has not said."""
        meta = self._look()
        if meta["status"] != PROGRESS_STATE:
            return None
        stored = _raw(meta)
        done, total = (stored.get("done"), stored.get("total")) if isinstance(stored, Mapping) else (None, None)
        if not isinstance(done, int | float) or not isinstance(total, int | float):
            return None  # another program's PROGRESS
        return Progress(done, total, stored.get("note"))

    def retrying(self) -> Retrying | None:
        """Return how the last attempt failed and when the next begins, or None if the task does not wait for one."""
        meta = self._look()
        if meta["status"] != "RETRY":
            return None
        stored = meta.get("error_json")
        told = stored.get("retry") if isinstance(stored, Mapping) else None
        if not isinstance(stored, Mapping) or not isinstance(told, Mapping):
            return None  # a task of plain Celery's, which does not say when
        error = f"{stored.get('exc_type')}: {stored.get('exc_text')}"
        try:
            return Retrying(int(told["attempt"]), datetime.fromtimestamp(told["next_at"], UTC), error)
        except (LookupError, TypeError, ValueError, ArithmeticError, OSError):
            return None  # what somebody has written there is no attempt and no time

    def revoke(self, *, terminate: bool = False) -> None:
        """Have the task not run, or end at its next ``ctx.check()`` if it runs.

        The workers that run now are told, and Redis and database results remember it for 30 days: workers that start
        later learn it there. Without these, it is forgotten when all workers restart, and a running task sees it on the
        thread pool only.

        Args:
            terminate: also end it if it is running (process pool only).

        Raises:
            BrokerUnavailable: if the workers cannot be told.
            ResultsUnavailable: if they were told, and the result backend cannot remember it.
        """
        self._reader.revoke(self.id, terminate=terminate)

    def forget(self) -> None:
        """Delete the stored result; a later :meth:`get` raises ``ResultUnknown``."""
        self._reader.forget(self.id)
        self._meta = None
        self._forgotten = True

    def __repr__(self) -> str:
        name = f" {self.task_name}" if self.task_name else ""
        return f"<TaskResult{name} {self.id}>"

    def __eq__(self, other: object) -> bool:
        return self.id == other.id if isinstance(other, TaskResult) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.id)

    def _refuse_forgotten(self) -> None:
        if self._forgotten:
            raise ResultUnknown(f"the result of task {self.id} was forgotten here", "", self.id)

    def _look(self) -> Meta:
        if self._meta is not None:
            return self._meta
        self._refuse_forgotten()
        meta = self._reader.look(self.id)
        if meta["status"] in _FINAL:
            self._meta = meta
        return meta

    def _seconds(self, timeout: float | timedelta | None) -> float:
        if timeout is None:
            return self._reader.default_timeout
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
        if not seconds <= _LONGEST:  # nan is not
            raise ConfigurationError(
                f"timeout={timeout!r} is no end of a wait", "Give seconds, a year's at most; None is results.timeout."
            )
        return seconds

    def _outcome(self, meta: Meta) -> R_co:
        status = meta["status"]
        if status == "SUCCESS":
            return self._decode(_raw(meta))
        if status == "REVOKED":
            stored = meta.get("error_json")
            told = stored.get("exc_text") if isinstance(stored, Mapping) else None
            ours = isinstance(told, str) and self.id in told  # of a run that ctx.check() has ended
            what = str(told) if ours else f"task {self.id} was revoked, or had expired, before it ran"
            raise TaskRevoked(what, "", self.id)
        raise _remote_error(meta, self.id)


def _refuse_inside_task() -> None:
    """Celery's rule, but for the thread that runs a task only: an application may have a worker in another thread."""
    task = get_current_worker_task()
    if task is None or task.request.is_eager:
        return
    if task_join_will_block() or getattr(task.app, "in_process_workers", 0):
        raise RuntimeError(
            "get() was called inside a task: a pool full of tasks that wait for others stands still. "
            "Chain the tasks, or await the result in an async task."
        )


def _raw(meta: Meta) -> Any:
    """Return the stored JSON value; backends that are not ours have only Celery's reading of it."""
    return meta["result_json"] if "result_json" in meta else meta.get("result")


def _remote_error(meta: Meta, task_id: str) -> BaseException:
    """Rebuild the error that the task ended with, or describe it.

    It is rebuilt only from a class that is already imported here, is an ``Exception`` and no signal, takes the stored
    arguments and then reads the same; the stored data never decides what is imported or called.

    Raises:
        PayloadError: if a failure is stored that is none.
    """
    stored = meta.get("error_json")
    traceback = str(meta.get("traceback") or "")
    if not isinstance(stored, Mapping):
        found = meta.get("result")
        if meta.get("result_json") is not None:  # read by ours, and ``found`` is what Celery says of it
            raise PayloadError(
                f"The stored failure of task {task_id} cannot be read: it is a {type(meta['result_json']).__name__}",
                "It was written by another program, or is damaged.",
            )
        if isinstance(found, Exception) and not isinstance(found, _SIGNALS):
            return found
        return TaskFailed(type(found).__name__, str(found), traceback, task_id)
    module, name = str(stored.get("exc_module") or ""), str(stored.get("exc_type") or "Exception")
    arguments = stored.get("exc_message")
    arguments = list(arguments) if isinstance(arguments, list | tuple) else [arguments]
    text = stored.get("exc_text")
    shown = text if isinstance(text, str) else ", ".join(str(part) for part in arguments)
    described = TaskFailed(f"{module}.{name}".removeprefix("builtins."), shown, traceback, task_id)
    error = _rebuilt(module, name, arguments)
    if error is None or (isinstance(text, str) and _text_of(error) != text):
        return described
    error.__cause__ = described
    return error


def _rebuilt(module: str, name: str, arguments: list[Any]) -> Exception | None:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or not issubclass(found, Exception) or issubclass(found, _SIGNALS):
        return None
    try:
        return found(*arguments)
    except Exception:  # noqa: BLE001 - a constructor may raise anything
        return None


def _text_of(error: Exception) -> str | None:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - so may __str__
        return None
