"""What does the task do, on every system? It works for as long as its call says, and fails as often as it says."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bench.faults.recorder import Again, Recorder

__all__ = ["READY", "RUNS", "do", "say_ready"]

RUNS = "FAULTS_RUNS"
"""Environment variable with the folder of the recorder."""
READY = "FAULTS_READY"
"""Environment variable with the file in which a worker says that it consumes."""

_recorder = Recorder(Path(os.environ.get(RUNS, ".")))


def do(number: int, attempt: int, pieces: int, pause: float, failures: int) -> int:
    """Run one attempt.

    Args:
        number: of the call.
        attempt: the first is 1.
        pieces: as in ``Call``.
        pause: as in ``Call``.
        failures: as in ``Call``.

    Returns:
        The number.

    Raises:
        Again: if this attempt is one of those that fail.
    """
    with _recorder.run(number, attempt):
        for _ in range(pieces):
            time.sleep(pause)
        if attempt <= failures:
            raise Again(f"attempt {attempt} of call {number}")
    return number


def say_ready(name: str) -> None:
    """Say that a worker of this process consumes."""
    if path := os.environ.get(READY):
        Path(path).write_text(name)
