"""How the bridge's Celery app connects, pools connections and publishes.

Celery asks ``app.amqp`` for its Connection, Producer and pools; these are ours, for five reasons:
pools belong to one app (kombu's are process-wide, keyed by URL: two apps would share limit, timeouts and TLS);
each wait of a send honours one deadline; a broken connection is dropped without a closing handshake that a frozen
server would never answer; task messages are confirmed, while events and control messages are not; payloads have a limit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from celery.app.amqp import AMQP
from kombu import Connection, Producer
from kombu.connection import ConnectionPool, PooledConnection
from kombu.pools import ProducerPool

from qbridge.backends.deadline import bounded, remaining
from qbridge.backends.rabbitmq.publisher import (
    BoundedAMQPSSLTransport,
    BoundedAMQPTransport,
    ConfirmChannel,
    NotConfirmed,
)
from qbridge.exceptions import PayloadError

__all__ = ["BridgeAMQP", "BridgeConnection", "BridgeProducer"]


@cache
def _bounded_transport(transport: type[Any]) -> type[Any]:
    """Return our subclass of one of kombu's transport classes, or the class itself where we have none."""
    name = f"{transport.__module__}:{transport.__name__}"
    if name == "kombu.transport.pyamqp:Transport":
        return BoundedAMQPTransport
    if name == "kombu.transport.pyamqp:SSLTransport":
        return BoundedAMQPSSLTransport
    if transport.__module__ == "kombu.transport.redis":
        from qbridge.backends.redis.transport import derive  # imports redis-py, an optional driver

        return derive(transport)
    return transport


class BridgeConnection(Connection):
    """A kombu connection whose transport is ours and whose connecting honours the call's deadline."""

    _confirms: ConfirmChannel | None = None

    def get_transport_cls(self) -> Any:
        """Return the transport class for the URL's scheme, ours where there is one."""
        return _bounded_transport(super().get_transport_cls())

    def _ensure_connection(self, *args: Any, **kwargs: Any) -> Any:
        left = remaining()
        if left is not None:
            # one round over all hosts; whether there is time for another is decided by the sender
            kwargs.update(max_retries=len(self.alt), interval_start=0.1, timeout=left)
        return super()._ensure_connection(*args, **kwargs)

    def _establish_connection(self) -> Any:
        configured = self.connect_timeout
        self.connect_timeout = bounded(configured)
        try:
            return super()._establish_connection()
        finally:
            self.connect_timeout = configured

    def confirms(self) -> ConfirmChannel:
        """Return the channel for confirmed messages, opened at first use and again after a reconnect."""
        amqp = self.connection
        if self._confirms is None or self._confirms.amqp is not amqp or not self._confirms.usable:
            self._confirms = ConfirmChannel(amqp)
        return self._confirms


class _PooledBridgeConnection(BridgeConnection, PooledConnection):
    """A pooled one: ``PooledConnection`` adds the pool and leaving a broken connection."""


class BridgeConnectionPool(ConnectionPool):
    """Connections of one app; closing and replacing never wait for the server."""

    def new(self) -> Any:
        """Make a connection; it connects at first use."""
        return _PooledBridgeConnection(self, **dict(self.connection._info(resolve=False)))

    def close_resource(self, resource: Any) -> None:
        """Drop a connection by closing its socket; a frozen server would not answer an orderly close."""
        if isinstance(resource, Connection):
            resource.collect(socket_timeout=0.1)


