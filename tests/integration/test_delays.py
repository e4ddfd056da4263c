"""Who keeps a task until it is due? The broker, on disk: workers come and go, and plain producers need not know."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import Exchange, Queue

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import Contract, WorkerProcess
from qbridge.testing.servers import RabbitMQServer
from qbridge.testing.waiting import wait_until

NOTE = "qbridge.testing.contract_app.tasks.note"


@pytest.fixture
def plain(contract: Contract) -> Iterator[Celery]:
    """A Celery app that knows nothing of bridges but the name of the queue."""
    _ = contract.bridge.celery.conf.broker_url  # kombu knows the embedded broker from here on
    app = Celery("plain", broker=contract.bridge.config.broker.celery_url(), set_as_current=False)
    app.conf.task_queues = [Queue("default", Exchange(""), routing_key="default", no_declare=True)]
    app.conf.task_default_queue = "default"
    yield app
    app.close()


def resident(worker: WorkerProcess) -> float:
    """Memory of a worker in MB."""
    pages = int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def waiting(contract: Contract) -> int:
    """Messages in the queue; on Redis an empty one does not exist."""
    if contract.broker == "redis":
        return contract.depth_or_none("default") or 0
    return contract.depth("default")


def note_name(contract: Contract) -> str:
    return str(contract.tasks.note.name)


def test_a_delayed_task_outlives_the_workers(contract: Contract) -> None:
    """Sent before any worker ever ran there; the first one is killed, the second runs it once and in time."""
    for countdown in (8, 40):
        path = contract.path()
        due = time.time() + countdown
        result = contract.tasks.note.using(countdown=countdown).delay(str(path), "late")
        with contract.worker_of("default", pool="solo") as first:
            first.kill()
        if time.time() < due - 1:
            break  # else this machine is busy, and the first may have begun it
    with contract.worker_of("default", pool="solo"):
        ready = time.time()  # on a busy machine two workers may take longer to start than the task is to wait
        assert result.get(timeout=countdown + 20) == "late"
    [(_, when, _)] = runs(path)
    assert due - 0.01 <= when < max(due, ready) + 2


def test_many_far_off_tasks_cost_a_worker_nothing(contract: Contract) -> None:
    """It does not see them: neither its memory nor the tasks of now notice."""
    path = contract.path()
    with contract.worker_of("default", pool="solo") as worker:
        contract.tasks.note.delay(str(contract.path())).get(timeout=20)
        before = resident(worker)
        contract.tasks.note.using(countdown=3600).send_many((str(path), str(number)) for number in range(3000))
        began = time.time()
        results = contract.tasks.note.send_many((str(path), "now") for _ in range(100))
        results[0].get(timeout=20)
        assert runs(path)[0][1] - began < 5
        for result in results:
            result.get(timeout=20)
        assert [word for _, _, word in runs(path)] == ["now"] * 100
        assert resident(worker) - before < 10


def test_a_plain_producers_eta_goes_back_to_the_broker(contract: Contract, plain: Celery) -> None:
    """The worker holds nothing that is due in more than a moment, and what it gave back runs once, when it is due."""
    far, near, now = contract.path("far"), contract.path("near"), contract.path("now")
    who = str(contract.tasks.who.name)
    with contract.worker_of("default", pool="solo") as worker:
        hour = datetime.now(UTC) + timedelta(hours=1)
        for number in range(50):
            plain.send_task(note_name(contract), (str(far), str(number)), eta=hour)
        due = time.time() + 4.3
        moment = datetime.fromtimestamp(due, UTC)
        plain.send_task(note_name(contract), (str(near),), eta=moment)
        plain.send_task(who, task_id="an-id-of-its-own", eta=moment, headers={"tenant": "a"})
        plain.send_task(note_name(contract), (str(now), "now"))
        wait_until(lambda: runs(now), 5, what="the task of now to run")
        wait_until(lambda: runs(near), 10, what="the near task to run")
        seen: Any = contract.bridge.result("an-id-of-its-own", dict).get(timeout=10)
        assert (seen["id"], seen["attempt"], seen["queue"]) == ("an-id-of-its-own", 1, "default")
        assert seen["headers"]["tenant"] == "a"
        worker.kill()
        # what it held would come back to the queue
        wait_until(lambda: waiting(contract) == 0, 5, what="the queue to be empty")
    with contract.worker_of("default", pool="solo"):
        contract.tasks.note.delay(str(now)).get(timeout=20)
        assert waiting(contract) == 0
    [(_, when, _)] = runs(near)
    assert due - 0.01 <= when < due + 2
    assert runs(far) == []


def test_what_goes_back_until_it_is_due_goes_to_its_own_queue(contract: Contract) -> None:
    """A message that came to two queues is not sent to both again."""
    app, path = contract.bridge.celery, contract.path()
    with contract.worker_of("default", pool="solo") as worker, app.connection_for_write() as connection:
        channel = connection.default_channel
        Exchange("events", "topic", durable=True)(channel).declare()
        for name in ("default", "idle"):
            queue = app.amqp.queues[name](channel)
            queue.declare()
            queue.bind_to("events", "orders.#")
        assert worker.name
        due = datetime.fromtimestamp(time.time() + 4, UTC).replace(tzinfo=None)  # brokers leave such a time to workers
        connection.Producer(channel).publish(
            [[str(path)], {}, {}], "orders.new", exchange="events", serializer="json",
            headers={"task": note_name(contract), "id": "1", "eta": due.isoformat()},
        )  # fmt: skip
        wait_until(lambda: runs(path), 15, what="the task")
    assert contract.depth("idle") == 1


def test_a_second_may_pass_before_a_delayed_task_is_sent(
    qbridge_rabbitmq: RabbitMQServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Declaring the delays may take longer than the delay is; a retry that Celery refuses then would be lost."""
    with qbridge_rabbitmq.heal().fresh() as url:
        contract = Contract(url, f"sqlite:///{tmp_path / 'results.db'}", tmp_path)
        delays, path = contract.bridge.celery.native_delays, contract.path()
        declare = delays.declare

        def slowly() -> None:
            declare()
            time.sleep(0.4)

        monkeypatch.setattr(delays, "declare", slowly)
        with contract.worker_of("default", pool="solo"):
            due = time.time() + 1.2
            assert contract.tasks.note.using(countdown=1.2).delay(str(path)).get(timeout=20) == ""
        contract.close()
    [(_, when, _)] = runs(path)
    assert due - 0.01 <= when


