"""The embedded broker's model: URLs, settings, check."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from kombu import Connection

from qbridge.backends.base import Finding
from qbridge.backends.embedded import EmbeddedBroker, register
from qbridge.backends.embedded import check as check_module
from qbridge.backends.embedded.inspect import QueueState, queue_states
from qbridge.exceptions import ConfigurationError


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("embedded:///var/lib/x.db", "/var/lib/x.db"),
        ("embedded:///with%20space/100%25.db", "/with space/100%.db"),
        ("embedded://./relative/x.db", "relative/x.db"),
        ("embedded://", ".qbridge/bridge.db"),
        ("embedded:///", ".qbridge/bridge.db"),
    ],
)
def test_urls_name_the_file(url: str, path: str) -> None:
    """Three slashes are absolute, a dot is relative, nothing is the default."""
    assert EmbeddedBroker.from_url(url).path == Path(path)


@pytest.mark.parametrize(
    "url", ["embedded://bridge.db", "embedded://host/x.db", "embedded:///x.db?a=1", "embedded:///x.db#a", "redis://x"]
)
def test_other_urls_are_refused_with_what_to_write(url: str) -> None:
    """A host, a query or a fragment would be ignored in silence otherwise."""
    with pytest.raises(ConfigurationError):
        EmbeddedBroker.from_url(url)


def test_kombu_reads_the_url_that_the_room_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is absolute from the moment that settings are made, and survives odd characters."""
    monkeypatch.chdir(tmp_path)
    broker = EmbeddedBroker(path="a b;%é/x?.db")
    url = broker.celery_settings()["broker_url"]
    assert register.SCHEME == "embedded"
    with Connection(url) as connection:
        assert connection.transport.store.database.path == tmp_path / "a b;%é/x?.db"
        assert connection.as_uri() == url
        assert connection.clone().transport.store.database.path == connection.transport.store.database.path


def test_settings_under_celery_defaults_are_the_users_own() -> None:
    """Only what was written down."""
    assert list(EmbeddedBroker().minimal_celery_settings()) == ["broker_url"]
    settings = EmbeddedBroker(publish_timeout=3).minimal_celery_settings()
    assert settings["broker_transport_options"] == {"publish_timeout": 3.0}


def test_three_priorities() -> None:
    """Normal sends nothing, so that plain producers are normal too."""
    broker = EmbeddedBroker()
    assert [broker.celery_priority(level) for level in ("low", "normal", "high")] == [1, None, 9]
    assert broker.capabilities.priorities == "three levels"


def test_importing_the_room_loads_no_kombu_and_no_sqlite() -> None:
    """The configuration is light."""
    code = "import qbridge.backends.embedded, sys; print([m for m in ('kombu', 'sqlite3', 'amqp') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def check(path: Path, *queues: str, timeout: float = 10.0) -> list[Finding]:
    broker = EmbeddedBroker(path=path, publish_timeout=timeout)
    return list(broker.check([SimpleNamespace(name=queue) for queue in queues]))


def test_check_of_an_unused_broker_is_fine_and_makes_nothing(tmp_path: Path) -> None:
    """The first message will make the file."""
    (finding,) = check(tmp_path / "sub" / "bridge.db")
    assert finding.level == "ok"
    assert list(tmp_path.iterdir()) == []


def test_check_says_depths_and_who_does_not_consume(tmp_path: Path) -> None:
    """A queue with messages and no worker is worth a warning."""
    path = tmp_path / "bridge.db"
    with Connection(EmbeddedBroker(path=path).celery_url()) as connection:
        connection.Producer().publish({"a": 1}, routing_key="reports")
    ok, warning = check(path, "reports", "default")
    assert "1 messages waiting" in ok.what
    assert (warning.level, warning.code) == ("warning", "broker.queue_without_consumer")
    assert queue_states(path) == [QueueState("reports", ready=1, delayed=0, claimed=0, consumers=0, durable=True)]


def test_check_names_a_locked_file(tmp_path: Path) -> None:
    """Within the bound, with what to look for."""
    path = tmp_path / "bridge.db"
    with Connection(EmbeddedBroker(path=path).celery_url()) as connection:
        connection.connect()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    (finding,) = check(path, timeout=0.2)
    holder.close()
    assert (finding.level, finding.code) == ("error", "broker.unusable")
    assert "locked by another process" in finding.what
    assert finding.todo


def test_check_names_a_damaged_file(tmp_path: Path) -> None:
    """Damage is an error, not an exception."""
    path = tmp_path / "bridge.db"
    path.write_bytes(b"x" * 8192)
    (finding,) = check(path)
    assert finding.level == "error"


def test_check_names_a_folder_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is named, since the lock and the pipe go there too."""
    monkeypatch.setattr(check_module.os, "access", lambda *args: False)  # root, who may run this, may write everywhere
    (finding,) = check(tmp_path / "bridge.db")
    assert finding.code == "broker.not_writable"
    assert str(tmp_path) in finding.what


def test_check_refuses_network_filesystems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's locks do not work there."""
    assert check_module._filesystem_of(Path("/proc")) in ("proc", None)
    monkeypatch.setattr(check_module, "_filesystem_of", lambda folder: "nfs4")
    (finding,) = check(tmp_path / "bridge.db")
    assert finding.code == "broker.network_filesystem"
