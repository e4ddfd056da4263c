"""Is a call sent once, whatever the number of senders, and what is known of it when a sender fails?"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from qbridge import ArgumentsError, Bridge, BridgeConfig, BrokerUnavailable, ResultsUnavailable, UnsupportedFeature
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.waiting import wait_until

QUEUE = "fragile"


@pytest.fixture(params=["redis", "sqlite"])
def contract(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Contract]:
    """The embedded broker, with results that keep claims."""
    broker = f"embedded://{tmp_path}/bridge.db"
    if request.param == "sqlite":
        contract = Contract(broker, f"sqlite:///{tmp_path}/results.db", tmp_path)
        try:
            yield contract
        finally:
            contract.close()
        return
    with request.getfixturevalue(f"qbridge_{request.param}").heal().fresh() as url:
        contract = Contract(broker, url, tmp_path)
        try:
            yield contract
        finally:
            contract.close()


only_sqlite = pytest.mark.parametrize("contract", ["sqlite"], indirect=True)


def in_processes(number: int, act: Callable[[], str]) -> list[str]:
    """Run something in forked children at once, and return what each returned."""
    pipes = []
    for _ in range(number):
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                os.write(writer, act().encode())
            finally:
                os._exit(0)
        os.close(writer)
        pipes.append(reader)
    answers = []
    for reader in pipes:
        with open(reader, "rb") as pipe:
            answers.append(pipe.read().decode())
    for _ in range(number):
        os.wait()
    return answers


def test_a_hundred_sends_from_ten_processes_are_one_run(contract: Contract) -> None:
    """All of them are given the handle of the one task that was sent, and its result."""
    path = contract.path()
    note = contract.tasks.note.using(queue=QUEUE, idempotency_key="order 7")

    def send() -> str:
        return " ".join(note.delay(str(path), "seven").id for _ in range(10))

    ids = {id_ for answer in in_processes(10, send) for id_ in answer.split()}
    (only,) = ids
    assert only == note.delay(str(path), "seven").id
    with contract.bridge.worker(pool="thread", concurrency=4, queues=[QUEUE]):
        assert "seven" == note.delay(str(path), word="seven").get(timeout=20)
        other = note.using(idempotency_key="order 8").delay(str(path), "eight")
        assert "eight" == other.get(timeout=20)
    assert ["seven", "eight"] == [word for _, _, word in runs(path)]


@only_sqlite
def test_a_key_is_for_one_call_of_one_task(contract: Contract) -> None:
    """Other arguments under the same key are refused, naming it; another task has keys of its own."""
    tasks = contract.tasks
    first = tasks.add.using(queue=QUEUE, idempotency_key="k").delay(1)
    with pytest.raises(ArgumentsError, match="'k'"):
        tasks.add.using(queue=QUEUE, idempotency_key="k").delay(2)
    assert first.id == tasks.add.using(queue=QUEUE, idempotency_key="k").delay(a=1, b=10).id
    assert first.id != tasks.lenient.using(queue=QUEUE, idempotency_key="k").delay(1).id
    with pytest.raises(UnsupportedFeature, match="one by one"):
        tasks.add.using(queue=QUEUE, idempotency_key="k").send_many([(1,)])


@only_sqlite
def test_a_unique_task_is_queued_once_and_again_when_it_has_ended(contract: Contract) -> None:
    """While it is queued or runs, its caller gets the first handle; the async client too."""
    path, release = contract.path(), contract.path("release")
    tasks = contract.tasks
    first = tasks.alone.using(queue=QUEUE).delay(str(path), str(release))
    assert first.id == tasks.alone.using(queue=QUEUE).delay(str(path), release=str(release)).id
    assert first.id == asyncio.run(tasks.alone.using(queue=QUEUE).adelay(str(path), str(release))).id
    by_function = [tasks.one_per_path.using(queue=QUEUE).delay(str(contract.path()), word).id for word in "ab"]
    assert 2 == len(set(by_function))
    other = str(contract.path())
    by_function = [tasks.one_per_path.using(queue=QUEUE).delay(other, word).id for word in "ab"]
    assert 1 == len(set(by_function))
    with contract.bridge.worker(pool="thread", concurrency=4, queues=[QUEUE]):
        wait_until(lambda: runs(path), 20, what="the task to run")
        assert first.id == tasks.alone.using(queue=QUEUE).delay(str(path), str(release)).id
        release.touch()
        assert 1 == first.get(timeout=20)
        second = tasks.alone.using(queue=QUEUE).delay(str(path), str(release))
        assert first.id != second.id
        assert 2 == second.get(timeout=20)


@only_sqlite
def test_a_key_is_free_again_when_the_broker_did_not_take_the_message(
    contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next send with it sends; where the message may have arrived, it sends the same id, and that runs once."""
    path = contract.path()
    note = contract.tasks.note.using(queue=QUEUE, idempotency_key="k")
    task: Any = contract.bridge.celery.tasks[note.name]
    send = type(task).send_encoded
    arrived = [False]

    def broken(self: Any, *args: Any, **options: Any) -> Any:
        if arrived[0]:
            send(self, *args, **options)
        raise BrokerUnavailable("gone", "", arrived[0])

    monkeypatch.setattr(type(task), "send_encoded", broken)
    with pytest.raises(BrokerUnavailable):
        note.delay(str(path), "x")
    arrived[0] = True
    with pytest.raises(BrokerUnavailable):
        note.delay(str(path), "x")
    monkeypatch.setattr(type(task), "send_encoded", send)
    result = note.delay(str(path), "x")
    with contract.bridge.worker(pool="thread", concurrency=4, queues=[QUEUE]):
        assert "x" == result.get(timeout=20)
        wait_until(lambda: contract.depth(QUEUE) == 0, 20, what="the copy to be taken")
        after = contract.tasks.note.using(queue=QUEUE).delay(str(contract.path()), "after")
        assert "after" == after.get(timeout=20)
        time.sleep(2)  # the copy waits for a run that may go on
    assert ["x"] == [word for _, _, word in runs(path)]


