"""Who remembers that a task was revoked when all workers restart? The result backend, if it keeps claims."""

from __future__ import annotations

from typing import Any

from qbridge.backends.claims import claim_store
from qbridge.backends.urls import mask_url
from qbridge.exceptions import QBridgeError, ResultsUnavailable

__all__ = ["remember_revoked"]


def remember_revoked(app: Any, task_id: str) -> None:
    """Note that a task is revoked, where that can be kept; workers look when they start, and every few seconds.

    Args:
        app: the bridge's app.
        task_id: of the task.

    Raises:
        ResultsUnavailable: if the result backend does not take the note.
    """
    store = claim_store(app.backend)
    if store is None:
        return
    try:
        store.revoke(task_id)
    except QBridgeError:
        raise
    except Exception as error:
        raise ResultsUnavailable(
            f"the result backend at {mask_url(str(app.backend.as_uri()))} cannot remember that task {task_id} is "
            f"revoked: {type(error).__name__}",
            "The workers that run now were told. Run `qbridge check`, and revoke again.",
        ) from error
