"""Is ``bridge.celery`` an ordinary Celery app, whose settings may be assigned at any time?"""

# long because: one sentence per thing that users of plain Celery rely on.

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import socket
import sys
import threading
import time
import types
import weakref
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, _state, shared_task, signals
from celery.app.task import Context
from celery.app.task import Task as CeleryTask
from celery.backends.base import Backend
from kombu import Queue
from kombu.exceptions import OperationalError
from kombu.transport import pyamqp
from kombu.transport import redis as kombu_redis

from qbridge import Bridge, BridgeConfig, ConfigurationError, ResultsUnavailable
from qbridge.amqp import BridgeConnection
from qbridge.backends.deadline import deadline


@pytest.fixture(autouse=True)
def no_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh process: no app is the default one, none is current, of closed bridges or not."""
    monkeypatch.setattr(_state, "default_app", None)
    monkeypatch.setattr(_state._tls, "current_app", None, raising=False)


@pytest.fixture
def bridge(tmp_path: Path) -> Iterator[Bridge]:
    """A bridge on the embedded broker, with one task."""
    config = BridgeConfig(broker=f"embedded://{tmp_path}/bridge.db", results=f"sqlite:///{tmp_path}/results.db")
    with Bridge(config) as made:
        _declare(made)
        yield made


def _declare(bridge: Bridge) -> None:
    @bridge.task(name="add")
    def add(first: int, second: int) -> int:
        return first + second


def _nowhere(**fields: Any) -> Bridge:
    """A bridge whose servers are never spoken to."""
    made = Bridge(BridgeConfig(**{"broker": "redis://localhost:1", "results": "redis://localhost:1", **fields}))
    _declare(made)
    return made


# -- defaults="celery"


def test_settings_are_plain_celerys_but_for_what_was_set() -> None:
    """Key by key."""
    plain = Celery(set_as_current=False)
    app = Bridge(BridgeConfig(defaults="celery")).celery
    assert dict(plain.conf) == dict(app.conf)
    plain = Celery(
        set_as_current=False, broker="redis://h:1/0", backend="redis://h:1/1", changes={"task_acks_late": True}
    )
    raw = {"task_acks_late": True}
    app = Bridge(BridgeConfig(defaults="celery", broker="redis://h:1/0", results="redis://h:1/1", celery=raw)).celery
    assert dict(plain.conf) == dict(app.conf)


def test_one_queue_is_declared_and_it_is_celerys() -> None:
    """Queue ``celery``: direct, durable, no arguments; the worker and its consumer are Celery's."""
    plain, app = Celery(set_as_current=False), Bridge(BridgeConfig(defaults="celery")).celery
    assert ["celery"] == list(app.amqp.queues)
    assert plain.amqp.queues["celery"].as_dict(recurse=True) == app.amqp.queues["celery"].as_dict(recurse=True)
    assert plain.Worker.__mro__[1] is app.Worker.__mro__[1]


def test_default_queue_stays_celerys_beside_queues_of_tasks() -> None:
    """A typed task that names a queue adds that queue, and changes nothing about the default one."""
    bridge = _nowhere(defaults="celery", celery={"task_default_exchange": "other"})

    @bridge.task(queue="reports")
    def report() -> None:
        """Nothing."""

    queues = bridge.celery.amqp.queues
    assert {"celery", "reports"} == set(queues) == set(queues.consume_from)
    assert "other" == queues["celery"].exchange.name


def test_a_typed_task_has_the_attributes_of_a_plain_one() -> None:
    """Acknowledgement, serializer, limits: all that Celery takes from its settings."""
    app = _nowhere(defaults="celery").celery
    plain_app = Celery(set_as_current=False)

    @plain_app.task(name="add", shared=False)
    def plain(first: int, second: int) -> int:
        return first + second

    typed = app.tasks["add"]
    names = [name for name, _ in CeleryTask.from_config] + [
        "max_retries",
        "default_retry_delay",
        "time_limit",
        "expires",
    ]
    assert {name: getattr(plain, name) for name in names} == {name: getattr(typed, name) for name in names}
    assert app.max_payload_bytes is None
    assert typed.max_payload_bytes is None


