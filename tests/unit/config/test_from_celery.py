"""What becomes of an existing Celery configuration?"""

# long because: one sentence per habit of Celery configurations, and there are many.

from __future__ import annotations

import ssl
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from kombu import Exchange, Queue

from qbridge.backends.database import DatabaseResults
from qbridge.backends.embedded import EmbeddedBroker
from qbridge.backends.none import NoResults
from qbridge.backends.rabbitmq import RabbitMQBroker
from qbridge.backends.redis import RedisBroker, RedisResults, Sentinel
from qbridge.backends.rpc import RpcResults
from qbridge.config import BridgeConfig, QueueConfig
from qbridge.exceptions import ConfigurationError

EVERYTHING = {
    "broker_url": "redis://:p@h/1",
    "result_backend": "redis://:p@h/2",
    "result_expires": timedelta(hours=1),
    "task_serializer": "json",
    "accept_content": ["json"],
    "task_acks_late": True,
    "task_default_queue": "mine",
    "task_queues": (
        Queue("mine"),
        Queue("q", Exchange("q"), queue_arguments={"x-queue-type": "quorum"}, no_declare=True),
    ),
    "worker_pool": "threads",
    "worker_concurrency": 3,
    "worker_prefetch_multiplier": 2,
    "imports": ("a.tasks",),
    "timezone": "Europe/Berlin",
    "task_time_limit": 30,
    "beat_schedule": {"x": {"task": "a.tasks.x", "schedule": 3}},
}


def codes(config: BridgeConfig) -> list[tuple[str, str]]:
    """Level and code of each finding."""
    return [(finding.level, finding.code) for finding in config.findings]


def words(config: BridgeConfig) -> str:
    """All findings in one text."""
    return "\n".join(f"{finding.what} | {finding.todo}" for finding in config.findings)


def test_todays_names_become_fields_and_the_rest_stays_raw() -> None:
    """A whole configuration is taken over without a finding."""
    config = BridgeConfig.from_celery(EVERYTHING)
    assert config.findings == ()
    assert config.defaults == "celery"
    assert config.broker == RedisBroker(host="h", password="p", db=1)
    assert config.results == RedisResults(host="h", password="p", db=2, expires=3600)
    assert (config.delivery, config.default_queue, config.timezone) == ("at_least_once", "mine", "Europe/Berlin")
    assert config.queues == (QueueConfig("mine"), QueueConfig("q", declare=False))
    assert (config.worker.pool, config.worker.concurrency, config.worker.prefetch) == ("thread", 3, 2)
    assert config.modules == ("a.tasks",)
    assert sorted(config.celery) == [
        "accept_content",
        "beat_schedule",
        "task_acks_late",
        "task_queues",
        "task_serializer",
        "task_time_limit",
    ]


def test_nothing_set_is_nothing_set() -> None:
    """An empty configuration means Celery's own defaults."""
    config = BridgeConfig.from_celery({})
    assert config.findings == ()
    assert config == BridgeConfig(defaults="celery")
    assert config.broker_is_default


def as_module(settings: dict[str, Any]) -> ModuleType:
    """The same settings as a module."""
    module = ModuleType("celeryconfig_of_tests")
    module.__dict__.update(settings, os=sys, _private=1, Helper=dict, helper=lambda: 1)
    return module


@pytest.mark.parametrize(
    "source",
    [
        {f"CELERY_{name.upper()}": value for name, value in EVERYTHING.items()},
        as_module(EVERYTHING),
        SimpleNamespace(**EVERYTHING),
        SimpleNamespace(DEBUG=True, INSTALLED_APPS=[], **{f"CELERY_{n.upper()}": v for n, v in EVERYTHING.items()}),
        {
            "BROKER_URL": "redis://:p@h/1",
            "CELERY_RESULT_BACKEND": "redis://:p@h/2",
            "CELERY_TASK_RESULT_EXPIRES": timedelta(hours=1),
            "CELERY_TASK_SERIALIZER": "json",
            "CELERY_ACCEPT_CONTENT": ["json"],
            "CELERY_ACKS_LATE": True,
            "CELERY_DEFAULT_QUEUE": "mine",
            "CELERY_QUEUES": EVERYTHING["task_queues"],
            "CELERYD_POOL": "threads",
            "CELERYD_CONCURRENCY": 3,
            "CELERYD_PREFETCH_MULTIPLIER": 2,
            "CELERY_IMPORTS": ("a.tasks",),
            "CELERY_TIMEZONE": "Europe/Berlin",
            "CELERYD_TASK_TIME_LIMIT": 30,
            "CELERYBEAT_SCHEDULE": EVERYTHING["beat_schedule"],
        },
    ],
    ids=["namespace", "module", "object", "django", "celery 3"],
)
def test_every_way_of_writing_means_the_same(source: object) -> None:
    """A namespace, a module, an object, Django's settings and names of Celery 3 all make the same config."""
    assert BridgeConfig.from_celery(source) == BridgeConfig.from_celery(EVERYTHING)


