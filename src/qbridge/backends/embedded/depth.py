"""How much waits in the embedded broker's queues, runs, and is consumed?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qbridge.backends.base import QueueDepth
from qbridge.backends.embedded.inspect import queue_states

__all__ = ["queue_depths"]


def queue_depths(path: Path, names: Iterable[str]) -> list[QueueDepth]:
    """Read the file without changing it.

    Args:
        path: the broker's file; without it no queue exists.
        names: of queues.

    Raises:
        FileUnavailable: if the file cannot be read.
    """
    states = {state.name: state for state in queue_states(path)} if path.exists() else {}
    return [
        QueueDepth(name, state.ready, state.claimed, state.consumers)
        if (state := states.get(name)) is not None
        else QueueDepth(name, None)
        for name in names
    ]
