"""What the operator writes for Redis is what kombu, Celery and redis-py read."""

from __future__ import annotations

import importlib.util
import inspect
import pickle
from datetime import timedelta
from typing import Any

import celery
import pytest
import redis
import redis.sentinel
from celery.app.defaults import DEFAULTS
from kombu.connection import Connection
from kombu.transport.redis import SentinelChannel, SentinelTransport
from redis.retry import Retry

from qbridge.backends.redis import RedisBroker, RedisResults, Sentinel
from qbridge.backends.redis.transport import derive
from qbridge.exceptions import ConfigurationError

SECRET = "s3cret"
#: Read by Celery though not in its table of settings.
EXTRA = {"result_backend_thread_safe", "redis_backend_health_check_interval"}


def app_of(settings: dict[str, Any]) -> celery.Celery:
    """A plain Celery app; nothing is connected."""
    app = celery.Celery("t", set_as_current=False)
    app.conf.update(settings)
    return app


def channel_of(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """kombu's channel over the settings, which pings nobody."""
    monkeypatch.setattr(redis.Redis, "ping", lambda _self: True)
    return app_of(settings).connection_for_write().channel()


def tcp_parameters(parameters: dict[str, Any]) -> tuple[Any, ...]:
    """Where a connection leads and as whom."""
    return tuple(parameters.get(name) for name in ("host", "port", "db", "username", "password"))


# URLs.


@pytest.mark.parametrize(
    "url",
    ["redis://", "redis://h", "redis://h:1/3", "redis://:p%40%2F@h/2", "redis://u:p@h", "redis://u:p@[::1]:7/0"],
)
def test_a_url_means_what_kombu_and_celery_make_of_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the broker and for results."""
    monkeypatch.setattr(redis.Redis, "ping", lambda _self: True)
    theirs = Connection(url).channel()._connparams()
    theirs["host"] = theirs["host"].replace("127.0.0.1", "localhost")
    ours = channel_of(RedisBroker.from_url(url).celery_settings(), monkeypatch)._connparams()
    assert tcp_parameters(theirs) == tcp_parameters(ours)
    plain, results = (
        app_of(s).backend.connparams for s in ({"result_backend": url}, RedisResults.from_url(url).celery_settings())
    )
    assert tcp_parameters(plain) == tcp_parameters(results)


@pytest.mark.parametrize("url", ["redis+socket:///run/re dis.sock?virtual_host=3", "redis+socket://u:p%40@/run/r.sock"])
def test_a_socket_url_means_what_kombu_and_celery_make_of_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Path, database and account; the arguments fit the class that they are for."""
    monkeypatch.setattr(redis.Redis, "ping", lambda _self: True)
    quoted = url.replace(" ", "%20")
    theirs = Connection(quoted).channel()._connparams()
    ours = channel_of(RedisBroker.from_url(quoted).celery_settings(), monkeypatch)._connparams()
    results = dict(app_of(RedisResults.from_url(quoted).celery_settings()).backend.connparams)
    for parameters in (ours, results):
        for name in ("path", "db", "username", "password"):
            assert theirs.get(name) == parameters.get(name), name
        parameters.pop("max_connections")
        made = parameters.pop("connection_class")(**parameters)
        assert isinstance(made, redis.UnixDomainSocketConnection)


def test_a_sentinel_url_leads_to_the_master_with_the_masters_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Sentinels have an account of their own, and nobody waits for ever for them."""
    sentinel = Sentinel(hosts=("a", "b:7"), master_name="m", username="su", password="sp")
    broker = RedisBroker(sentinel=sentinel, username="u", password=SECRET, db=2)
    seen = _sentinels_made(monkeypatch)
    monkeypatch.setattr(redis.Redis, "ping", lambda _self: True)
    connection = app_of(broker.celery_settings()).connection_for_write()
    assert isinstance(connection.channel(), SentinelChannel)
    connection.maybe_switch_next()  # the first Sentinel failed: the account must not get lost
    assert isinstance(connection.channel(), SentinelChannel)
    results = RedisResults(sentinel=sentinel, username="u", password=SECRET, db=2)
    assert app_of(results.celery_settings()).backend.client is not None
    assert len(seen) >= 3
    for hosts, sentinel_kwargs, master_kwargs in seen:
        assert [("a", 26379), ("b", 7)] == hosts
        assert ("su", "sp") == (sentinel_kwargs["username"], sentinel_kwargs["password"])
        assert sentinel_kwargs["socket_timeout"] < 10
        assert ("u", SECRET, 2) == (master_kwargs["username"], master_kwargs["password"], master_kwargs["db"])


def test_a_client_of_a_sentinel_does_not_multiply_its_timeout() -> None:
    """redis-py's own default is ten retries."""
    options = RedisBroker(sentinel=Sentinel(hosts=["a"], master_name="m")).celery_settings()["broker_transport_options"]
    made = redis.sentinel.Sentinel([("a", 1)], sentinel_kwargs=options["sentinel_kwargs"])
    ours: Any = made.sentinels[0].connection_pool.make_connection()
    theirs: Any = redis.Redis().connection_pool.make_connection()
    assert (0, 10) == (ours.retry.get_retries(), theirs.retry.get_retries())


def test_celery_report_of_sentinels_shows_no_password() -> None:
    """Celery masks the first password of a setting only, so the list of URLs has none."""
    sentinel = Sentinel(hosts=("a", "b"), master_name="m")
    app = app_of(RedisBroker(sentinel=sentinel, password=SECRET).celery_settings())
    app.conf.update(RedisResults(sentinel=sentinel, password=SECRET).celery_settings())
    assert SECRET not in app.bugreport()


@pytest.mark.parametrize(
    "url",
    [
        "redis://u:p%40@h:1/3",
        "rediss://h",
        "rediss://h?ssl_cert_reqs=none",
        "redis+socket://u:p@/r.sock?virtual_host=2",
    ],
)
def test_a_url_survives_the_way_through_the_model(url: str) -> None:
    """What the model writes it reads as the same place."""
    broker = RedisBroker.from_url(url)
    assert broker.celery_url() == RedisBroker.from_url(broker.celery_url()).celery_url()
    assert RedisResults.from_url(url).celery_url() == broker.celery_url()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://h?socket_timeout=1", "socket_timeout"),
        ("redis://h/one", "number of a database"),
        ("sentinel://h", "master"),
        ("redis://a;redis://b", "fail over"),
        ("rediss://h?ssl_cert_reqs=optional", "optional"),
        ("amqp://h", "not a Redis URL"),
        ("redis://u:s3cret#@h", "malformed|unquoted"),
    ],
)
def test_what_a_url_cannot_say_is_refused(url: str, words: str) -> None:
    """Naming what to do, and no secret."""
    for room in (RedisBroker, RedisResults):
        with pytest.raises(ConfigurationError, match=words) as caught:
            room.from_url(url)
        assert SECRET not in str(caught.value)


