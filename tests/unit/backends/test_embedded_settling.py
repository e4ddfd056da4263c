"""When the embedded broker learns of acknowledgements that a worker's event loop makes."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from kombu import Connection, Consumer, Queue
from kombu.asynchronous import Hub
from kombu.asynchronous.timer import Timer

from qbridge.backends.embedded import EmbeddedBroker, channel, register, settling, transport
from qbridge.backends.embedded.database import Database

assert register.SCHEME

WORK = Queue("work", durable=True)
N = 20


class Loop:
    """A consumer in an event loop, which never sweeps of its own accord.

    Args:
        path: the broker's file.
        on_message: called in the loop.
        prefetch: how many messages it may hold.
    """

    def __init__(self, path: Path, on_message: Callable[[Any], Any], prefetch: int = 0) -> None:
        self.path = path
        self.connection = Connection(
            EmbeddedBroker(path=path).celery_url(), transport_options={"publish_timeout": 0.3, "sweep_interval": 600}
        )
        producer = self.connection.Producer()
        for number in range(N):
            producer.publish(number, routing_key="work", declare=[WORK])
        self.hub = Hub(timer=Timer(max_interval=0.05))  # else a loop in which nothing happens sleeps for seconds
        self.channel: Any = self.connection.channel()
        self.channel.basic_qos(0, prefetch, False)
        Consumer(self.channel, [WORK], on_message=on_message).consume()
        self.connection.transport.hold_acks(prefetch)
        self.connection.transport.register_with_event_loop(self.connection.connection, self.hub)

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Run the loop."""
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end, "it did not come to that"
            self.hub.run_once()

    def left(self) -> int:
        """Messages in the file, claimed or not, as another process sees it."""
        with sqlite3.connect(self.path) as other:
            (count,) = other.execute("SELECT count(*) FROM message").fetchone()
        other.close()
        return int(count)

    def close(self) -> None:
        self.connection.release()
        self.hub.close()


@pytest.fixture
def consume(tmp_path: Path) -> Iterator[Callable[..., Loop]]:
    """Make loops, closed at the end."""
    made: list[Loop] = []

    def make(on_message: Callable[[Any], Any], **options: Any) -> Loop:
        made.append(Loop(tmp_path / "bridge.db", on_message, **options))
        return made[-1]

    yield make
    for loop in made:
        loop.close()


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_what_has_ended_is_settled_before_the_next_one_begins(consume: Callable[..., Loop], prefetch: int) -> None:
    """The next one may take long. The last acknowledgement waits for nothing."""
    seen: list[int] = []

    def on_message(message: Any) -> None:
        seen.append(loop.left())
        message.ack()

    loop = consume(on_message, prefetch=prefetch)
    loop.run_until(lambda: loop.left() == 0)
    assert seen == list(range(N, 0, -1))


def test_an_acknowledgement_costs_no_transaction_of_its_own(
    consume: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes with the next claim."""
    write, written = Database.write, [0]

    def counting(self: Database, *args: Any, **named: Any) -> AbstractContextManager[Any]:
        written[0] += 1
        return write(self, *args, **named)

    loop = consume(lambda message: message.ack())
    monkeypatch.setattr(Database, "write", counting)
    loop.run_until(lambda: loop.left() == 0)
    assert written[0] == N + 1


def test_a_busy_file_forgets_no_acknowledgement(consume: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that would have gone with a claim, nor one that comes meanwhile."""
    monkeypatch.setattr(channel, "CLAIM_PATIENCE", 0.02)
    monkeypatch.setattr(settling, "SETTLE_PATIENCE", 0.02)
    monkeypatch.setattr(transport, "SETTLE_PATIENCE", 0.02)
    messages: list[Any] = []
    loop = consume(messages.append)
    loop.run_until(lambda: len(messages) == 3)
    holder = sqlite3.connect(loop.path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    messages[0].ack()  # would go with a claim
    for _ in range(3):
        loop.hub.run_once()
    messages[1].ack()  # comes meanwhile
    loop.hub.run_once()
    assert len(messages) == 3
    holder.close()
    assert loop.left() == N
    loop.connection.transport.sweep()
    assert loop.left() == N - 2
    loop.connection.transport.nudge()
    loop.run_until(lambda: len(messages) == N)
    assert sorted(message.payload for message in messages) == list(range(N))
    for message in messages[2:]:
        message.ack()
    loop.run_until(lambda: loop.left() == 0)


@pytest.mark.parametrize("how", ["channel", "connection"])
def test_closing_right_after_an_acknowledgement_gives_only_the_others_back(
    consume: Callable[..., Loop], how: str
) -> None:
    """The loop has not come round since."""
    messages: list[Any] = []
    loop = consume(messages.append)
    loop.run_until(lambda: len(messages) == 5)
    messages[1].ack()
    messages[3].ack()
    assert loop.left() == N, "they wait for the next turn"
    if how == "channel":
        loop.channel.close()
        loop.connection.transport.sweep()
    else:
        loop.connection.release()
    assert loop.left() == N - 2


def test_whoever_cannot_wait_settles_what_waits(consume: Callable[..., Loop]) -> None:
    """A task that is acknowledged before it runs, or one that a timer begins."""
    messages: list[Any] = []
    loop = consume(messages.append)
    loop.run_until(lambda: len(messages) == 3)
    messages[0].ack()
    messages[1].ack()
    assert loop.left() == N
    loop.channel.settle_now()
    assert loop.left() == N - 2


def test_nobody_waits_who_has_not_asked_to(consume: Callable[..., Loop]) -> None:
    """The loop of a worker whose tasks run elsewhere."""
    messages: list[Any] = []
    loop = consume(messages.append)
    loop.connection.transport._holds_acks = False
    loop.run_until(lambda: len(messages) == 3)
    messages[0].ack()
    assert loop.left() == N - 1


def test_what_is_given_back_does_not_wait(consume: Callable[..., Loop]) -> None:
    """Somebody else may have room for it."""
    messages: list[Any] = []
    loop = consume(messages.append)
    loop.run_until(lambda: len(messages) == 2)
    messages[0].reject(requeue=True)
    with sqlite3.connect(loop.path) as other:
        (ready,) = other.execute("SELECT count(*) FROM message WHERE party IS NULL").fetchone()
    other.close()
    assert ready == N - 1