def test_transports_are_kombus_own_under_celery_and_ordered_under_safe() -> None:
    """Redis priorities are read in our order only where nobody expects Celery's."""
    plain = _nowhere(defaults="celery").celery.connection_for_write()
    safe = _nowhere().celery.connection_for_write()
    assert kombu_redis.Transport is type(plain.transport)
    assert kombu_redis.Transport is type(safe.transport).__mro__[1]
    assert (9, 0, 3, 6) == safe.transport.Channel.priority_steps


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("amqp://h", pyamqp.Transport),
        ("pyamqp://h", pyamqp.Transport),
        ("amqps://h", pyamqp.SSLTransport),
        ("redis://h", kombu_redis.Transport),
        ("rediss://h?ssl_cert_reqs=none", kombu_redis.Transport),
        ("sentinel://h:1;sentinel://h:2", kombu_redis.SentinelTransport),
    ],
)
def test_every_url_leads_to_a_subclass_of_its_transport(url: str, kind: type[Any]) -> None:
    """Whatever the scheme, and also in a copy and in a pool."""
    app = _nowhere().celery
    app.conf.broker_url = url
    connection = app.connection_for_write()
    for each in (connection, connection.clone(), app.pool.new(), app.pool.new().clone()):
        assert isinstance(each, BridgeConnection)
        assert isinstance(each.transport, kind)


# -- settings assigned at run time


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_default_queue_may_be_assigned(before: bool) -> None:
    """Before and after the first look at the queues."""
    app = _nowhere().celery
    if not before:
        assert ["default"] == list(app.amqp.queues)
        assert "default" == app.amqp.default_queue.name
    app.conf.task_default_queue = "other"
    assert ["other"] == list(app.amqp.queues)
    assert "other" == app.amqp.default_queue.name
    assert "other" == app.amqp.router.route({}, "x")["queue"].name


def test_queues_that_are_assigned_keep_those_of_typed_tasks() -> None:
    """``task_queues`` says what else there is; a typed task still finds its queue, and a worker consumes it."""
    bridge = _nowhere()

    @bridge.task(queue="reports")
    def report() -> None:
        """Nothing."""

    bridge.celery.conf.task_queues = [Queue("default"), Queue("mine")]
    queues = bridge.celery.amqp.queues
    assert {"default", "mine", "reports"} == set(queues) == set(queues.consume_from)


def test_routes_may_be_assigned() -> None:
    """After messages were routed by others."""
    app = _nowhere().celery
    app.conf.task_queues = [Queue("default"), Queue("one"), Queue("two")]
    for name in ("one", "two"):
        app.conf.update(task_routes={"add": {"queue": name}})
        assert name == app.amqp.router.route({}, "add")["queue"].name


@pytest.mark.parametrize(
    "assign",
    [
        lambda app: setattr(app.conf, "task_track_started", True),
        lambda app: app.conf.__setitem__("task_track_started", True),
        lambda app: app.conf.update(task_track_started=True),
        lambda app: app.conf.update([("task_track_started", True)]),
        lambda app: app.conf.setdefault("CELERY_TRACK_STARTED", True) or app.conf.update(CELERY_TRACK_STARTED=True),
        lambda app: app.add_defaults({"task_track_started": True}),
        lambda app: app.config_from_object(types.SimpleNamespace(task_track_started=True)),
    ],
)
def test_tasks_follow_settings_however_they_are_assigned(assign: Any) -> None:
    """Celery copies such a setting once, when a task is bound; ours follows, unless the task says it itself."""
    app = _nowhere(defaults="celery").celery

    @app.task(name="plain", shared=False)
    def plain() -> None:
        """Nothing."""

    @app.task(name="own", track_started=False, shared=False)
    def own() -> None:
        """Nothing."""

    assert [False, False, False] == [app.tasks[name].track_started for name in ("plain", "own", "add")]
    assign(app)
    assert app.conf.task_track_started is True
    assert [True, False, True] == [app.tasks[name].track_started for name in ("plain", "own", "add")]