class BridgeProducer(Producer):
    """A producer that can confirm a message, and refuses one that is too large."""

    #: Largest body of a task message in bytes; None: no limit.
    max_payload_bytes: int | None = None

    #: Unconfirmed messages that a bulk submission may have under way; 0: confirm each.
    window = 0

    def _prepare(self, body: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare(body, *args, **kwargs)
        size, limit = len(prepared[0]), self.max_payload_bytes
        if limit is not None and size > limit:
            raise PayloadError(
                f"the message has {size:,} bytes, the limit is {limit:,}",
                "Send a reference to the data instead, or raise serialization.max_payload_bytes.",
            )
        return prepared

    def _publish(
        self, body: Any, priority: Any, content_type: Any, content_encoding: Any, headers: Any, properties: Any,
        routing_key: Any, mandatory: Any, immediate: Any, exchange: Any, declare: Any, timeout: Any = None,
        confirm_timeout: Any = None, retry: bool = False, retry_policy: Any = None,
    ) -> Any:  # fmt: skip
        connection = self.connection
        if confirm_timeout is None or not isinstance(connection, BridgeConnection):
            return super()._publish(
                body, priority, content_type, content_encoding, headers, properties, routing_key, mandatory,
                immediate, exchange, declare, timeout, None, retry, retry_policy,
            )  # fmt: skip
        if connection.transport.driver_type != "amqp":
            # elsewhere a publish is one command whose answer is awaited: nothing more to confirm
            return super()._publish(
                body, priority, content_type, content_encoding, headers, properties, routing_key, mandatory,
                immediate, exchange, declare, timeout, None, retry, retry_policy,
            )  # fmt: skip
        for entity in declare or ():
            self.maybe_declare(entity, retry=retry, **(retry_policy or {}))
        confirms = connection.confirms()
        message = confirms.channel.prepare_message(body, priority, content_type, content_encoding, headers, properties)
        tag = confirms.publish(message, exchange=exchange, routing_key=routing_key)
        try:
            confirms.settle(at_most=self.window, timeout=confirm_timeout)
        except NotConfirmed:
            # what was declared may be gone from the server: the next attempt declares again
            connection.declared_entities.clear()
            raise
        return tag


class BridgeProducerPool(ProducerPool):
    """Producers of one app over its own connections."""

    def __init__(self, connections: Any, limit: int | None, producer: type[Producer]) -> None:
        super().__init__(connections, limit=limit, Producer=producer)

    def _acquire_connection(self) -> Any:
        return self.connections.acquire(block=True, timeout=bounded(None))


class BridgeAMQP(AMQP):
    """Celery's ``app.amqp`` with our connections, pools and publishing."""

    Connection = BridgeConnection

    @property
    def Producer(self) -> type[Producer]:  # noqa: N802 - Celery's name
        """The producer class, carrying this app's payload limit."""
        return self._producer_class

    @property
    def _producer_class(self) -> type[Producer]:
        cached = self.__dict__.get("_made_producer")
        if cached is None:
            limit = getattr(self.app, "max_payload_bytes", None)
            cached = type("Producer", (BridgeProducer,), {"max_payload_bytes": limit})
            self.__dict__["_made_producer"] = cached
        return cached

    @property
    def producer_pool(self) -> Any:
        """The app's producers."""
        if self._producer_pool is None:
            pool = self.app.pool
            self._producer_pool = BridgeProducerPool(pool, pool.limit, self._producer_class)
        return self._producer_pool

    publisher_pool = producer_pool

    def Queues(self, queues: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N802 - Celery's name
        """Return the queues of the settings, or where they name none, those that the bridge knows."""
        make = self.app.make_queues
        if queues or make is None:
            return super().Queues(queues, *args, **kwargs)
        known, left_to_others = make(self.app.conf.task_default_queue)
        made = super().Queues(list(known), *args, **kwargs)
        made.deselect(list(left_to_others))
        return made

    def _create_task_sender(self) -> Callable[..., Any]:
        send = super()._create_task_sender()

        def send_task_message(producer: Any, name: str, message: Any, **options: Any) -> Any:
            if self.app.safe:
                # an expired message reaches a worker, which says so; the broker would drop it without a word
                options.pop("expiration", None)
            if options.get("confirm_timeout") is None:
                options["confirm_timeout"] = self.app.confirm_timeout
            return send(producer, name, message, **options)

        return send_task_message

    def forget_derived(self, *names: str) -> None:
        """Drop what was computed from settings, so that it is computed again from the present ones."""
        for name in names:
            self.__dict__.pop(name, None)
