"""What becomes of a task that runs in a thread when its worker connects anew to the embedded broker? It stays its."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from qbridge.backends.embedded.errors import FileUnavailable
from qbridge.backends.embedded.transport import Transport
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.waiting import wait_until

QUEUE = "fragile"


@pytest.fixture
def contract(tmp_path: Path) -> Iterator[Contract]:
    """A bridge on a file."""
    contract = Contract(f"embedded://{tmp_path}/bridge.db", f"sqlite:///{tmp_path}/results.db", tmp_path)
    try:
        yield contract
    finally:
        contract.close()


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of messages in hand: a consumer that holds as many is told that its file cannot be read, once."""
    numbers: list[int] = []
    sweep = Transport.sweep

    def failing(self: Any) -> None:
        held = sum(len(channel.qos._claims) for channel in tuple(self.channels))
        if held in numbers:
            numbers.remove(held)
            raise FileUnavailable("the disk is full")
        sweep(self)

    monkeypatch.setattr(Transport, "sweep", failing)
    return numbers


def rows(contract: Contract, table: str) -> int:
    """Rows of a table of the broker's file."""
    with closing(sqlite3.connect(contract.folder / "bridge.db")) as file:
        return int(file.execute(f"SELECT count(*) FROM {table} WHERE queue = ?", (QUEUE,)).fetchone()[0])


def consumers(contract: Contract) -> int:
    """Who consumes the queue."""
    return rows(contract, "consumer")


def messages(contract: Contract) -> int:
    """What lies in it, claimed or not."""
    return rows(contract, "message")


def test_a_thread_keeps_its_message_when_its_worker_connects_anew(contract: Contract, broken: list[int]) -> None:
    """Beside an idle worker the tasks run once, and their messages are settled."""
    path, release, other = contract.path(), contract.path("release"), contract.path()
    hold, note = (contract.tasks.hold.using(queue=QUEUE), contract.tasks.note.using(queue=QUEUE))
    with contract.bridge.worker(pool="thread", concurrency=3, queues=[QUEUE]):
        held = [hold.delay(str(path), str(release)) for _ in range(2)]
        wait_until(lambda: len(runs(path)) == 2, 20, what="the tasks to run")
        with contract.worker_of(QUEUE, pool="thread", concurrency=3):
            broken.append(2)
            wait_until(lambda: not broken, 20, what="the connection to break")
            wait_until(lambda: consumers(contract) == 2, 20, what="the worker to consume again")
            after = [note.delay(str(other)) for _ in range(20)]
            assert [each.get(timeout=20) for each in after] == [""] * 20
            assert len(runs(path)) == 2
            release.touch()
            assert [result.get(timeout=20) for result in held] == [2, 2]
            wait_until(lambda: messages(contract) == 0, 20, what="the messages to be settled")
        assert note.delay(str(other)).get(timeout=20) == ""
    assert len(runs(path)) == 2
