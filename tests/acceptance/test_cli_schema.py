"""`qbridge schema snapshot|check`, as CI runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.acceptance.cli_programs import Folder

BEFORE = """
from qbridge import Bridge

bridge = Bridge()


@bridge.task
def paint(side: int) -> str:
    return f"old {side}x{side}"


@bridge.task
def add(a: int, b: int) -> int:
    return a + b
"""

CHANGED = (
    BEFORE.replace("def paint(side: int)", "def paint(width: int, height: int)")
    .replace("{side}x{side}", "{width}x{height}")
    .replace("old ", "new ")
)

AFTER = (
    CHANGED.replace("@bridge.task\ndef paint", "@bridge.task(version=2)\ndef paint").replace(
        "import Bridge", "import Bridge, Item"
    )
    + """

@paint.upcast(1)
def paint_square(side: int) -> Item:
    return paint.item(side, side)
"""
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    place = Folder(tmp_path, shop=BEFORE)
    yield place
    place.close()


def test_a_breaking_change_fails_the_check_until_it_is_mended(folder: Folder) -> None:
    """The program as CI runs it; what it says is tested beside the unit."""
    done = folder.run("schema", "snapshot", "-A", "shop", timeout=90)
    assert (done.returncode, done.stdout) == (0, "qbridge-schema.json: 2 tasks\n")
    (folder.path / "shop.py").write_text(CHANGED)
    done = folder.run("-A", "shop", "schema", "check", timeout=90)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "write @paint.upcast(1)" in done.stdout
    (folder.path / "shop.py").write_text(AFTER)
    done = folder.run("schema", "check", "-A", "shop", timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing would break" in done.stdout
