"""Results in Redis: Celery's keys and channels beside plain Celery, and waiting through every kind of bad time."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import celery
import pytest
import redis
from tests.timers import acted, later

from qbridge.backends.redis.results_backend import RedisBackend, SentinelBackend
from qbridge.exceptions import ResultsUnavailable, ResultTimeout
from qbridge.result_hub import ResultHub
from qbridge.testing.servers import RedisServer
from qbridge.testing.waiting import wait_until

OURS = {
    "redis": "qbridge.backends.redis.results_backend:RedisBackend",
    "rediss": "qbridge.backends.redis.results_backend:RedisBackend",
    "sentinel": "qbridge.backends.redis.results_backend:SentinelBackend",
}


def make_app(url: str, *, ours: bool = True, **settings: Any) -> celery.Celery:
    """A plain Celery app whose Redis results are ours, or Celery's own."""
    app = celery.Celery("t", broker="memory://", set_as_current=False)
    if ours:
        app.loader.override_backends = OURS
    app.conf.update(result_backend=url, redis_socket_timeout=3.0, redis_socket_connect_timeout=2.0, **settings)
    return app


@pytest.fixture
def url(qbridge_redis: RedisServer) -> Iterator[str]:
    """An empty Redis database."""
    with qbridge_redis.heal().fresh() as fresh:
        yield fresh


@pytest.fixture
def app(url: str) -> Iterator[celery.Celery]:
    """An app with our results."""
    app = make_app(url)
    with closing(app.backend):
        yield app
        acted()


@pytest.fixture
def hub(app: celery.Celery) -> Iterator[ResultHub]:
    """A hub, closed at the end."""
    with closing(ResultHub(app)) as hub:
        yield hub


@pytest.mark.filterwarnings("ignore:Call to deprecated setex")  # by plain Celery
def test_keys_values_and_channels_are_celerys(app: celery.Celery, url: str) -> None:
    """Results lie and are published under ``celery-task-meta-<id>``; plain Celery reads ours and we read its."""
    plain = make_app(url, ours=False)
    client = redis.Redis.from_url(url)
    listener = client.pubsub(ignore_subscribe_messages=True)
    listener.subscribe("celery-task-meta-1")
    app.backend.store_result("1", {"a": [1]}, "SUCCESS")
    stored = client.get("celery-task-meta-1")
    published = wait_until(lambda: listener.get_message(timeout=0.1), what="the publication")
    assert stored == published["data"]
    assert {"a": [1]} == plain.AsyncResult("1").get(timeout=5)
    plain.backend.store_result("2", LookupError("no"), "FAILURE")
    assert isinstance(app.AsyncResult("2").get(timeout=5, propagate=False), LookupError)
    listener.close()
    client.close()
    plain.backend.client.connection_pool.disconnect()


def test_a_send_costs_no_subscription(app: celery.Celery, url: str) -> None:
    """Sending subscribes to nothing: who waits does, and what was stored before is found."""
    app.backend.on_task_call(None, "1")
    with redis.Redis.from_url(url) as client:
        assert [] == client.pubsub_channels("*")
    app.backend.store_result("1", 5, "SUCCESS")
    assert 5 == app.AsyncResult("1").get(timeout=5)


def test_async_results_wait_from_many_threads(app: celery.Celery) -> None:
    """``AsyncResult.get`` and groups work through one backend object shared by all threads."""
    assert app.backend.thread_safe
    got: dict[int, Any] = {}

    def wait(number: int) -> None:
        got[number] = app.AsyncResult(f"task-{number}").get(timeout=20)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for number in range(12):
        app.backend.store_result(f"task-{number}", number, "SUCCESS")
    for thread in threads:
        thread.join(20)
    assert {number: number for number in range(8)} == got
    group = app.GroupResult("g", [app.AsyncResult(f"task-{number}") for number in range(12)])
    assert [*range(12)] == group.get(timeout=10)
    group.save()
    assert 12 == len(app.GroupResult.restore("g").results)


def test_a_publication_that_is_missed_is_found_by_looking(app: celery.Celery, url: str) -> None:
    """A result that is only set, as after a lost connection, ends a wait of either kind a moment later."""
    payload = app.backend.encode({"status": "SUCCESS", "result": 5, "traceback": None, "children": [], "task_id": "1"})
    with redis.Redis.from_url(url) as client, closing(ResultHub(app)) as hub:
        later(0.3, client.set, "celery-task-meta-1", payload)
        assert 5 == hub.wait("1", 10)["result"]
        client.delete("celery-task-meta-1")
        later(0.3, client.set, "celery-task-meta-1", payload)
        assert 5 == app.AsyncResult("1").get(timeout=10)