def test_a_dotted_name_is_imported(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules and attributes of modules are found, the working directory included."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (project / "confmodule_a.py").write_text("broker_url = 'redis://h'\nclass Inner:\n    broker_url = 'redis://i'\n")
    assert BridgeConfig.from_celery("confmodule_a").broker == RedisBroker(host="h")
    assert BridgeConfig.from_celery("confmodule_a:Inner").broker == RedisBroker(host="i")
    assert BridgeConfig.from_celery("confmodule_a.Inner").broker == RedisBroker(host="i")
    for missing in ("confmodule_b", "confmodule_a:Other", "confmodule_a.Other"):
        with pytest.raises(ConfigurationError, match="no Celery configuration at"):
            BridgeConfig.from_celery(missing)
    (project / "confmodule_c.py").write_text("import a_library_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_missing"):
        BridgeConfig.from_celery("confmodule_c")


def test_an_explicit_namespace_ignores_the_others() -> None:
    """With a namespace only its names are judged."""
    source = {"PROJ_BROKER_URL": "redis://h", "PROJ_TASK_ACK_LATE": True, "OTHER": 1, "DEBUG": True}
    config = BridgeConfig.from_celery(source, namespace="PROJ")
    assert config.broker == RedisBroker(host="h")
    assert words(config) == (
        "PROJ_TASK_ACK_LATE: Celery 5.7 reads no such setting and ignores it | did you mean 'PROJ_TASK_ACKS_LATE'?"
    )


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("CELERY_TAST_SERIALIZER", "'CELERY_TASK_SERIALIZER'"),
        ("CELERY_BACKEND", "'CELERY_RESULT_BACKEND'"),
        ("task_ack_late", "'task_acks_late'"),
        ("CELERYD_CONCURENCY", "'CELERYD_CONCURRENCY'"),
        ("BROKER_URI", "BROKER_URL'"),
        ("redbeat_lock_timeout", "bridge.celery.conf"),
    ],
)
@pytest.mark.parametrize("beside", [{}, {"CELERY_BROKER_URL": "amqp://h//"}, {"broker_url": "amqp://h//"}])
def test_ignored_keys_are_reported(key: str, suggestion: str, beside: dict[str, Any]) -> None:
    """What Celery ignores in silence is a finding with a did-you-mean."""
    config = BridgeConfig.from_celery({key: "s3cret", **beside})
    assert codes(config) == [("warning", "celery.ignored")]
    assert words(config).startswith(f"{key}: Celery 5.7 reads no such setting")
    assert suggestion in words(config)
    assert "s3cret" not in words(config)


def test_djangos_own_settings_are_not_reported() -> None:
    """Only what concerns Celery is judged among Django's settings."""
    source = {"DEBUG": 1, "DATABASES": {}, "SECRET_KEY": "x", "CELERY_BROKER_URL": "amqp://h//", "BROKER_URI": 1}
    assert [line[:11] for line in words(BridgeConfig.from_celery(source)).splitlines()] == ["BROKER_URI:"]


def test_the_same_setting_twice_is_reported() -> None:
    """Celery looks for the namespace first, then for today's name, then for the old one."""
    source = {"CELERY_TASK_SERIALIZER": "yaml", "task_serializer": "json", "CELERY_BROKER_URL": "redis://h"}
    config = BridgeConfig.from_celery(source)
    assert config.celery["task_serializer"] == "yaml"
    assert codes(config) == [("warning", "celery.twice")]
    same = BridgeConfig.from_celery({"enable_utc": True, "CELERY_BROKER_URL": "redis://h", "CELERY_ENABLE_UTC": True})
    assert same.findings == ()


