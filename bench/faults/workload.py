"""What is sent? Numbered calls of one task: most do nothing, some are slow, some fail first, some are delayed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["ATTEMPTS", "QUEUE", "TASK", "Call", "numbers_in", "task_id", "workload"]

TASK = "faults.work"
QUEUE = "default"
ATTEMPTS = 5
"""Runs that a task has if it fails each time; no call fails that often."""

_ID = re.compile(rb"flt-(\d{6})")


@dataclass(frozen=True)
class Call:
    """One call of the task.

    Args:
        number: of the call; its task id is made of it.
        pieces: how many pieces its work has.
        pause: seconds that each piece takes.
        failures: how many of its attempts fail before one succeeds.
        countdown: seconds by which it is delayed; None: not at all.
    """

    number: int
    pieces: int = 0
    pause: float = 0.0
    failures: int = 0
    countdown: float | None = None


def task_id(number: int) -> str:
    """The id of a call: what is left in a broker tells by it which call it was."""
    return f"flt-{number:06d}"


def numbers_in(raw: bytes) -> set[int]:
    """The numbers of the calls whose ids are in a message, or in anything else."""
    return {int(found) for found in _ID.findall(raw)}


def workload(count: int, seed: int) -> Iterator[Call]:
    """The calls of a run, the same for every system.

    Of a hundred, one is slow (0.5 to 3 s), two crawl (eight waits of 50 ms, as for pages of a site), four fail once or
    twice, and four are delayed by up to 5 s.

    Args:
        count: how many.
        seed: of all that is random.
    """
    chooser = random.Random(seed)
    for number in range(count):
        drawn = chooser.random()
        if drawn < 0.01:
            yield Call(number, pieces=1, pause=chooser.uniform(0.5, 3.0))
        elif drawn < 0.03:
            yield Call(number, pieces=8, pause=0.05)
        elif drawn < 0.07:
            yield Call(number, failures=chooser.randint(1, 2))
        elif drawn < 0.11:
            yield Call(number, countdown=round(chooser.uniform(0.5, 5.0), 1))
        else:
            yield Call(number)