def test_a_setting_may_be_taken_back() -> None:
    """Deleting it brings the default back, in the settings and in what was derived."""
    app = _nowhere(defaults="celery").celery
    app.conf.task_serializer = "yaml"
    assert "yaml" == app.tasks["add"].serializer
    del app.conf["task_serializer"]
    assert "json" == app.tasks["add"].serializer
    app.conf.task_serializer = "yaml"
    assert "yaml" == app.conf.pop("task_serializer")
    assert "json" == app.tasks["add"].serializer
    app.conf.task_serializer = "yaml"
    app.conf.clear()
    assert "json" == app.tasks["add"].serializer


def test_connections_backend_time_zone_and_control_follow() -> None:
    """What holds a URL or a zone is made anew."""
    app = _nowhere().celery
    pool, producers, backend = app.pool, app.producer_pool, app.backend
    assert "UTC" == str(app.timezone)
    assert producers is app.control.mailbox.producer_pool
    app.conf.broker_url = "redis://localhost:2/5"
    app.conf.result_backend = "redis://localhost:2/6"
    app.conf.timezone = "Europe/Berlin"
    assert pool is not app.pool
    assert producers is not app.producer_pool
    assert app.producer_pool is app.control.mailbox.producer_pool
    assert (2, "5") == (app.pool.connection.port, app.pool.connection.virtual_host)
    assert backend is not app.backend
    assert 6 == app.backend.connparams["db"]
    assert "Europe/Berlin" == str(app.timezone)


def test_other_threads_follow_too(bridge: Bridge) -> None:
    """A pool is closed while others send: each send ends well, on one connection or the other."""
    app, errors, stop = bridge.celery, [], threading.Event()
    (task,) = bridge.tasks.values()

    def send() -> None:
        while not stop.is_set():
            try:
                task.delay(1, 2)
            except Exception as error:
                errors.append(repr(error))

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(30):
        app.conf.broker_pool_limit = 2 + number % 3
        task.delay(1, 2)
    stop.set()
    for thread in threads:
        thread.join(20)
    assert [] == errors


@pytest.mark.parametrize("limit", [0, None, 1])
def test_any_pool_limit_works(bridge: Bridge, limit: int | None) -> None:
    """0 and None: a connection per send, closed afterwards."""
    bridge.celery.conf.broker_pool_limit = limit
    (task,) = bridge.tasks.values()
    for _ in range(3):
        task.delay(1, 2)
    assert [] == [each for each in bridge.celery.pool._dirty if limit]


def test_eager_mode_may_be_switched(bridge: Bridge) -> None:
    """``task_always_eager`` runs typed tasks in the caller, arguments checked."""
    (task,) = bridge.tasks.values()
    bridge.celery.conf.task_always_eager = True
    assert 3 == task.delay(1, 2).get()
    assert 3 == bridge.celery.tasks["add"].apply_async((1, 2)).get()
    bridge.celery.conf.task_always_eager = False
    assert "PENDING" == task.delay(1, 2).state


