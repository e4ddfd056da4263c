"""Do the ways of plain Celery work with typed tasks: canvas, shared tasks, Celery's own test worker, beat, control?"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from celery import Task as CeleryTask
from celery import _state, chain, chord, group, shared_task
from celery.beat import Scheduler
from celery.contrib.testing import tasks as celery_tasks  # not its proxy: pytest would look into it, and make an app
from celery.contrib.testing.worker import start_worker
from pydantic import BaseModel

from qbridge import ArgumentsError, Bridge, BridgeConfig


class Visit(BaseModel):
    """A model that crosses the wire."""

    count: int
    when: datetime


VISIT = Visit(count=1, when=datetime(2020, 1, 1, tzinfo=UTC))


class Tripled(CeleryTask):  # type: ignore[misc]  # celery has no types
    """A task made of a class, in the old way."""

    name = "ways.tripled"

    def run(self, number: int) -> int:
        return number * 3


@pytest.fixture(
    scope="module",
    params=[
        ("rabbitmq", "redis", "safe"),
        ("rabbitmq", "rpc", "celery"),
        ("redis", "redis", "celery"),
        ("redis", "redis", "safe"),
    ],
    ids="-".join,
)
def bridge(request: pytest.FixtureRequest) -> Iterator[Bridge]:
    """A bridge whose app is run by Celery's own worker for tests."""
    broker, results, defaults = request.param
    with (
        _nothing_shared_stays(),
        request.getfixturevalue(f"qbridge_{broker}").fresh() as broker_url,
        request.getfixturevalue("qbridge_redis").fresh() as redis_url,
        Bridge(
            BridgeConfig(broker=broker_url, results=redis_url if results == "redis" else "rpc://", defaults=defaults)
        ) as made,
    ):
        _declare(made)
        with start_worker(made.celery, loglevel="ERROR", shutdown_timeout=30):
            yield made


@contextmanager
def _nothing_shared_stays() -> Iterator[None]:
    """Celery keeps shared tasks for every app of the process that is yet to come."""
    before = set(_state._on_app_finalizers)
    try:
        yield
    finally:
        _state._on_app_finalizers.intersection_update(before)


def _increased(number: int) -> int:
    """The shared task: one function however often it is declared, as apps that live on know it from the first time."""
    return number + 1


def _declare(bridge: Bridge) -> None:
    app = bridge.celery

    @bridge.task(name="ways.add")
    def add(first: int, second: int) -> int:
        return first + second

    @bridge.task(name="ways.total", queue="totals")
    def total(numbers: list[int]) -> int:
        return sum(numbers)

    @bridge.task(name="ways.visit")
    def visit(visit: Visit) -> Visit:
        return Visit(count=visit.count + 1, when=visit.when)

    shared_task(name="ways.shared")(_increased)

    @app.task(
        bind=True, name="ways.flaky", autoretry_for=(ValueError,), default_retry_delay=0, max_retries=3, shared=False
    )
    def flaky(self: Any, number: int) -> int:
        if self.request.retries < 2:
            raise ValueError
        return number

    app.register_task(Tripled())


def _s(bridge: Bridge, name: str, *args: Any) -> Any:
    return bridge.celery.signature(f"ways.{name}", args=args)


def test_typed_plain_shared_and_class_based_tasks_run(bridge: Bridge) -> None:
    """Side by side on one app."""
    app = bridge.celery
    assert 3 == bridge.tasks["ways.add"].delay(1, 2).get(timeout=20)
    assert "pong" == celery_tasks.ping.delay().get(timeout=20)
    for name, expected in (("shared", 6), ("flaky", 5), ("tripled", 15)):
        assert expected == app.tasks[f"ways.{name}"].delay(5).get(timeout=20)
    assert 3 == app.send_task("ways.add", (1, 2)).get(timeout=20)
    sent = app.tasks["ways.add"].apply_async((1, 2), countdown=0.2, link=_s(bridge, "shared"))
    assert 3 == app.AsyncResult(sent.id).get(timeout=20)


def test_typed_tasks_are_members_of_a_canvas(bridge: Bridge) -> None:
    """Results travel as JSON from task to task, models too."""
    app = bridge.celery
    assert 14 == chain(_s(bridge, "add", 1, 2), _s(bridge, "add", 10), _s(bridge, "shared")).delay().get(timeout=20)
    assert [0, 2, 4] == group(_s(bridge, "add", n, n) for n in range(3)).delay().get(timeout=20)
    visits = chain(app.tasks["ways.visit"].s(VISIT), app.tasks["ways.visit"].s())
    assert {"count": 3, "when": "2020-01-01T00:00:00Z"} == visits.delay().get(timeout=20)
    if app.conf.result_backend != "rpc://":  # which cannot count the members of a chord, as with plain Celery
        header = [_s(bridge, "add", 1, 1), _s(bridge, "shared", 3), _s(bridge, "tripled", 2)]
        assert 12 == chord(header, _s(bridge, "total")).delay().get(timeout=20)


def test_arguments_are_checked_in_celerys_ways_too(bridge: Bridge) -> None:
    """``apply_async`` of a typed task's Celery task takes Python values and JSON values, and refuses wrong ones."""
    task = bridge.celery.tasks["ways.visit"]
    for given in (VISIT, VISIT.model_dump(mode="json")):
        assert 2 == task.apply_async((given,)).get(timeout=20)["count"]
        assert 2 == task.apply((given,)).get()["count"]
    with pytest.raises(ArgumentsError):
        task.apply_async(("wrong",))


def test_beat_entries_of_typed_tasks_send_them(bridge: Bridge) -> None:
    """An entry made by ``add_periodic_task`` is sent by Celery's scheduler as it is."""
    app = bridge.celery
    app.add_periodic_task(3600.0, app.tasks["ways.add"].s(20, 1), name="hourly")
    scheduler = Scheduler(app=app, lazy=True)
    scheduler.update_from_dict(app.conf.beat_schedule)
    sent = scheduler.apply_async(scheduler.schedule["hourly"], advance=False)
    assert 21 == app.AsyncResult(sent.id).get(timeout=20)


def test_remote_control_works(bridge: Bridge) -> None:
    """Ping and inspect, also after a setting was assigned."""
    control = bridge.celery.control
    bridge.celery.conf.broker_pool_limit = 5
    for each in (control, bridge.celery.control):
        (answer,) = each.ping(timeout=2)
        assert [{"ok": "pong"}] == list(answer.values())
    (registered,) = bridge.celery.control.inspect(timeout=2).registered().values()
    assert {"ways.add", "ways.flaky", "ways.shared"} <= {name.split(" ")[0] for name in registered}


def test_each_bridge_sends_to_its_own_broker_from_any_thread(bridge: Bridge, tmp_path: Path) -> None:
    """Celery's current app of a new thread is whichever is the default one; typed tasks do not ask for it."""
    found: list[Any] = []

    with Bridge(BridgeConfig(broker=f"embedded://{tmp_path}/b.db", results=f"sqlite:///{tmp_path}/r.db")) as other:

        @other.task(name="ways.add")
        def add(first: int, second: int) -> int:
            return first * second

        def send() -> None:
            results = [each.tasks["ways.add"].delay(3, 4) for each in (bridge, other)]
            found.extend(result.get(timeout=20) for result in results)

        with other.worker(concurrency=1):
            thread = threading.Thread(target=send)
            thread.start()
            thread.join(40)
    assert [7, 12] == found
