"""How does Redis want to be spoken to as a result backend? Its model, and the Celery settings it means."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import SecretStr

from qbridge.backends.base import Finding, ResultBackend, ResultCapabilities, Seconds
from qbridge.backends.redis.server import HEALTH_CHECK_INTERVAL, RedisServer, Sentinel
from qbridge.backends.tls import TLS

__all__ = ["RedisResults"]


class RedisResults(RedisServer, ResultBackend, frozen=True):
    """Results kept in Redis (or Valkey) and read by anybody who knows the id, until they expire.

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
        timeout: seconds that ``get()`` waits where the caller names none.
        look_timeout: seconds that one look may take: ``state``, ``ready()``, ``progress()``, ``forget()``.
        expires: seconds that a result is kept.
        socket_timeout: seconds to wait for one answer of the server.
    """

    schemes: ClassVar[tuple[str, ...]] = (*RedisServer.schemes, "socket")

    kind: Literal["redis"] = "redis"
    expires: Seconds = 86400.0
    socket_timeout: Seconds = 5.0

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
            timeout: float | timedelta = 60.0,
            look_timeout: float | timedelta = 5.0,
            expires: float | timedelta = 86400.0,
            socket_timeout: float | timedelta = 5.0,
        ) -> None: ...

    def celery_url(self) -> str:
        """The URL for ``result_backend``; with Sentinels the account is in ``redis_username`` and ``redis_password``.

        Celery masks the first URL of a list only when it prints its configuration.
        """
        return super().celery_url() if self.sentinel is None else self._url(None, None)

    def celery_settings(self) -> dict[str, Any]:
        """The bounded way to keep results in Redis."""
        settings: dict[str, Any] = {
            **self.minimal_celery_settings(),
            "result_expires": self.expires,
            # Celery's defaults are 120 s for an answer and, for the connection, the same.
            "redis_socket_timeout": self.socket_timeout,
            "redis_socket_connect_timeout": min(self.connect_timeout, self.socket_timeout),
            "redis_retry_on_timeout": False,
            "redis_backend_health_check_interval": HEALTH_CHECK_INTERVAL,
            # One client for all threads: its pool is made for that, and one subscription serves every waiter.
            "result_backend_thread_safe": True,
            "result_backend_transport_options": {
                **self._transport_options(),
                # Inside each attempt of always_retry, Celery makes 20 at intervals of 1 s. Bounded by time instead, so
                # that a server that refuses (a restart) is waited for as long as one that does not answer: measured on
                # a frozen (SIGSTOP) one, a result is given up after 20.8 s, a read of the state after 20.3 s.
                "retry_policy": {
                    "max_retries": 20,
                    "interval_start": 0,
                    "interval_step": 0.2,
                    "interval_max": 1,
                    "timeout": self.socket_timeout,
                },
            },
            "result_backend_always_retry": True,
            # Celery's default is to retry for ever, in the worker's main process too.
            "result_backend_max_retries": 3,
            "result_backend_base_sleep_between_retries_ms": 100,
            "result_backend_max_sleep_between_retries_ms": 1000,
        }
        if self.unix_socket is None:  # Celery passes it on to the socket's connection class, which refuses it
            settings["redis_socket_keepalive"] = True
        return settings

    def minimal_celery_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"result_backend": self.celery_url()}
        if self.sentinel is not None:
            if self.username is not None:
                settings["redis_username"] = self.username
            if self.password is not None:
                settings["redis_password"] = self.password.get_secret_value()
        if self.tls is not None:
            settings["redis_backend_use_ssl"] = self.ssl_options()
        if options := self._transport_options():
            settings["result_backend_transport_options"] = options
        for field, setting in (
            ("expires", "result_expires"),
            ("connect_timeout", "redis_socket_connect_timeout"),
            ("socket_timeout", "redis_socket_timeout"),
        ):
            if field in self.model_fields_set:
                settings[setting] = getattr(self, field)
        return settings

    def _transport_options(self) -> dict[str, Any]:
        options = self.sentinel_options(self.socket_timeout)
        if self.key_prefix:
            options["global_keyprefix"] = self.key_prefix
        return options

    @property
    def capabilities(self) -> ResultCapabilities:
        return ResultCapabilities(readable_elsewhere=True, chords=True, progress=True, claims=True)

    def check(self) -> Iterable[Finding]:
        from qbridge.backends.redis.check import check_results  # loads redis-py: not needed to configure

        return check_results(self)
