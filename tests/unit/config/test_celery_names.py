"""Which raw Celery settings are taken, and what is said about the others?"""

from __future__ import annotations

import re
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

import celery
import pytest
from kombu import Queue

from qbridge.config import BridgeConfig, known_settings, overlay, owned_settings
from qbridge.config.celery_names import check_setting, parse_setting
from qbridge.config.raw_settings import RawSettings
from qbridge.exceptions import ConfigurationError

BROKERS = [
    "amqp://u:p@h//",
    "amqps://u:p@a//;amqps://u:p@b//",
    {"kind": "rabbitmq", "queue_type": "classic", "heartbeat": 10, "connect_timeout": 2, "tls": {"verify": False}},
    "redis://u:p@h/1",
    {"url": "rediss://u:p@h/1", "key_prefix": "x:", "visibility_timeout": 60, "connect_timeout": 1},
    {"url": "sentinel://a;sentinel://b?master_name=m", "username": "u", "password": "p"},
    "redis+socket:///run/redis.sock",
    "embedded:///tmp/b.db",
    {"kind": "embedded", "publish_timeout": 3},
]
RESULTS = [
    "rpc://",
    {"kind": "rpc", "expires": 60, "persistent": False},
    "redis://u:p@h/1",
    {"url": "rediss://u:p@h/1", "key_prefix": "x:", "expires": 60, "socket_timeout": 3, "connect_timeout": 1},
    {"url": "sentinel://a;sentinel://b?master_name=m", "username": "u", "password": "p"},
    "sqlite:///x.db",
    {"url": "sqlite:///x.db", "expires": 9, "create_tables": False, "table_names": {"task": "t"}, "pool_size": 2},
    "none",
]


def fault(celery_settings: dict[str, Any], **arguments: Any) -> str:
    """The message with which raw settings are refused."""
    with pytest.raises(ConfigurationError) as caught:
        BridgeConfig(celery=celery_settings, **arguments)
    return str(caught.value)


@pytest.mark.parametrize("how", ["celery_settings", "minimal_celery_settings"])
@pytest.mark.parametrize("broker", BROKERS, ids=str)
def test_brokers_emit_only_settings_that_are_read(broker: Any, how: str) -> None:
    """Each setting that a broker means is one that Celery reads, in a type that it understands."""
    for name, value in getattr(BridgeConfig(broker=broker).broker, how)().items():
        assert check_setting(name, value) is None


@pytest.mark.parametrize("how", ["celery_settings", "minimal_celery_settings"])
@pytest.mark.parametrize("results", RESULTS, ids=str)
def test_results_emit_only_settings_that_are_read(results: Any, how: str) -> None:
    """Each setting that a result backend means is one that Celery reads, in a type that it understands."""
    for name, value in getattr(BridgeConfig(results=results).results, how)().items():
        assert check_setting(name, value) is None


@pytest.mark.parametrize("broker", BROKERS, ids=str)
def test_brokers_emit_only_transport_options_that_are_read(broker: Any) -> None:
    """The same options, written raw under defaults="celery", are accepted for that broker."""
    room = BridgeConfig(broker=broker).broker
    options = room.celery_settings().get("broker_transport_options", {})
    config = BridgeConfig(defaults="celery", broker=room, celery={"broker_transport_options": options})
    assert dict(config.celery["broker_transport_options"]) == options


@pytest.mark.parametrize("results", RESULTS, ids=str)
def test_results_emit_only_transport_options_that_are_read(results: Any) -> None:
    """The same for result backends."""
    room = BridgeConfig(results=results).results
    options = room.celery_settings().get("result_backend_transport_options", {})
    BridgeConfig(defaults="celery", results=room, celery={"result_backend_transport_options": options})


def test_every_default_of_celery_passes() -> None:
    """Celery's own defaults are of the types that we expect; what fails here was misread in Celery's code."""
    from celery.app.defaults import DEFAULTS

    assert set(DEFAULTS) <= set(known_settings())
    assert [name for name, value in DEFAULTS.items() if check_setting(name, value) is not None] == []


def test_settings_that_celery_reads_without_listing_them_are_known() -> None:
    """Celery's code is searched for reads of settings that its table lacks; each is known here."""
    pattern = re.compile(r"""(?:conf\.get\(|_get\(|conf\[)\s*['"]([a-z][a-z0-9]*_[a-z0-9_]+)['"]""")
    folder = Path(celery.__file__).parent
    read = {name for path in folder.rglob("*.py") for name in pattern.findall(path.read_text("utf-8"))}
    assert len(read) > 20
    assert read - set(known_settings()) == set()


def test_owned_settings_exist_and_so_do_their_fields() -> None:
    """The closed table names settings that Celery reads and fields that the configuration has."""
    from qbridge.config import describe

    paths = {row.path for row in describe()}
    for setting, field in owned_settings().items():
        assert setting in known_settings()
        assert field in paths