def test_mixed_names_are_reported() -> None:
    """Celery refuses to start with names of two eras; here they are read and reported."""
    config = BridgeConfig.from_celery({"task_acks_late": True, "CELERYD_CONCURRENCY": 2})
    assert (config.delivery, config.worker.concurrency) == ("at_least_once", 2)
    assert codes(config) == [("warning", "celery.mixed")]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"task_serializer": "pickle"}, {}),
        ({"result_serializer": "pickle"}, {}),
        ({"accept_content": ["pickle"]}, {}),
        ({"accept_content": {"pickle", "json"}}, {"accept_content": ["json"]}),
        ({"result_accept_content": ["application/x-python-serialize"]}, {}),
    ],
)
def test_pickle_is_an_error_with_a_way(settings: dict[str, Any], kept: dict[str, Any]) -> None:
    """Pickle is never taken over; the finding says how to move."""
    config = BridgeConfig.from_celery(settings)
    assert codes(config) == [("error", "celery.pickle")]
    assert "drain" in config.findings[0].todo
    assert dict(config.celery) == kept


@pytest.mark.parametrize(
    "settings",
    [
        {"task_track_started": "yes"},
        {"task_time_limit": "abc"},
        {"accept_content": [[]]},
        {"timezone": "Mars"},
        {"task_default_queue": "a,b"},
        {"imports": ["proj/tasks.py"]},
        {"worker_soft_shutdown_timeout": float("inf")},
        {"task_time_limit": 3, "task_soft_time_limit": 5},
        {"task_queues": {"a": {}, "a.dead": {}}},
        {"broker_transport_options": {"visibility_timeout": -3}, "broker_url": "redis://h"},
    ],
)
def test_a_setting_that_cannot_be_is_left_out(settings: dict[str, Any]) -> None:
    """One wrong setting is a finding, the rest of the configuration is taken over."""
    config = BridgeConfig.from_celery({**settings, "task_remote_tracebacks": True})
    assert [level for level, _ in codes(config)] == ["error"]
    assert config.celery["task_remote_tracebacks"] is True


@pytest.mark.parametrize(
    ("settings", "broker"),
    [
        ({"broker_url": "amqp://u:p@h/shop"}, RabbitMQBroker(host="h", username="u", password="p", vhost="shop")),
        (
            {"broker_url": "amqp://u:p@a//;amqp://u:p@b:1//"},
            RabbitMQBroker(hosts=("a", "b:1"), username="u", password="p"),
        ),
        ({"broker_url": ["amqp://a//", "amqp://b//"]}, RabbitMQBroker(hosts=("a", "b"))),
        (
            {"broker_host": "h", "broker_user": "u", "broker_password": "p", "broker_vhost": "v", "broker_port": 1},
            RabbitMQBroker(host="h", port=1, username="u", password="p", vhost="v"),
        ),
        ({"broker_host": "h", "broker_vhost": "/"}, RabbitMQBroker(host="h", port=5672)),
        ({"broker_host": "redis://h"}, RedisBroker(host="h")),
        ({"broker_host": "h", "broker_transport": "redis"}, RedisBroker(host="h", port=6379)),
        ({"broker_read_url": "redis://h", "broker_write_url": "redis://h"}, RedisBroker(host="h")),
        (
            {"broker_url": "amqp://h//", "broker_heartbeat": None, "broker_connection_timeout": 2},
            RabbitMQBroker(host="h", heartbeat=0, connect_timeout=2),
        ),
        (
            {
                "broker_url": "redis://h",
                "broker_transport_options": {
                    "visibility_timeout": 60,
                    "global_keyprefix": "x:",
                    "socket_connect_timeout": 1,
                },
            },
            RedisBroker(host="h", visibility_timeout=60, key_prefix="x:", connect_timeout=1),
        ),
        (
            {
                "broker_url": "sentinel://:p@a:1;sentinel://:p@b:2",
                "broker_transport_options": {"master_name": "m", "sentinel_kwargs": {"password": "q"}},
            },
            RedisBroker(password="p", sentinel=Sentinel(hosts=("a:1", "b:2"), master_name="m", password="q")),
        ),
    ],
)
def test_brokers_are_taken_over(settings: dict[str, Any], broker: Any) -> None:
    """Every way to name a broker leads to the same model, and nothing of it stays raw."""
    config = BridgeConfig.from_celery(settings)
    assert config.findings == ()
    assert config.broker == broker
    assert config.broker.celery_url() == broker.celery_url()
    assert dict(config.celery) == {}


