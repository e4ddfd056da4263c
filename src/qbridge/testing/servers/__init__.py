"""Private real servers for tests: RabbitMQ, Redis, PostgreSQL and MariaDB on free loopback ports.

::

    with RedisServer() as redis, redis.fresh() as url:
        ...
        redis.freeze()

A URL in ``QBRIDGE_TEST_RABBITMQ_URL``, ``QBRIDGE_TEST_REDIS_URL``, ``QBRIDGE_TEST_POSTGRESQL_URL`` or
``QBRIDGE_TEST_MARIADB_URL`` takes the place of the private server. From a terminal:
``python -m qbridge.testing.servers install`` and ``python -m qbridge.testing.servers run redis rabbitmq``.
"""

from __future__ import annotations

from typing import TypeVar

from qbridge.testing.servers.absence import ServerFailed, ServerMissing, cannot_run, in_ci
from qbridge.testing.servers.base import Server
from qbridge.testing.servers.database import DatabaseServer, MariaDBServer, PostgreSQLServer
from qbridge.testing.servers.install import compose_url, install, missing
from qbridge.testing.servers.process import free_ports
from qbridge.testing.servers.rabbitmq import RabbitMQServer
from qbridge.testing.servers.redis import RedisServer
from qbridge.testing.servers.tls import ThrowawayCA

__all__ = [
    "SERVERS",
    "DatabaseServer",
    "MariaDBServer",
    "PostgreSQLServer",
    "RabbitMQServer",
    "RedisServer",
    "Server",
    "ServerFailed",
    "ServerMissing",
    "ThrowawayCA",
    "cannot_run",
    "free_ports",
    "in_ci",
    "obtain",
]

S = TypeVar("S", bound=Server)

#: Every kind of server by its name.
SERVERS: dict[str, type[Server]] = {
    kind.name: kind for kind in (RabbitMQServer, RedisServer, PostgreSQLServer, MariaDBServer)
}


def obtain(kind: type[S]) -> S:
    """Start a server of this kind by the first way that works here.

    In order: the URL in its environment variable; the programs on this machine; installing them with apt (as root
    on Debian and Ubuntu); docker compose.

    Args:
        kind: ``RedisServer``, for example.

    Raises:
        ServerMissing: if there is no way; the message names all of them.
        ServerFailed: if it does not start; the message shows its log.
    """
    server = kind.from_environment()
    if server.private and missing([kind.name]):
        try:
            install([kind.name])
        except ServerMissing:
            url = compose_url(kind.name)
            if url is None:
                raise
            server = kind.at(url)
    return server.start()