def test_threads_that_ask_at_once_get_one_backend(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of several would have connections that nobody closes, and with rpc replies that nobody waits for."""
    got: list[Any] = []
    make = bridge.celery._get_backend
    together = threading.Barrier(4)

    def slowly() -> Any:
        time.sleep(0.01)  # gives the others their turn
        return make()

    def ask() -> None:
        together.wait(10)
        got.append(bridge.celery.backend)

    monkeypatch.setattr(bridge.celery, "_get_backend", slowly)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert 4 == len(got)
    assert {id(bridge.celery.backend)} == {id(each) for each in got}


def test_results_follow_an_assigned_backend(tmp_path: Path) -> None:
    """Handles of typed tasks read from where the settings say, also if the configuration names no results."""
    with Bridge(BridgeConfig(broker=f"embedded://{tmp_path}/b.db", results="disabled://")) as bridge:
        _declare(bridge)
        (task,) = bridge.tasks.values()
        with pytest.raises(ResultsUnavailable, match="no result backend is configured"):
            task.delay(1, 2).get(timeout=0.1)
        bridge.celery.conf.update(result_backend=f"db+sqlite:///{tmp_path}/r.db", task_ignore_result=False)
        with bridge.worker(concurrency=1):
            assert 3 == task.delay(1, 2).get(timeout=20)


# -- environment


def test_celerys_variables_do_not_override_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that contradicts the configuration is an error; one set later, or an URL assigned later, changes nothing."""
    app = _nowhere().celery
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://elsewhere")
    monkeypatch.setenv("CELERY_BROKER_READ_URL", "redis://elsewhere")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://elsewhere")
    assert "localhost" == app.connection_for_read().hostname == app.connection_for_write().hostname
    assert "localhost" == app.backend.connparams["host"]
    app.conf.broker_url = "redis://assigned"
    assert "assigned" == app.connection_for_write().hostname
    with pytest.raises(ConfigurationError, match="CELERY_BROKER_URL"):
        _nowhere()


# -- the current app, other apps


def test_the_app_fills_the_void_and_gives_the_place_back() -> None:
    """Where no app is current, the first bridge's is; another one does not push it aside; closing leaves nothing."""
    first, second = _nowhere(), _nowhere()
    assert first.celery is _state.get_current_app()
    assert second.celery is not _state.get_current_app()
    second.close()
    assert first.celery is _state.get_current_app()
    first.celery.set_current()
    first.close()
    assert _state.default_app is None
    assert _state._tls.current_app is None


def test_another_app_stays_the_current_one() -> None:
    """A bridge in an application that has a Celery app of its own changes nothing there."""
    other = Celery("other", set_as_current=True)
    bridge = _nowhere()
    assert other is _state.get_current_app()
    assert bridge.celery.close() is None
    assert other is _state.get_current_app()


def test_typed_tasks_stay_in_their_app_and_shared_ones_come_to_all() -> None:
    """Celery's own decorators keep their meaning beside ours."""
    before = set(_state._on_app_finalizers)

    @shared_task(name="tests.shared")
    def everywhere(number: int) -> int:
        return number

    one, other, plain = _nowhere(), Bridge(BridgeConfig(broker="redis://localhost:1")), Celery(set_as_current=False)
    try:
        for app in (one.celery, other.celery, plain):
            assert "tests.shared" in app.tasks
        assert ["add"] == [name for name in one.celery.tasks if name == "add"]
        assert "add" not in other.celery.tasks
        assert "add" not in plain.tasks
    finally:
        _state._on_app_finalizers.intersection_update(before)


# -- pickle and copies


def test_an_app_is_found_again_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickled is where it is, through its bridge or by itself: typed tasks are code."""
    place, made = types.ModuleType("tests_place"), _nowhere()
    monkeypatch.setitem(sys.modules, "tests_place", place)
    place.bridge = made  # type: ignore[attr-defined]
    assert made.celery is pickle.loads(pickle.dumps(made.celery))
    place.bridge, place.app = None, made.celery  # type: ignore[attr-defined]
    assert made.celery is pickle.loads(pickle.dumps(made.celery))


def test_an_app_that_no_module_holds_is_copied_as_celery_does() -> None:
    """With its settings, those assigned later too, and with what the bridge demanded of it."""
    app = _nowhere().celery
    app.conf.task_track_started = True
    for made in (pickle.loads(pickle.dumps(app)), copy.copy(app)):
        assert app is not made
        assert made.safe
        assert app.confirm_timeout == made.confirm_timeout
        assert made.conf.task_track_started
        assert dict(app.conf) == dict(made.conf)
        made.conf.task_default_queue = "followed"
        assert ["followed"] == list(made.amqp.queues)


# -- instrumentation


def test_wrappers_of_apply_async_and_send_task_see_typed_tasks(bridge: Bridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentry replaces ``Task.apply_async`` and adds headers; others replace ``Celery.send_task``."""
    seen: list[tuple[str, str]] = []
    apply_async, send_task = CeleryTask.apply_async, Celery.send_task

    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(("apply_async", self.name))
        kwargs["headers"] = {**(kwargs.get("headers") or {}), "sentry-trace": "1-2"}
        return apply_async(self, *args, **kwargs)

    def noted(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        seen.append(("send_task", name))
        return send_task(self, name, *args, **kwargs)

    monkeypatch.setattr(CeleryTask, "apply_async", traced)
    monkeypatch.setattr(Celery, "send_task", noted)
    headers: list[dict[str, Any]] = []

    def inject(headers: dict[str, Any] | None = None, **_: Any) -> None:
        assert headers is not None
        headers["traceparent"] = "00-1-2-01"

    def published(sender: str, headers: dict[str, Any] | None = None, _kept: Any = headers, **_: Any) -> None:
        assert "add" == sender
        _kept.append(headers)

    signals.before_task_publish.connect(inject)
    signals.after_task_publish.connect(published)
    try:
        bridge.tasks["add"].delay(1, 2)
        bridge.tasks["add"].using(countdown=1, headers={"own": "kept"}).delay(1, 2)
        bridge.tasks["add"].send_many([(1, 2)])
    finally:
        signals.before_task_publish.disconnect(inject)
        signals.after_task_publish.disconnect(published)
    assert [("apply_async", "add"), ("send_task", "add")] * 3 == seen
    assert ["1-2"] * 3 == [each["sentry-trace"] for each in headers]
    assert ["00-1-2-01"] * 3 == [each["traceparent"] for each in headers]
    assert "kept" == headers[1]["own"]


# -- the end of apps, of connections, of parents


def test_nothing_is_left_of_closed_bridges(tmp_path: Path) -> None:
    """Apps, tasks, pools, threads and files are gone."""

    def one() -> weakref.ref[Any]:
        with Bridge(BridgeConfig(broker=f"embedded://{tmp_path}/b.db", results=f"sqlite:///{tmp_path}/r.db")) as made:
            _declare(made)
            assert "PENDING" == made.tasks["add"].delay(1, 2).state
            made.celery.control.broadcast("nothing")
            return weakref.ref(made.celery)

    one()
    gc.collect()
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    apps = [one() for _ in range(20)]
    gc.collect()
    assert [None] * 20 == [each() for each in apps]
    assert files >= len(os.listdir("/proc/self/fd"))
    assert threads >= threading.active_count()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_lock_held_by_a_thread_of_the_parent_does_not_stop_the_child(bridge: Bridge) -> None:
    """kombu's cached properties take a lock at each reading, one for all objects."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with vars(Celery)["amqp"].lock, vars(kombu_redis.Channel)["client"].lock:
            held.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        try:
            bridge.tasks["add"].delay(1, 2)
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    done.set()
    thread.join(10)
    assert 0 == status


def test_dropping_connections_leaves_the_sockets_of_the_process_alone() -> None:
    """kombu's own ``collect`` sets the default timeout of all sockets meanwhile, and two threads may leave it set."""
    seen: list[float | None] = []
    app = _nowhere().celery
    connection = app.connection_for_write()
    connection._do_close_self = lambda: seen.append(socket.getdefaulttimeout())  # type: ignore[method-assign]
    connection.collect(socket_timeout=0.1)
    assert [None] == seen


def test_a_silent_server_leaves_time_for_the_next() -> None:
    """Within one deadline each server of a list is tried, though the first takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as second:
        first_port, second_port = silent.getsockname()[1], second.getsockname()[1]
        second.settimeout(5)
        app = _nowhere().celery
        app.conf.broker_url = f"amqp://127.0.0.1:{first_port};amqp://127.0.0.1:{second_port}"
        began = time.monotonic()
        with deadline(1.0), app.connection_for_write() as connection, pytest.raises(OperationalError):
            connection.default_channel  # noqa: B018 - connects
        assert time.monotonic() - began < 1.5
        accepted, _ = second.accept()
        accepted.close()


def test_an_expired_wait_for_the_pool_is_an_error_in_time(tmp_path: Path) -> None:
    """All connections are in use: the send says so when its time is up."""
    with Bridge(BridgeConfig(broker=f"embedded://{tmp_path}/b.db")) as bridge:
        app = bridge.celery
        app.conf.broker_pool_limit = 1
        with app.producer_or_acquire(), deadline(0.3), pytest.raises(Exception, match="broker_pool_limit"):
            app.send_task("add", (1, 2))


@pytest.mark.parametrize("zone", [{}, {"timezone": "Europe/Berlin"}, {"enable_utc": False}, {"timezone": "Asia/Tokyo"}])
def test_the_present_moment_is_celerys(bridge: Bridge, zone: dict[str, Any]) -> None:
    """Also after another time zone was assigned."""
    app = bridge.celery
    for name, value in zone.items():
        app.conf[name] = value
    ours, theirs = app.now(), Celery.now(app)
    assert ours.utcoffset() == theirs.utcoffset()
    assert abs((theirs - ours).total_seconds()) < 5


@pytest.mark.parametrize("results", ["sqlite:///{}/results.db", "redis://localhost:1/0", "rpc://"])
@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "RETRY", "STARTED"])
def test_what_is_stored_is_what_celery_makes_of_it(tmp_path: Path, results: str, state: str) -> None:
    """With and without the task and its arguments, which may be asked for at any time."""
    config = BridgeConfig(broker=f"embedded://{tmp_path}/b.db", results=results.format(tmp_path))
    request = Context(
        id="1", group="g", parent_id="p", task="add", args=[1], kwargs={}, hostname="w", retries=2,
        delivery_info={"routing_key": "q"}, children=[],
    )  # fmt: skip
    with Bridge(config) as bridge:
        app: Any = bridge.celery
        for extended in (False, True):
            app.conf.result_extended = extended
            for asked in (request, Context(id="1"), None):
                ours = app.backend._get_result_meta(3, state, None, asked)
                theirs = Backend._get_result_meta(app.backend, 3, state, None, asked)
                when, expected = ours.pop("date_done"), theirs.pop("date_done")
                assert ours == theirs
                assert ("worker" in ours) is (extended and asked is not None)
                assert (when is None) is (expected is None)
                if when is not None:
                    both = [datetime.fromisoformat(text) for text in (when, expected)]
                    assert both[0].utcoffset() == both[1].utcoffset()
                    assert abs((both[1] - both[0]).total_seconds()) < 5


def test_a_pooled_producer_sends_on_the_connection_that_it_has_now(bridge: Bridge) -> None:
    """It is used again and again, on whichever connection is free; its channel is that connection's."""
    app = bridge.celery
    app.conf.broker_pool_limit = 2
    seen = set()
    for _ in range(5):
        with app.producer_pool.acquire() as first, app.producer_pool.acquire() as second:
            for producer in (first, second):
                connection: Any = producer.connection
                assert producer.channel is connection.default_channel
                assert producer.channel.connection is connection.transport
                seen.add(id(producer.channel))
            connection.collect()
            assert second.__connection__.default_channel.connection is second.__connection__.transport
    assert len(seen) >= 2
    with app.producer_pool.acquire() as producer:
        producer.publish("x", exchange="", routing_key="default")
