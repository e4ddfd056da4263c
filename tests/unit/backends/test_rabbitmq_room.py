"""What the operator writes for RabbitMQ is what kombu and py-amqp read."""

from __future__ import annotations

import inspect
import pickle
import socket
from datetime import timedelta
from typing import Any

import amqp
import celery
import pytest
from celery.app.defaults import DEFAULTS
from kombu.connection import Connection
from pydantic import BaseModel, SecretStr, ValidationError

from qbridge.backends.rabbitmq import RabbitMQBroker
from qbridge.config import QueueConfig
from qbridge.exceptions import ConfigurationError, UnsupportedFeature

SECRET = "s3cret"


def connection_of(settings: dict[str, Any]) -> Connection:
    """The connection that a plain Celery app makes of settings; nothing is connected."""
    app = celery.Celery("t", set_as_current=False)
    app.conf.update(settings)
    connection: Connection = app.connection_for_write()
    return connection


# URLs.


@pytest.mark.parametrize(
    "url",
    [
        "amqp://", "amqp://h", "amqp://h/", "amqp://h//", "amqp://h/shop", "amqp://h//shop", "amqp://h/%2Fshop",
        "amqp://u:p@h:1/v", "amqp://u:p%40%2F%3B@h:1/a%2Fb", "amqp://u@h", "pyamqp://h:7/v", "amqps://h/v", "amqp://u:p@[::1]:5/v",
    ],
)  # fmt: skip
def test_a_url_means_what_kombu_makes_of_it(url: str) -> None:
    """Above all ``/v`` and ``//v`` stay the two vhosts that they are."""
    ours = connection_of(RabbitMQBroker.from_url(url).celery_settings())
    theirs = Connection(url)
    account = {"userid": "guest", "password": "guest", "hostname": "localhost"}
    for name in ("hostname", "userid", "password", "virtual_host"):
        assert (getattr(theirs, name) or account.get(name)) == getattr(ours, name), name
    default = 5671 if url.startswith("amqps") else 5672
    assert (theirs.port or default) == ours.port
    assert bool(url.startswith("amqps")) == bool(ours.ssl)


def test_vhosts_with_and_without_a_slash_are_two() -> None:
    """The field holds the name exactly."""
    assert ["shop", "/shop"] == [RabbitMQBroker.from_url(url).vhost for url in ("amqp://h/shop", "amqp://h//shop")]
    assert "amqp://guest:guest@localhost:5672/%2Fshop" == RabbitMQBroker(vhost="/shop").celery_url()
    assert "/shop" == connection_of(RabbitMQBroker(vhost="/shop").celery_settings()).virtual_host


def test_a_list_of_urls_is_a_cluster() -> None:
    """kombu fails over between them, each with the same account, vhost and TLS."""
    broker = RabbitMQBroker.from_url(f"amqp://u:{SECRET}@one:1/v;amqp://u:{SECRET}@[::2]/v")
    assert ("one:1", "::2") == broker.hosts
    connection = connection_of(broker.celery_settings())
    seen = []
    for _ in range(3):
        seen.append(
            (connection.hostname, connection.port, connection.userid, connection.password, connection.virtual_host)
        )
        connection.maybe_switch_next()
    assert [("one", 1, "u", SECRET, "v"), ("::2", 5672, "u", SECRET, "v"), ("one", 1, "u", SECRET, "v")] == seen


def test_celery_report_of_a_cluster_shows_no_password() -> None:
    """Celery masks the first password of a setting only, so the list of URLs has none."""
    app = celery.Celery("t", set_as_current=False)
    app.conf.update(RabbitMQBroker(hosts=("one", "two"), username="u", password=SECRET).celery_settings())
    assert SECRET not in app.bugreport()
    app.conf.update(RabbitMQBroker(username="u", password=SECRET).celery_settings())
    assert SECRET not in app.bugreport()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("amqp://h?heartbeet=1", "did you mean heartbeat"),
        ("amqp://u:s3cret@h/v;amqp://u:s3cret@h2/w", "differ"),
        ("redis://h", "not a RabbitMQ URL"),
        ("amqp://u:s3cret@h:x/", "malformed"),
        ("amqp://h?heartbeat=s3cret", "heartbeat"),
    ],
)
def test_what_a_url_cannot_say_is_refused(url: str, words: str) -> None:
    """Naming what to do, and no secret."""
    with pytest.raises(ConfigurationError, match=words) as caught:
        RabbitMQBroker.from_url(url)
    assert SECRET not in str(caught.value)


def test_parameters_of_a_url_are_read() -> None:
    """kombu knows these two as well."""
    broker = RabbitMQBroker.from_url("amqp://h?heartbeat=7&connect_timeout=2")
    assert (7.0, 2.0) == (broker.heartbeat, broker.connect_timeout)


# Fields.


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prot": 1}, "did you mean port"),
        ({"host": "a", "hosts": ["b"]}, "host and hosts"),
        ({"host": "a:1", "port": 1}, "twice"),
        ({"host": "amqp://a"}, "host is malformed"),
        ({"port": 0}, "port"),
        ({"vhost": ""}, "vhost"),
        ({"heartbeat": -1}, "heartbeat"),
        ({"publish_timeout": 0}, "publish_timeout"),
        ({"queue_type": "stream"}, "queue_type"),
        ({"password": 5}, "password"),
        ({"kind": "redis"}, "kind"),
    ],
)
def test_wrong_fields_are_configuration_errors(fields: dict[str, Any], words: str) -> None:
    """They name the field, and never show the password that stands beside it."""
    with pytest.raises(ConfigurationError, match=words) as caught:
        RabbitMQBroker(**{"password": SECRET, **fields})
    assert SECRET not in str(caught.value)


