"""An empty working directory and an environment without settings, for every test of the configuration."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a project of its own, so that nothing above it is read."""
    for name in list(os.environ):
        if name.upper().startswith(("QBRIDGE_", "CELERY_")):
            monkeypatch.delenv(name)
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / ".git").mkdir()
    monkeypatch.chdir(folder)
    return folder