def test_a_sentinel_url_may_name_the_master() -> None:
    """kombu has a transport option for it; a URL is all that an environment variable can hold."""
    broker = RedisBroker.from_url("sentinel://u:p@a/2;sentinel://b:3?master_name=m")
    assert broker.sentinel == Sentinel(hosts=("a:26379", "b:3"), master_name="m")
    assert (2, "u") == (broker.db, broker.username)


# Fields.


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prot": 1}, "did you mean port"),
        ({"host": "h:1"}, "port"),
        ({"unix_socket": "relative"}, "unix_socket"),
        ({"unix_socket": "/s", "host": "h"}, "host and port"),
        ({"unix_socket": "/s", "tls": True}, "unix_socket"),
        ({"sentinel": {"hosts": ["a"], "master_name": "m"}, "port": 1}, "host and port"),
        ({"sentinel": {"hosts": ["a"]}}, "master_name"),
        ({"sentinel": {"hosts": [], "master_name": "m"}}, "hosts"),
        ({"tls": {"server_hostname": "x"}}, "server_hostname"),
        ({"db": -1}, "db"),
    ],
)
def test_wrong_fields_are_configuration_errors(fields: dict[str, Any], words: str) -> None:
    """They name the field, and never show the password that stands beside it."""
    for room in (RedisBroker, RedisResults):
        with pytest.raises(ConfigurationError, match=words) as caught:
            room(**{"password": SECRET, **fields})
        assert SECRET not in str(caught.value)


def test_a_room_is_a_value() -> None:
    """Comparable, hashable, picklable, and silent about its passwords."""
    sentinel = Sentinel(hosts=["a"], master_name="m", password=f"{SECRET}2")
    for room in (RedisBroker(sentinel=sentinel, password=SECRET), RedisResults(sentinel=sentinel, password=SECRET)):
        assert room == pickle.loads(pickle.dumps(room))
        assert isinstance(hash(room), int)
        for text in (repr(room), room.safe_url(), f"{room.model_dump()}", room.model_dump_json()):
            assert SECRET not in text


