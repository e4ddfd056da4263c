"""How does Redis want to be spoken to as a broker? Its model, and the Celery settings it means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from pydantic import SecretStr

from qbridge.backends.base import Broker, BrokerCapabilities, Finding, Priority, Seconds
from qbridge.backends.kept import KeptQueue
from qbridge.backends.redis.server import HEALTH_CHECK_INTERVAL, RedisServer, Sentinel, keepalive_options
from qbridge.backends.tls import TLS

__all__ = ["RedisBroker"]


class RedisBroker(RedisServer, Broker, frozen=True):
    """Redis (or Valkey) as the broker: one server or a Sentinel group, not a Redis Cluster.

    Args:
        host: name or address of the server.
        port: of the server.
        db: number of the database.
        username: ACL account; None: the default user.
        password: of the account.
        tls: True, False or a ``TLS`` model.
        unix_socket: path of a socket, instead of host and port.
        sentinel: the Sentinels that know the master, instead of host and port.
        key_prefix: put before every key, so that several applications can share a database.
        connect_timeout: seconds for one attempt to connect.
        publish_timeout: seconds that a send may take in all.
        lease: seconds without a sign of life after which another worker takes over what a worker held. Workers renew
            it every third of it, however long their tasks run.
        visibility_timeout: seconds after which a message that a plain Celery worker has not acknowledged is delivered
            again; what qbridge's workers hold has a lease instead.
    """

    kind: Literal["redis"] = "redis"
    lease: Seconds = 30.0
    # Twelve hours where Celery has one. Too long delays the tasks of a killed plain worker, which shows, and loses
    # nothing. Too short runs every longer task again while it is still running, and again, in silence.
    visibility_timeout: Seconds = 12 * 3600.0

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            kind: Literal["redis"] = "redis",
            host: str = "localhost",
            port: int = 6379,
            db: int = 0,
            username: str | None = None,
            password: str | SecretStr | None = None,
            tls: TLS | bool | None = None,
            unix_socket: str | None = None,
            sentinel: Sentinel | None = None,
            key_prefix: str = "",
            connect_timeout: float | timedelta = 5.0,
            publish_timeout: float | timedelta = 10.0,
            lease: float | timedelta = 30.0,
            visibility_timeout: float | timedelta = 43200.0,
        ) -> None: ...

    @property
    def socket_timeout(self) -> float:
        """Seconds to wait for one answer: a third of ``publish_timeout``, between 1.5 and 15.

        Measured on a frozen (SIGSTOP) server: a send by kombu waits for three answers at most (the command, the ping
        of the new connection, the command again), 10.02 s for a ``publish_timeout`` of 10. The lower bound leaves a
        worker's blocking pop, which Redis answers after up to one second, time to be answered.
        """
        return min(15.0, max(1.5, self.publish_timeout / 3))

    def celery_settings(self) -> dict[str, Any]:
        """The bounded way to use Redis as a broker."""
        return {
            **self.minimal_celery_settings(),
            "broker_connection_timeout": min(self.connect_timeout, self.publish_timeout),
            "broker_connection_retry": True,
            # A worker that starts before its broker waits for it, for ever: the supervisor decides when to give up.
            "broker_connection_retry_on_startup": True,
            "broker_connection_max_retries": None,
            "broker_channel_error_retry": True,
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
        options = self.sentinel_options(self.socket_timeout)
        if self.key_prefix:
            options["global_keyprefix"] = self.key_prefix
        if "visibility_timeout" in self.model_fields_set:
            options["visibility_timeout"] = self.visibility_timeout
        if "connect_timeout" in self.model_fields_set:
            options["socket_connect_timeout"] = self.connect_timeout
        if options:
            settings["broker_transport_options"] = options
        return settings

    def _transport_options(self) -> dict[str, Any]:
        options = {
            # kombu's default for both is None: a Redis that accepts and does not answer blocks a send for ever.
            "socket_timeout": self.socket_timeout,
            "socket_connect_timeout": min(self.connect_timeout, self.socket_timeout),
            "socket_keepalive": True,
            "socket_keepalive_options": keepalive_options(),
            "health_check_interval": HEALTH_CHECK_INTERVAL,
            # True repeats a command whose answer did not come: the message may then be queued twice.
            "retry_on_timeout": False,
            # The only place where it is read; Celery knows no setting of this name.
            "visibility_timeout": self.visibility_timeout,
            # Look for messages of dead workers every 10 s; kombu's default is every tenth time, about 100 s.
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 1,
            "lease": self.lease,  # read by qbridge's transport
            # No priority_steps: kombu's are the same buckets, and qbridge's transport brings the order to take them in.
            **self._publish_retry_policy(),
            **self.sentinel_options(self.socket_timeout),
        }
        if self.key_prefix:
            options["global_keyprefix"] = self.key_prefix
        return options

    @property
    def capabilities(self) -> BrokerCapabilities:
        return BrokerCapabilities(
            priorities="three levels",
            native_delays=False,
            publisher_confirms=True,
            rpc_results=True,
            notes=(
                "the tasks of a killed worker run elsewhere when its lease has ended",
                "a worker that is stopped for longer than its lease, and goes on, runs its task beside the second run",
            ),
        )

    def celery_priority(
        self,
        level: Priority,
        *,
        queue_type: str | None = None,
        max_priority: int | None = None,
        server_version: tuple[int, ...] | None = None,
    ) -> int | None:
        """The priority number of ``level``: qbridge's transport takes the lists in the order 9, 0, 3, 6.

        Normal is kombu's 0, the plain list named after the queue: there lie the messages of peers that know no
        priorities. (kombu alone would take 0 first, and high last.)
        """
        return {"low": 3, "normal": None, "high": 9}[level]

    def kept_queue(self, connection: Any, name: str) -> AbstractContextManager[KeptQueue]:
        from qbridge.backends.redis.dead_letters import open_queue  # loads redis-py: not needed to configure

        return open_queue(connection, name)

    def check(self, queues: Sequence[Any] = ()) -> Iterable[Finding]:
        from qbridge.backends.redis.check import check_broker  # loads redis-py: not needed to configure

        return check_broker(self, queues)