@only_sqlite
def test_sends_with_one_key_end_in_time_together(contract: Contract) -> None:
    """Whoever waits for another send with the key has no more time than that one, and may send when it is over."""
    bridge = Bridge(
        BridgeConfig(
            broker={**contract.bridge.config.broker.model_dump(), "publish_timeout": 2.0},
            results=contract.bridge.config.results,
        )
    )
    add = bridge.task(name="once.add")(lambda a: a).using(idempotency_key="k")
    took: list[float] = []

    def send() -> None:
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            add.delay(1)
        took.append(time.monotonic() - began)

    with bridge:
        add.using(idempotency_key="before").delay(1)
        with closing(sqlite3.connect(contract.folder / "bridge.db", isolation_level=None)) as holder:
            holder.execute("BEGIN IMMEDIATE")
            senders = [threading.Thread(target=send) for _ in range(4)]
            for sender in senders:
                sender.start()
            for sender in senders:
                sender.join(30)
        assert 4 == len(took)
        assert 4 > max(took)  # one after the other they took 8
        assert add.delay(1).id == add.delay(1).id


def test_a_key_needs_results_that_keep_claims(tmp_path: Path) -> None:
    """Elsewhere both are refused with the reason, the task where it is declared."""
    contract = Contract(f"embedded://{tmp_path}/bridge.db", "rpc://", tmp_path)
    try:
        with pytest.raises(UnsupportedFeature, match="rpc"):
            contract.tasks.add.using(idempotency_key="k").delay(1)
        with pytest.raises(UnsupportedFeature, match="alone is unique, and rpc"):
            contract.bridge.task(name="alone", unique=True)(lambda a: a)
    finally:
        contract.close()


def test_results_that_are_away_say_so(tmp_path: Path) -> None:
    """Nothing is sent when nobody can tell whether it was sent before."""
    contract = Contract(f"embedded://{tmp_path}/bridge.db", "redis://127.0.0.1:1/0", tmp_path)
    try:
        with pytest.raises(ResultsUnavailable, match="Nothing was sent"):
            contract.tasks.add.using(queue=QUEUE, idempotency_key="k").delay(1)
        assert not contract.depth_or_none(QUEUE)
    finally:
        contract.close()


def test_an_eager_task_runs_as_often_as_it_is_called() -> None:
    """There is nobody to agree with."""
    bridge = Bridge(BridgeConfig(broker="embedded:///tmp/never-made.db", celery={"task_always_eager": True}))
    with bridge:
        add = bridge.task(name="once.add")(lambda a: a)
        assert add.using(idempotency_key="k").delay(1).get() == 1
