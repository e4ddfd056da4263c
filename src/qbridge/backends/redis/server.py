"""Which Redis, and how is it reached? The fields that broker and results share: TCP, TLS, unix socket, Sentinel."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self
from urllib.parse import quote, urlencode

from pydantic import BaseModel, Field, SecretStr, field_validator, model_validator

from qbridge.backends.base import Room, Seconds, need_driver
from qbridge.backends.tls import TLS, OptionalTLS
from qbridge.backends.urls import Address, address, join_url, refuse_query, split_url
from qbridge.exceptions import ConfigurationError

__all__ = ["RedisServer", "Sentinel"]

PORT = 6379
SENTINEL_PORT = 26379
HEALTH_CHECK_INTERVAL = 25
"""Seconds of silence after which a connection is pinged before use (kombu's own default)."""


class Sentinel(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """The Sentinels that know which server is the master.

    Args:
        hosts: each ``host`` or ``host:port`` (26379).
        master_name: the name under which they know the master.
        username: of the account at the Sentinels, which have accounts of their own.
        password: of that account.
    """

    hosts: tuple[str, ...] = Field(min_length=1)
    master_name: str = Field(min_length=1)
    username: str | None = None
    password: SecretStr | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            hosts: Sequence[str],
            master_name: str,
            username: str | None = None,
            password: str | SecretStr | None = None,
        ) -> None: ...

    @field_validator("hosts")
    @classmethod
    def _hosts_are_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            address(host, SENTINEL_PORT)
        return value

    @property
    def servers(self) -> tuple[Address, ...]:
        """Host and port of each Sentinel."""
        return tuple(address(host, SENTINEL_PORT) for host in self.hosts)


class RedisServer(Room, frozen=True):
    """A Redis server (or Valkey), as broker or as result backend."""

    schemes: ClassVar[tuple[str, ...]] = ("redis", "rediss", "redis+socket", "sentinel")

    host: str = Field(default="localhost", min_length=1)
    port: int = Field(default=PORT, ge=1, le=65535)
    db: int = Field(default=0, ge=0)
    username: str | None = None
    password: SecretStr | None = None
    tls: OptionalTLS = None
    unix_socket: str | None = Field(default=None, pattern=r"^/")
    sentinel: Sentinel | None = None
    key_prefix: str = ""
    connect_timeout: Seconds = 5.0

    @field_validator("host")
    @classmethod
    def _host_is_a_host(cls, value: str) -> str:
        if address(value, 0).port:
            raise ValueError("the port belongs in the field port")
        return value

    @model_validator(mode="after")
    def _the_ways_to_the_server_exclude_each_other(self) -> Self:
        given = self.model_fields_set
        if self.unix_socket is not None and (self.sentinel is not None or self.tls is not None):
            raise ValueError("unix_socket goes with neither sentinel nor tls: it leads to a server on this machine")
        if (self.unix_socket is not None or self.sentinel is not None) and given & {"host", "port"}:
            raise ValueError("host and port go with neither unix_socket nor sentinel: leave them out")
        if self.tls is not None and self.tls.server_hostname is not None:
            raise ValueError("tls.server_hostname: redis-py compares the certificate with the host it connects to")
        need_driver("redis", "redis", type(self).__name__)
        return self

    @property
    def server(self) -> Address:
        """Host and port, for a server that is reached by TCP."""
        return Address(address(self.host, 0).host, self.port)

    @property
    def place(self) -> str:
        """What is spoken to, for messages: ``host:port/db``, the socket's path or the Sentinels' master."""
        if self.unix_socket is not None:
            return f"{self.unix_socket} (db {self.db})"
        if self.sentinel is not None:
            return f"{self.sentinel.master_name} of the Sentinels {', '.join(map(str, self.sentinel.servers))}"
        return f"{self.server}/{self.db}"

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read a URL as kombu and Celery do.

        ``redis://user:password@host:port/db``, ``rediss://`` for TLS (verified, unless ``ssl_cert_reqs=none`` is
        added; ``ssl_ca_certs``, ``ssl_certfile``, ``ssl_keyfile`` and ``ssl_check_hostname`` are read too),
        ``redis+socket:///path?virtual_host=db``, and ``sentinel://host:port/db;sentinel://…?master_name=name``.
        """
        every = [split_url(one) for one in url.split(";") if one.strip()]
        first = every[0] if every else split_url(url)
        query = {name: value for one in every for name, value in one.query.items()}
        fields: dict[str, Any] = {}
        if first.username is not None:
            fields["username"] = first.username
        if first.password is not None:
            fields["password"] = first.password
        if any(one.scheme != first.scheme for one in every) or (len(every) > 1 and first.scheme != "sentinel"):
            raise ConfigurationError(
                f"a list of {first.scheme}:// URLs is not something that Redis clients fail over between",
                "Name one server, or Sentinels: sentinel://one:26379;sentinel://two:26379?master_name=name.",
            )
        known: tuple[str, ...] = ("db", "virtual_host")
        if first.scheme in ("redis+socket", "socket"):
            fields["unix_socket"] = "/" + (first.path or "")
        elif first.scheme == "sentinel":
            known = (*known, "master_name")
            if "master_name" not in query:
                raise ConfigurationError(
                    "this sentinel:// URL does not say which master is meant",
                    f"Add ?master_name=name, or write {cls.__name__}(sentinel=Sentinel(hosts=…, master_name=…)).",
                )
            hosts = tuple(str(Address(one.host or "localhost", one.port or SENTINEL_PORT)) for one in every)
            fields["sentinel"] = Sentinel(hosts=hosts, master_name=query["master_name"])
        elif first.scheme in ("redis", "rediss"):
            fields |= {name: value for name, value in (("host", first.host), ("port", first.port)) if value is not None}
            if first.scheme == "rediss":
                known = (*known, *TLS_QUERY)
                fields["tls"] = _tls_from_query(query)
        else:
            raise ConfigurationError(f"{first.scheme}:// is not a Redis URL", f"Write one of {', '.join(cls.schemes)}.")
        refuse_query(first.scheme, set(query) - set(known), sorted(known))
        path = None if "unix_socket" in fields else first.path
        db = (query.get("virtual_host") or query.get("db") or path or "").strip("/")
        if db:
            if not db.isdigit():
                raise ConfigurationError("the path of a Redis URL is the number of a database", "Write /0, /1, ….")
            fields["db"] = int(db)
        return cls(**fields)

    def celery_url(self) -> str:
        """The URL for Celery; several Sentinels are several URLs between semicolons, each with the master's account."""
        return self._url(self.username, self.password.get_secret_value() if self.password else None)

    def _url(self, username: str | None, password: str | None) -> str:
        if self.sentinel is not None:
            path = str(self.db)
            return ";".join(
                join_url("sentinel", username=username, password=password, server=server, path=path)
                for server in self.sentinel.servers
            )
        if self.unix_socket is not None:
            account = join_url("redis+socket", username=username, password=password).removesuffix("/")
            return f"{account}{quote(self.unix_socket)}?{urlencode({'virtual_host': self.db})}"
        return join_url(
            "rediss" if self.tls else "redis",
            username=username,
            password=password,
            server=self.server,
            path=str(self.db),
        )

    def ssl_options(self) -> dict[str, Any] | None:
        """The ``ssl_*`` arguments of redis-py's connections, for ``broker_use_ssl`` and ``redis_backend_use_ssl``."""
        if self.tls is None:
            return None
        options: dict[str, Any] = {
            # Named in any case: kombu's meaning of rediss:// without it is to verify nothing.
            "ssl_cert_reqs": ssl.CERT_REQUIRED if self.tls.verify else ssl.CERT_NONE,
            "ssl_check_hostname": self.tls.checks_hostname,
        }
        files = (("ssl_ca_certs", "ca_file"), ("ssl_certfile", "cert_file"), ("ssl_keyfile", "key_file"))
        for option, field in files:
            path = getattr(self.tls, field)
            if path is not None:
                options[option] = str(path)
        return options

    def sentinel_options(self, socket_timeout: float) -> dict[str, Any]:
        """The transport options of kombu's and Celery's Sentinel support.

        Args:
            socket_timeout: seconds to wait for one answer of one Sentinel.
        """
        if self.sentinel is None:
            return {}
        # Arguments of redis.Redis. Given at all, they replace the timeouts that redis-py would have copied from the
        # master's connection, and redis.Redis retries 10 times unless it is told not to.
        kwargs: dict[str, Any] = {
            "socket_timeout": socket_timeout,
            "socket_connect_timeout": min(self.connect_timeout, socket_timeout),
            "socket_keepalive": True,
            "retry": None,
        }
        if self.sentinel.username is not None:
            kwargs["username"] = self.sentinel.username
        if self.sentinel.password is not None:
            kwargs["password"] = self.sentinel.password.get_secret_value()
        if self.tls is not None:
            kwargs |= {"ssl": True, **(self.ssl_options() or {})}
        return {"master_name": self.sentinel.master_name, "sentinel_kwargs": kwargs}


TLS_QUERY = ("ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile")


def _tls_from_query(query: dict[str, str]) -> TLS | bool:
    named = {name: query[name] for name in TLS_QUERY if name in query}
    if not named:
        return True
    required = named.get("ssl_cert_reqs", "required").lower().removeprefix("cert_")
    if required not in {"required", "none"}:
        raise ConfigurationError(
            "ssl_cert_reqs of this rediss:// URL is neither 'required' nor 'none'",
            "'optional' means that nobody is verified: say 'none' if that is what you want.",
        )
    return TLS(
        ca_file=named.get("ssl_ca_certs"),
        cert_file=named.get("ssl_certfile"),
        key_file=named.get("ssl_keyfile"),
        verify=required == "required",
        check_hostname=named.get("ssl_check_hostname", "true").lower() != "false",
    )


def keepalive_options() -> dict[int, int]:
    """TCP keepalive for kombu's Redis connections, which otherwise get the kernel's two hours."""
    wanted = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
    return {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}
