"""Pools in threads: each task comes to an end, and inside an application's process it runs under its own app."""

from __future__ import annotations

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

    def on_apply(self, target: Any, args: Any = (), kwargs: Any = None, callback: Any = None, **rest: Any) -> Any:
        """Run the task in one of the pool's threads."""

        def ending(*given: Any, **named: Any) -> Any:
            try:
                return target(*given, **named)
            except BaseException:  # noqa: BLE001 - reported as a child process of the process pool would
                return 1, ExceptionInfo(), 0.0

        return super().on_apply(ending, args, kwargs, callback, **rest)


class ThreadPool(EndingThreadPool):
    """The same inside an application's process."""

    task_join_will_block = False

    def on_apply(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the task in one of the pool's threads."""
        return super().on_apply(_under(self.app, target), *args, **kwargs)