def test_hub_and_results_of_all_ages(app: celery.Celery, hub: ResultHub, url: str) -> None:
    """The hub returns what is there, what comes, and what fails, and leaves no subscription behind."""
    app.backend.store_result("there", 1, "SUCCESS")
    assert 1 == hub.wait("there", 0)["result"]
    app.backend.store_result("comes", None, "STARTED")
    later(0.1, app.backend.store_result, "comes", 2, "SUCCESS")
    started = time.monotonic()
    assert 2 == hub.wait("comes", 10)["result"]
    assert time.monotonic() - started < 1
    later(0.1, app.backend.store_result, "fails", LookupError("no"), "FAILURE")
    assert "FAILURE" == hub.wait("fails", 10)["status"]
    with pytest.raises(ResultTimeout):
        hub.wait("never", 0.2)
    assert "PENDING" == hub.look("never")["status"]
    with redis.Redis.from_url(url) as client:
        wait_until(lambda: client.pubsub_channels("*") == [], what="no subscriptions")


def test_a_thousand_coroutines_share_one_subscriber(app: celery.Celery, hub: ResultHub) -> None:
    """A thousand waiting coroutines get their results over one connection."""

    async def run() -> list[Any]:
        waiters = [asyncio.ensure_future(hub.wait_async(f"task-{number}", 30)) for number in range(1_000)]
        await asyncio.sleep(0)
        await asyncio.to_thread(
            lambda: [app.backend.store_result(f"task-{number}", number, "SUCCESS") for number in range(1_000)]
        )
        return [meta["result"] for meta in await asyncio.gather(*waiters)]

    assert [*range(1_000)] == asyncio.run(run())


def test_a_restarted_server_is_subscribed_to_again(
    app: celery.Celery, hub: ResultHub, qbridge_redis: RedisServer
) -> None:
    """A wait survives a restart of Redis: what is stored afterwards ends it."""
    outcome: list[Any] = []
    waiting = threading.Thread(target=lambda: outcome.append(hub.wait("1", 30)["result"]))
    waiting.start()
    wait_until(lambda: hub._watcher is not None, what="the hub at work")
    qbridge_redis.kill()
    qbridge_redis.heal()
    app.backend.store_result("1", 5, "SUCCESS")
    waiting.join(30)
    assert [5] == outcome


def test_a_cut_subscription_is_made_again(app: celery.Celery, hub: ResultHub, url: str) -> None:
    """A subscriber whose connection is cut notices, subscribes again and misses nothing."""
    outcome: list[Any] = []
    waiting = threading.Thread(target=lambda: outcome.append(hub.wait("1", 30)["result"]))
    waiting.start()
    with redis.Redis.from_url(url) as client:
        wait_until(lambda: client.pubsub_channels("*"), what="the subscription")
        client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        client.set(
            "celery-task-meta-1",
            app.backend.encode({"status": "SUCCESS", "result": 5, "traceback": None, "children": [], "task_id": "1"}),
        )
    waiting.join(30)
    assert [5] == outcome


def test_a_frozen_server_ends_waits_in_time(app: celery.Celery, hub: ResultHub, qbridge_redis: RedisServer) -> None:
    """With Redis frozen, waits and looks raise ResultsUnavailable within their bounds; after the thaw they go on."""
    app.backend.store_result("1", 5, "SUCCESS")
    assert 5 == hub.wait("1", 5)["result"]
    qbridge_redis.freeze()
    try:
        for timeout in (0.0, 1.0):
            started = time.monotonic()
            with pytest.raises(ResultsUnavailable):
                hub.wait("1", timeout)
            assert time.monotonic() - started < timeout + 1
        started = time.monotonic()
        with pytest.raises(ResultsUnavailable):
            asyncio.run(hub.look_async("1"))
        assert time.monotonic() - started < 6
    finally:
        qbridge_redis.thaw()
    assert 5 == hub.wait("1", 10)["result"]


def test_a_stopped_server_is_named(app: celery.Celery, hub: ResultHub, qbridge_redis: RedisServer) -> None:
    """With Redis down, a wait ends at its timeout and says that the server refuses connections."""
    qbridge_redis.kill()
    try:
        started = time.monotonic()
        with pytest.raises(ResultsUnavailable, match="ConnectionError"):
            hub.wait("1", 0.5)
        assert time.monotonic() - started < 1.5
    finally:
        qbridge_redis.heal()


def test_a_forked_child_waits_by_itself(app: celery.Celery, hub: ResultHub) -> None:
    """Parent and child wait at the same time, each over connections of its own."""
    assert "PENDING" == hub.look("1")["status"]
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert 1 == hub.wait("1", 20)["result"]
            app.backend.store_result("2", 2, "SUCCESS")
            code = 0
        finally:
            os._exit(code)
    later(0.3, app.backend.store_result, "1", 1, "SUCCESS")
    assert 1 == hub.wait("1", 20)["result"]
    assert 2 == hub.wait("2", 20)["result"]
    assert 0 == os.waitpid(pid, 0)[1]


