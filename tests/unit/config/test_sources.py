"""Where do values come from, which one wins, and what is said about names that nobody knows?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qbridge.backends.database import DatabaseResults
from qbridge.backends.rabbitmq import RabbitMQBroker
from qbridge.backends.redis import RedisBroker, RedisResults
from qbridge.config import BridgeConfig, QueueConfig, WorkerConfig
from qbridge.exceptions import ConfigurationError
from qbridge.retry import Retry


def fault(**arguments: object) -> str:
    """The message with which a configuration is refused."""
    with pytest.raises(ConfigurationError) as caught:
        BridgeConfig(**arguments)  # type: ignore[arg-type]
    return str(caught.value)


def test_each_source_beats_the_next(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments beat the environment, which beats .env, which beats qbridge.toml, which beats pyproject.toml."""
    (project / "pyproject.toml").write_text('[tool.qbridge]\nname = "pyproject"\n')
    assert BridgeConfig().name == "pyproject"
    (project / "qbridge.toml").write_text('name = "toml"\n')
    assert BridgeConfig().name == "toml"
    (project / ".env").write_text("QBRIDGE_NAME=dotenv\nOTHER=1\n")
    assert BridgeConfig().name == "dotenv"
    monkeypatch.setenv("QBRIDGE_NAME", "environment")
    assert BridgeConfig().name == "environment"
    assert BridgeConfig(name="argument").name == "argument"


