"""Workers inside an application's process: several of them, and what their tasks were declared with."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from qbridge import Bridge, BridgeConfig, Retry, Task, TaskContext, TaskRevoked
from qbridge.testing.waiting import wait_until


def config_on(place: Path) -> BridgeConfig:
    """A bridge on files."""
    return BridgeConfig(broker=f"embedded://{place}/b.db", results=f"db+sqlite:///{place}/r.db")


def adding(bridge: Bridge) -> Task[[int, int], int]:
    """One task."""

    @bridge.task
    def add(a: int, b: int) -> int:
        return a + b

    return add


def test_the_end_of_one_worker_leaves_the_other_at_work(tmp_path: Path) -> None:
    """Each has an event loop of its own, in whichever order they end."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with Bridge(config_on(tmp_path / "one")) as one, Bridge(config_on(tmp_path / "two")) as two:
        first, second = adding(one), adding(two)
        with two.worker():
            with one.worker():
                assert (first.delay(1, 2).get(timeout=20), second.delay(3, 4).get(timeout=20)) == (3, 7)
            assert second.delay(5, 6).get(timeout=20) == 11
            with one.worker():
                assert first.delay(1, 2).get(timeout=20) == 3


def test_a_task_declared_with_msgpack_is_read_by_a_worker_of_a_json_bridge(tmp_path: Path) -> None:
    """Its worker refused its messages: the bridge accepts JSON only."""
    with Bridge(config_on(tmp_path)) as bridge:

        @bridge.task(serialization="msgpack")
        def echo(data: bytes) -> bytes:
            return data

        add = adding(bridge)
        with bridge.worker():
            assert echo.delay(b"\xff\x00").get(timeout=20) == b"\xff\x00"
            assert add.delay(1, 2).get(timeout=20) == 3


@pytest.mark.parametrize("is_async", [False, True], ids=["def", "async def"])
def test_a_running_task_ends_when_it_is_revoked(tmp_path: Path, is_async: bool) -> None:
    """On the thread pool ``ctx.check()`` sees it, for good: no retry follows, and another task goes on."""
    begun: list[str] = []
    policy = Retry(on=Exception, attempts=3, wait_initial=0.1, wait_jitter=0)
    with Bridge(config_on(tmp_path)) as bridge:

        @bridge.task(context=True, retry=policy)
        def crunch(ctx: TaskContext, seconds: float) -> str:
            begun.append(ctx.task_id)
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                ctx.check()
                time.sleep(0.02)
            return "done"

        @bridge.task(context=True, retry=policy)
        async def acrunch(ctx: TaskContext, seconds: float) -> str:
            begun.append(ctx.task_id)
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                ctx.check()
                await asyncio.sleep(0.02)
            return "done"

        send = acrunch.delay if is_async else crunch.delay
        with bridge.worker(pool="thread", concurrency=2):
            revoked, other = send(30.0), send(2.0)
            wait_until(lambda: len(begun) == 2, 20, what="both tasks to run")
            revoked.revoke()
            with pytest.raises(TaskRevoked, match="revoked while it ran"):
                revoked.get(timeout=20)
            assert other.get(timeout=20) == "done"
            assert sorted([revoked.id, other.id]) == sorted(begun)
