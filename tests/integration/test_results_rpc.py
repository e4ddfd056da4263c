"""Results over rpc on a real RabbitMQ: any thread may wait, nothing is lost with a connection, and limits are said."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from uuid import uuid4

import celery
import pytest
from celery.app.task import Context
from kombu.exceptions import OperationalError
from tests.timers import acted, later

from qbridge.backends.deadline import deadline
from qbridge.backends.rpc.backend import RPCBackend
from qbridge.backends.rpc.inbox import Reply, ReplyInbox
from qbridge.celery_app import BridgeCelery
from qbridge.exceptions import ResultsUnavailable, ResultTimeout, ResultUnknown
from qbridge.result_hub import ResultHub
from qbridge.testing.servers import RabbitMQServer
from qbridge.testing.waiting import wait_until


def make_app(url: str, **settings: Any) -> BridgeCelery:
    """A bridge's app with rpc results."""
    app = BridgeCelery("t", broker=url)
    app.conf.update(result_backend="rpc://", result_persistent=True, result_expires=60, **settings)
    return app


@pytest.fixture
def url(qbridge_rabbitmq: RabbitMQServer) -> Iterator[str]:
    """An empty vhost."""
    with qbridge_rabbitmq.heal().fresh() as fresh:
        yield fresh


@pytest.fixture
def app(url: str) -> Iterator[BridgeCelery]:
    """The sender's app."""
    app = make_app(url)
    yield app
    acted()
    app.backend.close()
    app.close()


@pytest.fixture
def worker(url: str) -> Iterator[BridgeCelery]:
    """Another app, in the worker's place."""
    worker = make_app(url)
    worker.confirm_timeout = 5.0
    yield worker
    acted()
    worker.close()


@pytest.fixture
def hub(app: BridgeCelery) -> Iterator[ResultHub]:
    """A hub, closed at the end."""
    with closing(ResultHub(app)) as hub:
        yield hub


def send(app: BridgeCelery) -> str:
    """Do what sending a task does to the result backend; return the id."""
    task_id = str(uuid4())
    app.backend.on_task_call(None, task_id)
    return task_id


def answer(worker: BridgeCelery, app: BridgeCelery, task_id: str, value: Any, state: str = "SUCCESS") -> None:
    """Do what a worker does when a task has ended."""
    request = Context(id=task_id, reply_to=app.thread_oid, correlation_id=task_id)
    worker.backend.store_result(task_id, value, state, request=request)


def test_the_hub_returns_what_comes(app: BridgeCelery, worker: BridgeCelery, hub: ResultHub) -> None:
    """Results that came before, come during, or come after states on the way end a wait; a failure is a meta."""
    there, comes, fails = send(app), send(app), send(app)
    answer(worker, app, there, {"a": 1})
    assert {"a": 1} == hub.wait(there, 10)["result"]
    answer(worker, app, comes, None, "STARTED")
    later(0.1, answer, worker, app, comes, 5)
    assert 5 == asyncio.run(hub.wait_async(comes, 10))["result"]
    answer(worker, app, fails, LookupError("no"), "FAILURE")
    meta = hub.wait(fails, 10)
    assert ("FAILURE", "no") == (meta["status"], meta["error_json"]["exc_text"])
    with pytest.raises(ResultTimeout):
        hub.wait(send(app), 0.2)


def test_looking_does_not_consume(app: BridgeCelery, worker: BridgeCelery, hub: ResultHub) -> None:
    """States can be looked at again and again, and a result can be read again in the same process."""
    task_id = send(app)
    assert "PENDING" == hub.look(task_id)["status"]
    answer(worker, app, task_id, {"done": 1}, "PROGRESS")
    wait_until(lambda: hub.look(task_id)["status"] == "PROGRESS", what="the progress")
    answer(worker, app, task_id, 5)
    wait_until(lambda: hub.look(task_id)["status"] == "SUCCESS", what="the result")
    assert [5, 5] == [hub.wait(task_id, 1)["result"] for _ in range(2)]
    answer(worker, app, task_id, 6)
    answer(worker, app, sent := send(app), 1)
    assert 1 == hub.wait(sent, 5)["result"]
    assert 5 == hub.look(task_id)["result"], "the first end of a task is its end"


