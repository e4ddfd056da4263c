"""Who is told how a worker is, and what if nobody can be?"""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path

import pytest

from qbridge.exceptions import ConfigurationError
from qbridge.worker import health
from qbridge.worker.health import Health, HealthFile, HealthPort
from qbridge.worker.watchdog import Condition

WELL = Condition(live=True, ready=True)


def test_a_file_that_cannot_be_written_is_said_at_the_start(tmp_path: Path) -> None:
    """Not after the first probe has killed the worker."""
    with pytest.raises(ConfigurationError, match=r"nowhere/health cannot be written: No such file"):
        HealthFile(tmp_path / "nowhere" / "health")


def test_a_port_that_is_taken_is_said_at_the_start() -> None:
    """With what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigurationError, match="workers on one"):
        HealthPort("127.0.0.1", taken.getsockname()[1])


def test_an_old_answer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that still answers while the watchdog's thread has ended."""
    port = HealthPort("127.0.0.1", 0)
    try:
        port(WELL)
        assert port.answer("/live") == (200, {"live": True, "ready": True, "reason": ""})
        monkeypatch.setattr(health, "_FRESH", 0.0)
        status, told = port.answer("/live")
        assert (status, told["reason"]) == (503, "its watchdog has stood still")
    finally:
        port.close()


def test_one_that_cannot_be_told_does_not_keep_the_others_from_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk is logged once, not every two seconds."""

    def full(condition: Condition) -> None:
        raise OSError(28, "No space left on device")

    tell = Health([full, HealthFile(tmp_path / "health")])
    with caplog.at_level(logging.WARNING):
        tell(WELL)
        tell(WELL)
    assert json.loads((tmp_path / "health").read_text())["ready"] is True
    assert len([record for record in caplog.records if "No space left" in record.getMessage()]) == 1
