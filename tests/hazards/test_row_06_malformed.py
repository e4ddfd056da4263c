"""Rows 6, 7 and 51: what becomes of messages that a worker cannot handle, and of the worker?"""

from __future__ import annotations

import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import Exchange, Queue
from tests.hazards.kit import Place
from tests.raw_messages import UNREADABLE, Raw

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.contracts.kit import WorkerProcess
from qbridge.testing.servers.absence import ServerFailed
from qbridge.testing.waiting import wait_until

JSON = "application/json"
FATAL: dict[str, tuple[bytes, dict[str, Any]]] = {
    "no id": (b"[[], {}, {}]", {"task": "plain.note"}),
    "unknown without an id": (b"[[], {}, {}]", {"task": "nobody.knows"}),
    "an object": (b'{"a": 1}', {"task": "plain.note", "id": "1"}),
    "a number": (b"5", {"task": "plain.note", "id": "1"}),
}


class Touch:
    """Runs code in whoever unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def put(app: Celery, queue: Queue, body: bytes, headers: dict[str, Any], content_type: str = JSON) -> None:
    """Send what no producer makes."""
    with app.producer_or_acquire() as producer:
        producer.publish(
            body, exchange=queue.exchange, routing_key=queue.routing_key, declare=[queue], headers=headers,
            content_type=content_type, content_encoding="binary", retry=False,
        )  # fmt: skip


def ended(worker: WorkerProcess) -> bool:
    """Whether the process is gone."""
    return worker.process.exit_code() is not None


def see_a_worker_end(plain: Any) -> None:
    """Start one, and wait until it is gone; it may be before it was ready."""
    try:
        with plain.worker("solo") as worker:
            wait_until(lambda: ended(worker), 20, what="the worker to end")
    except ServerFailed as error:
        assert "the worker ended with code" in str(error)  # noqa: PT017


CELERY = Queue("celery", Exchange("celery", type="direct"), routing_key="celery")


@pytest.mark.parametrize("shape", list(FATAL))
def test_plain_celery_ends_at_a_malformed_message_worker_after_worker(on_rabbitmq: Place, shape: str) -> None:
    """The message is not acknowledged, so it kills the next worker too."""
    plain = on_rabbitmq.plain()
    put(plain.app, CELERY, *FATAL[shape])
    for _ in range(2):
        see_a_worker_end(plain)


def test_plain_celery_ends_at_properties_that_cannot_be_read(on_rabbitmq: Place) -> None:
    """What py-amqp raises while it takes the message from the socket ends the worker, and then the next one.

    What qbridge does with all of ``UNREADABLE`` is in ``tests/integration/test_rabbitmq_unreadable.py``.
    """
    plain = on_rabbitmq.plain()
    message = Raw(b"[[], {}, {}]")
    message.raw = UNREADABLE["a content type that is no text"]
    with plain.app.connection_for_write() as connection:
        CELERY(connection.default_channel).declare()
        connection.default_channel.basic_publish(message, exchange="", routing_key=CELERY.name)
    for _ in range(2):
        see_a_worker_end(plain)


def test_plain_celery_deletes_what_it_cannot_handle(on_rabbitmq: Place) -> None:
    """Unknown, undecodable, of a foreign type: acknowledged or rejected, and gone."""
    plain = on_rabbitmq.plain()
    put(plain.app, CELERY, b"[[], {}, {}]", {"task": "nobody.knows", "id": "1"})
    put(plain.app, CELERY, b"\xff\x00{", {"task": "plain.note", "id": "1"})
    put(plain.app, CELERY, b"<a/>", {"other": "kept"}, "text/xml")
    path = on_rabbitmq.path()
    plain.send("note", path, "after")
    with plain.worker("solo") as worker:
        wait_until(lambda: runs(path), 20, what="the good task to run")
        worker.process.end(signal.SIGTERM, 20)  # in order: the good task is acknowledged
    with plain.app.connection_for_read() as connection:
        for name in ("celery", "celery.dead"):
            try:
                left = connection.channel().queue_declare(queue=name, passive=True).message_count
            except Exception:
                left = 0
            assert left == 0


@pytest.mark.parametrize("broker", ["rabbitmq", "redis"])
def test_ours_keeps_each_of_them_and_goes_on(request: pytest.FixtureRequest, broker: str, tmp_path: Path) -> None:
    """One worker, all shapes, then a good task: it runs, and there is a dead letter for each; a pickle stays closed."""
    place: Place = request.getfixturevalue(f"on_{broker}")
    ours, opened = place.ours(), tmp_path / "opened"
    app = ours.bridge.celery
    queue = app.amqp.queues["default"]
    for body, headers in FATAL.values():
        put(app, queue, body, headers)
    put(app, queue, b"[[], {}, {}]", {"task": "nobody.knows", "id": "1"})
    put(app, queue, b"\xff\x00{", {"task": "plain.note", "id": "1"})
    put(app, queue, b"<a/>", {"other": "kept"}, "text/xml")
    put(app, queue, pickle.dumps(Touch(opened)), {"task": "a", "id": "1"}, "application/x-python-serialize")
    with ours.worker_of("default", pool="solo") as worker:
        assert ours.tasks.note.delay(str(place.path()), "after").get(timeout=20) == "after"
        wait_until(lambda: len(ours.bridge.dead_letters.list()) == 8, 20, what="the dead letters")
        assert not ended(worker)
    assert not opened.exists()
