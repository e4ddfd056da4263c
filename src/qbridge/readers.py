"""Where result handles read from: the hub of a bridge, an eager run, or nowhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from qbridge.backends.base import ResultBackend
from qbridge.exceptions import ResultsUnavailable
from qbridge.result_hub import ResultHub

__all__ = ["EagerReader", "HubReader", "NoReader"]

Meta = Mapping[str, Any]
Revoke = Callable[[str, bool], None]
"""Tells all workers not to run a task, given its id and whether to end it if it runs."""

_BOUNDS = ("poll_min", "poll_max", "look_timeout")


class HubReader:
    """Reads through the bridge's result hub.

    Args:
        app: the bridge's app.
        results: the result backend's configuration: how long to wait, how often to look.
        revoke: tells the workers.
    """

    def __init__(self, app: Any, results: ResultBackend, revoke: Revoke) -> None:
        self._app = app
        self._revoke = revoke
        bounds = {name: getattr(results, name) for name in _BOUNDS if hasattr(results, name)}
        self.hub: ResultHub = ResultHub(app, **bounds)
        self.default_timeout: float = results.timeout

    def wait(self, task_id: str, timeout: float) -> Meta:
        """Return the outcome as soon as there is one."""
        return self.hub.wait(task_id, timeout)

    async def wait_async(self, task_id: str, timeout: float) -> Meta:
        """Do the same without blocking the event loop."""
        return await self.hub.wait_async(task_id, timeout)

    def look(self, task_id: str) -> Meta:
        """Return what is stored now."""
        return self.hub.look(task_id)

    async def look_async(self, task_id: str) -> Meta:
        """Do the same without blocking the event loop."""
        return await self.hub.look_async(task_id)

    def forget(self, task_id: str) -> None:
        """Delete what is stored."""
        self.hub.forget(task_id)

    def clear(self, task_id: str) -> None:
        """Delete what is stored of a task that runs again; who asks for it waits."""
        self.hub.clear(task_id)

    def restore(self, task_id: str, meta: Meta) -> None:
        """Store what was cleared, if nothing is stored now."""
        self.hub.restore(task_id, meta)

    def revoke(self, task_id: str, *, terminate: bool) -> None:
        """Tell all workers."""
        self._revoke(task_id, terminate)

    def refuse_unreadable(self, task_id: str) -> None:
        """Raise ResultsUnavailable at once for an id that can never be read from here."""
        if getattr(self._app.backend, "result_inbox", None) is not None:
            self.hub.look(task_id)  # answered from memory: rpc results come to the sending process alone

    def close(self) -> None:
        """Stop the hub."""
        self.hub.close()


class EagerReader:
    """Reads the outcome of a task that ran in the caller (Celery's ``task_always_eager``)."""

    default_timeout: float = 0.0

    def __init__(self, outcome: Any) -> None:
        self._outcome = outcome

    def look(self, task_id: str) -> Meta:
        """Return the outcome."""
        outcome = self._outcome
        return {"status": outcome.state, "result": outcome.result, "traceback": outcome.traceback}

    def wait(self, task_id: str, timeout: float) -> Meta:
        """Return the outcome."""
        return self.look(task_id)

    async def wait_async(self, task_id: str, timeout: float) -> Meta:
        """Return the outcome."""
        return self.look(task_id)

    async def look_async(self, task_id: str) -> Meta:
        """Return the outcome."""
        return self.look(task_id)

    def forget(self, task_id: str) -> None:
        """Nothing is stored."""

    def revoke(self, task_id: str, *, terminate: bool) -> None:
        """The task has run."""


class NoReader:
    """Says why there is no result to read.

    Args:
        task: name of the task.
        nowhere: True if the configuration has no result backend; False if this task stores none.
        revoke: tells the workers.
    """

    default_timeout: float = 0.0

    def __init__(self, task: str, nowhere: bool, revoke: Revoke) -> None:
        self._revoke = revoke
        self._task = task
        self._nowhere = nowhere

    def _refuse(self) -> NoReturn:
        if self._nowhere:
            raise ResultsUnavailable(
                "no result backend is configured",
                "Set results in the configuration, for example QBRIDGE_RESULTS=rpc://.",
            )
        raise ResultsUnavailable(
            f"task {self._task} is declared with results=False: its results are not stored", "Declare it without."
        )

    def look(self, task_id: str) -> Meta:
        """Raise ResultsUnavailable."""
        self._refuse()

    def wait(self, task_id: str, timeout: float) -> Meta:
        """Raise ResultsUnavailable."""
        self._refuse()

    async def wait_async(self, task_id: str, timeout: float) -> Meta:
        """Raise ResultsUnavailable."""
        self._refuse()

    async def look_async(self, task_id: str) -> Meta:
        """Raise ResultsUnavailable."""
        self._refuse()

    def forget(self, task_id: str) -> None:
        """Nothing is stored."""

    def revoke(self, task_id: str, *, terminate: bool) -> None:
        """Tell all workers: it needs no results."""
        self._revoke(task_id, terminate)
