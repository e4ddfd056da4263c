"""Which tasks that failed become dead letters? Those that were tried for as long as was allowed, and killers."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from billiard.exceptions import WorkerLostError

from qbridge import ArgumentsError, DeadLetter, Retry, TaskContext, TaskFailed, TaskResult
from qbridge.testing.contract_app.tasks import OutOfStock, runs
from qbridge.testing.contracts.kit import MAX_REDELIVERIES, Contract
from qbridge.testing.waiting import wait_until

AT_ONCE = Retry(on=ConnectionError, attempts=2, wait_initial=0.05, wait_jitter=0)


def letters(contract: Contract, count: int = 1) -> list[DeadLetter]:
    """All dead letters, once there are as many."""
    wait_until(lambda: len(contract.bridge.dead_letters.list()) >= count, 20, what="the dead letters")
    return contract.bridge.dead_letters.list()


def ran(path: Path, times: int) -> bool:
    """Whether a task has begun so many times."""
    return len(runs(path)) == times


def ends(result: TaskResult[Any], error: type[Exception]) -> None:
    """Wait for a failure."""
    with pytest.raises(error):
        result.get(timeout=30)


def test_a_task_that_was_tried_in_vain_is_kept_and_can_be_replayed(contract: Contract) -> None:
    """With its arguments, its error and the count of attempts; what was not to be tried again is a failure only."""
    bridge, broken = contract.bridge, [True]

    def pay(amount: int) -> int:
        if broken:
            raise ConnectionError("the bank is closed")
        return amount

    def wrong(amount: int) -> int:
        raise ValueError(amount)

    paying = bridge.task(name="pay", retry=AT_ONCE)(pay)
    early = bridge.task(name="early", retry=AT_ONCE, delivery="at_most_once")(pay)
    in_slot = bridge.task(name="slot", retry=Retry(on=OSError, attempts=3, wait_initial=0.05, where="worker"))(pay)
    bug = bridge.task(name="bug", retry=AT_ONCE)(wrong)
    plain = bridge.task(name="plain")(wrong)

    @bridge.task(name="asks", context=True, retry=AT_ONCE)
    def asks(ctx: TaskContext) -> None:
        ctx.retry(after=0)

    with bridge.worker(pool="thread", concurrency=2):
        first = paying.delay(5)
        for result in (first, early.delay(6), in_slot.delay(7)):
            ends(result, ConnectionError)
        ends(bug.delay(1), ValueError)
        ends(plain.delay(1), ValueError)
        ends(asks.delay(), Exception)
        found = letters(contract, 4)
        told = {letter.task: (letter.reason, letter.attempts, letter.error_type) for letter in found}
        assert told == {
            "pay": ("exhausted", 2, "ConnectionError"),
            "early": ("exhausted", 2, "ConnectionError"),
            "slot": ("exhausted", 3, "ConnectionError"),
            "asks": ("exhausted", 2, "MaxRetriesExceededError"),
        }
        [kept] = [letter for letter in found if letter.task == "pay"]
        assert kept.task_id == first.id
        assert kept.body.startswith(b"[[5]")
        assert "in pay" in kept.traceback
        assert kept.error_text == "the bank is closed"
        assert kept.first_at is not None
        assert kept.first_at <= kept.at
        broken.clear()
        bridge.dead_letters.replay(kept.id)
        assert bridge.result(first.id, paying).get(timeout=20) == 5


@pytest.mark.parametrize("pool", ["thread", "process"])
def test_a_task_whose_next_attempt_has_too_many_headers_is_kept(contract: Contract, pool: str) -> None:
    """A message that just fits gains headers with each attempt: its failure is what the task raised, and it is kept."""
    name, app = str(contract.tasks.try_again.name), contract.bridge.celery
    queue, path = app.amqp.queues["default"], contract.path()
    headers = {"task": name, "id": "full", "mine": "x" * 59_800}
    with app.connection_for_write() as connection:
        connection.Producer().publish(
            [[str(path), 100], {}, {}], queue.routing_key, exchange=queue.exchange, declare=[queue], headers=headers,
            serializer="json", correlation_id="full",
        )  # fmt: skip
    with contract.worker_of("default", pool=pool):
        ends(contract.bridge.result("full", contract.tasks.try_again), OutOfStock)
        kept = contract.dead_letter_of("full")
    assert ("too_large", 1, "OutOfStock") == (kept.reason, kept.attempts, kept.error_type)
    assert "There is no next attempt: the message is not sent" in kept.traceback
    assert len(runs(path)) == 1


def test_a_task_whose_arguments_do_not_fit_is_kept(contract: Contract) -> None:
    """Sent by somebody who does not check them: a failure with the reason, and a dead letter."""
    elsewhere = contract.another_bridge()  # which knows no signature
    result = elsewhere.send("qbridge.testing.contract_app.tasks.note", ({"no": "path"}, ["no text"]))
    with contract.bridge.worker(pool="solo"):
        ends(result, ArgumentsError)
        [kept] = letters(contract)
    assert (kept.reason, kept.attempts, kept.error_type, kept.task_id) == ("invalid", 1, "ArgumentsError", result.id)


def test_a_task_that_kills_its_process_is_kept_in_the_end(contract: Contract) -> None:
    """Run again as often as ``max_redeliveries``, apart from the attempts of its Retry; then a failure and a letter.

    One that dies of its errors, in processes, is kept too.
    """
    path, tried = contract.path(), contract.path()
    with contract.worker_of("default", pool="process"):
        lost = contract.tasks.kill_child.delay(str(path), 100)
        with pytest.raises((WorkerLostError, TaskFailed), match=r"signal 9|WorkerLostError"):
            lost.get(timeout=60)
        failed = contract.tasks.try_again.delay(str(tried), 100)
        ends(failed, Exception)
        found = letters(contract, 2)
    assert len(runs(path)) == MAX_REDELIVERIES + 1
    assert {(letter.reason, letter.task_id, letter.attempts, letter.crashes) for letter in found} == {
        ("crashed", lost.id, 1, MAX_REDELIVERIES + 1),
        ("exhausted", failed.id, 3, 0),
    }


def test_a_crash_costs_no_attempt_and_no_wait(contract: Contract) -> None:
    """A task that is run again after its process was lost waits for its next attempts as long as its Retry says."""
    path = contract.path()
    with contract.worker_of("default", pool="process"):
        assert contract.tasks.kill_child_then_fail.delay(str(path)).get(timeout=60) == 2
    (_, _, first), (_, second, attempt), (_, third, last) = runs(path)
    assert (first, attempt, last) == ("1", "1", "2")
    assert third - second >= 1.5


@pytest.mark.parametrize("contract", ["rabbitmq"], indirect=True)
def test_a_deploy_is_no_crash(contract: Contract) -> None:
    """RabbitMQ counts what returns to a queue; what workers gave back when they stopped is not lost with them."""
    path, release = contract.path(), contract.path("release")
    result = contract.tasks.hold.delay(str(path), str(release))
    quick = {"QBRIDGE_WORKER__SHUTDOWN_TIMEOUT": "0.2"}
    for number in range(MAX_REDELIVERIES + 2):
        with contract.worker_of("default", pool="solo", settings=quick) as worker:
            wait_until(partial(ran, path, number + 1), 20, what=f"run {number + 1}")
            worker.ask_to_stop()
            worker.wait(20)
    release.touch()
    with contract.worker_of("default", pool="solo"):
        assert result.get(timeout=20) == MAX_REDELIVERIES + 3
    assert contract.bridge.dead_letters.list() == []


@pytest.fixture
def short_lease(contract: Contract) -> dict[str, str]:
    """Redis notices dead workers soon."""
    return {"QBRIDGE_BROKER__LEASE": "1.5"} if contract.broker == "redis" else {}


def test_a_task_that_kills_whole_workers_is_kept_in_the_end(contract: Contract, short_lease: dict[str, str]) -> None:
    """kill -9 of every worker that runs it: so many runs, then the next worker gives it up, and does not run it."""
    path, release = contract.path(), contract.path("release")
    result = contract.tasks.hold.delay(str(path), str(release))
    for number in range(MAX_REDELIVERIES + 1):
        with contract.worker_of("default", pool="solo", settings=short_lease) as worker:
            wait_until(partial(ran, path, number + 1), 20, what=f"run {number + 1}")
            worker.kill()
    began = time.monotonic()
    with contract.worker_of("default", pool="solo", settings=short_lease):
        [kept] = letters(contract)
        with pytest.raises((WorkerLostError, TaskFailed)):
            result.get(timeout=20)
        assert contract.tasks.note.delay(str(contract.path()), "after").get(timeout=20) == "after"
    assert time.monotonic() - began < 30
    assert (kept.reason, kept.task_id, kept.crashes) == ("crashed", result.id, MAX_REDELIVERIES + 1)
    assert len(runs(path)) == MAX_REDELIVERIES + 1


def test_a_task_whose_error_repeats_its_argument_is_kept_beside_its_headers(contract: Contract) -> None:
    """Record and headers were too much for a frame of RabbitMQ: a character may have twelve octets in a record."""
    bridge, mine = contract.bridge, {"mine": "x" * 40_000}

    @bridge.task(name="repeats", retry=AT_ONCE)
    def repeats(text: str) -> None:
        raise ConnectionError(text)

    with bridge.worker(pool="thread", concurrency=2):
        for _ in range(8):  # more than it may hold
            repeats.using(headers=mine).delay("\U0001f600" * 20_000)
        kept = letters(contract, 8)
        assert contract.tasks.note.delay(str(contract.path()), "after").get(timeout=20) == "after"
    assert {(letter.reason, letter.headers["mine"], letter.error_text[0]) for letter in kept} == {
        ("exhausted", mine["mine"], "\U0001f600")
    }
