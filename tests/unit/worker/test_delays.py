"""Which messages does a worker give back until they are due, and what if it cannot?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, Self

import pytest
from celery.utils.collections import LimitedSet
from kombu.exceptions import OperationalError

from qbridge.worker.delays import Delays
from qbridge.worker.revocations import Revocations


class Message:
    """A message of a task as a consumer gets it."""

    def __init__(self, seconds: float | None, **headers: Any) -> None:
        eta = None if seconds is None else (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
        self.headers: dict[str, Any] = {"task": "t", "id": "1", "eta": eta, **headers}
        self.delivery_info = {"exchange": "default", "routing_key": "default"}
        self.properties = {"correlation_id": "1", "reply_to": "me", "delivery_tag": 7, "expiration": "5"}
        self.content_type, self.content_encoding = "application/json", "utf-8"
        self.body = b"[[], {}, {}]"
        self.channel = SimpleNamespace(connection=object())
        self.acknowledged = False

    def ack_log_error(self, logger: Any, errors: Any) -> None:
        self.acknowledged = True


class Worker:
    """As much of a worker as matters here."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.again: list[Any] = []
        self.error: Exception | None = None
        self.max_payload_bytes: int | None = None
        self.timezone = UTC
        self.app = self
        self.connection = SimpleNamespace(transport=SimpleNamespace(driver_type="redis"))
        self.controller = SimpleNamespace(state=SimpleNamespace(revoked=LimitedSet()))
        self.revocations = Revocations()
        self.timer = SimpleNamespace(call_after=lambda seconds, function, args: self.again.append((function, args)))
        self.connection_errors = (OSError,)

    def producer_or_acquire(self) -> Worker:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def publish(self, body: Any, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.sent.append({"body": body, **options})


@pytest.fixture
def worker() -> Iterator[Worker]:
    return Worker()


def put_back(worker: Worker, message: Message) -> bool:
    return Delays(worker).put_back(message, "again")


def test_a_task_that_is_due_in_a_while_is_sent_again_and_then_acknowledged(worker: Worker) -> None:
    """The copy has all that identifies it, and nothing of the delivery."""
    message = Message(60, tenant="a", **{"x-death": [{"queue": "celery_delayed_5"}]})
    assert put_back(worker, message)
    assert message.acknowledged
    [sent] = worker.sent
    assert sent["headers"] == {"task": "t", "id": "1", "eta": message.headers["eta"], "tenant": "a"}
    assert (sent["exchange"], sent["routing_key"]) == ("default", "default")
    assert (sent["body"], sent["content_type"], sent["content_encoding"]) == (message.body, "application/json", "utf-8")
    assert (sent["correlation_id"], sent["reply_to"]) == ("1", "me")
    assert not {"delivery_tag", "expiration"} & set(sent)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Message(None),
        lambda: Message(1),
        lambda: Message(60, task=None, id=None, eta="soon"),
        lambda: Message(60, id="revoked"),
        lambda: Message(60, id="learnt"),
        lambda: Message(60, expires=(datetime.now(UTC) - timedelta(seconds=1)).isoformat()),
    ],
    ids=["without an ETA", "due in a moment", "no time", "revoked", "revoked once", "expired"],
)
def test_others_go_on_as_they_are(worker: Worker, make: Callable[[], Message]) -> None:
    """What is held for a moment, and what Celery refuses at once, is not sent around."""
    message = make()
    worker.controller.state.revoked.add("revoked")
    worker.revocations.learn(["learnt"])
    headers = dict(message.headers)
    assert not put_back(worker, message)
    assert message.headers == headers
    assert not worker.sent
    assert not message.acknowledged


def test_a_task_that_is_due_runs_without_a_timer(worker: Worker) -> None:
    """Celery would let each raise the prefetch count for a moment."""
    message = Message(-1)
    assert not put_back(worker, message)
    assert message.headers["eta"] is None


def test_an_eta_without_a_zone_is_in_the_apps_and_leaves_with_one(worker: Worker) -> None:
    """So that a broker that keeps delays need not know the app's time zone."""
    moment = datetime.now(UTC) + timedelta(seconds=60)
    assert put_back(worker, Message(None, eta=moment.replace(tzinfo=None).isoformat()))
    assert worker.sent[0]["headers"]["eta"] == moment.isoformat()


def test_what_the_broker_does_not_take_is_kept_and_tried_again(worker: Worker) -> None:
    """Unacknowledged: whatever happens, the broker still has it."""
    worker.error = OperationalError("memory alarm")
    message = Message(60)
    assert put_back(worker, message)
    assert not message.acknowledged
    assert worker.again == [("again", (message,))]


def test_a_message_of_a_lost_connection_is_not_sent_again(worker: Worker) -> None:
    """The broker delivers it again; a copy would be a second run."""
    message = Message(60)
    message.channel.connection = None
    assert put_back(worker, message)
    assert not worker.sent
