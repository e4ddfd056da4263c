"""Workers inside an application's process: several of them, and what their tasks were declared with."""

from __future__ import annotations

from pathlib import Path

from qbridge import Bridge, BridgeConfig, Task


def config_on(place: Path) -> BridgeConfig:
    """A bridge on files."""
    return BridgeConfig(broker=f"embedded://{place}/b.db", results=f"db+sqlite:///{place}/r.db")


def adding(bridge: Bridge) -> Task[[int, int], int]:
    """One task."""

    @bridge.task
    def add(a: int, b: int) -> int:
        return a + b

    return add


def test_the_end_of_one_worker_leaves_the_other_at_work(tmp_path: Path) -> None:
    """Each has an event loop of its own, in whichever order they end."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with Bridge(config_on(tmp_path / "one")) as one, Bridge(config_on(tmp_path / "two")) as two:
        first, second = adding(one), adding(two)
        with two.worker():
            with one.worker():
                assert (first.delay(1, 2).get(timeout=20), second.delay(3, 4).get(timeout=20)) == (3, 7)
            assert second.delay(5, 6).get(timeout=20) == 11
            with one.worker():
                assert first.delay(1, 2).get(timeout=20) == 3


def test_a_task_declared_with_msgpack_is_read_by_a_worker_of_a_json_bridge(tmp_path: Path) -> None:
    """Its worker refused its messages: the bridge accepts JSON only."""
    with Bridge(config_on(tmp_path)) as bridge:

        @bridge.task(serialization="msgpack")
        def echo(data: bytes) -> bytes:
            return data

        add = adding(bridge)
        with bridge.worker():
            assert echo.delay(b"\xff\x00").get(timeout=20) == b"\xff\x00"
            assert add.delay(1, 2).get(timeout=20) == 3
