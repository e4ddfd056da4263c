"""Pools in threads: each task comes to an end, and inside an application's process it runs under its own app."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.app.trace import trace_task_ret
from celery.concurrency import solo, thread

__all__ = ["EndingThreadPool", "SoloPool", "ThreadPool"]


def _under(app: Any, target: Any) -> Any:
    # Celery's tracer falls back to the current app of the thread, which in a plain thread is the default app
    return partial(trace_task_ret, app=app) if target is trace_task_ret else target


class SoloPool(solo.TaskPool):
    """Celery's solo pool, bound to its app."""

    # process-wide in Celery: True would forbid waiting for results in every thread of the application
    task_join_will_block = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        inline: Any = self.__dict__["on_apply"]  # Celery sets it per instance

        def on_apply(target: Any, *given: Any, **named: Any) -> Any:
            return inline(_under(self.app, target), *given, **named)

        self.__dict__["on_apply"] = on_apply


class EndingThreadPool(thread.TaskPool):
    """Celery's thread pool; an error of the tracer itself ends the task too, and so does a plain task's ``sys.exit``.

    In Celery it stays in the future that nobody reads: the message is never acknowledged, and once there are as many
    of them as the worker prefetches, it stands still.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._requests: dict[Future[Any], Any] = {}

    def on_apply(self, target: Any, args: Any = (), kwargs: Any = None, callback: Any = None, **rest: Any) -> Any:
        """Run the task in one of the pool's threads."""

        def ending(*given: Any, **named: Any) -> Any:
            try:
                return target(*given, **named)
            except BaseException:  # noqa: BLE001 - reported as a child process of the process pool would
                return 1, ExceptionInfo(), 0.0

        applied = super().on_apply(ending, args, kwargs, callback, **rest)
        accepted = rest.get("accept_callback")
        self._requests[applied.f] = getattr(accepted, "__self__", None)
        applied.f.add_done_callback(self._forget)
        return applied

    def _forget(self, future: Future[Any]) -> None:
        self._requests.pop(future, None)

    @property
    def at_work(self) -> int:
        """How many tasks run or wait for a thread; one counts until its message's acknowledgement is on its way."""
        return len(self._requests)

    def running(self) -> list[Any]:
        """The requests of the tasks at work."""
        return [request for request in tuple(self._requests.values()) if request is not None]

    def withdraw(self) -> list[Any]:
        """Take back the tasks that no thread has begun, and return their requests."""
        withdrawn = [(future, request) for future, request in tuple(self._requests.items()) if request is not None]
        return [request for future, request in withdrawn if future.cancel()]


class ThreadPool(EndingThreadPool):
    """The same inside an application's process."""

    task_join_will_block = False

    def on_apply(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the task in one of the pool's threads."""
        return super().on_apply(_under(self.app, target), *args, **kwargs)
