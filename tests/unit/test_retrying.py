"""The next attempt on its way to the broker: what it carries, and what happens if the broker does not take it."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import Reject
from celery.exceptions import Retry as CeleryRetry
from kombu.exceptions import OperationalError

from qbridge import BrokerUnavailable, retrying
from qbridge.retrying import HEADER_ATTEMPTS_SINCE, HEADER_RETRY, History, hand_over, kept_headers
from qbridge.serialization.locked_messages import BROKERS, NOT_SIGNED


class Broker:
    """Refuses the next attempt a number of times."""

    def __init__(self, refusals: int, reason: Exception) -> None:
        self.refusals = refusals
        self.reason = reason
        self.countdowns: list[float] = []

    def __call__(self, countdown: float) -> None:
        self.countdowns.append(countdown)
        if len(self.countdowns) <= self.refusals:
            raise Reject(self.reason, requeue=False)
        raise CeleryRetry("sent")


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(retrying, "_REFUSED", 0.5)
    monkeypatch.setattr(retrying, "_AWAY", 0.25)
    monkeypatch.setattr(retrying, "_FIRST_PAUSE", 0.01)
    app = Celery("retrying", broker="memory://", set_as_current=False)
    return SimpleNamespace(app=app, name="shop.pay", request=SimpleNamespace(id="1", headers={}))


def test_a_refused_attempt_is_offered_again(task: Any) -> None:
    """Until the broker takes it; its time stays the same."""
    broker = Broker(3, OperationalError("refused"))
    with pytest.raises(CeleryRetry):
        hand_over(task, 10.0, broker, late=True)
    assert len(broker.countdowns) == 4
    assert broker.countdowns[-1] < broker.countdowns[0] <= 10


def test_a_broker_that_does_not_take_it_gets_the_old_message_back(task: Any) -> None:
    """After a while, and sooner where the connection is gone: then the message is on its way already."""
    refused, away = Broker(999, OperationalError("refused")), Broker(999, ConnectionResetError("gone"))
    for broker in (refused, away):
        with pytest.raises(Reject) as caught:
            hand_over(task, 0.0, broker, late=True)
        assert caught.value.requeue
    assert len(away.countdowns) < len(refused.countdowns)


def test_without_a_message_that_could_go_back_the_failure_says_so(task: Any) -> None:
    """Under at_most_once the message is acknowledged before the run."""
    with pytest.raises(BrokerUnavailable, match=r"shop\.pay\[1\].*its last attempt"):
        hand_over(task, 0.0, Broker(999, OperationalError("refused")), late=False)


def test_a_message_that_no_broker_would_take_is_not_offered_again(task: Any) -> None:
    """What is wrong with it arrives as it is."""
    broker = Broker(999, TypeError("not JSON"))
    with pytest.raises(TypeError, match="not JSON"):
        hand_over(task, 0.0, broker, late=True)
    assert len(broker.countdowns) == 1


def test_the_story_is_read_from_the_message_and_goes_on_in_the_next() -> None:
    """Number, first time, time waited; the text of the last error is short."""
    first = datetime(2026, 1, 2, tzinfo=UTC)
    headers = {HEADER_ATTEMPTS_SINCE: first.isoformat(), HEADER_RETRY: {"idle": 2.5}}
    history = History.of(SimpleNamespace(headers=headers, retries=2), began=0.0)
    assert history == History(3, first.timestamp(), 2.5)
    following = history.headers_after(OSError("x" * 1000), 4)
    assert following[HEADER_ATTEMPTS_SINCE] == first.isoformat()
    assert following[HEADER_RETRY]["idle"] == 6.5
    assert len(following[HEADER_RETRY]["error"]) == 200


@pytest.mark.parametrize("told", [None, 5, "now", {"idle": "long"}, {"idle": -1}])
def test_headers_of_somebody_else_are_no_story(told: Any) -> None:
    """A message is never refused for them."""
    headers = {HEADER_ATTEMPTS_SINCE: told, HEADER_RETRY: told}
    assert History.of(SimpleNamespace(headers=headers, retries=None), began=7.0) == History(1, 7.0, 0.0)


def test_what_no_signature_covers_is_no_header_of_the_task() -> None:
    """Who may write to a broker, and has no key, told tasks what he liked in ``ctx.headers``."""
    added = {f"{prefix}a": "not signed" for prefix in BROKERS} | dict.fromkeys(NOT_SIGNED, "not signed")
    assert kept_headers({**added, "x-tenant": "signed"}) == {"x-tenant": "signed"}