@pytest.mark.parametrize(
    ("settings", "results"),
    [
        ({"result_backend": "rpc://", "result_persistent": True}, RpcResults(persistent=True)),
        ({"result_backend": "db+sqlite:////nowhere/x.db"}, DatabaseResults(url="sqlite:////nowhere/x.db")),
        (
            {"result_backend": "database", "database_url": "sqlite:////nowhere/x.db"},
            DatabaseResults(url="sqlite:////nowhere/x.db"),
        ),
        (
            {
                "result_backend": "db+sqlite:////nowhere/x.db",
                "database_create_tables_at_setup": False,
                "database_table_names": {"task": "t"},
                "result_expires": 60,
            },
            DatabaseResults(url="sqlite:////nowhere/x.db", create_tables=False, table_names={"task": "t"}, expires=60),
        ),
        ({"result_backend": "redis", "redis_host": "h", "redis_password": "p"}, RedisResults(host="h", password="p")),
        (
            {
                "result_backend": "redis://h",
                "redis_socket_timeout": 3,
                "result_backend_transport_options": {"global_keyprefix": "x:"},
            },
            RedisResults(host="h", socket_timeout=3, key_prefix="x:"),
        ),
        ({"result_backend": "disabled://"}, NoResults()),
        ({"result_backend": None}, NoResults()),
    ],
)
def test_results_are_taken_over(settings: dict[str, Any], results: Any) -> None:
    """Every way to name a result backend leads to the same model."""
    config = BridgeConfig.from_celery({"broker_url": "amqp://h//", **settings})
    assert config.findings == ()
    assert config.results.celery_url() == results.celery_url()
    assert {**config.results.model_dump(), "url": 0} == {**results.model_dump(), "url": 0} or config.results == results
    assert dict(config.celery) == {}


def test_results_that_never_expire_stay_so() -> None:
    """Celery's 0 means for ever, which no field can say."""
    config = BridgeConfig.from_celery({"result_backend": "redis://h", "result_expires": 0})
    assert dict(config.celery) == {"result_expires": 0}


@pytest.mark.parametrize("url", ["sqs://k:s3cret@", "memory://", "redis://:s3cret@h/x", "amqp://u:s3cret@h:p//"])
def test_an_unreadable_broker_is_a_finding(url: str) -> None:
    """No other server is spoken to instead: the embedded broker stands in, and an error says so."""
    config = BridgeConfig.from_celery({"broker_url": url, "broker_transport_options": {"region": "x"}})
    assert codes(config) == [("error", "celery.broker")]
    assert isinstance(config.broker, EmbeddedBroker)
    assert config.results == NoResults()
    assert "s3cret" not in words(config)


@pytest.mark.parametrize("url", ["django-db", "mongodb://u:s3cret@h", "cache+memcached://h", "redis://:s3cret@h/x"])
def test_an_unreadable_result_backend_is_a_finding(url: str) -> None:
    """Without a result backend that can be read there are no results, and an error says so."""
    config = BridgeConfig.from_celery({"result_backend": url})
    assert codes(config) == [("error", "celery.results")]
    assert config.results == NoResults()
    assert "s3cret" not in words(config)


@pytest.mark.parametrize(
    "settings",
    [
        {"broker_url": "amqp://h//", "broker_read_url": "amqp://other//"},
        {"broker_use_ssl": True},
        {"broker_host": "h", "broker_password": lambda: "s3cret"},
    ],
)
def test_brokers_that_are_more_than_one_model_can_say(settings: dict[str, Any]) -> None:
    """Split brokers, encryption without a server and computed passwords are errors."""
    assert codes(BridgeConfig.from_celery(settings)) == [("error", "celery.broker")]