@pytest.mark.parametrize("setting", sorted(owned_settings()))
def test_an_owned_setting_is_refused_under_safe(setting: str) -> None:
    """A setting with a typed field is refused, naming the field."""
    kinds = known_settings()[setting].split(" or ")
    samples: dict[str, Any] = {"bool": True, "int": 1, "float": 1, "concurrency": 1, "strings": ["json"], "dict": {}}
    value = next((samples[kind] for kind in kinds if kind in samples), "UTC")
    assert f"celery.{setting} (argument): has a typed field" in fault({setting: value})
    assert f"write {owned_settings()[setting]}" in fault({setting: value})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task_ack_late": True}, "did you mean 'task_acks_late'?"),
        ({"acks_late": True}, "did you mean 'task_acks_late'?"),
        ({"CELERY_TASK_SERIALIZER": "json"}, "write task_serializer"),
        ({"CELERYD_CONCURRENCY": 3}, "write worker_concurrency"),
        ({"BROKER_URL": "x"}, "write broker_url"),
        ({"TASK_ACKS_LATE": True}, "write task_acks_late"),
        ({"CELERY_BROKER_URL": "x"}, "write broker_url"),
        ({"redbeat_redis_url": "x"}, "bridge.celery.conf"),
        ({"task_time_limit": "abc"}, "should be a number, not str"),
        ({"task_time_limit": 0}, "no limit"),
        ({"task_time_limit": -1}, "negative"),
        ({"task_time_limit": float("nan")}, "not a finite number"),
        ({"task_time_limit": float("inf")}, "not a finite number"),
        ({"task_time_limit": True}, "should be a number, not bool"),
        ({"task_track_started": "false"}, "should be True or False, not str"),
        ({"task_track_started": None}, "is None"),
        ({"task_track_started": 2}, "should be True or False, not int"),
        ({"beat_schedule": []}, "should be a mapping, not list"),
        ({"event_serializer": "pickle"}, "names pickle"),
        ({"accept_content": ["json", "pickle"]}, "names pickle"),
        ({"accept_content": ["application/x-python-serialize"]}, "names pickle"),
        ({"worker_eta_task_limit": 1.5}, "should be a whole number, not float"),
        ({"timezone": "Mars"}, "not a time zone"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], words: str) -> None:
    """Celery would take each of these in silence."""
    assert words in fault(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"task_time_limit": 3, "task_soft_time_limit": 2.5},
        {"result_failure_expires": timedelta(days=1)},
        {"task_routes": lambda name, *_: None},
        {"task_routes": ({"a": "b"},)},
        {"broker_failover_strategy": "shuffle"},
        {"broker_pool_limit": None},
        {"broker_connection_max_retries": None},
        {"result_backend_max_retries": float("inf")},
        {"result_backend_thread_safe": True},
        {"redis_backend_credential_provider": object()},
        {"database_engine_callback": lambda url: url},
        {"worker_consumer": "a:B"},
        {"worker_timer": object},
        {"worker_state_db": Path("x")},
        {"task_default_rate_limit": "10/m"},
        {"task_default_rate_limit": 10},
        {"task_default_delivery_mode": "transient"},
        {"security_key_password": b"x"},
        {"result_cache_max": -1},
        {"task_remote_tracebacks": 1},
        {"beat_schedule": {"a": {"task": "x", "schedule": 3}}},
    ],
)
def test_a_right_setting_is_kept(settings: dict[str, Any]) -> None:
    """Everything that Celery's documentation allows is taken."""
    assert dict(BridgeConfig(celery=settings).celery) == settings


@pytest.mark.parametrize(
    ("broker", "options", "words"),
    [
        ("redis://h", {"socket_timeuot": 3}, "did you mean 'socket_timeout'?"),
        ("redis://h", {"read_timeout": 3}, "nothing reads this option with redis"),
        ("redis://h", {"visibility_timeout": 3}, "write broker.visibility_timeout"),
        ("redis://h", {"global_keyprefix": "x"}, "write broker.key_prefix"),
        ("amqp://h//", {"visibility_timeout": 3}, "nothing reads this option with rabbitmq"),
        ("amqp://h//", {"confirm_publsh": True}, "did you mean 'confirm_publish'?"),
        ("amqp://h//", {"heartbeat": 3}, "write broker.heartbeat"),
        ("embedded://", {"publish_timeout": 3}, "write broker.publish_timeout"),
    ],
)
def test_a_wrong_transport_option_is_refused(broker: str, options: dict[str, Any], words: str) -> None:
    """kombu and py-amqp would swallow each of these."""
    assert words in fault({"broker_transport_options": options}, broker=broker)


@pytest.mark.parametrize(
    ("broker", "options"),
    [
        ("amqp://h//", {"confirm_publish": True, "client_properties": {}, "max_retries": 3, "login_method": "PLAIN"}),
        ("redis://h", {"queue_order_strategy": "priority", "sep": ":", "polling_interval": 1, "client_name": "x"}),
        ("embedded://", {"polling_interval": 1}),
    ],
)
def test_a_right_transport_option_is_kept(broker: str, options: dict[str, Any]) -> None:
    """What the driver reads and no field owns is the way down."""
    assert BridgeConfig(broker=broker, celery={"broker_transport_options": options}).celery["broker_transport_options"]


