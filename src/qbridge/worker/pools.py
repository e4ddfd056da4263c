"""Pools for a worker inside an application's process: tasks run under its app, not the process's default one."""

from __future__ import annotations

from functools import partial
from typing import Any

from celery.app.trace import trace_task_ret
from celery.concurrency import solo, thread

__all__ = ["SoloPool", "ThreadPool"]


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


class ThreadPool(thread.TaskPool):
    """Celery's thread pool, bound to its app."""

    task_join_will_block = False

    def on_apply(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the task in one of the pool's threads."""
        return super().on_apply(_under(self.app, target), *args, **kwargs)
