"""What does the context of a running task ask of the worker? State, an end, a token, another attempt."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from celery.exceptions import MaxRetriesExceededError
from celery.exceptions import Retry as CeleryRetry

from qbridge.due_by import deadline_of, passed
from qbridge.exceptions import TaskRevoked
from qbridge.retrying import History, give_up
from qbridge.standing import Standing

__all__ = ["AskedAgain", "LiveRun"]


class AskedAgain(CeleryRetry):
    """Raised by ``ctx.retry()``: the next attempt is sent when the body has ended, in the task's own thread."""

    def __init__(self, wait: float, error: Exception | None = None) -> None:
        super().__init__("another attempt", error, wait)
        self.wait = wait
        self.error = error


class LiveRun:
    """The part of a context that talks to the worker (see ``qbridge.context.Run``).

    It has the request: on the event loop of async tasks Celery's ``task.request`` is nobody's.
    """

    def __init__(self, task: Any, request: Any, began: float, standing: Standing) -> None:
        self.standing = standing
        self.task = task
        self.request = request
        self.began = began

    def report(self, state: str, meta: Mapping[str, Any]) -> None:
        if not self.task.ignore_result:
            self.task.update_state(task_id=self.request.id, state=state, meta=dict(meta))

    def check(self) -> None:
        task_id = str(self.request.id)
        if passed(deadline_of(self.request.headers)):
            raise TaskRevoked(f"the deadline of task {task_id} has passed", "", task_id)
        if _revoked_here(task_id) or self.standing.is_revoked():
            raise TaskRevoked(f"task {task_id} was revoked while it ran", "", task_id)

    def token(self) -> int:
        return self.standing.token()

    def try_again(self, wait: float | None) -> NoReturn:
        """Schedule the attempt that the running one asks for.

        Raises:
            MaxRetriesExceededError: Celery's, if this was the last attempt that the policy or the deadline allows.
        """
        policy, history = self.task.policy, History.of(self.request, self.began)
        asks = f"task {self.task.name} asks for another run after attempt {history.attempt}"
        allowed: float | None = 0.0
        if policy is not None:
            allowed = policy.asked_wait(history.attempt, history.elapsed, history.idle)
        if wait is None:
            wait = allowed
        if allowed is None or passed(deadline_of(self.request.headers), wait or 0.0):
            why = "its last" if allowed is None else "and its deadline would have passed by then"
            error = MaxRetriesExceededError(f"{asks}, {why}")
            if policy is not None:
                give_up(error, "exhausted", self.request, history.attempt)
            raise error
        raise AskedAgain(wait or 0.0)


def _revoked_here(task_id: str) -> bool:
    """Return whether this process's worker knows of a revoke (children of a pool do not)."""
    state: Any = sys.modules.get("celery.worker.state")
    return state is not None and task_id in state.revoked
