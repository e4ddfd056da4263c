"""`qbridge schema`: the file, the table, exit codes, and what is said where there is no file."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qbridge.cli import program

BEFORE = """
from qbridge import Bridge, BridgeConfig, Item

bridge = Bridge(BridgeConfig(broker="embedded:///nowhere/b.db", results="rpc://"))


@bridge.task(name="shop.paint")
def paint(side: int) -> str: ...


@bridge.task(name="shop.add")
def add(a: int, b: int) -> int: ...
"""
CHANGED = BEFORE.replace("paint(side: int)", "paint(width: int, height: int)")
AFTER = (
    CHANGED.replace('"shop.paint"', '"shop.paint", version=2')
    + """

@paint.upcast(1)
def paint_square(side: int) -> Item:
    return paint.item(side, side)
"""
)
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(source: str, command: str, *words: str) -> Result:
    """Run a command on an application: a module of another name each time, as a new process would load it."""
    name = f"shop_of_schema_{next(_numbers)}"
    Path(f"{name}.py").write_text(source)
    return CliRunner().invoke(program, ["schema", command, "-A", name, *words], env={"COLUMNS": "100"})


def test_a_snapshot_is_a_file_to_be_committed(folder: Path) -> None:
    """Compared with itself nothing has changed."""
    done = run(BEFORE, "snapshot")
    assert (done.exit_code, done.output) == (0, "qbridge-schema.json: 2 tasks\n")
    text = (folder / "qbridge-schema.json").read_text()
    assert sorted(json.loads(text)["tasks"]) == ["shop.add", "shop.paint"]
    assert run(BEFORE, "snapshot", "other.json").exit_code == 0
    assert (folder / "other.json").read_text() == text
    done = run(BEFORE, "check", "other.json", "--json")
    assert (done.exit_code, json.loads(done.output)) == (0, {"ok": True, "changes": []})


def test_a_change_that_breaks_is_told_with_the_way_out() -> None:
    """And one that an upcaster mends is told too."""
    assert run(BEFORE, "snapshot").exit_code == 0
    done = run(CHANGED, "check")
    assert done.exit_code == 1
    for words in ("side", "is gone, or has another name", "breaking", "write @paint.upcast(1)", "3 of 3 changes"):
        assert words in done.output
    done = run(CHANGED, "check", "--json")
    assert done.exit_code == 1
    told = json.loads(done.output)
    assert told["ok"] is False
    assert {"task", "place", "what", "verdict", "todo"} == set(told["changes"][0])
    done = run(AFTER, "check")
    assert done.exit_code == 0, done.output
    assert "go through" in done.output
    assert "Nothing would break" in done.output


def test_without_a_file_that_can_be_read_the_command_says_how_to_make_one(folder: Path) -> None:
    """Exit code 2, which is no verdict."""
    for text in (None, "{}", "nothing"):
        if text is not None:
            (folder / "qbridge-schema.json").write_text(text)
        done = run(BEFORE, "check")
        assert done.exit_code == 2
        assert "qbridge schema snapshot" in done.output
    done = run(BEFORE, "snapshot", str(folder / "nowhere" / "f.json"))
    assert done.exit_code == 2
    assert "cannot be written" in done.output
