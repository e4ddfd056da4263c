"""How often a task is tried, and how long: what its policy says and what it asks for itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import MaxRetriesExceededError

from qbridge import Bridge, BridgeConfig, Retry, TaskContext
from qbridge.backends.database.backend import DatabaseBackend
from qbridge.testing.servers import RabbitMQServer
from qbridge.testing.waiting import wait_until


@pytest.fixture
def bridge(tmp_path: Path) -> Iterator[Bridge]:
    """A bridge on files."""
    config = BridgeConfig(broker=f"embedded://{tmp_path}/b.db", results=f"db+sqlite:///{tmp_path}/r.db")
    with Bridge(config) as made:
        yield made


def test_timeout_counts_from_the_start_of_the_first_run(bridge: Bridge) -> None:
    """The time that the first run takes is a part of it."""
    began: list[float] = []

    @bridge.task(retry=Retry(on=ValueError, attempts=5, timeout=0.3, wait_initial=0.01, wait_jitter=0))
    def slow() -> None:
        began.append(time.monotonic())
        time.sleep(0.4)
        raise ValueError("too slow")

    with bridge.worker(), pytest.raises(ValueError, match="too slow"):
        slow.delay().get(timeout=20)
    assert len(began) == 1


def test_a_task_that_asks_for_another_run_gets_as_many_as_its_policy_has(bridge: Bridge) -> None:
    """And waits as long as the policy says, if it does not say itself."""
    began: list[float] = []

    @bridge.task(context=True, retry=Retry(on=ValueError, attempts=3, wait_initial=0.3, wait_exp_base=1, wait_jitter=0))
    def never_content(ctx: TaskContext, after: float | None) -> None:
        began.append(time.monotonic())
        ctx.retry(after=after)

    with bridge.worker():
        with pytest.raises(MaxRetriesExceededError, match="attempt 3, its last"):
            never_content.delay(None).get(timeout=20)
        first, second, third = began
        assert second - first >= 0.3
        assert third - second >= 0.3
        began.clear()
        with pytest.raises(MaxRetriesExceededError):
            never_content.delay(0.01).get(timeout=20)
        assert began[-1] - began[0] < 0.6


def test_the_outcome_of_a_fast_attempt_is_not_covered_by_the_state_of_the_one_before(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next attempt may end before a slow result backend has taken that there will be one."""
    store = DatabaseBackend._store_result

    def slowly(self: Any, task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> None:
        if state == "RETRY":
            time.sleep(0.5)
        store(self, task_id, result, state, *args, **kwargs)

    monkeypatch.setattr(DatabaseBackend, "_store_result", slowly)

    @bridge.task(retry=Retry(on=ValueError, attempts=2, wait_initial=0.01, wait_jitter=0))
    def hopeless() -> None:
        raise ValueError("no")

    with bridge.worker(pool="thread", concurrency=2):
        result = hopeless.delay()
        with pytest.raises(ValueError, match="no"):
            result.get(timeout=20)
        wait_until(lambda: bridge.dead_letters.list() != [], 20, what="the dead letter")
    assert bridge.result(result.id).state == "FAILURE"


def test_a_delayed_message_keeps_its_queue_and_headers_through_attempts(qbridge_rabbitmq: RabbitMQServer) -> None:
    """RabbitMQ delays it on another exchange, under another key, and writes notes of its own into it."""
    with (
        qbridge_rabbitmq.fresh() as url,
        Bridge(BridgeConfig(broker=url, results="rpc://", queues=["reports.slow"])) as made,
    ):

        @made.task(context=True, retry=Retry(on=KeyError, wait_initial=1, wait_jitter=0))
        def look(ctx: TaskContext, until: int) -> tuple[int, str | None, dict[str, str]]:
            if ctx.attempt < until:
                raise KeyError
            return ctx.attempt, ctx.queue, dict(ctx.headers)

        with made.worker():
            delayed = look.using(queue="reports.slow", countdown=1.2, headers={"tenant": "a"})
            assert delayed.delay(1).get(timeout=20) == (1, "reports.slow", {"tenant": "a"})
            assert delayed.delay(3).get(timeout=20) == (3, "reports.slow", {"tenant": "a"})
