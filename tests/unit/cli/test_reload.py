"""Which changes of files count."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qbridge.cli.reload import FileTimes, roots_of


def test_new_changed_and_deleted_sources_are_seen(tmp_path: Path) -> None:
    """Each once; other files, caches, hidden folders and virtual environments are not."""
    package = tmp_path / "proj"
    package.mkdir()
    tasks = package / "tasks.py"
    tasks.write_text("a = 1")
    for junk in ("__pycache__", ".hidden", "env"):
        (tmp_path / junk).mkdir()
    (tmp_path / "env" / "pyvenv.cfg").touch()
    times = FileTimes([tmp_path])
    assert times.changed() is None

    for junk in ("notes.txt", "__pycache__/x.py", ".hidden/x.py", "env/x.py"):
        (tmp_path / junk).write_text("b = 2")
    assert times.changed() is None

    (package / "more.py").touch()
    assert times.changed() == package / "more.py"
    os.utime(tasks, (1, 1))
    assert times.changed() == tasks
    (package / "more.py").unlink()
    assert times.changed() == package / "more.py"
    assert times.changed() is None


def test_a_package_elsewhere_is_watched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A src layout: the working directory, and where the package lies; nothing is imported."""
    work, source = tmp_path / "work", tmp_path / "src"
    (source / "elsewhere").mkdir(parents=True)
    (source / "elsewhere" / "__init__.py").write_text("raise RuntimeError")
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(source)
    assert roots_of("elsewhere.tasks:bridge") == [work, source / "elsewhere"]
    assert roots_of("unknown") == [work]