def test_result_transport_options() -> None:
    """Those of results are checked like those of brokers."""
    message = fault({"result_backend_transport_options": {"retry_polcy": {}}}, results="redis://h")
    assert "did you mean 'retry_policy'?" in message


def test_celerys_defaults_take_owned_settings_into_fields() -> None:
    """Under defaults="celery" a raw setting fills its field and stays for Celery to read."""
    raw = {
        "broker_url": "redis://:p@h/1",
        "result_backend": "redis://:p@h/2",
        "task_acks_late": True,
        "task_default_queue": "mine",
        "task_serializer": "json",
        "timezone": UTC,
        "worker_pool": "threads",
        "worker_concurrency": 3,
        "worker_prefetch_multiplier": 2,
        "worker_max_tasks_per_child": 5,
        "imports": ["a.b"],
        "include": ["c"],
    }
    config = BridgeConfig(defaults="celery", celery=raw)
    assert config.broker.safe_url() == "redis://:**@h:6379/1"
    assert config.results.safe_url() == "redis://:**@h:6379/2"
    assert (config.delivery, config.default_queue, config.modules) == ("at_least_once", "mine", ("a.b", "c"))
    assert (config.worker.pool, config.worker.concurrency, config.worker.prefetch) == ("thread", 3, 2)
    assert dict(config.celery) == raw


@pytest.mark.parametrize(
    ("raw", "arguments"),
    [
        ({"broker_url": "redis://h/1"}, {"broker": "redis://h/2"}),
        ({"result_backend": "redis://h/1"}, {"results": "rpc://"}),
        ({"task_acks_late": True}, {"delivery": "at_most_once"}),
        ({"task_default_queue": "a"}, {"default_queue": "b"}),
        ({"worker_prefetch_multiplier": 2}, {"worker": {"prefetch": 1}}),
        ({"worker_pool": "solo"}, {"worker": {"pool": "thread"}}),
        ({"imports": ["a"]}, {"modules": ["b"]}),
        ({"task_queues": [Queue("a")]}, {"queues": ["b"]}),
    ],
)
def test_celerys_defaults_refuse_contradictions_only(raw: dict[str, Any], arguments: dict[str, Any]) -> None:
    """A field that says something else than the raw setting is a conflict; one that says the same is not."""
    message = fault(raw, defaults="celery", **arguments)
    assert f"celery.{next(iter(raw))} (argument): says something else than {next(iter(arguments))}" in message


def test_celerys_defaults_accept_agreement() -> None:
    """Saying the same twice is no conflict."""
    config = BridgeConfig(
        defaults="celery",
        broker="redis://h:6379/1",
        worker={"prefetch": 2},
        celery={"broker_url": "redis://h/1", "worker_prefetch_multiplier": 2},
    )
    assert config.worker.prefetch == 2


def test_raw_settings_are_not_printed() -> None:
    """Names are shown, values are not, unless they are numbers of harmless settings."""
    config = BridgeConfig(
        defaults="celery", celery={"broker_url": "redis://:s3cret@h", "security_key": "s3cret", "task_protocol": 2}
    )
    for text in (repr(config), str(config), repr(config.celery), str(config.model_dump()), config.model_dump_json()):
        assert "s3cret" not in text
    assert '"task_protocol":2' in config.model_dump_json()
    assert config.celery["security_key"] == "s3cret"


def test_not_a_mapping() -> None:
    """Raw settings that are no mapping are refused."""
    with pytest.raises(ConfigurationError, match="mapping of Celery's settings"):
        BridgeConfig(celery=3)  # type: ignore[arg-type]


def test_overlay_merges_options_name_by_name() -> None:
    """A raw transport option does not take away those beside it; any other setting replaces."""
    below = {"broker_transport_options": {"a": 1, "b": 2}, "beat_schedule": {"x": 1}, "name": 1}
    above = {"broker_transport_options": {"b": 3}, "beat_schedule": {"y": 1}}
    assert overlay(below, above) == {
        "broker_transport_options": {"a": 1, "b": 3},
        "beat_schedule": {"y": 1},
        "name": 1,
    }


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("task_acks_late", "yes", True),
        ("task_acks_late", "0", False),
        ("task_acks_late", "maybe", "maybe"),
        ("task_time_limit", "3.5", 3.5),
        ("task_time_limit", "x", "x"),
        ("worker_concurrency", "auto", "auto"),
        ("imports", "a,b", ["a", "b"]),
        ("imports", '["a"]', ["a"]),
        ("result_backend", "123", "123"),
        ("nonsense", "{", "{"),
    ],
)
def test_settings_from_the_environment_have_their_types(name: str, text: str, value: Any) -> None:
    """What does not look like the setting's type stays text, and is refused as such later."""
    assert parse_setting(name, text) == value


def test_raw_settings_behave_like_a_mapping() -> None:
    """Equal settings are equal and hash alike."""
    one, other = RawSettings({"a": [1]}), RawSettings({"a": [1]})
    assert (one, hash(one), repr(one)) == (other, hash(other), "<1 Celery settings: a>")
    assert one == {"a": [1]}
    assert repr(RawSettings()) == "{}"
