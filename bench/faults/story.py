"""What happens to the servers, workers and connections of a cell, and when? The faults as data, from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from bench.faults.cells import WORKERS, Cell

__all__ = ["OF_WORKERS", "OUTAGES", "Act", "Event", "Story", "story"]

Act = Literal[
    "kill_worker",  # SIGKILL to a worker and the processes of its pool: a lost machine, a container that is killed
    "kill_parent",  # SIGKILL to the worker alone, as `kill -9 PID` does: its pool's processes are left behind
    "kill_child",  # SIGKILL to one process of a pool, one that runs a task if there is one
    "kill_broker",
    "start_broker",
    "freeze_broker",  # SIGSTOP: it keeps its connections and answers nothing
    "thaw_broker",
    "kill_results",
    "start_results",
    "cut",  # every connection to the broker, with a reset
    "lose",  # every connection of workers to the broker, without a word: neither end hears of it
    "stall",  # every connection to the broker stands still, and then goes on
    "resume",
    "delay",  # 0.2 s for each packet, each way
    "undelay",
    "roll",  # SIGTERM to one worker, and another in its place when it has ended
]

OUTAGES: dict[Act, Act] = {
    "kill_broker": "start_broker",
    "freeze_broker": "thaw_broker",
    "kill_results": "start_results",
    "stall": "resume",
}
"""What begins a time in which nothing can be expected to run, and what ends it."""

OF_WORKERS: tuple[Act, ...] = ("kill_worker", "kill_parent", "kill_child", "roll")
"""What happens to a worker or to a part of it; all else happens to servers and connections."""


@dataclass(frozen=True)
class Event:
    """One thing that happens.

    Args:
        at: seconds after the sends began.
        act: what.
        worker: number of the worker that it happens to, where it happens to one.
    """

    at: float
    act: Act
    worker: int = 0


@dataclass(frozen=True)
class Story:
    """All that happens in a cell.

    Args:
        events: in the order of their times.
        length: seconds; tasks are sent for longer than this if need be.
        workers: how many there are.
    """

    events: tuple[Event, ...]
    length: float
    workers: int = WORKERS


_SERVERS: tuple[tuple[float, Act], ...] = (
    (16, "kill_broker"),
    (18, "start_broker"),
    (36, "freeze_broker"),
    (66, "thaw_broker"),
    (84, "kill_results"),
    (86, "start_results"),
    (104, "cut"),
    (112, "cut"),
    (120, "lose"),
    (148, "stall"),
    (154, "resume"),
    (164, "delay"),
    (168, "undelay"),
)
_CALM = ((3, 13), (26, 33), (74, 81), (94, 101), (138, 145), (172, 180))
"""When processes are killed: not while it is measured how soon all goes on after a server's fault, which would then be
how soon another worker has started, and early enough before the next one for that worker to be there."""
_CALM_WITHOUT_SERVERS = ((3, 75),)
_ROLLING = 6.0
"""Seconds from one worker of a rolling restart to the next."""
_WORKER_KILLS = 20
_CHILD_KILLS = 10
_SHORT = 2
"""Workers in the short version."""


def story(cell: Cell, seed: int, *, short: bool = False) -> Story:
    """What happens in a cell.

    Args:
        cell: an embedded broker has no server: there the workers are killed and restarted, and that is all.
        seed: of all that is random.
        short: the version of the tests: one kill of each kind, and one restart of the broker.
    """
    chooser = random.Random(f"{seed} {cell.broker} {cell.pool}")
    if short:
        return _short(cell, chooser)
    servers = cell.broker != "embedded"
    events = [Event(at, act) for at, act in _SERVERS if servers and not (cell.results == "rpc" and "results" in act)]
    calm = _CALM if servers else _CALM_WITHOUT_SERVERS
    rolling = calm[-1][1] + 5.0
    events += [Event(rolling + _ROLLING * number, "roll", number) for number in range(WORKERS)]
    end = rolling + _ROLLING * WORKERS
    for number in range(_WORKER_KILLS):
        act: Act = "kill_parent" if number % 2 else "kill_worker"
        events.append(Event(_moment(chooser, calm), act, chooser.randrange(WORKERS)))
    if cell.pool == "process":
        kills = (_moment(chooser, calm) for _ in range(_CHILD_KILLS))
        events += [Event(at, "kill_child", chooser.randrange(WORKERS)) for at in kills]
    return Story(tuple(sorted(events, key=lambda event: event.at)), end + 8)


def _moment(chooser: random.Random, spans: tuple[tuple[float, float], ...]) -> float:
    """A moment in any of some spans of time, each second of them as likely as any other."""
    at = chooser.uniform(0, sum(end - begin for begin, end in spans))
    for begin, end in spans:
        if at <= end - begin:
            return begin + at
        at -= end - begin
    return spans[-1][1]


def _short(cell: Cell, chooser: random.Random) -> Story:
    events = [Event(1.0, "kill_worker", chooser.randrange(_SHORT)), Event(4.0, "kill_parent", 0)]
    if cell.pool == "process":
        events.append(Event(2.0, "kill_child", chooser.randrange(_SHORT)))
    if cell.broker != "embedded":
        events += [Event(2.5, "kill_broker"), Event(3.0, "start_broker")]
    return Story(tuple(sorted(events, key=lambda event: event.at)), 5.0, _SHORT)
