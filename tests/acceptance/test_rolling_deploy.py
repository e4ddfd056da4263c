"""A rolling deploy that changes a task's arguments, with the program's own worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.acceptance.cli_programs import Folder

from qbridge import Bridge

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


@pytest.fixture(params=["embedded", "redis", "rabbitmq"])
def any_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    """A project on each broker; results in a file."""
    if request.param == "embedded":
        place = Folder(tmp_path, shop=BEFORE)
        yield place
        place.close()
        return
    with request.getfixturevalue(f"qbridge_{request.param}").heal().fresh() as url:
        place = Folder(tmp_path, broker=url, shop=BEFORE)
        yield place
        place.close()


def declared(bridge: Bridge, source: str) -> Bridge:
    """Declare on a bridge what a file does."""
    exec(compile(source.replace("bridge = Bridge()", ""), "shop.py", "exec"), {"bridge": bridge, "__name__": "shop"})
    return bridge


def test_old_and_new_processes_beside_each_other_lose_no_call(any_folder: Folder) -> None:
    """Calls of both versions, while an old worker runs, then a new one beside it, then the new one alone."""
    folder = any_folder
    old = declared(Bridge(folder.bridge.config), BEFORE)
    new = declared(Bridge(folder.bridge.config), AFTER)
    with old, new:
        sent = []

        def send(number: int) -> None:
            sent.append((old.tasks["shop.paint"].delay(number), f"{number}x{number}"))
            sent.append((new.tasks["shop.paint"].delay(number, 1), f"{number}x1"))
            sent.append((old.tasks["shop.paint"].using(countdown=2).delay(number), f"{number}x{number}"))

        first = folder.start("worker", "-A", "shop", "-c", "1", "-n", "first@%h")
        first.wait_for(" ready.", 90)
        send(1)
        first.wait_for("does not know version 2 of the task shop.paint", 60)
        (folder.path / "shop.py").write_text(AFTER)
        second = folder.start("worker", "-A", "shop", "-c", "1", "-n", "second@%h")
        second.wait_for(" ready.", 90)
        send(2)
        assert first.stop() == 0
        send(3)
        for result, size in sent:
            assert result.get(timeout=60).removeprefix("old ").removeprefix("new ") == size
        assert new.dead_letters.list() == []
        assert second.stop() == 0
