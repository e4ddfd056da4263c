"""The result hub without servers: SQLite, files, and backends that misbehave on purpose."""

# long because: one sentence per promise of the hub.

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import celery
import pytest
from tests.timers import acted, later

from qbridge.exceptions import PayloadError, ResultsUnavailable, ResultTimeout, ResultUnknown
from qbridge.result_hub import ResultHub
from qbridge.result_hub import hub as hub_module
from qbridge.testing.contracts.kit import longest_pause, unblocked
from qbridge.testing.waiting import wait_until

OURS = {"db": "qbridge.backends.database.backend:DatabaseBackend"}


def make_app(backend: str, **settings: Any) -> celery.Celery:
    """A Celery app whose database results are ours."""
    app = celery.Celery("t", broker="memory://", set_as_current=False)
    app.loader.override_backends = OURS
    app.conf.update(result_backend=backend, **settings)
    return app


@pytest.fixture(params=["db+sqlite", "file"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> celery.Celery:
    """An app whose results are polled: in one query for all, or one by one as any backend allows."""
    if request.param == "file":
        return make_app(f"file://{tmp_path}")
    return make_app(f"db+sqlite:///{tmp_path / 'results.db'}")


@pytest.fixture
def hub(app: celery.Celery) -> Iterator[ResultHub]:
    """A hub, closed at the end."""
    hub = ResultHub(app)
    yield hub
    acted()
    hub.close()


class Misbehaving:
    """A result backend that does what a test tells it."""

    def __init__(self) -> None:
        self.metas: dict[str, Any] = {}
        self.error: Exception | None = None
        self.thawed = threading.Event()
        self.thawed.set()
        self.questions: list[list[str]] = []

    def get_many_meta(self, task_ids: list[str], *, ready_only: bool) -> dict[str, Any]:
        self.questions.append(list(task_ids))
        self.thawed.wait(30)
        if self.error is not None:
            raise self.error
        return {task_id: self.metas[task_id] for task_id in task_ids if task_id in self.metas}

    def forget(self, task_id: str) -> None:
        self.thawed.wait(30)
        if self.error is not None:
            raise self.error
        self.metas.pop(task_id, None)


class FakeApp:
    """Has a backend, as an app."""

    def __init__(self) -> None:
        self.backend: Any = Misbehaving()


@pytest.fixture
def fake() -> Iterator[tuple[Misbehaving, ResultHub]]:
    """A backend that a test commands, and a hub on it."""
    app = FakeApp()
    hub = ResultHub(app)
    yield app.backend, hub
    app.backend.thawed.set()
    hub.close()


def success(value: Any) -> dict[str, Any]:
    """The meta of a task that ended well."""
    return {"status": "SUCCESS", "result": value, "result_json": value}


def test_a_result_that_is_there_is_returned_at_once(app: celery.Celery, hub: ResultHub) -> None:
    """A wait for a stored result does not wait, not even with a timeout of zero."""
    app.backend.store_result("1", {"a": 1}, "SUCCESS")
    assert {"a": 1} == hub.wait("1", 0)["result"]
    assert {"a": 1} == hub.wait("1", 10)["result"]


def test_a_result_that_comes_is_returned_soon(app: celery.Celery, hub: ResultHub) -> None:
    """A wait ends some milliseconds after the result is stored; states on the way do not end it."""
    app.backend.store_result("1", None, "STARTED")
    started = time.monotonic()
    later(0.1, app.backend.store_result, "1", 5, "SUCCESS")
    assert 5 == hub.wait("1", 10)["result"]
    assert 0.1 <= time.monotonic() - started < 1


def test_a_failure_is_returned_with_what_was_stored(hub: ResultHub, app: celery.Celery) -> None:
    """A failed task ends the wait with its meta; to raise is the reader's part."""
    app.backend.store_result("1", LookupError("no"), "FAILURE", traceback="Traceback …")
    meta = hub.wait("1", 10)
    assert ("FAILURE", "Traceback …") == (meta["status"], meta["traceback"])
    assert isinstance(meta["result"], LookupError)


def test_time_runs_out_as_said(hub: ResultHub) -> None:
    """Without a result the wait ends at its timeout with an error that names the task and the time."""
    started = time.monotonic()
    with pytest.raises(ResultTimeout, match=r"task never after 0\.3 s") as caught:
        hub.wait("never", 0.3)
    assert 0.3 <= time.monotonic() - started < 1.3
    assert "never" == caught.value.task_id


def test_a_look_returns_any_state(app: celery.Celery, hub: ResultHub) -> None:
    """``look`` reads the present meta, whatever it is, and PENDING where nothing is stored."""
    assert "PENDING" == hub.look("1")["status"]
    app.backend.store_result("1", {"done": 1}, "PROGRESS")
    assert ("PROGRESS", {"done": 1}) == (hub.look("1")["status"], hub.look("1")["result"])
    app.backend.store_result("1", 5, "SUCCESS")
    assert "SUCCESS" == asyncio.run(hub.look_async("1"))["status"]


def test_a_forgotten_result_is_unknown(app: celery.Celery, hub: ResultHub) -> None:
    """After ``forget`` each question about the task raises, and who waits for it is told."""
    app.backend.store_result("1", 5, "SUCCESS")
    hub.forget("1")
    assert "PENDING" == app.backend.get_task_meta("1", cache=False)["status"]
    for ask in (lambda: hub.wait("1", 5), lambda: hub.look("1")):
        with pytest.raises(ResultUnknown):
            ask()
    later(0.1, hub.forget, "2")
    with pytest.raises(ResultUnknown):
        hub.wait("2", 10)


def test_a_result_that_cannot_be_deleted_is_said(fake: tuple[Misbehaving, ResultHub]) -> None:
    """``forget`` raises if the server refuses, or does not answer in time: the result is still there."""
    backend, _ = fake
    app = FakeApp()
    app.backend = backend
    hub = ResultHub(app, look_timeout=0.3)
    try:
        backend.error = ConnectionRefusedError("nobody is at home")
        with pytest.raises(ResultsUnavailable, match="nobody is at home"):
            hub.forget("1")
        with pytest.raises(ResultsUnavailable, match="nobody is at home"):
            asyncio.run(hub.forget_async("1"))
        backend.error = None
        backend.thawed.clear()
        with pytest.raises(ResultsUnavailable, match="deleted"):
            hub.forget("1")
    finally:
        backend.thawed.set()
        hub.close()


def test_many_threads_wait_at_once(app: celery.Celery, hub: ResultHub) -> None:
    """Each of fifty threads gets its own result, and two that wait for one task both get it."""
    got: dict[int, Any] = {}

    def wait(number: int) -> None:
        got[number] = hub.wait(f"task-{number // 2}", 20)["result"]

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(50)]
    for thread in threads:
        thread.start()
    for number in range(25):
        app.backend.store_result(f"task-{number}", number, "SUCCESS")
    for thread in threads:
        thread.join(20)
    assert {number: number // 2 for number in range(50)} == got


def test_a_thousand_coroutines_wait_without_threads(app: celery.Celery, hub: ResultHub) -> None:
    """A thousand coroutines of one loop wait with one thread more than before, and the loop stays free."""

    async def run(name: int) -> float:
        waiters = [asyncio.ensure_future(hub.wait_async(f"{name}-{number}", 60)) for number in range(1_000)]
        await asyncio.sleep(0.3)  # all are waiting: what is measured is the waiting
        async with unblocked(0.01) as blocked:
            threads_before = threading.active_count()
            storing = asyncio.to_thread(
                lambda: [app.backend.store_result(f"{name}-{number}", number, "SUCCESS") for number in range(1_000)]
            )
            metas, _ = await asyncio.gather(asyncio.gather(*waiters), storing)
            assert threading.active_count() <= threads_before + 1
        assert [*range(1_000)] == [meta["result"] for meta in metas]
        return blocked.longest

    names = count()
    assert longest_pause(lambda: asyncio.run(run(next(names))), 0.5) < 0.5


def test_event_loops_of_several_threads_share_a_hub(app: celery.Celery, hub: ResultHub) -> None:
    """Loops in different threads, and one that runs twice, wait on the same hub."""
    got: list[Any] = []

    def run_loop(number: int) -> None:
        got.append(asyncio.run(hub.wait_async(f"task-{number}", 20))["result"])

    threads = [threading.Thread(target=run_loop, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for number in range(4):
        app.backend.store_result(f"task-{number}", number, "SUCCESS")
    for thread in threads:
        thread.join(20)
    assert [0, 1, 2, 3] == sorted(got)
    assert 3 == asyncio.run(hub.wait_async("task-3", 5))["result"]


def test_cancelled_waits_leave_nothing(hub: ResultHub) -> None:
    """A wait under ``asyncio.timeout`` is cancelled cleanly; the hub keeps no waiter, also if the loop is gone."""

    async def run() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await hub.wait_async("1", 60)
        task = asyncio.ensure_future(hub.wait_async("2", 60))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(ResultTimeout):
            await hub.wait_async("3", 0.1)

    asyncio.run(run())
    assert {} == hub._waiting

    abandoned = asyncio.new_event_loop()
    waiter = hub.wait_async("4", 60)
    abandoned.call_soon(abandoned.stop)
    task = abandoned.create_task(waiter)
    abandoned.run_forever()
    abandoned.close()  # in the middle of the wait
    hub._resolve({"4": success(1)})
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_ten_thousand_timed_out_waits_leave_no_memory(fake: tuple[Misbehaving, ResultHub]) -> None:
    """Waits that ran out of time leave nothing behind: not in the hub, not in what it watches with."""
    backend, hub = fake
    backend.questions = _Nowhere()  # type: ignore[assignment]

    async def wait_in_vain(count: int) -> None:
        outcomes = await asyncio.gather(
            *(hub.wait_async(f"{time.monotonic_ns()}-{number}", 0.01) for number in range(count)),
            return_exceptions=True,
        )
        assert all(isinstance(outcome, ResultTimeout) for outcome in outcomes)

    asyncio.run(wait_in_vain(1_000))
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(10):
        asyncio.run(wait_in_vain(1_000))
    wait_until(lambda: not (hub._waiting or hub._new or hub._gone), what="an empty hub")
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 200_000
    wait_until(lambda: not getattr(hub._watcher, "_since", None), what="a watcher without tasks")


class _Nowhere(list[Any]):
    def append(self, item: Any) -> None:
        """Keep nothing."""


def test_all_waiters_cost_one_question(fake: tuple[Misbehaving, ResultHub]) -> None:
    """Polling asks once for everybody, often at first and then ever less."""
    backend, hub = fake

    async def run() -> None:
        waiters = [asyncio.ensure_future(hub.wait_async(f"{number}", 20)) for number in range(200)]
        await asyncio.sleep(0.5)
        backend.metas.update({f"{number}": success(number) for number in range(200)})
        await asyncio.gather(*waiters)

    asyncio.run(run())
    assert 200 == max(len(question) for question in backend.questions)
    assert len(backend.questions) < 200


def test_a_frozen_backend_holds_up_nobody(fake: tuple[Misbehaving, ResultHub]) -> None:
    """While the backend does not answer, waits end in time and say so; when it answers again, all is well."""
    backend, hub = fake
    backend.thawed.clear()
    started = time.monotonic()
    with pytest.raises(ResultsUnavailable, match="has not answered"):
        hub.wait("1", 0.6)
    with pytest.raises(ResultsUnavailable):
        asyncio.run(hub.wait_async("2", 0.2))
    assert time.monotonic() - started < 3
    backend.metas["1"] = success(5)
    backend.thawed.set()
    assert 5 == hub.wait("1", 5)["result"]


def test_a_failing_backend_is_named_in_the_error(
    fake: tuple[Misbehaving, ResultHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of the server are remembered: a wait ends with them, a look at once, and recovery is noticed."""
    backend, hub = fake
    backend.error = ConnectionRefusedError("nobody is at home")
    with pytest.raises(ResultsUnavailable, match=r"after 0\.3 s: ConnectionRefusedError: nobody is at home"):
        hub.wait("1", 0.3)
    started = time.monotonic()
    with pytest.raises(ResultsUnavailable, match="nobody is at home"):
        hub.look("1")
    assert time.monotonic() - started < 2
    later(0.2, setattr, backend, "error", None)
    backend.metas["1"] = success(5)
    assert 5 == hub.wait("1", 10)["result"]
    with pytest.raises(ResultTimeout):
        hub.wait("2", 0.3)


def test_one_unreadable_result_fails_its_reader_only(fake: tuple[Misbehaving, ResultHub]) -> None:
    """A result that cannot be decoded is a PayloadError for who asked for it."""
    backend, hub = fake
    backend.metas.update({"bad": ValueError("not JSON"), "good": success(1)})
    with pytest.raises(PayloadError, match="task bad cannot be read"):
        hub.wait("bad", 5)
    assert 1 == hub.wait("good", 5)["result"]


def test_without_a_result_backend_a_wait_says_so_at_once() -> None:
    """No result backend: an error that says what to set, not a timeout."""
    hub = ResultHub(celery.Celery("t", broker="memory://", set_as_current=False))
    started = time.monotonic()
    with pytest.raises(ResultsUnavailable, match="no result backend is configured"):
        hub.wait("1", 10)
    assert time.monotonic() - started < 2
    hub.close()


def test_a_backend_that_cannot_be_made_is_an_error_at_once(tmp_path: Path) -> None:
    """A missing driver or missing tables do not look like a slow task."""
    for backend, words in (
        ("db+sqlite+nodriver:///x", "NoSuchModuleError"),
        (f"db+sqlite:///{tmp_path / 'x.db'}", "CREATE TABLE"),
    ):
        hub = ResultHub(make_app(backend, database_create_tables_at_setup=False))
        started = time.monotonic()
        with pytest.raises(ResultsUnavailable, match=words):
            hub.wait("1", 5)
        assert time.monotonic() - started < 3
        hub.close()


def test_the_thread_ends_when_idle_and_begins_again(
    fake: tuple[Misbehaving, ResultHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle hub has no thread; the next wait has one again."""
    monkeypatch.setattr(hub_module, "_IDLE", 0.2)
    backend, hub = fake
    assert hub._thread is None
    backend.metas["1"] = success(1)
    for _ in range(2):
        assert 1 == hub.wait("1", 5)["result"]
        thread = hub._thread
        assert thread is not None
        assert thread.daemon
        wait_until(lambda: hub._thread is None, what="the thread's end")
        thread.join(5)


def test_closing_ends_all_waits_and_is_final(fake: tuple[Misbehaving, ResultHub]) -> None:
    """``close`` wakes who waits, ends the thread, and later questions raise."""
    _, hub = fake
    later(0.1, hub.close)
    with pytest.raises(ResultsUnavailable, match="closed"):
        hub.wait("1", 10)
    wait_until(lambda: hub._thread is None, what="the thread's end")
    for ask in (lambda: hub.wait("1", 5), lambda: hub.look("1"), lambda: hub.forget("1")):
        with pytest.raises(ResultsUnavailable, match="closed"):
            ask()
    hub.close()


def test_many_hubs_leave_no_descriptors(tmp_path: Path) -> None:
    """Hundreds of hubs can be used and closed without leaking a descriptor or a thread."""
    app = make_app(f"db+sqlite:///{tmp_path / 'results.db'}")
    app.backend.store_result("1", 5, "SUCCESS")

    def use() -> None:
        hub = ResultHub(app)
        hub.wait("1", 5)
        hub.close()

    use()
    gc.collect()
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(100):
        use()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2
    assert threading.active_count() <= threads


def test_a_forked_child_begins_with_a_fresh_hub(app: celery.Celery, hub: ResultHub) -> None:
    """A child waits with a thread of its own, while the parent's waits go on."""
    app.backend.store_result("1", 5, "SUCCESS")
    outcome: list[Any] = []
    waiting = threading.Thread(target=lambda: outcome.append(hub.wait("late", 20)["result"]))
    waiting.start()
    wait_until(lambda: hub._watcher is not None, what="the hub at work")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert {} == hub._waiting
            assert 5 == hub.wait("1", 10)["result"]
            app.backend.store_result("late", 6, "SUCCESS")
            code = 0
        finally:
            os._exit(code)
    assert 0 == os.waitpid(pid, 0)[1]
    waiting.join(20)
    assert [6] == outcome


def test_the_result_backend_may_be_changed_at_run_time(tmp_path: Path) -> None:
    """A hub reads from the backend that the app has now."""
    app = FakeApp()
    app.backend.metas["1"] = success("first")
    hub = ResultHub(app)
    assert "first" == hub.wait("1", 5)["result"]
    app.backend = Misbehaving()
    app.backend.metas["1"] = success("second")
    assert "second" == hub.wait("1", 5)["result"]
    hub.close()