def test_any_thread_may_send_and_any_other_wait(app: BridgeCelery, worker: BridgeCelery, hub: ResultHub) -> None:
    """All threads of a process share one reply queue with one consumer, by the hub and by AsyncResult."""
    ids: list[str] = []
    threads = [threading.Thread(target=lambda: ids.append(send(app))) for _ in range(20)]
    got: dict[str, Any] = {}

    def wait(task_id: str, *, by_hub: bool) -> None:
        got[task_id] = hub.wait(task_id, 20)["result"] if by_hub else app.AsyncResult(task_id).get(timeout=20)

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    waiting = [
        threading.Thread(target=wait, args=(task_id,), kwargs={"by_hub": bool(number % 2)})
        for number, task_id in enumerate(ids)
    ]
    for thread in waiting:
        thread.start()
    for number, task_id in enumerate(ids):
        answer(worker, app, task_id, number)
    for thread in waiting:
        thread.join(20)
    assert {task_id: number for number, task_id in enumerate(ids)} == got
    assert 1 == sum(thread.name == "qbridge-replies" for thread in threading.enumerate())


def test_celerys_own_api(app: BridgeCelery, worker: BridgeCelery) -> None:
    """``get``, ``state``, ``on_message``, ``then``, groups and ``forget`` work as on plain Celery."""
    result = app.AsyncResult(send(app))
    assert "PENDING" == result.state
    with pytest.raises(celery.exceptions.TimeoutError):
        result.get(timeout=0.1)
    assert {} == app.backend._listening, "a wait in vain leaves nothing behind"
    seen: list[Any] = []
    called = threading.Event()
    result.then(lambda ended: called.set())
    answer(worker, app, result.id, {"done": 1}, "PROGRESS")
    later(0.1, answer, worker, app, result.id, 5)
    assert 5 == result.get(timeout=10, on_message=lambda meta: seen.append(meta["status"]))
    assert ["PROGRESS", "SUCCESS"] == seen
    assert called.wait(5)
    assert ("SUCCESS", 5) == (result.state, app.AsyncResult(result.id).result)

    ids = [send(app) for _ in range(5)]
    group = app.GroupResult("g", [app.AsyncResult(task_id) for task_id in ids])
    finished = threading.Event()
    group.then(lambda ended: finished.set())
    for number, task_id in reversed([*enumerate(ids)]):
        later(0.05, answer, worker, app, task_id, number)
    assert [*range(5)] == group.get(timeout=10)
    assert finished.wait(5)
    assert {} == app.backend._listening

    failed = app.AsyncResult(send(app))
    answer(worker, app, failed.id, LookupError("no"), "FAILURE")
    with pytest.raises(LookupError):
        failed.get(timeout=10)
    with pytest.raises(NotImplementedError):
        app.backend.ensure_chords_allowed()


def test_ids_of_others_cannot_be_read_here(app: BridgeCelery, hub: ResultHub) -> None:
    """An id that this process did not send raises at once and names what can be used instead."""
    send(app)
    started = time.monotonic()
    for ask in (lambda: hub.wait("other", 10), lambda: hub.look("other")):
        with pytest.raises(ResultsUnavailable, match=r"this one did not\. Use .*redis"):
            ask()
    assert time.monotonic() - started < 1


def test_a_forgotten_result_is_unknown(app: BridgeCelery, worker: BridgeCelery, hub: ResultHub) -> None:
    """A forgotten result is gone, also if it comes later, and its waiters are told."""
    task_id = send(app)
    later(0.1, hub.forget, task_id)
    with pytest.raises(ResultUnknown):
        hub.wait(task_id, 10)
    answer(worker, app, task_id, 5)
    answer(worker, app, other := send(app), 1)
    hub.wait(other, 10)
    with pytest.raises(ResultUnknown):
        hub.look(task_id)


