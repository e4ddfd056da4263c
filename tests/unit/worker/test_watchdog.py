"""When does a fault count, and what is done about it? Looks without a clock, at a worker made of attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state

from qbridge.backends.base import QueueDepth
from qbridge.worker import watchdog
from qbridge.worker.pulse import Pulse
from qbridge.worker.watchdog import EXIT_CODE, Condition, Watchdog

PATIENCE = 10.0


class Worker:
    """As much of a worker as the watchdog looks at."""

    def __init__(self) -> None:
        self.pulse = Pulse()
        self.pulse.consuming = True
        self.broken: list[Callable[[], None]] = []
        self.ended: list[tuple[str, int]] = []
        self.app = None
        self.pool = SimpleNamespace(num_processes=2)
        self.hub: Any = SimpleNamespace(call_soon=self.broken.append)
        self.ending = SimpleNamespace(began=False, begin=lambda *given: self.ended.append(given))
        task_consumer = SimpleNamespace(_active_tags={"default": "1"})
        self.consumer = SimpleNamespace(pulse=self.pulse, task_consumer=task_consumer, task_buckets={}, connection=None)


@pytest.fixture(autouse=True)
def waiting(monkeypatch: pytest.MonkeyPatch) -> list[QueueDepth]:
    """What waits in the worker's queues."""
    depths: list[QueueDepth] = []
    monkeypatch.setattr(watchdog, "queues_with_messages", lambda *_, **__: list(depths))
    return depths


@pytest.fixture(autouse=True)
def _no_requests() -> Iterator[None]:
    """Celery's tables are the process's."""
    yield
    state.reserved_requests.clear()
    state.active_requests.clear()


class Request:
    """Something that can be in Celery's tables."""


def looks(dog: Watchdog, worker: Worker, seconds: float, *, beats: bool = True) -> Condition:
    """Look once a second."""
    condition = Condition(live=True, ready=True)
    for _ in range(int(seconds)):
        worker.pulse.beats += beats
        condition = dog.look(1.0)
    return condition


def made(**options: Any) -> tuple[Watchdog, Worker]:
    worker = Worker()
    return Watchdog(worker, PATIENCE, acts=options.get("acts", True), tell=lambda condition: None), worker


def test_a_well_worker_is_left_alone(waiting: list[QueueDepth]) -> None:
    """Idle, with nothing waiting; or with messages that come."""
    dog, worker = made()
    assert looks(dog, worker, 60) == Condition(live=True, ready=True)
    waiting.append(QueueDepth("default", 7))
    for _ in range(60):
        worker.pulse.received += 1
        assert looks(dog, worker, 1).ready
    assert (worker.broken, worker.ended) == ([], [])


def test_a_loop_is_given_its_patience() -> None:
    """Not less, and a new connection is tried before the end."""
    dog, worker = made()
    looks(dog, worker, 1)
    assert looks(dog, worker, PATIENCE - 1, beats=False).ready
    assert looks(dog, worker, 1, beats=False) == Condition(True, False, "its loop has stood still for 10 s")
    assert worker.ended == []
    assert not looks(dog, worker, PATIENCE / 2, beats=False).live
    assert worker.ended == [("watchdog", EXIT_CODE)]


def test_a_loop_that_comes_round_again_is_forgiven() -> None:
    """What was slow once begins with its whole patience."""
    dog, worker = made()
    looks(dog, worker, 1)
    looks(dog, worker, PATIENCE + 1, beats=False)
    assert looks(dog, worker, 1).ready
    looks(dog, worker, PATIENCE + 1, beats=False)
    assert worker.ended == []


def test_messages_that_wait_are_a_fault_of_an_idle_worker_only(waiting: list[QueueDepth]) -> None:
    """One that runs something has no room for them."""
    dog, worker = made()
    waiting.append(QueueDepth("default", 7, consumers=1))
    busy = Request()
    state.reserved_requests.add(busy)
    state.active_requests.add(busy)
    assert looks(dog, worker, 60).ready
    state.reserved_requests.clear()
    state.active_requests.clear()
    condition = looks(dog, worker, 14)
    assert condition.reason == "messages wait in default (7), nothing runs here, and none has come for 10 s"
    assert len(worker.broken) == 1
    with pytest.raises(ConnectionResetError):
        worker.broken[0]()
    looks(dog, worker, PATIENCE)
    assert worker.ended == [("watchdog", EXIT_CODE)]


def test_a_worker_behind_another_one_is_not_ended(waiting: list[QueueDepth]) -> None:
    """A queue may have a single active consumer, which RabbitMQ does not tell; the others wait for years."""
    dog, worker = made()
    waiting.append(QueueDepth("default", 7, consumers=2))
    looks(dog, worker, 300)
    assert len(worker.broken) == 1
    assert worker.ended == []


def test_a_task_that_waits_for_a_free_slot_is_a_fault(waiting: list[QueueDepth]) -> None:
    """A new connection would not help; waiting behind running tasks is none."""
    dog, worker = made()
    tasks = [Request(), Request(), Request()]
    for task in tasks:
        state.reserved_requests.add(task)
    for task in tasks[:2]:
        state.active_requests.add(task)
    assert looks(dog, worker, 60).ready
    state.active_requests.discard(tasks[0])
    state.reserved_requests.discard(tasks[0])
    condition = looks(dog, worker, PATIENCE)
    assert condition.reason == "1 task(s) wait for a slot, and 1 of 2 are free"
    assert worker.broken == []
    assert worker.ended == [("watchdog", EXIT_CODE)]


def test_a_lost_connection_is_no_fault(waiting: list[QueueDepth]) -> None:
    """Connecting has its own bounds, and may take as long as the broker is away."""
    dog, worker = made()
    worker.pulse.consuming = False
    waiting.append(QueueDepth("default", 7))
    condition = looks(dog, worker, 300, beats=False)
    assert condition == Condition(True, False, "it is not connected to its broker")
    assert worker.ended == []


def test_without_a_watchdog_health_is_told_all_the_same() -> None:
    """``worker.watchdog=0``: nothing is done about it."""
    dog, worker = made(acts=False)
    looks(dog, worker, 1)
    condition = looks(dog, worker, 100, beats=False)
    assert (condition.live, condition.ready) == (True, False)
    assert worker.ended == []


def test_an_ending_worker_is_live_and_not_ready() -> None:
    """Its end has its own bound."""
    dog, worker = made()
    worker.ending.began = True
    assert looks(dog, worker, 100, beats=False) == Condition(True, False, "it is ending")
