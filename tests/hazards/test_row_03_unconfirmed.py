"""Row 3: a message that RabbitMQ does not take; does the caller learn of it?"""

from __future__ import annotations

from kombu import Exchange, Queue
from tests.hazards.kit import Place

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.servers import RabbitMQServer
from qbridge.testing.waiting import wait_until


def test_plain_celery_calls_a_lost_task_sent(on_rabbitmq: Place, qbridge_rabbitmq: RabbitMQServer) -> None:
    """Its queue was deleted meanwhile: the message goes nowhere, and the send succeeds."""
    plain, path = on_rabbitmq.plain(), on_rabbitmq.path()
    plain.send("note", path)
    qbridge_rabbitmq.api("DELETE", f"/api/queues/{on_rabbitmq.url.rpartition('/')[2]}/celery")
    plain.send("note", path)
    with plain.app.connection_for_read() as connection:
        queue = Queue("celery", Exchange("celery"), "celery")(connection.default_channel)
        assert queue.queue_declare().message_count == 0
    later = on_rabbitmq.path("later")
    plain.send("note", later)
    with plain.worker("solo"):
        wait_until(lambda: runs(later), 20, what="what was sent to a queue that is there")
    assert runs(path) == []


def test_ours_is_there(on_rabbitmq: Place, qbridge_rabbitmq: RabbitMQServer) -> None:
    """It is returned, its queue declared again, and the message confirmed."""
    ours, path = on_rabbitmq.ours(), on_rabbitmq.path()
    note = ours.tasks.note.using(queue="fragile")
    note.delay(str(path), "before")
    qbridge_rabbitmq.api("DELETE", f"/api/queues/{on_rabbitmq.url.rpartition('/')[2]}/fragile")
    note.delay(str(path), "after")
    with ours.worker_of("fragile", pool="solo"):
        wait_until(lambda: [word for _, _, word in runs(path)] == ["after"], 20, what="the second one")
