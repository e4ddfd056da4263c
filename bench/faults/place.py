"""Where does a cell happen? Its servers, the proxies before the broker, and what is left in the broker afterwards."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import amqp

from bench.faults.cells import Cell
from bench.faults.workload import numbers_in, task_id
from qbridge.testing.proxy import TcpProxy
from qbridge.testing.servers import RabbitMQServer, RedisServer, ServerFailed
from qbridge.testing.waiting import wait_until

__all__ = ["Place"]

_DELAY = 0.2


class Place:
    """The servers of one cell; use it in a ``with`` block.

    Workers and the sender reach the broker through proxies of their own; a lost connection is one of the workers'. Both
    Redis servers write every command to disk before they answer it, so that what is lost was not lost by Redis.

    Args:
        cell: which.
        folder: for files.
        rabbitmq: a server to use; None: a private one, as on Redis.
    """

    def __init__(self, cell: Cell, folder: Path, rabbitmq: RabbitMQServer | None = None) -> None:
        self._cell = cell
        self._folder = folder
        self._stack = ExitStack()
        self._rabbitmq = rabbitmq
        self._broker: Any = None
        self._results: Any = None
        self._proxies: list[TcpProxy] = []
        self._broker_url = f"embedded://{folder / 'bridge.db'}"
        self.results_url: str = f"sqlite:///{folder / 'results.db'}"
        """Where the results go."""

    def __enter__(self) -> Self:
        with self._stack:
            if self._cell.results == "redis":
                self._results = self._stack.enter_context(RedisServer(appendonly=True))
                self.results_url = self._results.url
            elif self._cell.results == "rpc":
                self.results_url = "rpc://"
            if self._cell.broker == "redis":
                self._broker = self._stack.enter_context(RedisServer(appendonly=True))
                self._broker_url = self._broker.url
            elif self._cell.broker == "rabbitmq":
                self._broker = self._rabbitmq or self._stack.enter_context(RabbitMQServer())
                self._broker_url = self._stack.enter_context(self._broker.heal().fresh())
            if self._broker is not None:
                self._proxies = [self._stack.enter_context(TcpProxy.to(self._broker_url)) for _ in range(2)]
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._broker is not None:
            self._broker.heal()
        self._stack.close()

    @property
    def url_of_workers(self) -> str:
        """URL of the broker for workers."""
        return self._proxies[0].url(self._broker_url) if self._proxies else self._broker_url

    @property
    def url_of_sender(self) -> str:
        """URL of the broker for the sender."""
        return self._proxies[1].url(self._broker_url) if self._proxies else self._broker_url

    # What happens to it, by the names of the acts

    def kill_broker(self) -> None:
        """SIGKILL it."""
        self._broker.kill()

    def start_broker(self) -> None:
        """Start it again, on what it had on disk; returns when it answers."""
        self._broker.start()

    def freeze_broker(self) -> None:
        """SIGSTOP it."""
        self._broker.freeze()

    def thaw_broker(self) -> None:
        """SIGCONT it."""
        self._broker.thaw()

    def kill_results(self) -> None:
        """SIGKILL the result server."""
        self._results.kill()

    def start_results(self) -> None:
        """Start it again, on what it had on disk."""
        self._results.start()

    def cut(self) -> None:
        """Reset all connections to the broker."""
        for proxy in self._proxies:
            proxy.cut()

    def lose(self) -> None:
        """Lose the workers' connections to the broker, without a word to either end."""
        self._proxies[0].lose()

    def stall(self) -> None:
        """Let nothing pass to or from the broker."""
        for proxy in self._proxies:
            proxy.stall()

    def resume(self) -> None:
        """Let it pass again, with what was held back."""
        for proxy in self._proxies:
            proxy.resume()

    def delay(self) -> None:
        """Hold back all that passes for a while."""
        for proxy in self._proxies:
            proxy.delay(_DELAY)

    def undelay(self) -> None:
        """End that."""
        for proxy in self._proxies:
            proxy.delay(0)

    # What is left of it, when all workers are gone

    def left(self) -> tuple[frozenset[int], frozenset[int]]:
        """Take what is left in the broker.

        Returns:
            The calls of which a message is there, and those of which a dead letter is.
        """
        entries = {"rabbitmq": self._in_rabbitmq, "redis": self._in_redis, "embedded": self._in_file}
        left: set[int] = set()
        dead: set[int] = set()
        for name, raw in entries[self._cell.broker]():
            (dead if ".dead" in name else left).update(numbers_in(raw))
        return frozenset(left), frozenset(dead)

    def _in_rabbitmq(self) -> Iterator[tuple[str, bytes]]:
        vhost = self._broker_url.rpartition("/")[2]
        names = wait_until(lambda: self._settled(vhost), 30, what="RabbitMQ to take back what dead workers held")
        host = f"{self._broker.url.rpartition('@')[2].partition('/')[0]}"
        with amqp.Connection(host=host, virtual_host=vhost) as connection:
            channel = connection.channel()
            for name in names:
                while (message := channel.basic_get(name, no_ack=True)) is not None:
                    yield name, str(message.headers.get("id")).encode()

    def _settled(self, vhost: str) -> list[str]:
        # A lost connection is closed by the server after two heartbeats, or never: closed here, as its client is dead.
        for connection in self._broker.api("GET", "/api/connections"):
            if connection.get("vhost") == vhost:
                with suppress(ServerFailed):  # it has gone meanwhile; one that has not is seen by what it holds
                    self._broker.api("DELETE", f"/api/connections/{quote(connection['name'], safe='')}")
        queues = self._broker.queues(vhost)
        held = sum(queue.get("messages_unacknowledged", 1) for queue in queues.values())
        return [] if held else list(queues)

    def _in_redis(self) -> Iterator[tuple[str, bytes]]:
        import redis

        with redis.Redis.from_url(self._broker_url) as client:
            anything: Any = client  # redis-py types answers for its sync and async clients at once
            for key in anything.scan_iter(count=1000):
                kind = anything.type(key)
                if kind == b"list":
                    entries = anything.lrange(key, 0, -1)
                elif kind == b"hash":
                    entries = anything.hvals(key)
                else:
                    entries = []
                for entry in entries:
                    yield key.decode(), entry

    def _in_file(self) -> Iterator[tuple[str, bytes]]:
        with sqlite3.connect(self._folder / "bridge.db") as database:
            for queue, envelope in database.execute("SELECT queue, envelope FROM message"):
                yield queue, str(envelope).encode()

    def stored(self, numbers: list[int]) -> frozenset[int] | None:
        """Which calls have a stored success; None where results cannot be read by id.

        Args:
            numbers: of the calls to look at.
        """
        if self._cell.results == "rpc":
            return None
        if self._cell.results == "sqlite":
            with sqlite3.connect(self._folder / "results.db") as database:
                rows = database.execute("SELECT task_id FROM celery_taskmeta WHERE status = 'SUCCESS'")
                return frozenset(number for (name,) in rows for number in numbers_in(name.encode()))
        import redis

        with redis.Redis.from_url(self.results_url) as client:
            found: list[Any] = client.mget([f"celery-task-meta-{task_id(number)}" for number in numbers])
        return frozenset(
            number for number, value in zip(numbers, found, strict=True) if value and b'"SUCCESS"' in value
        )