def test_results_survive_a_restart_of_the_broker(
    app: BridgeCelery, worker: BridgeCelery, hub: ResultHub, qbridge_rabbitmq: RabbitMQServer
) -> None:
    """The reply queue and what is in it outlive the broker; the receiver comes back by itself."""
    before, after = send(app), send(app)
    receiver = app.backend._replies.receiver
    outcome: list[Any] = []
    waiting = threading.Thread(target=lambda: outcome.append(hub.wait(after, 60)["result"]))
    waiting.start()
    # What comes while the receiver is away has to be kept by the broker.
    receive, receiver._deliver = receiver._deliver, _refuse
    answer(worker, app, before, 1)
    qbridge_rabbitmq.restart()
    receiver._deliver = receive
    wait_until(lambda: receiver.trouble is None, 30, what="the receiver's return")
    answer(worker, app, after, 2)
    waiting.join(60)
    assert [2] == outcome


def _refuse(message: Any) -> None:
    message.requeue()
    raise ConnectionResetError("the test takes no replies now")


def test_a_cut_connection_loses_no_reply(app: BridgeCelery, worker: BridgeCelery, hub: ResultHub) -> None:
    """Replies that come while the receiver has no connection are delivered when it is back."""
    sent = [send(app) for _ in range(20)]
    receiver = app.backend._replies.receiver
    receive, receiver._deliver = receiver._deliver, _refuse
    for number, task_id in enumerate(sent):
        answer(worker, app, task_id, number)
    wait_until(lambda: receiver._failures, what="the lost connection")
    receiver._deliver = receive
    assert [*range(20)] == [hub.wait(task_id, 20)["result"] for task_id in sent]


@pytest.mark.parametrize("bound", [None, 5.0])
def test_a_sender_that_has_gone_is_no_error(app: BridgeCelery, worker: BridgeCelery, bound: float | None) -> None:
    """A confirmed result whose reply queue does not exist any more is dropped, without retries."""
    worker._bridge_options["publish_timeout"] = bound
    started = time.monotonic()
    request = Context(id="1", reply_to="gone", correlation_id="1")
    worker.backend.store_result("1", 5, "SUCCESS", request=request)
    worker.backend.store_result("2", 5, "SUCCESS", request=Context(id="2"))
    assert time.monotonic() - started < 2


def test_sends_are_bounded_when_the_broker_is_frozen(url: str, qbridge_rabbitmq: RabbitMQServer) -> None:
    """The first send with a result needs the reply queue: if the broker is frozen, it fails within its deadline."""
    app = make_app(url)
    qbridge_rabbitmq.freeze()
    try:
        started = time.monotonic()
        with pytest.raises(OperationalError, match="reply queue"), deadline(1.0):
            send(app)
        assert time.monotonic() - started < 2
    finally:
        qbridge_rabbitmq.thaw()
    send(app)
    app.backend.close()
    app.close()


def test_a_frozen_broker_ends_waits_in_time(
    app: BridgeCelery, worker: BridgeCelery, hub: ResultHub, qbridge_rabbitmq: RabbitMQServer
) -> None:
    """With the broker frozen a wait ends at its timeout; a result that comes after the thaw is there."""
    task_id = send(app)
    qbridge_rabbitmq.freeze()
    try:
        started = time.monotonic()
        with pytest.raises((ResultTimeout, ResultsUnavailable)):
            hub.wait(task_id, 0.5)
        assert time.monotonic() - started < 1.5
    finally:
        qbridge_rabbitmq.thaw()
    answer(worker, app, task_id, 5)
    assert 5 == hub.wait(task_id, 20)["result"]


def test_a_stopped_broker_is_said(app: BridgeCelery, hub: ResultHub, qbridge_rabbitmq: RabbitMQServer) -> None:
    """Without a broker no reply can come: the wait says so at its end."""
    task_id = send(app)
    qbridge_rabbitmq.stop()
    try:
        wait_until(app.backend.trouble, what="the loss to be noticed")
        with pytest.raises(ResultsUnavailable):
            hub.wait(task_id, 0.3)
    finally:
        qbridge_rabbitmq.heal()


