"""Does a task run where, when, in which order and as often as its sender said?"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from qbridge import ArgumentsError, ConfigurationError, UnknownQueueError, UnsupportedFeature
from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract, longest_pause, unblocked
from qbridge.testing.waiting import wait_until


def test_an_async_task_is_a_task(qbridge_contract: Contract) -> None:
    """A coroutine function runs in the worker, and its value comes back."""
    assert qbridge_contract.tasks.shout.delay("hello").get(timeout=20) == "HELLO"


def test_async_tasks_of_one_process_share_a_loop(qbridge_contract: Contract) -> None:
    """The event loop of a worker process is made once and used again."""
    places = [qbridge_contract.tasks.loop_of.delay().get(timeout=20) for _ in range(6)]
    by_process: dict[int, set[tuple[int, int]]] = {}
    for process, thread, loop in places:
        by_process.setdefault(process, set()).add((thread, loop))
    assert all(len(loops) == 1 for loops in by_process.values())


async def _with_async_client(tasks: Any) -> tuple[list[int], float]:
    await (await tasks.add.adelay(0))  # imports and connections are made once
    async with unblocked() as blocked:
        sent = [await tasks.add.adelay(number, 1) for number in range(10)]
        sent += await asyncio.gather(*(tasks.add.adelay(number, 1) for number in range(10, 20)))
        values = [await sent[0].aget(timeout=20), await sent[1]]
        values += await asyncio.gather(*sent[2:])
    return values, blocked.longest


def test_the_async_client_does_not_block_the_event_loop(qbridge_contract: Contract) -> None:
    """``adelay``, ``aget`` and ``await`` work one by one and all at once, and the loop goes on meanwhile."""

    def measure() -> float:
        values, longest = asyncio.run(_with_async_client(qbridge_contract.tasks))
        assert values == list(range(1, 21))
        return longest

    assert longest_pause(measure) < 0.05


def test_the_async_client_refuses_wrong_arguments(qbridge_contract: Contract) -> None:
    """``adelay`` validates like ``delay``."""
    with pytest.raises(ArgumentsError):
        asyncio.run(qbridge_contract.tasks.add.adelay("1"))


def test_the_context_tells_id_attempt_queue_and_headers(qbridge_contract: Contract) -> None:
    """A task sees what it was sent with."""
    contract = qbridge_contract
    result = contract.tasks.who.using(headers={"tenant": "x", "n": 1}).delay()
    expected = {"id": result.id, "attempt": 1, "queue": "default", "headers": {"tenant": "x", "n": 1}}
    assert result.get(timeout=20) == expected
    other = contract.tasks.who.using(queue="reports.slow", task_id="an-id-of-my-own").delay()
    assert other.get(timeout=20) == {"id": "an-id-of-my-own", "attempt": 1, "queue": "reports.slow", "headers": {}}


def test_progress_reaches_the_caller(qbridge_contract: Contract) -> None:
    """``ctx.progress`` is seen by ``progress()`` while the task runs, where the result backend can carry it."""
    contract = qbridge_contract
    release = contract.path("release")
    result = contract.tasks.report.delay(str(release))
    if contract.bridge.config.results.capabilities.progress:
        seen = wait_until(result.progress, 20, what="progress")
        assert (seen.done, seen.total, seen.note) == (3, 10, "a third")
        assert seen.fraction == 0.3
        assert not result.ready()
    release.touch()
    assert result.get(timeout=20) == 10
    assert result.progress() is None


def test_a_countdown_runs_once_and_on_time(qbridge_contract: Contract) -> None:
    """Two seconds, half a second, and a moment given as a datetime: never early, and once."""
    contract = qbridge_contract
    paths = [contract.path() for _ in range(3)]
    note = contract.tasks.note
    begins, results = [], []
    moment = datetime.now(UTC) + timedelta(seconds=1.5)
    when: list[dict[str, Any]] = [{"countdown": 2}, {"countdown": 0.5}, {"eta": moment}]
    for options, path in zip(when, paths, strict=True):
        begins.append(time.time())
        results.append(note.using(**options).delay(str(path), "late"))
    assert [result.get(timeout=30) for result in results] == ["late"] * 3
    assert [len(runs(path)) for path in paths] == [1, 1, 1]
    waited = [runs(path)[0][1] - began for path, began in zip(paths, begins, strict=True)]
    assert 1.99 <= waited[0] < 5
    assert 0.49 <= waited[1] < 3.5
    # RabbitMQ's delays are whole seconds, rounded up.
    assert moment.timestamp() - 0.01 <= runs(paths[2])[0][1] < moment.timestamp() + 4


def test_queues_with_a_name_in_common_get_one_run_each(qbridge_contract: Contract) -> None:
    """``slow`` and ``reports.slow`` are two queues: a message to one is not delivered to the other."""
    contract = qbridge_contract
    slow, reports = contract.path("slow"), contract.path("reports")
    first, second = contract.tasks.on_slow.delay(str(slow)), contract.tasks.on_reports_slow.delay(str(reports))
    delayed = contract.tasks.on_reports_slow.using(countdown=1).delay(str(reports))
    assert [first.get(timeout=20), second.get(timeout=20), delayed.get(timeout=20)] == [
        "slow", "reports.slow", "reports.slow",
    ]  # fmt: skip
    # What came after them on both queues has run too: nothing is left that could still run.
    after = [contract.tasks.who.using(queue=queue).delay() for queue in ("slow", "reports.slow")]
    assert [one.get(timeout=20)["queue"] for one in after] == ["slow", "reports.slow"]
    assert [word for _, _, word in runs(slow)] == ["slow"]
    assert [word for _, _, word in runs(reports)] == ["reports.slow", "reports.slow"]


def test_an_unknown_queue_is_refused(qbridge_contract: Contract) -> None:
    """A name that nobody declared raises, and the error suggests the one that was meant."""
    with pytest.raises(UnknownQueueError, match=r"did you mean 'reports\.slow'|Did you mean 'reports\.slow'"):
        qbridge_contract.tasks.add.using(queue="reports.slwo").delay(1)
    with pytest.raises(UnknownQueueError):
        qbridge_contract.bridge.send("any.task", queue="nowhere")
    with pytest.raises(TypeError, match="did you mean 'countdown'"):
        qbridge_contract.tasks.add.using(countdwn=1)
    with pytest.raises(ConfigurationError):
        qbridge_contract.tasks.add.using(countdown=-1)


def test_priorities_order_what_waits(qbridge_contract: Contract) -> None:
    """A worker takes high before normal before low, wherever the queue has priorities."""
    contract = qbridge_contract
    path = contract.path()
    contract.purge("ranked")
    results = [
        contract.tasks.note.using(queue="ranked", priority=level).delay(str(path), level)
        for level in ("low", "normal", "high") * 2
    ]
    wait_until(lambda: contract.depth("ranked") == 6, 20, what="all six to be queued")
    with contract.bridge.worker(pool="solo", queues=["ranked"]):
        for result in results:
            result.get(timeout=20)
    assert [word for _, _, word in runs(path)] == ["high", "high", "normal", "normal", "low", "low"]


def test_a_queue_without_priorities_says_so(qbridge_contract: Contract) -> None:
    """A priority on a RabbitMQ quorum queue before 4.0 is refused, naming the way; elsewhere it is taken."""
    contract = qbridge_contract
    send = contract.tasks.add.using(priority="high").delay
    if contract.broker == "rabbitmq" and contract.server_version < (4,):
        with pytest.raises(UnsupportedFeature, match="max_priority"):
            send(1)
    else:
        assert send(1).get(timeout=20) == 11
    assert contract.tasks.add.using(priority="normal").delay(1).get(timeout=20) == 11


def test_many_tasks_are_sent_at_once(qbridge_contract: Contract) -> None:
    """``send_many`` of 500: each result comes back to its own handle."""
    results = qbridge_contract.tasks.add.send_many([(number, 1) for number in range(500)])
    assert len({result.id for result in results}) == 500
    deadline = time.monotonic() + 60
    values = [result.get(timeout=max(1.0, deadline - time.monotonic())) for result in results]
    assert values == list(range(1, 501))


def test_items_of_different_tasks_are_sent_at_once(qbridge_contract: Contract) -> None:
    """``bridge.send_many`` takes calls of any tasks, each with its own options."""
    tasks = qbridge_contract.tasks
    first, second, third = qbridge_contract.bridge.send_many(
        [tasks.add.item(1, 2), tasks.shout.item("a"), tasks.who.using(queue="slow").item()]
    )
    assert (first.get(timeout=20), second.get(timeout=20)) == (3, "A")
    assert third.get(timeout=20)["queue"] == "slow"


def test_nothing_of_a_bulk_is_sent_if_one_call_is_wrong(qbridge_contract: Contract) -> None:
    """A wrong call in the middle raises ArgumentsError, and nothing is queued."""
    contract = qbridge_contract
    contract.purge("fragile")
    with pytest.raises(ArgumentsError):
        contract.tasks.add.using(queue="fragile").send_many([(1,), ("no",), (2,)])
    assert not contract.depth_or_none("fragile")  # Redis has no empty lists


def test_a_task_is_sent_by_its_name(qbridge_contract: Contract) -> None:
    """``bridge.send`` reaches a task that this bridge knows, and one that only the worker knows."""
    contract = qbridge_contract
    assert contract.bridge.send("contracts.renamed", (5,)).get(timeout=20) == -5
    with pytest.raises(ArgumentsError):
        contract.bridge.send("contracts.renamed", ("5",))
    other = contract.another_bridge()
    assert other.send("contracts.renamed", kwargs={"value": 6}).get(timeout=20) == -6


def test_a_remote_declaration_reaches_the_workers_task(qbridge_contract: Contract) -> None:
    """``bridge.remote`` types a task of another code base: it is validated, sent, and cannot be called here."""
    bridge = qbridge_contract.another_bridge()

    @bridge.remote(name="contracts.renamed", queue="default")
    def renamed(value: int) -> int: ...  # type: ignore[empty-body]  # lives in the worker

    assert renamed.delay(7).get(timeout=20) == -7
    with pytest.raises(ArgumentsError):
        renamed.delay("7")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # the point
    with pytest.raises(ConfigurationError):
        renamed(7)


def test_twenty_threads_send_and_get(qbridge_contract: Contract) -> None:
    """Each thread gets the results of its own tasks; a result may also be read in another thread than sent it."""
    tasks = qbridge_contract.tasks

    def work(number: int) -> list[int]:
        results = [tasks.add.delay(number, step) for step in range(5)]
        return [result.get(timeout=60) for result in results]

    with ThreadPoolExecutor(20) as threads:
        values = list(threads.map(work, range(20)))
        sent = list(threads.map(tasks.add.delay, range(20)))
    assert values == [[number + step for step in range(5)] for number in range(20)]
    assert [result.get(timeout=60) for result in sent] == list(range(10, 30))