def test_a_missing_driver_is_said_at_configuration_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the exact extra to install."""
    find = importlib.util.find_spec
    monkeypatch.setattr("qbridge.backends.base.find_spec", lambda name: None if name == "redis" else find(name))
    for room in (RedisBroker, RedisResults):
        with pytest.raises(ConfigurationError, match=r'pip install "qbridge\[redis\]"'):
            room()


# Settings.


@pytest.mark.parametrize(
    "where",
    [
        {},
        {"tls": True},
        {"unix_socket": "/s"},
        {"sentinel": Sentinel(hosts=["a"], master_name="m")},
        {"key_prefix": "x:"},
    ],
)
def test_every_setting_is_one_that_celery_and_kombu_read(where: dict[str, Any]) -> None:
    """Both accept any name in silence."""
    broker, results = RedisBroker(**where, password="p"), RedisResults(**where, password="p")
    for settings in (broker.celery_settings(), broker.minimal_celery_settings()):
        assert set() == set(settings) - set(DEFAULTS)
        read = {
            *derive(SentinelTransport).Channel.from_transport_options,
            "max_retries",
            "interval_start",
            "interval_step",
            "interval_max",
        }
        assert set() == set(settings.get("broker_transport_options", ())) - read
    for settings in (results.celery_settings(), results.minimal_celery_settings()):
        assert set() == set(settings) - set(DEFAULTS) - EXTRA


def test_kombus_connections_get_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """kombu's own default for each is None: for ever."""
    parameters = channel_of(RedisBroker(publish_timeout=9).celery_settings(), monkeypatch)._connparams()
    assert (3.0, 3.0, True) == tuple(
        parameters[n] for n in ("socket_timeout", "socket_connect_timeout", "socket_keepalive")
    )
    parameters.pop("max_connections")
    made = parameters.pop("connection_class")(**parameters)
    assert 0 == made.retry.get_retries()
    assert 25 == made.health_check_interval
    assert made.socket_keepalive_options


def test_celerys_result_connections_get_the_bounds() -> None:
    """redis-py's retries do not multiply them."""
    parameters = dict(app_of(RedisResults(socket_timeout=4).celery_settings()).backend.connparams)
    assert (4.0, 4.0, 25) == tuple(
        parameters[n] for n in ("socket_timeout", "socket_connect_timeout", "health_check_interval")
    )
    parameters.pop("max_connections")
    made = redis.Connection(**parameters)
    assert 0 == made.retry.get_retries()
    assert isinstance(made.retry, Retry)


@pytest.mark.parametrize(("total", "one"), [(10, 10 / 3), (1, 1.5), (300, 15.0)])
def test_one_answer_may_take_a_third_of_a_send(total: float, one: float) -> None:
    """kombu waits for up to three of them."""
    assert one == RedisBroker(publish_timeout=total).socket_timeout


def test_the_visibility_timeout_is_where_kombu_looks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery's documentation names three places, kombu reads one."""
    channel = channel_of(RedisBroker(visibility_timeout=timedelta(hours=1)).celery_settings(), monkeypatch)
    assert 3600.0 == channel.visibility_timeout
    assert 43200.0 == RedisBroker().visibility_timeout
    assert (10, 1) == (channel.unacked_restore_interval, channel.unacked_restore_throttle)


def test_the_key_prefix_is_before_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the broker and of results."""
    channel = channel_of(RedisBroker(key_prefix="app:").celery_settings(), monkeypatch)
    assert "app:" == channel.global_keyprefix
    backend = app_of(RedisResults(key_prefix="app:").celery_settings()).backend
    assert backend.get_key_for_task("x").startswith(b"app:")


def test_result_retries_have_an_end() -> None:
    """Celery's own default with ``always_retry`` is to retry for ever."""
    backend = app_of(RedisResults(socket_timeout=5).celery_settings()).backend
    assert (True, 3, 5.0) == (backend.always_retry, backend.max_retries, backend.retry_policy["timeout"])
    assert 86400 == backend.expires


def test_priorities_are_the_lists_that_our_transport_takes_in_order() -> None:
    """Normal is the plain list named after the queue."""
    assert [3, None, 9] == [RedisBroker().celery_priority(level) for level in ("low", "normal", "high")]
    assert "priority_steps" not in RedisBroker().celery_settings()["broker_transport_options"]


def test_under_celerys_defaults_only_what_was_written_is_set() -> None:
    """A bridge can join an existing fleet."""
    assert {"broker_url"} == set(RedisBroker.from_url("redis://u:p@h/1").minimal_celery_settings())
    assert {"result_backend"} == set(RedisResults.from_url("redis://u:p@h/1").minimal_celery_settings())
    settings = RedisResults(expires=60, key_prefix="x").minimal_celery_settings()
    assert (60, {"global_keyprefix": "x"}) == (settings["result_expires"], settings["result_backend_transport_options"])


def _sentinels_made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    seen: list[tuple[Any, Any, Any]] = []
    original = redis.sentinel.Sentinel.__init__

    def made(self: Any, sentinels: Any, **kwargs: Any) -> None:
        original(self, sentinels, **kwargs)
        seen.append((list(sentinels), kwargs["sentinel_kwargs"], self.connection_kwargs))

    assert "sentinel_kwargs" in inspect.signature(original).parameters
    monkeypatch.setattr(redis.sentinel.Sentinel, "__init__", made)
    return seen