def test_a_forked_child_has_a_reply_queue_of_its_own(app: BridgeCelery, url: str, hub: ResultHub) -> None:
    """Parent and child send and wait beside each other; the child cannot read what the parent sent."""
    mine = send(app)
    address = app.thread_oid
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            app.forget_connections()  # what the bridge does in each child
            try:
                hub.wait(mine, 10)
            except ResultsUnavailable:
                assert address != app.thread_oid
                child_worker = make_app(url)
                for number in range(50):
                    task_id = send(app)
                    answer(child_worker, app, task_id, number)
                    assert number == hub.wait(task_id, 10)["result"]
                code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os.write(writer, b"!")
            os._exit(code)
    worker = make_app(url)
    for number in range(50):
        task_id = send(app)
        answer(worker, app, task_id, -number)
        assert -number == hub.wait(task_id, 10)["result"]
    answer(worker, app, mine, "mine")
    assert 0 == os.waitpid(pid, 0)[1]
    assert b"!" == os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    assert "mine" == hub.wait(mine, 10)["result"]
    assert app.backend.trouble() is None
    worker.close()


def test_closing_deletes_the_reply_queue_and_is_final(url: str) -> None:
    """A closed bridge leaves no queue and no thread; sending with a result raises."""
    app = make_app(url)
    hub = ResultHub(app)
    task_id = send(app)
    address = app.thread_oid
    later(0.1, hub.close)
    with pytest.raises(ResultsUnavailable, match="closed"):
        hub.wait(task_id, 10)
    wait_until(
        lambda: not any(thread.name == "qbridge-replies" for thread in threading.enumerate()), what="the thread's end"
    )
    with pytest.raises(OperationalError, match="closed"):
        send(app)
    with app.connection_for_write() as connection:
        queue = app.backend.reply_queue(address)(connection.default_channel)
        with pytest.raises(connection.channel_errors):
            queue.queue_declare(passive=True)
    app.close()


def test_settings_of_the_reply_queue(app: BridgeCelery) -> None:
    """The queue outlives a connection, not a dead process: durable, not auto-delete, with an expiry."""
    backend = app.backend
    assert type(backend) is RPCBackend
    assert backend.binding.durable
    assert not backend.binding.auto_delete
    assert 60 == backend.binding.expires
    assert 2 == backend.delivery_mode
    assert backend.thread_safe


def reply(arrived: float, *, ready: bool = True) -> Reply:
    """A reply that came at some time."""
    return Reply(b"{}", "application/json", "utf-8", ready, arrived)


def test_the_inbox_is_bounded_by_number_and_age() -> None:
    """Unread results are kept up to a number and an age; what was dropped is known to be gone."""
    inbox = ReplyInbox(expires=10, limit=100)
    for number in range(300):
        inbox.expect(f"{number}")
        inbox.put(f"{number}", reply(time.monotonic()))
    assert 100 == len(inbox)
    assert inbox.find("299") is not None
    assert inbox.find("0") is None
    assert inbox.gone("200") is False
    inbox.put("299-old", reply(time.monotonic() - 11))
    inbox.expect("late")
    inbox.put("late", reply(time.monotonic() + 11))
    assert 1 == len(inbox)
    assert inbox.gone("299")


def test_read_results_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read is kept for a while longer, for another look, but not for ever."""
    monkeypatch.setattr("qbridge.backends.rpc.inbox.KEPT_AFTER_READING", 10)
    inbox = ReplyInbox(expires=None, limit=1_000)
    for number in range(50):
        inbox.expect(f"{number}")
        inbox.put(f"{number}", reply(0.0))
        assert inbox.find(f"{number}", take=True) is not None
    assert 10 == len(inbox)
    assert inbox.gone("0")
    assert inbox.find("49") is not None