def test_inside_another_model_faults_keep_their_path() -> None:
    """A bridge's config can say ``broker.port``."""

    class Holder(BaseModel, hide_input_in_errors=True):
        broker: RabbitMQBroker

    with pytest.raises(ValidationError) as caught:
        Holder.model_validate({"broker": {"prot": 1, "password": SECRET}})
    assert ("broker", "prot") == caught.value.errors()[0]["loc"]
    assert SECRET not in str(caught.value)


def test_a_broker_is_a_value() -> None:
    """Frozen, comparable, hashable, picklable, and silent about its password."""
    broker = RabbitMQBroker(password=SECRET, hosts=["a", "b"])
    with pytest.raises(ValidationError):
        broker.host = "other"  # type: ignore[misc]  # that is the point
    assert broker == pickle.loads(pickle.dumps(broker))
    assert hash(broker) == hash(RabbitMQBroker(password=SecretStr(SECRET), hosts=("a", "b")))
    for text in (repr(broker), str(broker), broker.safe_url(), f"{broker.model_dump()}", broker.model_dump_json()):
        assert SECRET not in text


def test_durations_may_be_timedeltas() -> None:
    """Seconds are held."""
    assert 3.0 == RabbitMQBroker(publish_timeout=timedelta(seconds=3)).publish_timeout


# Settings.


def test_every_setting_is_one_that_celery_reads() -> None:
    """Celery accepts any name in silence."""
    broker = RabbitMQBroker(hosts=("a", "b"), tls=True)
    assert set() == set(broker.celery_settings()) - set(DEFAULTS)
    assert set() == set(broker.minimal_celery_settings()) - set(DEFAULTS)


def test_every_transport_option_is_an_argument_of_py_amqp_or_of_kombus_retries() -> None:
    """py-amqp swallows unknown ones in ``**kwargs``."""
    options = RabbitMQBroker().celery_settings()["broker_transport_options"]
    known = set(inspect.signature(amqp.Connection.__init__).parameters)
    assert set() == set(options) - known - {"max_retries", "interval_start", "interval_step", "interval_max"}


def test_py_amqp_gets_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every wait on a socket has an end."""
    monkeypatch.setattr(amqp.Connection, "connect", lambda _self: None)
    broker = RabbitMQBroker(host="h", connect_timeout=3, publish_timeout=6)
    made = connection_of(broker.celery_settings()).transport.establish_connection()
    assert (3, 6, 2) == (made.connect_timeout, made.read_timeout, made.write_timeout)
    assert 30_000 == made.socket_settings[socket.TCP_USER_TIMEOUT]


def test_connecting_never_takes_longer_than_a_send_may() -> None:
    """A short ``publish_timeout`` needs no other field to be changed."""
    assert 1 == RabbitMQBroker(publish_timeout=1).celery_settings()["broker_connection_timeout"]


def test_confirms_are_left_to_the_sender() -> None:
    """In the transport options they would cover events and remote control too."""
    assert "confirm_publish" not in RabbitMQBroker().celery_settings()["broker_transport_options"]


def test_under_celerys_defaults_only_what_was_written_is_set() -> None:
    """A bridge can join an existing fleet."""
    assert {"broker_url"} == set(RabbitMQBroker.from_url("amqp://u:p@h//").minimal_celery_settings())
    broker = RabbitMQBroker(heartbeat=9, connect_timeout=2)
    assert {"broker_url", "broker_heartbeat", "broker_connection_timeout"} == set(broker.minimal_celery_settings())


# Priorities.


@pytest.mark.parametrize(
    ("most", "expected"), [(9, [1, 5, 9]), (10, [1, 6, 10]), (3, [0, 2, 3]), (2, [0, 1, 2]), (255, [28, 142, 255])]
)
def test_classic_queues_have_three_levels_within_their_own_maximum(most: int, expected: list[int]) -> None:
    """Low before normal before high, and no number above the queue's."""
    broker = RabbitMQBroker(queue_type="classic")
    assert expected == [broker.celery_priority(level, max_priority=most) for level in ("low", "normal", "high")]


def test_quorum_queues_have_two_levels_from_4_on() -> None:
    """Above 4 is high, all else is normal."""
    broker = RabbitMQBroker()
    for version in (None, (4, 0, 5), (4, 2)):
        levels = [broker.celery_priority(level, server_version=version) for level in ("low", "normal", "high")]
        assert [None, None, 9] == levels


@pytest.mark.parametrize(
    "where",
    [{"server_version": (3, 10, 8)}, {"queue_type": "classic"}, {"queue_type": "quorum", "server_version": (3, 13)}],
)
def test_without_priorities_the_way_is_named(where: dict[str, Any]) -> None:
    """``QueueConfig(…, max_priority=9)``; normal is always possible."""
    assert RabbitMQBroker().celery_priority("normal", **where) is None
    for level in ("low", "high"):
        with pytest.raises(UnsupportedFeature, match=r"QueueConfig\(name, type='classic', max_priority=9\)"):
            RabbitMQBroker().celery_priority(level, **where)
    assert 9 == QueueConfig("q", type="classic", max_priority=9).max_priority  # what the message says exists