def test_tls_is_taken_over(tmp_path: Path) -> None:
    """Files, verification and host names mean what they meant to the driver."""
    pem = tmp_path / "ca.pem"
    pem.touch()
    verified = {"ca_certs": str(pem), "cert_reqs": ssl.CERT_REQUIRED}
    config = BridgeConfig.from_celery({"broker_url": "amqps://h//", "broker_use_ssl": verified})
    assert config.findings == ()
    assert config.broker.tls is not None  # type: ignore[union-attr]
    assert (config.broker.tls.verify, config.broker.tls.check_hostname) == (True, False)  # type: ignore[union-attr]
    redis = BridgeConfig.from_celery(
        {
            "broker_url": "rediss://h",
            "broker_use_ssl": {"ssl_ca_certs": str(pem), "ssl_cert_reqs": "required", "ssl_check_hostname": False},
            "result_backend": "rediss://h",
            "redis_backend_use_ssl": {"ssl_cert_reqs": ssl.CERT_NONE},
        }
    )
    assert redis.broker.tls.verify  # type: ignore[union-attr]
    assert not redis.results.tls.verify  # type: ignore[union-attr]
    assert codes(redis) == [("warning", "celery.tls")]


@pytest.mark.parametrize("value", [True, {"cert_reqs": "CERT_NONE"}, {"keyfile": None}])
def test_unverified_tls_is_taken_over_and_reported(value: Any) -> None:
    """What encrypted without verifying still does, and a warning says how to verify."""
    config = BridgeConfig.from_celery({"broker_url": "amqp://h//", "broker_use_ssl": value})
    assert config.broker.tls.verify is False  # type: ignore[union-attr]
    assert codes(config) == [("warning", "celery.tls")]


def test_schemes_that_did_not_verify_are_reported() -> None:
    """amqps:// and rediss:// verified nobody with Celery, and do here."""
    config = BridgeConfig.from_celery({"broker_url": "amqps://h//"})
    assert config.broker.tls.verify  # type: ignore[union-attr]
    assert codes(config) == [("info", "celery.tls")]


def test_tls_that_cannot_be_is_a_finding_and_no_plaintext(tmp_path: Path) -> None:
    """A missing file never turns into an unencrypted connection."""
    broken = {"ca_certs": str(tmp_path / "missing.pem"), "cert_reqs": ssl.CERT_REQUIRED}
    config = BridgeConfig.from_celery({"broker_url": "amqps://h//", "broker_use_ssl": broken})
    assert codes(config) == [("error", "celery.broker")]
    assert isinstance(config.broker, EmbeddedBroker)


def test_unread_transport_options_are_reported() -> None:
    """An option that the driver swallows is a finding; one that it reads stays raw."""
    options = {"confirm_publish": True, "confirm_publsh": True}
    config = BridgeConfig.from_celery({"broker_url": "amqp://h//", "broker_transport_options": options})
    assert codes(config) == [("warning", "celery.ignored")]
    assert dict(config.celery) == {"broker_transport_options": {"confirm_publish": True}}


def test_celerys_variables_are_followed_as_celery_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery's variables beat its configuration; a finding says that they did."""
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://:s3cret@env/1")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://:s3cret@env/2")
    config = BridgeConfig.from_celery({"broker_url": "amqp://h//", "result_backend": "rpc://"})
    assert (config.broker.kind, config.results.kind) == ("redis", "redis")
    assert codes(config) == [("warning", "celery.environment")] * 2
    assert "s3cret" not in words(config)
    assert BridgeConfig.from_celery({}).findings == ()


def test_settings_of_qbridge_fill_what_celerys_do_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """QBRIDGE_* variables still count, for what the Celery configuration leaves open."""
    monkeypatch.setenv("QBRIDGE_BROKER", "redis://h")
    monkeypatch.setenv("QBRIDGE_NAME", "app")
    config = BridgeConfig.from_celery({"result_backend": "rpc://"})
    assert (config.broker, config.name) == (RedisBroker(host="h"), "app")


def test_a_lazy_setting_that_fails_is_skipped() -> None:
    """An object whose other attributes raise, as lazy settings may, is read all the same."""

    class Settings:
        CELERY_BROKER_URL = "redis://h"

        @property
        def SECRET_KEY(self) -> str:  # noqa: N802 - Django's name
            raise RuntimeError("not configured")

    assert BridgeConfig.from_celery(Settings()).broker == RedisBroker(host="h")
