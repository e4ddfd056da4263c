"""Where the demo takes place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qbridge import BridgeConfig, ConfigurationError
from qbridge.cli.demo.place import prepared


def test_nothing_around_has_a_say_and_all_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither files of the project nor variables; the folder is gone afterwards."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qbridge.toml").write_text('name = "project"')
    monkeypatch.setenv("QBRIDGE_WORKER__POOL", "solo")
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://elsewhere")
    with prepared(None, None) as place:
        config = BridgeConfig()
        assert config.name == "qbridge-demo"
        assert config.worker.pool == "process"
        assert config.default_queue == place.queue
        assert str(place.folder) in config.broker.safe_url()
        assert str(place.folder) in config.results.safe_url()
    assert not place.folder.exists()
    assert Path.cwd() == tmp_path
    assert os.environ["QBRIDGE_WORKER__POOL"] == "solo"
    assert os.environ["CELERY_BROKER_URL"] == "redis://elsewhere"
    assert "QBRIDGE_BROKER" not in os.environ


def test_relative_paths_mean_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the demo's temporary one."""
    monkeypatch.chdir(tmp_path)
    with prepared("embedded://./mine.db", "sqlite:///mine-too.db"):
        config = BridgeConfig()
        assert config.broker.celery_url() == f"embedded://{tmp_path}/mine.db"
        assert config.results.safe_url().endswith(f"sqlite:///{tmp_path}/mine-too.db")


def test_a_url_that_means_nothing_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any folder is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(ConfigurationError, match="foo://"), prepared("foo://x", None):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_kept_where_its_log_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed demo names the log."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with prepared(None, None) as place:
        place.keep = True
    assert place.folder.parent == tmp_path
    assert place.folder.exists()
