"""A rolling deploy that changes a task's arguments: producers first, or workers first, nothing is lost."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import chain

from qbridge import ArgumentsError, Bridge, Item, Retry, TaskContext, TaskFailed
from qbridge.testing.contracts.kit import Contract
from qbridge.testing.waiting import wait_until
from qbridge.versions import HEADER_SCHEMA

RETRY = Retry(on=ConnectionError, attempts=5, wait_initial=1, wait_jitter=0)


def before(bridge: Bridge, sick: Path | None = None) -> SimpleNamespace:
    """The code before the deploy: a square has one side."""

    @bridge.task(name="shop.paint", retry=RETRY)
    def paint(side: int) -> str:
        if sick is not None and sick.exists():
            raise ConnectionError("the printer is away")
        return f"old {side}x{side}"

    @bridge.task(name="shop.measure")
    def measure(number: int) -> int:
        return number + 1

    return SimpleNamespace(bridge=bridge, paint=paint, measure=measure)


def after(bridge: Bridge) -> SimpleNamespace:
    """The code after it: any rectangle, and a colour that callers have to give."""

    @bridge.task(name="shop.paint", version=2, retry=RETRY, context=True)
    def paint(ctx: TaskContext, width: int, height: int, colour: str) -> str:
        assert not [name for name in ctx.headers if name.startswith("qbridge")]
        return f"new {width}x{height} {colour}, attempt {ctx.attempt}"

    @paint.upcast(1)
    def paint_square(side: int) -> Item:
        return paint.item(side, side, colour="red")

    @bridge.task(name="shop.measure")
    def measure(number: int) -> int:
        return number + 1

    return SimpleNamespace(bridge=bridge, paint=paint, measure=measure)


def test_producers_first(contract: Contract, caplog: pytest.LogCaptureFixture) -> None:
    """Old workers leave calls of the new version to new ones, and go on with all else; no call is dead or misread."""
    old = before(contract.another_bridge(worker={"unknown_task_grace": 60}))
    new = after(contract.another_bridge())
    sent = [
        new.paint.delay(1, 2, colour="blue"),
        new.paint.using(countdown=1).delay(3, 4, colour="blue"),
        *new.paint.send_many([(11, 12, "blue")]),
        *new.bridge.send_many(new.paint.item(5, 6, colour="blue")),
        new.bridge.send("shop.paint", (7, 8), {"colour": "blue"}),
    ]
    with old.bridge.worker(pool="solo", queues=["default"]):
        wait_until(
            lambda: all(f"version 2 of the task shop.paint: [{one.id}]" in caplog.text for one in sent),
            20,
            what="the old worker to see all of them",
        )
        assert old.measure.delay(1).get(timeout=20) == 2
        assert new.measure.delay(1).get(timeout=20) == 2
        assert old.paint.delay(9).get(timeout=20) == "old 9x9"
        assert {one.state for one in sent} == {"PENDING"}
    with new.bridge.worker(pool="thread", concurrency=2, queues=["default"]):
        told = [one.get(timeout=40) for one in sent]
    assert told == [f"new {size} blue, attempt 1" for size in ("1x2", "3x4", "11x12", "5x6", "7x8")]
    assert contract.bridge.dead_letters.list() == []


def test_workers_first(contract: Contract, tmp_path: Path) -> None:
    """New workers read old calls by the upcaster: waiting ones, delayed ones, retries, steps of a chain."""
    sick = tmp_path / "sick"
    sick.touch()
    old = before(contract.another_bridge(), sick)
    new = after(contract.another_bridge())
    failed_before = old.paint.delay(1)
    with old.bridge.worker(pool="solo", queues=["default"]):
        wait_until(lambda: failed_before.retrying() is not None, 20, what="the first attempt to fail")
    sent = [old.paint.delay(2), old.paint.using(countdown=1).delay(3), *old.paint.send_many([(4,)])]
    celery_tasks = old.bridge.celery.tasks
    steps = chain(celery_tasks["shop.measure"].s(4), celery_tasks["shop.paint"].s())
    chained = contract.bridge.result(steps.apply_async().id)
    with new.bridge.worker(pool="thread", concurrency=2, queues=["default"]):
        told = [one.get(timeout=40) for one in sent]
        assert told == [f"new {side}x{side} red, attempt 1" for side in (2, 3, 4)]
        assert chained.get(timeout=40) == "new 5x5 red, attempt 1"
        again = failed_before.get(timeout=40)
        assert again.startswith("new 1x1 red, attempt ")
        assert not again.endswith("attempt 1")
    assert contract.bridge.dead_letters.list() == []


def test_a_version_that_no_worker_has_is_replayed_after_the_deploy(contract: Contract) -> None:
    """Its caller is told which version there is and which was sent; the dead letter keeps both, and the call."""
    old, new = before(contract.another_bridge()), after(contract.another_bridge())
    sent = new.paint.using(task_id="of-the-new").delay(1, 2, colour="blue")
    said = (
        f"version 2 with schema {new.paint.fingerprint}, this worker has version 1 with schema {old.paint.fingerprint}"
    )
    with (
        old.bridge.worker(pool="solo", queues=["default"]),
        pytest.raises(ArgumentsError, match=f"{said}.*Start workers that have version 2"),
    ):
        sent.get(timeout=20)
    letter = contract.dead_letter_of("of-the-new")
    assert (letter.reason, letter.version, letter.fingerprint) == ("unknown_task", 2, new.paint.fingerprint)
    assert said in letter.error_text
    assert [one.id for one in contract.bridge.dead_letters.replay(letter.id)] == [letter.id]
    with new.bridge.worker(pool="solo", queues=["default"]):
        assert contract.bridge.result("of-the-new", str).get(timeout=20) == "new 1x2 blue, attempt 1"


def test_an_old_call_that_no_upcaster_takes(contract: Contract) -> None:
    """It runs if it fits; else its dead letter says what is missing, and can be replayed when that is there."""
    old, new = before(contract.another_bridge()), contract.another_bridge()

    @new.task(name="shop.paint", version=2)
    def paint(side: int, height: int | None = None) -> str:
        return f"new {side}x{height or side}"

    @new.task(name="shop.measure", version=2)
    def measure(text: str) -> str:
        return text

    fits, misfit = old.paint.delay(1), old.measure.delay(1)
    with new.worker(pool="solo", queues=["default"]):
        assert contract.bridge.result(fits.id, str).get(timeout=20) == "new 1x1"
        with pytest.raises(ArgumentsError, match=r"sent as version 1.*Write @measure.upcast\(1\)"):
            misfit.get(timeout=20)
    letter = contract.dead_letter_of(misfit.id)
    assert (letter.reason, letter.version, letter.fingerprint) == ("invalid", 1, old.measure.fingerprint)
    fixed = contract.another_bridge()

    @fixed.task(name="shop.measure", version=2)
    def measure_text(text: str) -> str:
        return text

    @measure_text.upcast(1)
    def measure_number(number: int) -> Item:
        return measure_text.item(f"number {number}")

    contract.bridge.dead_letters.replay(letter.id)
    with fixed.worker(pool="solo", queues=["default"]):
        assert contract.bridge.result(misfit.id, str).get(timeout=20) == "number 1"


def test_what_an_upcaster_raises_is_tried_again(contract: Contract) -> None:
    """As the task's own errors are: it may ask a service that is away."""
    old, new = before(contract.another_bridge()), contract.another_bridge()
    seen: list[dict[str, Any]] = []

    @new.task(name="shop.paint", version=2, retry=RETRY)
    def paint(width: int, height: int) -> str:
        return f"new {width}x{height}"

    @paint.upcast(1)
    def paint_square(side: int) -> Item:
        seen.append(dict(new.celery.tasks["shop.paint"].request.headers or {}))
        if len(seen) == 1:
            raise ConnectionError("the list of sizes is away")
        return paint.item(side, side)

    sent = old.paint.delay(5)
    with new.worker(pool="thread", concurrency=1, queues=["default"]):
        assert contract.bridge.result(sent.id, str).get(timeout=20) == "new 5x5"
    assert [headers[HEADER_SCHEMA] for headers in seen] == [f"1:{old.paint.fingerprint}"] * 2


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_what_an_upcaster_raises_is_tried_again_in_the_slot(contract: Contract, kind: str) -> None:
    """With ``where="worker"`` too, counted together with the attempts of the task; what does not fit is not."""
    old, new = before(contract.another_bridge()), contract.another_bridge()
    seen: list[int] = []
    policy = Retry(on=ConnectionError, attempts=3, wait_initial=0.05, wait_jitter=0, where="worker")

    def paint_now(ctx: TaskContext, width: int, height: int) -> str:
        if ctx.attempt == 2:
            raise ConnectionError("the brush is away")
        return f"new {width}x{height}, attempt {ctx.attempt}"

    async def paint_soon(ctx: TaskContext, width: int, height: int) -> str:
        return paint_now(ctx, width, height)

    declare = new.task(name="shop.paint", version=2, retry=policy, context=True)
    paint: Any = declare(paint_now) if kind == "def" else declare(paint_soon)

    @paint.upcast(1)
    def paint_square(side: int) -> Item:
        seen.append(side)
        if side < 0 or len(seen) == 1:
            raise ConnectionError("the list of sizes is away")
        item: Item = paint.item(side, side)
        return item

    sent, in_vain = old.paint.delay(5), old.paint.delay(-1)
    misfit = contract.bridge.send("shop.paint", ("wide", "high"))
    with new.worker(pool="solo", queues=["default"]):
        assert contract.bridge.result(sent.id, str).get(timeout=20) == "new 5x5, attempt 3"
        for one, error in ((in_vain, ConnectionError), (misfit, ArgumentsError)):
            with pytest.raises(error):
                contract.bridge.result(one.id, str).get(timeout=20)
    assert seen == [5, 5, -1, -1, -1]
    found = {letter.task_id: (letter.reason, letter.attempts) for letter in contract.bridge.dead_letters.list()}
    assert found == {in_vain.id: ("exhausted", 3), misfit.id: ("invalid", 1)}


@pytest.mark.parametrize("pool", ["thread", "solo"])
def test_an_upcaster_that_exits_fails_its_task_only(contract: Contract, pool: Any) -> None:
    """As a task that does: the caller is told, and the worker goes on."""
    old, new = before(contract.another_bridge()), after(contract.another_bridge())

    @old.bridge.task(name="shop.exits")
    def old_exits(side: int) -> int:
        return side

    @new.bridge.task(name="shop.exits", version=2)
    def exits(width: int, height: int) -> int:
        return width

    @exits.upcast(1)
    def exits_square(side: int) -> Item:
        sys.exit("wrong usage")

    sent = old_exits.delay(5)
    with new.bridge.worker(pool=pool, concurrency=1, queues=["default"]):
        with pytest.raises(TaskFailed, match="wrong usage"):
            contract.bridge.result(sent.id, int).get(timeout=20)
        assert new.measure.delay(1).get(timeout=20) == 2
