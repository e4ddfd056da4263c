"""How is a private Redis run: plain, with passwords and users, over TLS, on a unix socket?"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote, urlsplit, urlunsplit

from qbridge.testing.servers.base import Server
from qbridge.testing.servers.install import program
from qbridge.testing.servers.process import free_ports
from qbridge.testing.servers.tls import ThrowawayCA

if TYPE_CHECKING:
    from redis import Redis

__all__ = ["RedisServer"]


class RedisServer(Server):
    """A Redis server without persistence, with 512 databases.

    Args:
        requirepass: password of the default user.
        users: further users as Redis ACL lines: ``"worker on >secret ~* &* +@all"``.
        tls: serve TLS, and nothing else, with a certificate of a throwaway CA (``.ca.certificate``).
        unix_socket: listen on a unix socket too (``.unix_socket``).
        appendonly: write every command to disk, so that data survive ``kill`` (``stop`` then keeps them too).
        settings: further lines of redis.conf: ``{"maxmemory": "10mb", "maxmemory-policy": "allkeys-lru"}``.
    """

    name: ClassVar[str] = "redis"
    environment_variable: ClassVar[str] = "QBRIDGE_TEST_REDIS_URL"

    def __init__(
        self,
        *,
        requirepass: str | None = None,
        users: Sequence[str] = (),
        tls: bool = False,
        unix_socket: bool = False,
        appendonly: bool = False,
        settings: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.port: int = 0
        self.ca: ThrowawayCA | None = None
        self._requirepass = requirepass
        self._users = tuple(users)
        self._tls = tls
        self._with_socket = unix_socket
        self._appendonly = appendonly
        self._settings = dict(settings or {})
        self._next_database = 0

    @property
    def unix_socket(self) -> Path:
        """Path of the unix socket."""
        return self.folder / "redis.sock"

    @property
    def _private_url(self) -> str:
        return self.user_url("", self._requirepass or "")

    def user_url(self, username: str, password: str, database: int = 0) -> str:
        """URL of the private server for a user of one's own.

        Args:
            username: an ACL user; empty: the default user.
            password: unquoted; empty: none.
            database: its number.
        """
        login = f"{quote(username, safe='')}:{quote(password, safe='')}@" if username or password else ""
        # The certificate is for "localhost" and 127.0.0.1 alike.
        return f"{'rediss' if self._tls else 'redis'}://{login}127.0.0.1:{self.port}/{database}"

    def _choose_ports(self) -> None:
        (self.port,) = free_ports(1)

    def _prepare(self, folder: Path) -> None:
        lines = [
            "bind 127.0.0.1",
            "protected-mode no",
            f"dir {folder}",
            "databases 512",
            'save ""',
            f"appendonly {'yes' if self._appendonly else 'no'}",
            "appendfsync always",
        ]
        if self._tls:
            self.ca = ThrowawayCA(folder / "tls")
            certificate, key = self.ca.issue("server")
            lines += [
                "port 0",
                f"tls-port {self.port}",
                f"tls-cert-file {certificate}",
                f"tls-key-file {key}",
                f"tls-ca-cert-file {self.ca.certificate}",
                "tls-auth-clients optional",
            ]
        else:
            lines.append(f"port {self.port}")
        if self._with_socket:
            lines.append(f"unixsocket {self.unix_socket}")
        if self._requirepass is not None:
            lines.append(f"requirepass {self._requirepass}")
        lines += [f"user {line}" for line in self._users]
        lines += [f"{name} {value}" for name, value in self._settings.items()]
        (folder / "redis.conf").write_text("\n".join(lines) + "\n")

    def _command(self, folder: Path) -> list[str]:
        return [program("redis-server"), str(folder / "redis.conf")]

    def _is_ready(self) -> bool:
        # By hand, so that a Redis can be started where redis-py is not installed. A server that wants a password
        # first answers -NOAUTH and is ready; one that still reads its data answers -LOADING and is not.
        address = urlsplit(self.url)
        try:
            with socket.create_connection((address.hostname or "localhost", address.port or 6379), 2) as plain:
                if address.scheme == "rediss":
                    context = ssl.create_default_context()
                    context.check_hostname = False
                    context.verify_mode = ssl.CERT_NONE
                    with context.wrap_socket(plain) as encrypted:
                        encrypted.sendall(b"PING\r\n")
                        answer = encrypted.recv(64)
                else:
                    plain.sendall(b"PING\r\n")
                    answer = plain.recv(64)
        except OSError:
            return False
        return answer.startswith((b"+PONG", b"-NOAUTH"))

    def client(self, url: str | None = None) -> Redis:
        """A redis-py client with decoded answers and bounded waits; close it, or use it in a ``with`` block.

        Args:
            url: a URL of this server, such as ``fresh`` gives; None: ``self.url``.
        """
        import redis  # the extra "redis" is needed by those who use Redis only

        options: dict[str, Any] = {"decode_responses": True, "socket_timeout": 10, "socket_connect_timeout": 10}
        if self.ca is not None:
            options["ssl_ca_certs"] = str(self.ca.certificate)
        return redis.Redis.from_url(self.url if url is None else url, **options)

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """A database number that no test of this run used before, emptied before and after.

        Yields:
            Its URL. On a server given by URL the numbers come round again after 15.
        """
        with self.client() as client:
            # redis-py types answers for its sync and async clients at once.
            answer: Any = client.config_get("databases")
        limit = int(answer["databases"])
        self._next_database = self._next_database % (limit - 1) + 1
        parts = urlsplit(self.url)
        url = urlunsplit(parts._replace(path=f"/{self._next_database}"))
        with self.client(url) as client:
            client.flushdb()
        yield url
        if self.running:
            with self.client(url) as client:
                client.flushdb()