def test_a_worker_readies_the_delays_of_its_own_queues_only(qbridge_rabbitmq: RabbitMQServer, tmp_path: Path) -> None:
    """On a new vhost the other queues are not there yet: no error is logged for them, and delays to each work.

    Celery's worker binds every queue of the app to the delays, and calls it critical when one is not there.
    """
    with qbridge_rabbitmq.heal().fresh() as url:
        contract = Contract(url, f"sqlite:///{tmp_path / 'results.db'}", tmp_path)
        here, later = contract.path(), contract.path()
        with contract.worker_of("default", pool="solo") as worker:
            result = contract.tasks.note.using(countdown=0.5).delay(str(here), "here")
            whole = contract.tasks.note.using(countdown=1).delay(str(here), "whole")
            afterwards = contract.tasks.on_slow.using(countdown=0.5).delay(str(later))
            another = contract.tasks.on_slow.using(countdown=1).delay(str(later))
            assert (result.get(timeout=20), whole.get(timeout=20)) == ("here", "whole")
            logged = worker.log.read_text()
        with contract.worker_of("slow", pool="solo") as worker:
            assert (afterwards.get(timeout=20), another.get(timeout=20)) == ("slow", "slow")
            logged += worker.log.read_text()
        contract.close()
    assert len(runs(here)) == 2
    assert len(runs(later)) == 2
    for word in ("WARNING", "ERROR", "CRITICAL"):
        assert word not in logged, logged
