"""Which cells are there, and what is the same in all of them?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

__all__ = [
    "BROKERS",
    "CONCURRENCY",
    "HEARTBEAT",
    "LEASE",
    "POOLS",
    "PREFETCH",
    "PUBLISH_TIMEOUT",
    "SYSTEMS",
    "WORKERS",
    "Broker",
]
__all__ += ["Cell", "Pool", "Results", "System", "all_cells"]

System = Literal["qbridge", "celery", "celery-late"]
Broker = Literal["rabbitmq", "redis", "embedded"]
Pool = Literal["process", "thread", "solo"]
Results = Literal["redis", "rpc", "sqlite"]

SYSTEMS: tuple[System, ...] = get_args(System)
BROKERS: tuple[Broker, ...] = get_args(Broker)
POOLS: tuple[Pool, ...] = get_args(Pool)

WORKERS = 3
CONCURRENCY: dict[Pool, int] = {"process": 2, "thread": 4, "solo": 1}

PREFETCH = 4
"""Messages that a worker holds for each task that it may run at once: Celery's default, qbridge's is 1."""
LEASE = 5.0
"""Seconds; qbridge's default is 30. Short, so that a lease ends many times in one run."""
HEARTBEAT = 5.0
"""Seconds between RabbitMQ and qbridge's workers; its default is 60, Celery's is 120."""
PUBLISH_TIMEOUT = 4.0
"""Seconds; qbridge's default is 10. Short, so that sends go on while the broker is away."""


@dataclass(frozen=True)
class Cell:
    """One run of the story.

    Args:
        system: who sends and works.
        broker: where the messages are.
        results: where the results go.
        pool: how the workers run tasks.
    """

    system: System
    broker: Broker
    results: Results
    pool: Pool

    def __str__(self) -> str:
        return f"{self.system} {self.broker}×{self.results} {self.pool}"


def all_cells() -> list[Cell]:
    """Every cell of the table: qbridge's, one with rpc results, and Celery's beside them; it has no embedded broker."""
    ours = [Cell("qbridge", broker, results_of(broker), pool) for broker in BROKERS for pool in POOLS]
    ours.append(Cell("qbridge", "rabbitmq", "rpc", "process"))
    servers: tuple[Broker, ...] = ("rabbitmq", "redis")
    both: tuple[System, ...] = ("celery", "celery-late")
    theirs = [Cell(system, broker, "redis", pool) for system in both for broker in servers for pool in POOLS]
    return ours + theirs


def results_of(broker: Broker) -> Results:
    """The results that a broker is measured with: those that keep claims."""
    return "sqlite" if broker == "embedded" else "redis"
