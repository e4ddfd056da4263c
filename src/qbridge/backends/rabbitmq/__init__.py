"""How does RabbitMQ want to be spoken to? The model that the operator writes, and the Celery settings it means."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from qbridge.backends.base import Broker, BrokerCapabilities, Finding, Priority, Seconds
from qbridge.backends.kept import KeptQueue
from qbridge.backends.tls import TLS, OptionalTLS
from qbridge.backends.urls import Address, address, join_url, refuse_query, split_url
from qbridge.exceptions import ConfigurationError, UnsupportedFeature

__all__ = ["RabbitMQBroker"]

PORT = 5672
TLS_PORT = 5671

QueueType = Literal["quorum", "classic"]


class RabbitMQBroker(Broker, frozen=True):
    """RabbitMQ over AMQP 0-9-1.

    Args:
        host: name or address of the server.
        hosts: several servers of one cluster instead, each ``host`` or ``host:port``; tried in this order.
        port: None for 5672, with TLS 5671.
        username: of the account.
        password: of the account.
        vhost: name of the virtual host, exactly: ``"shop"`` and ``"/shop"`` are two different ones.
        tls: True, False or a ``TLS`` model.
        heartbeat: seconds between a worker's signs of life; 0 turns them off.
        queue_type: what new queues are; cannot change for a queue that exists.
        connect_timeout: seconds for one attempt on one server, TCP, TLS and AMQP handshake each; never more than
            ``publish_timeout`` is used.
        publish_timeout: seconds that a send may take in all.
    """

    schemes: ClassVar[tuple[str, ...]] = ("amqp", "amqps", "pyamqp")

    kind: Literal["rabbitmq"] = "rabbitmq"
    host: str = Field(default="localhost", min_length=1)
    hosts: tuple[str, ...] = ()
    port: int | None = Field(default=None, ge=1, le=65535)
    username: str = "guest"
    password: SecretStr = SecretStr("guest")
    vhost: str = Field(default="/", min_length=1)
    tls: OptionalTLS = None
    heartbeat: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    queue_type: QueueType = "quorum"
    connect_timeout: Seconds = 4.0

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            kind: Literal["rabbitmq"] = "rabbitmq",
            host: str = "localhost",
            hosts: Sequence[str] = (),
            port: int | None = None,
            username: str = "guest",
            password: str | SecretStr = "guest",  # noqa: S107 - RabbitMQ's own default account
            vhost: str = "/",
            tls: TLS | bool | None = None,
            heartbeat: float = 60.0,
            queue_type: QueueType = "quorum",
            connect_timeout: float | timedelta = 4.0,
            publish_timeout: float | timedelta = 10.0,
        ) -> None: ...

    @field_validator("host", "hosts", mode="after")
    @classmethod
    def _hosts_are_hosts(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for host in (value,) if isinstance(value, str) else value:
            address(host, PORT)
        return value

    @model_validator(mode="after")
    def _one_way_to_name_the_servers(self) -> Self:
        if self.hosts and "host" in self.model_fields_set:
            raise ValueError("host and hosts are both set: write one server as host=, a cluster as hosts=")
        if ":" in self.host and address(self.host, 0).port and "port" in self.model_fields_set:
            raise ValueError("the port is given twice, in host and in port")
        return self

    @property
    def servers(self) -> tuple[Address, ...]:
        """Host and port of each server, in the order in which they are tried."""
        default = self.port or (TLS_PORT if self.tls else PORT)
        return tuple(address(host, default) for host in self.hosts or (self.host,))

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read ``amqp://user:password@host:port/vhost``, with ``amqps`` for TLS and ``;`` between servers of a cluster.

        As kombu reads it: ``amqp://h``, ``amqp://h/`` and ``amqp://h//`` mean the vhost ``/``, ``amqp://h/shop`` means
        ``shop`` and ``amqp://h//shop`` (or ``/%2Fshop``) means ``/shop``. The parameters ``heartbeat`` and
        ``connect_timeout`` are read, any other is refused.
        """
        every = [split_url(one) for one in url.split(";") if one.strip()]
        first = every[0] if every else split_url(url)
        for other in every:
            if other.scheme not in cls.schemes:
                raise ConfigurationError(
                    f"{other.scheme}:// is not a RabbitMQ URL", f"Write one of {', '.join(cls.schemes)}."
                )
            refuse_query(other.scheme, set(other.query) - {"heartbeat", "connect_timeout"}, sorted(cls.model_fields))
            ours, theirs = ((u.scheme, u.username, u.password, u.path, u.query) for u in (first, other))
            if ours != theirs:
                raise ConfigurationError(
                    "the URLs of this failover list differ in more than host and port",
                    "Servers of one cluster share scheme, account, vhost and parameters: repeat them in each URL.",
                )
        fields: dict[str, Any] = dict(first.query)
        if len(every) > 1:
            fields["hosts"] = tuple(
                str(Address(u.host or "localhost", u.port)) if u.port else u.host or "localhost" for u in every
            )
        else:
            fields |= {name: value for name, value in (("host", first.host), ("port", first.port)) if value is not None}
        if first.scheme == "amqps":
            fields["tls"] = True
        for name, value in (("username", first.username), ("password", first.password), ("vhost", first.path)):
            if value is not None:
                fields[name] = value
        return cls(**fields)

    def celery_url(self) -> str:
        """The URL for ``broker_url``; several servers are several URLs between semicolons.

        Each has the account: kombu forgets ``broker_user`` and ``broker_password`` when it goes to the next server.
        """
        return ";".join(
            join_url(
                "amqps" if self.tls else "amqp",
                username=self.username,
                password=self.password.get_secret_value(),
                server=server,
                path=self.vhost,
            )
            for server in self.servers
        )

    def celery_settings(self) -> dict[str, Any]:
        """The bounded, confirmed, late-acknowledging way to speak to RabbitMQ.

        Publisher confirms are not among them: in ``broker_transport_options`` they would cover events and remote
        control too, and a worker with events enabled stalls on them; the sender confirms its own messages.
        """
        return {
            **self.minimal_celery_settings(),
            "broker_connection_timeout": min(self.connect_timeout, self.publish_timeout),
            "broker_connection_retry": True,
            # A worker that starts before its broker waits for it, for ever: the supervisor decides when to give up.
            "broker_connection_retry_on_startup": True,
            "broker_connection_max_retries": None,
            # Without it a 406 (consumer_timeout, a queue declared otherwise) ends the worker as "unrecoverable".
            "broker_channel_error_retry": True,
            "broker_heartbeat": self.heartbeat,
            "broker_pool_limit": 10,
            # Celery waits for ever for a free connection of the pool.
            "broker_pool_acquire_timeout": self.publish_timeout,
            "broker_transport_options": self._transport_options(),
            "task_publish_retry": True,
            "task_publish_retry_policy": self._publish_retry_policy(),
        }

    def minimal_celery_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"broker_url": self.celery_url()}
        if self.tls is not None:
            settings["broker_use_ssl"] = self.ssl_options()
        if "heartbeat" in self.model_fields_set:
            settings["broker_heartbeat"] = self.heartbeat
        if "connect_timeout" in self.model_fields_set:
            settings["broker_connection_timeout"] = self.connect_timeout
        return settings

    def _transport_options(self) -> dict[str, Any]:
        return {
            # SO_RCVTIMEO: py-amqp waits for ever for the answer to channel.open or queue.declare. Measured on a frozen
            # (SIGSTOP) server: 10.2 s for 10, and 4.0 s (connect_timeout) for a send that has to connect first.
            # Waits that name their own timeout (event loops, waiting for results) are not affected.
            "read_timeout": self.publish_timeout,
            # SO_SNDTIMEO: a server under a memory or disk alarm stops reading, and the socket's buffer fills. A third,
            # because the kernel takes a large write in pieces and each starts the time anew: measured are three.
            "write_timeout": max(1.0, self.publish_timeout / 3),
            "socket_settings": socket_settings(),
            **self._publish_retry_policy(),
        }

    def ssl_options(self, server: Address | None = None) -> dict[str, Any]:
        """py-amqp's ``ssl`` options, verification on unless ``tls`` says otherwise.

        Args:
            server: the one that is connected to; None: whichever it will be.
        """
        tls = self.tls or TLS()
        options: dict[str, Any] = {"cert_reqs": ssl.CERT_REQUIRED if tls.verify else ssl.CERT_NONE}
        for name, path in (("ca_certs", tls.ca_file), ("certfile", tls.cert_file), ("keyfile", tls.key_file)):
            if path is not None:
                options[name] = str(path)
        if not tls.checks_hostname:
            return options  # py-amqp compares host names if and only if server_hostname is set
        first, *others = self.servers
        if server is None and tls.server_hostname is None and others:
            return HostnameOfTheMoment(options, server_hostname=None)
        options["server_hostname"] = tls.server_hostname or (server or first).host
        return options

    @property
    def capabilities(self) -> BrokerCapabilities:
        if self.queue_type == "classic":
            return BrokerCapabilities(
                priorities="three levels",
                native_delays=False,
                publisher_confirms=True,
                rpc_results=True,
                notes=("priorities need QueueConfig(name, type='classic', max_priority=9)",),
            )
        return BrokerCapabilities(
            priorities="two levels",
            native_delays=True,
            publisher_confirms=True,
            rpc_results=True,
            notes=("priorities on quorum queues need RabbitMQ 4.0 or later: high, and everything else",),
        )

    def celery_priority(
        self,
        level: Priority,
        *,
        queue_type: str | None = None,
        max_priority: int | None = None,
        server_version: tuple[int, ...] | None = None,
    ) -> int | None:
        """The AMQP priority number that stands for ``level``, or None to send none.

        A classic queue orders by the number up to its own ``max_priority``. A quorum queue knows two levels from
        RabbitMQ 4.0 on: above 4 is high. Until the server was asked, the answer is that of 4.0.
        """
        # as a queue is declared: only a classic one can have max_priority
        if (queue_type or ("classic" if max_priority is not None else self.queue_type)) == "classic":
            if max_priority is None:
                if level == "normal":
                    return None
                raise self._no_priorities("a classic queue without max_priority")
            return round({"low": 1, "normal": 5, "high": 9}[level] * max_priority / 9)
        if level != "normal" and server_version is not None and server_version < (4,):
            version = ".".join(map(str, server_version))
            raise self._no_priorities(f"a quorum queue on RabbitMQ {version} (priorities came with 4.0)")
        return 9 if level == "high" else None

    def _no_priorities(self, where: str) -> UnsupportedFeature:
        return UnsupportedFeature(
            f"{where} has no priorities",
            "Use a queue that has: QueueConfig(name, type='classic', max_priority=9); a queue that exists must be "
            "deleted first, its arguments cannot change.",
        )

    def kept_queue(self, connection: Any, name: str) -> AbstractContextManager[KeptQueue]:
        from qbridge.backends.rabbitmq.dead_letters import open_queue  # loads py-amqp: not needed to configure

        return open_queue(connection, name)

    def check(self, queues: Sequence[Any] = (), *, plain: bool = False) -> Iterable[Finding]:
        """Look at the live server and say what is fine and what is not; changes nothing there.

        Args:
            queues: the ``QueueConfig`` objects that the bridge knows.
            plain: whether they are declared as plain Celery does (``defaults="celery"``).
        """
        from qbridge.backends.rabbitmq.check import check  # loads py-amqp: not needed to configure

        return check(self, queues, plain=plain)


class HostnameOfTheMoment(dict[str, Any]):
    """TLS options for several servers: each is checked against its own name.

    kombu fills in ``server_hostname`` for a None, but in place, so the second server of a failover list would be
    checked against the name of the first. Reading it as None every time makes kombu fill it in every time; py-amqp
    unpacks the mapping and gets the stored value.
    """

    def __getitem__(self, name: str) -> Any:
        return None if name == "server_hostname" else super().__getitem__(name)


def socket_settings() -> dict[int, int]:
    """TCP options for py-amqp, whose default TCP_USER_TIMEOUT of 1 s kills a publisher under flow control.

    A silent peer is noticed after 30 s without an acknowledged byte, an idle one after 30 + 3 x 10 s.
    """
    wanted = {"TCP_USER_TIMEOUT": 30_000, "TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
    return {getattr(socket, name): value for name, value in wanted.items() if hasattr(socket, name)}