def test_a_key_prefix_is_honoured(url: str) -> None:
    """``global_keyprefix`` applies to what the hub waits on too."""
    app = make_app(url, result_backend_transport_options={"global_keyprefix": "shop:"})
    with closing(app.backend), closing(ResultHub(app)) as hub:
        later(0.1, app.backend.store_result, "1", 5, "SUCCESS")
        assert 5 == hub.wait("1", 10)["result"]
        with redis.Redis.from_url(url) as client:
            assert client.exists("shop:celery-task-meta-1")


def test_decoded_responses_are_understood(url: str) -> None:
    """A URL with ``decode_responses`` makes Redis answer with text; the hub reads that too."""
    app = make_app(f"{url}?decode_responses=true")
    with closing(app.backend), closing(ResultHub(app)) as hub:
        later(0.1, app.backend.store_result, "1", 5, "SUCCESS")
        assert 5 == hub.wait("1", 10)["result"]


def test_the_classes_follow_the_scheme() -> None:
    """Each Redis scheme has our class, which is Celery's too."""
    for scheme, kind in (("redis://h/1", RedisBackend), ("sentinel://h:1/0;sentinel://i:1/0", SentinelBackend)):
        backend = make_app(scheme).backend
        assert kind is type(backend)
        assert isinstance(backend, celery.backends.redis.RedisBackend)
        assert 30.0 == backend.retry_policy["timeout"]


@pytest.mark.parametrize("rules", [("-@scripting",), ("resetchannels", "&other")])
def test_an_account_without_scripts_or_channels_stores_results(url: str, rules: tuple[str, ...]) -> None:
    """The first state of a task takes a script, others plain commands; an account for those alone has all of them.

    One that may not announce stores what it can, as before there was a script: a waiter finds it by looking.
    """
    with RedisServer.at(url).client() as client:
        client.execute_command("ACL", "SETUSER", "plain", "reset", "on", ">pw", "~*", "&*", "+@all", *rules)
        try:
            app = make_app(url.replace("redis://", "redis://plain:pw@"))
            with closing(app.backend):
                app.backend.store_result("a", 1, "SUCCESS")
                assert app.backend.get_state("a") == "SUCCESS"
                if rules == ("-@scripting",):
                    for state, value in (("STARTED", 1), ("FAILURE", ValueError("no"))):
                        app.backend.store_result("b", value, state)
                        assert app.backend.get_state("b") == state
        finally:
            client.execute_command("ACL", "DELUSER", "plain")


def test_a_first_state_is_one_round_trip(app: celery.Celery, url: str) -> None:
    """Celery looks first; a later state is compared with what the same step has found."""
    with RedisServer.at(url).client() as client:

        def calls() -> dict[str, int]:
            stats: dict[str, Any] = client.info("commandstats")
            return {name: stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "eval", "multi")}

        app.backend.store_result("first", 0, "SUCCESS")  # the server knows the script now
        before = calls()
        app.backend.store_result("a", 1, "STARTED")
        after = calls()
        assert {name: after[name] - before[name] for name in after} == {"evalsha": 1, "eval": 0, "multi": 0}
        app.backend.store_result("a", 1, "SUCCESS")
        app.backend.store_result("a", ValueError("no"), "FAILURE")
        last = calls()
        assert {name: last[name] - after[name] for name in last} == {"evalsha": 2, "eval": 0, "multi": 1}
        assert app.backend.get_state("a") == "SUCCESS"


def test_states_replace_one_another_but_never_a_success(url: str) -> None:
    """As in Celery, whichever of them comes first; each is announced, and kept as long as its kind is."""
    backend = make_app(url, result_failure_expires=100).backend
    with closing(backend), RedisServer.at(url).client() as client:
        heard = client.pubsub()
        heard.subscribe("celery-task-meta-x", "celery-task-meta-y")
        wait_until(lambda: len(client.pubsub_channels("celery-task-meta-*")) == 2, 5, what="the subscription")
        backend.store_result("x", ValueError("no"), "FAILURE")
        assert 90 <= client.ttl("celery-task-meta-x") <= 100
        backend.store_result("x", 1, "SUCCESS")
        assert client.ttl("celery-task-meta-x") > 1000
        backend.store_result("x", ValueError("no"), "FAILURE")
        assert backend.get_state("x") == "SUCCESS"
        backend.store_result("y", None, "STARTED")
        states: list[str] = []

        def told() -> bool:
            message = heard.get_message(ignore_subscribe_messages=True)
            if message is not None:
                states.append(json.loads(message["data"])["status"])
            return len(states) == 3

        wait_until(told, 5, what="three announcements")
        assert states == ["FAILURE", "SUCCESS", "STARTED"]
        assert heard.get_message(ignore_subscribe_messages=True, timeout=0.2) is None
