"""Row 11: an unknown task, while the result backend is away: what becomes of the worker?"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from kombu import Exchange, Queue
from tests.hazards.kit import Place

from qbridge.testing.contract_app.tasks import runs
from qbridge.testing.waiting import wait_until

NOWHERE = "redis://127.0.0.1:9/0"
UNKNOWN = {"task": "nobody.knows", "id": "1"}


def ran(path: Path) -> bool:
    """Whether the task has run."""
    return bool(runs(path))


def put_unknown(app: object, queue: Queue) -> None:
    """Send a task that nobody has."""
    with app.producer_or_acquire() as producer:  # type: ignore[attr-defined]  # Celery's
        producer.publish(
            b"[[], {}, {}]", exchange=queue.exchange, routing_key=queue.routing_key, declare=[queue], headers=UNKNOWN,
            content_type="application/json", content_encoding="utf-8", retry=False,
        )  # fmt: skip


def test_plain_celery_ends_with_the_result_backend(on_rabbitmq: Place) -> None:
    """It cannot store that the task is unknown, and the error ends the program."""
    plain = on_rabbitmq.plain(results=NOWHERE, result_backend_transport_options={"retry_policy": {"timeout": 1.0}})
    put_unknown(plain.app, Queue("celery", Exchange("celery", type="direct"), routing_key="celery"))
    with plain.worker("solo") as worker:
        wait_until(lambda: worker.process.exit_code() is not None, 60, what="the worker to end")


@pytest.mark.timeout(120)
def test_ours_keeps_the_message_and_goes_on(on_rabbitmq: Place) -> None:
    """The message is a dead letter before anything is stored, and the next task runs."""
    ours, path = on_rabbitmq.ours(), on_rabbitmq.path()
    put_unknown(ours.bridge.celery, ours.bridge.celery.amqp.queues["default"])
    ours.tasks.silent.delay(str(path))
    with ours.worker_of("default", pool="solo", settings={"QBRIDGE_RESULTS": NOWHERE}) as worker:
        wait_until(partial(ran, path), 90, what="the next task to run")
        [letter] = ours.bridge.dead_letters.list()
        assert worker.process.exit_code() is None
    assert letter.reason == "unknown_task"
