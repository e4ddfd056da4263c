"""What can happen to the servers that a client speaks to? Each place has its own faults, and a way to mend each."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.bounds.settings import ANSWER, LOOK, PUBLISH
from qbridge import BridgeConfig
from qbridge.testing.proxy import TcpProxy
from qbridge.testing.servers import PostgreSQLServer, RabbitMQServer, RedisServer

__all__ = ["PLACES", "Fault", "Place"]

_AWAY = 1.0
"""Seconds for which a server is away that is restarted in the middle of a call."""


@dataclass(frozen=True)
class Fault:
    """One thing that can be wrong.

    Args:
        name: as the table shows it.
        begin: makes it so.
        end: mends it.
        in_the_middle: whether calls begin before it.
    """

    name: str
    begin: Callable[[], object]
    end: Callable[[], object]
    in_the_middle: bool = False


@dataclass(frozen=True)
class Place:
    """A pair of broker and results, and its faults.

    Args:
        name: as the table shows it.
        config: of a bridge there.
        faults: one after the other.
        claims: whether its results keep claims.
    """

    name: str
    config: BridgeConfig
    faults: tuple[Fault, ...]
    claims: bool = True


def _of_server(server: Any, proxy: TcpProxy, full: Fault) -> tuple[Fault, ...]:
    restarts: list[threading.Thread] = []

    def restart() -> None:
        server.kill()

        def come_back() -> None:
            time.sleep(_AWAY)
            server.start()

        restarts.append(threading.Thread(target=come_back))
        restarts[-1].start()

    return (
        Fault("stopped", server.stop, server.heal),
        Fault("frozen", server.freeze, server.heal),
        full,
        Fault("restarted in the middle", restart, lambda: restarts.pop().join(), in_the_middle=True),
        Fault("cut off without a reset", proxy.stall, proxy.resume),
    )


@contextmanager
def _rabbitmq(folder: Path) -> Iterator[Place]:
    with RabbitMQServer() as server, TcpProxy.to(server.url) as proxy:
        full = Fault(
            "full (memory alarm)",
            lambda: server.ctl("set_vm_memory_high_watermark", "absolute", "1"),
            lambda: server.ctl("set_vm_memory_high_watermark", "0.8"),
        )
        broker = {"kind": "rabbitmq", "host": proxy.host, "port": proxy.port, "publish_timeout": PUBLISH}
        config = BridgeConfig(broker=broker, results={"kind": "rpc", "look_timeout": LOOK})
        yield Place("RabbitMQ × rpc", config, _of_server(server, proxy, full), claims=False)


@contextmanager
def _redis(folder: Path) -> Iterator[Place]:
    with RedisServer() as server, TcpProxy.to(server.url) as proxy:

        def limit(memory: str) -> Callable[[], None]:
            def set_it() -> None:
                with server.client() as client:
                    client.config_set("maxmemory", memory)

            return set_it

        full = Fault("full (maxmemory)", limit("1"), limit("0"))
        where = {"kind": "redis", "host": proxy.host, "port": proxy.port}
        config = BridgeConfig(
            broker={**where, "publish_timeout": PUBLISH},
            results={**where, "db": 1, "look_timeout": LOOK, "socket_timeout": ANSWER},
        )
        yield Place("Redis × Redis", config, _of_server(server, proxy, full))


@contextmanager
def _postgresql(folder: Path) -> Iterator[Place]:
    with PostgreSQLServer() as server, server.fresh() as url, TcpProxy.to(server.url) as proxy:
        # an account that the server can have enough of: those who administrate it are let in for ever
        server.execute("CREATE ROLE app LOGIN PASSWORD 'app'")
        database = url.rpartition("/")[2]
        server.execute(f"ALTER DATABASE {database} OWNER TO app")
        gone = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'"
        full = Fault(
            "full (no more connections)",
            lambda: server.execute("ALTER ROLE app CONNECTION LIMIT 0", gone),
            lambda: server.execute("ALTER ROLE app CONNECTION LIMIT -1"),
        )
        config = BridgeConfig(
            broker={"kind": "embedded", "path": folder / "bridge.db", "publish_timeout": PUBLISH},
            results={
                "kind": "database",
                "url": f"postgresql+psycopg://app:app@{proxy.host}:{proxy.port}/{database}",
                "look_timeout": LOOK,
                "connect_timeout": ANSWER,
                "statement_timeout": ANSWER,
                "lock_timeout": ANSWER,
                "pool_timeout": ANSWER,
            },
        )
        yield Place("embedded × PostgreSQL", config, _of_server(server, proxy, full))


@contextmanager
def _sqlite(folder: Path) -> Iterator[Place]:
    """Both in files on a disk of two megabytes, which needs root rights."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=True)
    try:
        config = BridgeConfig(
            broker={"kind": "embedded", "path": disk / "bridge.db", "publish_timeout": PUBLISH},
            results={
                "kind": "database",
                "url": f"sqlite:///{disk / 'results.db'}",
                "look_timeout": LOOK,
                "connect_timeout": ANSWER,
                "statement_timeout": ANSWER,
                "lock_timeout": ANSWER,
                "pool_timeout": ANSWER,
            },
        )
        held = ExitStack()

        def hold() -> None:
            for name in ("bridge.db", "results.db"):
                held.enter_context(_locked(disk / name))

        def fill() -> None:
            with (disk / "filler").open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"0" * 4096)
                except OSError:
                    pass

        faults = (
            Fault("locked by another process", hold, held.close),
            Fault("disk full", fill, (disk / "filler").unlink),
        )
        yield Place("embedded × SQLite", config, faults)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    script = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN IMMEDIATE'); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        holder.stdout.readline()
        yield
    finally:
        holder.stdin.close()
        holder.wait(10)
        holder.stdout.close()


PLACES: dict[str, Callable[[Path], Any]] = {
    "rabbitmq": _rabbitmq,
    "redis": _redis,
    "postgresql": _postgresql,
    "sqlite": _sqlite,
}
