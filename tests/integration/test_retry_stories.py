"""Does a retry keep its count, its wait and its deadline, wherever its attempts run; can callers see it?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from tenacity import (
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    stop_any,
    stop_before_delay,
    wait_chain,
    wait_fixed,
)

from qbridge import Bridge, BridgeConfig, Retry, TaskContext, TaskRevoked
from qbridge.testing.waiting import wait_until


@pytest.fixture
def bridge(tmp_path: Path) -> Iterator[Bridge]:
    """A bridge on files."""
    config = BridgeConfig(broker=f"embedded://{tmp_path}/b.db", results=f"db+sqlite:///{tmp_path}/r.db")
    with Bridge(config) as made:
        yield made


def test_tenacitys_strategies_see_one_story_across_messages(bridge: Bridge) -> None:
    """Each attempt is a message; waits, the number and the time since the first come from it."""
    began: list[float] = []
    idle: list[float] = []

    def note_idle(state: RetryCallState) -> bool:
        idle.append(state.idle_for)
        return False

    policy = Retry.from_tenacity(
        retry=retry_if_exception_type(OSError),
        stop=stop_any(note_idle, stop_after_attempt(4), stop_before_delay(60)),
        wait=wait_chain(wait_fixed(0.1), wait_fixed(0.4), wait_fixed(0.2)),
    )

    @bridge.task(context=True, retry=policy)
    def fragile(ctx: TaskContext) -> list[int]:
        began.append(time.monotonic())
        raise OSError(ctx.attempt)

    assert not idle, "the declaration has asked"
    with bridge.worker(pool="solo"), pytest.raises(OSError, match="4"):
        fragile.delay().get(timeout=30)
    waits = [later - earlier for earlier, later in pairwise(began)]
    assert len(waits) == 3
    assert waits[0] >= 0.1
    assert waits[1] >= 0.4
    assert waits[2] >= 0.2
    assert idle == pytest.approx([0, 0.1, 0.5, 0.7])


def test_a_waiting_retry_is_visible(bridge: Bridge) -> None:
    """State RETRY with the number of the attempt, the next time and the error; plain Celery reads the error too."""

    @bridge.task(retry=Retry(on=OSError, attempts=2, wait_initial=30, wait_jitter=0))
    def fragile() -> None:
        raise OSError("no route")

    with bridge.worker(pool="solo"):
        result = fragile.delay()
        wait_until(lambda: result.state == "RETRY", 20, what="the retry")
        told = result.retrying()
        assert told is not None
        assert told.attempt == 1
        assert "OSError: no route" in told.error
        assert timedelta(seconds=20) < told.next_at - datetime.now(UTC) <= timedelta(seconds=30)
        plain = bridge.celery.AsyncResult(result.id)
        assert plain.state == "RETRY"
        assert isinstance(plain.result, OSError)
        assert result.result is None


def test_where_worker_tries_again_in_the_slot(bridge: Bridge) -> None:
    """No message, no state RETRY; the context counts, and the last error arrives."""
    attempts: list[int] = []

    @bridge.task(context=True, retry=Retry(on=OSError, attempts=3, wait_initial=0.05, wait_jitter=0, where="worker"))
    def fragile(ctx: TaskContext) -> None:
        attempts.append(ctx.attempt)
        raise ConnectionError(f"again, {ctx.is_last_attempt}")

    with bridge.worker(pool="solo"), pytest.raises(ConnectionError, match="again, True"):
        fragile.delay().get(timeout=30)
    assert attempts == [1, 2, 3]


def test_an_async_task_waits_in_its_slot_without_holding_the_loop(bridge: Bridge) -> None:
    """Another async task runs on the same loop meanwhile."""

    @bridge.task(
        context=True, retry=Retry(on=OSError, attempts=2, wait_initial=1.5, wait_jitter=0, where="worker"), name="slow"
    )
    async def slow(ctx: TaskContext) -> float:
        await asyncio.sleep(0)
        if ctx.attempt == 1:
            raise OSError
        return time.monotonic()

    @bridge.task(name="quick")
    async def quick() -> float:
        return time.monotonic()

    with bridge.worker(pool="thread", concurrency=2):
        first, second = slow.delay(), quick.delay()
        assert second.get(timeout=30) < first.get(timeout=30)


def test_an_async_task_can_ask_for_another_attempt(bridge: Bridge) -> None:
    """Its context knows the message, on the loop too."""

    @bridge.task(context=True)
    async def ask(ctx: TaskContext) -> int:
        ctx.progress(1, 2)
        if ctx.attempt < 3:
            ctx.retry(after=0.01)
        return ctx.attempt

    with bridge.worker(pool="thread", concurrency=1):
        assert ask.delay().get(timeout=30) == 3


def test_a_task_past_its_deadline_is_not_run(bridge: Bridge) -> None:
    """Its result says REVOKED."""
    ran: list[int] = []

    @bridge.task
    def late() -> None:
        ran.append(1)

    result = late.using(deadline=timedelta(seconds=0.01)).delay()
    time.sleep(0.05)  # the deadline has to pass
    with bridge.worker(pool="solo"), pytest.raises(TaskRevoked):
        result.get(timeout=30)
    assert ran == []
    assert result.state == "REVOKED"


def test_what_a_task_sends_inherits_its_deadline(bridge: Bridge) -> None:
    """An earlier one of its own counts, a later one does not."""

    @bridge.task(context=True)
    def child(ctx: TaskContext) -> str:
        return str(ctx.deadline)

    @bridge.task(context=True)
    def parent(ctx: TaskContext) -> list[str]:
        assert ctx.deadline is not None
        options = [{}, {"deadline": timedelta(days=1)}, {"deadline": timedelta(seconds=30)}]
        return [child.using(**each).delay().id for each in options] + [str(ctx.deadline)]

    @bridge.task(context=True)
    async def async_parent(ctx: TaskContext) -> str:
        return (await child.adelay()).id

    due = datetime.now(UTC) + timedelta(seconds=60)
    with bridge.worker(pool="thread", concurrency=2):
        *ids, own = parent.using(deadline=due).delay().get(timeout=30)
        found = [bridge.result(task_id, child).get(timeout=30) for task_id in ids]
        assert own == str(due)
        assert found[:2] == [own, own]
        assert found[2] < own
        task_id = async_parent.using(deadline=due).delay().get(timeout=30)
        assert bridge.result(task_id, child).get(timeout=30) == own
        assert child.delay().get(timeout=30) == "None"


def test_no_attempt_is_scheduled_past_the_deadline(bridge: Bridge) -> None:
    """The error arrives at once instead; ``ctx.check()`` ends a run that is past it, for good."""
    runs: list[int] = []

    @bridge.task(context=True, retry=Retry(on=(OSError, TaskRevoked), attempts=5, wait_initial=5, wait_jitter=0))
    def fragile(ctx: TaskContext, long: bool) -> None:
        runs.append(ctx.attempt)
        if long:
            wait_until(lambda: datetime.now(UTC) > (ctx.deadline or datetime.now(UTC)), 20, what="the deadline")
            ctx.check()
        raise OSError("no route")

    with bridge.worker(pool="solo"):
        began = time.monotonic()
        with pytest.raises(OSError, match="no route"):
            fragile.using(deadline=timedelta(seconds=4)).delay(False).get(timeout=30)
        assert time.monotonic() - began < 4
        with pytest.raises(TaskRevoked, match="deadline"):
            fragile.using(deadline=timedelta(seconds=1)).delay(True).get(timeout=30)
    assert runs == [1, 1]