def test_parts_from_different_sources_come_together(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part refines what a weaker source said; fields that it does not name stay."""
    (project / "qbridge.toml").write_text('[worker]\npool = "thread"\nconcurrency = 3\n')
    monkeypatch.setenv("QBRIDGE_WORKER__CONCURRENCY", "7")
    assert BridgeConfig(worker={"prefetch": 2}).worker == WorkerConfig(pool="thread", concurrency=7, prefetch=2)
    assert BridgeConfig(worker=WorkerConfig(prefetch=2)).worker == WorkerConfig(prefetch=2)


def test_a_part_refines_a_weaker_url(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The password can come from the environment, the rest of the URL from a file."""
    (project / "qbridge.toml").write_text('broker = "amqp://app@rabbit/shop"\nresults = "postgresql://h/db"\n')
    monkeypatch.setenv("QBRIDGE_BROKER__PASSWORD", "s3cret")
    monkeypatch.setenv("QBRIDGE_RESULTS__EXPIRES", "60")
    config = BridgeConfig()
    assert isinstance(config.broker, RabbitMQBroker)
    assert config.broker.celery_url() == "amqp://app:s3cret@rabbit:5672/shop"
    assert isinstance(config.results, DatabaseResults)
    assert (config.results.expires, config.results.dialect) == (60, "postgresql")


def test_a_stronger_url_replaces_weaker_parts(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL says all of it: nothing of a weaker source's broker remains."""
    (project / "qbridge.toml").write_text('[broker]\nkind = "redis"\nhost = "a"\nkey_prefix = "x:"\n')
    assert BridgeConfig().broker == RedisBroker(host="a", key_prefix="x:")
    monkeypatch.setenv("QBRIDGE_BROKER", "redis://b/2")
    assert BridgeConfig().broker == RedisBroker(host="b", db=2)


def test_another_kind_replaces_weaker_parts(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Naming another kind starts anew."""
    (project / "qbridge.toml").write_text('[broker]\nkind = "redis"\nkey_prefix = "x:"\n')
    monkeypatch.setenv("QBRIDGE_BROKER__KIND", "rabbitmq")
    assert BridgeConfig().broker == RabbitMQBroker()
    monkeypatch.setenv("QBRIDGE_BROKER__URL", "redis://b")
    monkeypatch.setenv("QBRIDGE_BROKER__KIND", "redis")
    monkeypatch.setenv("QBRIDGE_BROKER__DB", "3")
    assert BridgeConfig().broker == RedisBroker(host="b", db=3)


def test_the_kind_of_a_url_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind beside the URL that it belongs to changes nothing."""
    monkeypatch.setenv("QBRIDGE_BROKER", "redis://b")
    monkeypatch.setenv("QBRIDGE_BROKER__KIND", "redis")
    assert BridgeConfig().broker == RedisBroker(host="b")


def test_url_and_fields_in_one_mapping(project: Path) -> None:
    """A table may hold a URL and what the URL cannot say."""
    (project / "qbridge.toml").write_text('[broker]\nurl = "redis://:p@h/1"\nkey_prefix = "x:"\n')
    broker = BridgeConfig().broker
    assert broker == RedisBroker(host="h", password="p", db=1, key_prefix="x:")


def test_nested_variables_with_and_without_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kind the fields tell which broker is meant; where they cannot, the message says what to write."""
    monkeypatch.setenv("QBRIDGE_BROKER__PUBLISH_TIMEOUT", "3")
    assert (BridgeConfig().broker.kind, BridgeConfig().broker.publish_timeout) == ("embedded", 3)
    monkeypatch.setenv("QBRIDGE_BROKER__VHOST", "shop")
    assert BridgeConfig().broker == RabbitMQBroker(vhost="shop", publish_timeout=3)
    monkeypatch.delenv("QBRIDGE_BROKER__VHOST")
    monkeypatch.setenv("QBRIDGE_BROKER__HOST", "h")
    message = fault()
    assert "rabbitmq or redis" in message
    assert "kind" in message
    assert "QBRIDGE_BROKER__" in message
    monkeypatch.setenv("QBRIDGE_BROKER__KIND", "redis")
    assert BridgeConfig().broker == RedisBroker(host="h", publish_timeout=3)


def test_deep_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models in models are reached with more underscores."""
    monkeypatch.setenv("QBRIDGE_RESULTS__KIND", "redis")
    monkeypatch.setenv("QBRIDGE_RESULTS__SENTINEL__HOSTS", "a:1,b:2")
    monkeypatch.setenv("QBRIDGE_RESULTS__SENTINEL__MASTER_NAME", "m")
    results = BridgeConfig().results
    assert isinstance(results, RedisResults)
    assert results.sentinel is not None
    assert results.sentinel.hosts == ("a:1", "b:2")


def test_lists_and_mappings_in_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists are separated by commas or written as JSON, mappings as JSON."""
    monkeypatch.setenv("QBRIDGE_MODULES", "proj.tasks, proj.more")
    monkeypatch.setenv("QBRIDGE_QUEUES", '["a", {"name": "b", "declare": false}]')
    monkeypatch.setenv("QBRIDGE_WORKER", '{"pool": "solo"}')
    monkeypatch.setenv("QBRIDGE_CELERY", '{"task_track_started": true}')
    monkeypatch.setenv("QBRIDGE_CELERY__TASK_REMOTE_TRACEBACKS", "no")
    monkeypatch.setenv("QBRIDGE_CELERY__WORKER_ETA_TASK_LIMIT", "10")
    monkeypatch.setenv("QBRIDGE_CELERY__TASK_ROUTES", '{"a": {"queue": "b"}}')
    config = BridgeConfig()
    assert config.modules == ("proj.tasks", "proj.more")
    assert config.queues == (QueueConfig("a"), QueueConfig("b", declare=False))
    assert config.worker == WorkerConfig(pool="solo")
    assert dict(config.celery) == {
        "task_track_started": True,
        "task_remote_tracebacks": False,
        "worker_eta_task_limit": 10,
        "task_routes": {"a": {"queue": "b"}},
    }


def test_one_mapping_where_there_may_be_many_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for the name of a queue."""
    monkeypatch.setenv("QBRIDGE_QUEUES", '{"name": "b", "declare": false}')
    assert "write [ and ] around it" in fault()


def test_a_retry_in_a_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are named as text, numbers as numbers or text."""
    (project / "qbridge.toml").write_text(
        '[retry]\non = ["ConnectionError", "json.JSONDecodeError"]\nattempts = 2\nwhere = "worker"\n'
    )
    monkeypatch.setenv("QBRIDGE_RETRY__WAIT_MAX", "1.5")
    import json

    assert BridgeConfig().retry == Retry(
        on=(ConnectionError, json.JSONDecodeError), attempts=2, wait_max=1.5, where="worker"
    )


@pytest.mark.parametrize(
    ("retry", "words"),
    [
        ({"attempts": 3}, "which errors"),
        ({"on": "NoSuchError"}, "not an exception type"),
        ({"on": "nowhere.NoSuchError"}, "not an exception type"),
        ({"on": "OSError", "atempts": 3}, "did you mean 'attempts'"),
        ({"on": "OSError", "attempts": "many"}, "not a number"),
        ({"on": "OSError", "attempts": 0}, "never run"),
        (3, "Retry"),
    ],
)
def test_a_wrong_retry(retry: object, words: str) -> None:
    """What is wrong with a retry is said in words."""
    assert words in fault(retry=retry)


@pytest.mark.parametrize(
    ("variable", "suggestion"),
    [
        ("QBRIDGE_BROKR", "QBRIDGE_BROKER"),
        ("QBRIDGE_WORKER__POL", "QBRIDGE_WORKER__POOL"),
        ("QBRIDGE_WORKER_POOL", "QBRIDGE_WORKER__POOL"),
        ("QBRIDGE_BROKER__PASWORD", "QBRIDGE_BROKER__PASSWORD"),
        ("QBRIDGE_BROKER__TLS__CA_FIL", "QBRIDGE_BROKER__TLS__CA_FILE"),
        ("qbridge_result", "QBRIDGE_RESULTS"),
        ("QBRIDGE_", "no field has this name"),
        ("QBRIDGE_QQQQQQQQQQQQQQQQQ", "remove it"),
        ("QBRIDGE_QUEUES__0", "QBRIDGE_QUEUES"),
    ],
)
def test_a_stray_variable_is_refused(variable: str, suggestion: str, project: Path) -> None:
    """A name under our prefix that no field has is an error, in the environment and in .env alike."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(variable, "s3cret")
        message = fault()
    assert f"environment variable {variable}" in message
    assert suggestion in message
    assert "s3cret" not in message
    (project / ".env").write_text(f"{variable}=s3cret\n")
    message = fault()
    assert str(project / ".env") in message
    assert suggestion in message


def test_names_of_others_are_left_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers for test suites and settings of other programs are none of the configuration's business."""
    monkeypatch.setenv("QBRIDGE_TEST_REDIS_URL", "redis://h")
    monkeypatch.setenv("NOT_QBRIDGE_BROKR", "x")
    (project / ".env").write_text("DATABASE_URL=x\nQBRIDGE_TEST_X=1\n")
    (project / "pyproject.toml").write_text('[tool.other]\nqbridge_like = "qbridge"\n')
    assert BridgeConfig().broker_is_default


def test_names_differ_in_case_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Case does not matter, but two spellings that say different things are an error."""
    monkeypatch.setenv("qbridge_name", "a")
    assert BridgeConfig().name == "a"
    monkeypatch.setenv("QBRIDGE_NAME", "a")
    assert BridgeConfig().name == "a"
    monkeypatch.setenv("QBRIDGE_NAME", "b")
    if os.name == "posix":
        assert "says something else" in fault()


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("qbridge.toml", 'brokr = "x"', "did you mean 'broker'"),
        ("qbridge.toml", 'worker = {pol = "x"}', "did you mean 'pool'"),
        ("qbridge.toml", "broker = s3cret", "is not TOML"),
        ("pyproject.toml", '[tool.qbridge]\nqueue = "x"', "did you mean 'queues'"),
        ("pyproject.toml", "[tool]\nqbridge = 3", "table of fields"),
        ("pyproject.toml", "[tool.qbridge\n", "is not TOML"),
        (".env", "QBRIDGE_NAME\n", "no value"),
        (".env", "QBRIDGE_WORKER={s3cret\n", "not"),
    ],
)
def test_a_faulty_file_is_named(file: str, text: str, words: str, project: Path) -> None:
    """The message names the file, the field and what to write, and shows no value."""
    (project / file).write_text(text)
    message = fault()
    assert str(project / file) in message
    assert words in message
    assert "s3cret" not in message


def test_unreadable_files_are_named(project: Path) -> None:
    """A file that is no text is named."""
    (project / ".env").write_bytes(b"\xff\xfeQBRIDGE_NAME=x")
    assert f"{project / '.env'}: is not UTF-8 text" in fault()


def test_files_are_found_up_to_the_projects_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder below, the project's files count; from outside of any project, only the working directory's."""
    (project.parent / "qbridge.toml").write_text('name = "outside"\n')
    below = project / "src" / "app"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert BridgeConfig().name is None
    (project / "qbridge.toml").write_text('name = "project"\n')
    (project / ".env").write_text("QBRIDGE_TIMEZONE=Europe/Berlin\n")
    assert (BridgeConfig().name, BridgeConfig().timezone) == ("project", "Europe/Berlin")
    (below / ".env").write_text("QBRIDGE_NAME=nearer\n")
    assert (BridgeConfig().name, BridgeConfig().timezone) == ("nearer", "UTC")


def test_every_fault_is_said_at_once_with_its_source(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One error, one line per fault, each with the place to look."""
    (project / "qbridge.toml").write_text("[worker]\nprefetch = 0\n")
    monkeypatch.setenv("QBRIDGE_WORKER__CONCURRENCY", "many")
    lines = fault(timezone="Mars", nmae="x").splitlines()
    assert lines[0] == "the configuration has 4 faults:"
    found = "\n".join(sorted(lines[1:]))
    assert "nmae (argument): no such field; did you mean 'name'?" in found
    assert "timezone (argument)" in found
    assert "worker.concurrency (environment variable QBRIDGE_WORKER__CONCURRENCY)" in found
    assert f"worker.prefetch ({project / 'qbridge.toml'})" in found


def test_celerys_variables_never_override_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of Celery that names another server is an error; one that names the same is not."""
    for variable in ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "redis://:s3cret@other/1")
            for arguments in ({"broker": "redis://h/1"}, {}):
                message = fault(**arguments)
                assert variable in message
                assert "QBRIDGE_BROKER" in message
                assert "s3cret" not in message
            BridgeConfig(broker="redis://:s3cret@other:6379/1")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "rpc://")
    assert "QBRIDGE_RESULTS" in fault(broker="amqp://h//")
    BridgeConfig(broker="amqp://h//", results="rpc://")


def test_under_celerys_defaults_its_variables_are_adopted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing else is said, joining a fleet means following its variables; what is said still wins loudly."""
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://other/1")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://other/2")
    config = BridgeConfig(defaults="celery")
    assert (config.broker, config.results) == (RedisBroker(host="other", db=1), RedisResults(host="other", db=2))
    assert not config.broker_is_default
    assert "CELERY_BROKER_URL" in fault(defaults="celery", broker="amqp://h//")
