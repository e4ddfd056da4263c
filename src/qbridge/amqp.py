"""How the bridge's Celery app connects, pools connections and publishes.

Celery asks ``app.amqp`` for its Connection, Producer and pools; these are ours, for five reasons:
pools belong to one app (kombu's are process-wide, keyed by URL: two apps would share limit, timeouts and TLS);
each wait of a send honours one deadline; a broken connection is dropped without a closing handshake that a frozen
server would never answer; task messages are confirmed, events and control messages are not; payloads have a limit.
"""

# long because: connection, pools, producer and ``app.amqp`` are the links of one chain, each made by the next.

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

from celery.app.amqp import AMQP
from kombu.connection import Connection, ConnectionPool, PooledConnection
from kombu.messaging import Producer
from kombu.transport import supports_librabbitmq
from kombu.utils.functional import lazy

from qbridge.backends.deadline import bounded, deadline, remaining
from qbridge.backends.forking import begin_anew_after_fork
from qbridge.backends.rabbitmq.connection import BoundedAMQPSSLTransport, BoundedAMQPTransport
from qbridge.backends.rabbitmq.publisher import ConfirmChannel
from qbridge.producer import BridgeProducer, BridgeProducerPool, turn_away

__all__ = ["BridgeAMQP", "BridgeConnection", "BridgeConnectionPool", "SafeConnection"]

# Options of a send that describe its arguments.
_IN_THE_HEADERS = ("argsrepr", "kwargsrepr")

_GOODBYE = 1.0  # seconds for the closing handshakes of all connections that are closed at once

_LONGEST_WAIT = 2  # seconds between two attempts at a broker that is away, where the caller names no others

# kombu tries the import of librabbitmq for every connection. The lock of an import that another thread had begun at
# the time of a fork is never released in the child.
_AMQP = "librabbitmq" if supports_librabbitmq() else "pyamqp"

_BOUNDED = {
    "kombu.transport.pyamqp:Transport": BoundedAMQPTransport,
    "kombu.transport.pyamqp:SSLTransport": BoundedAMQPSSLTransport,
}


@cache
def _in_our_order(transport: Any) -> Any:
    """Return our subclass of one of kombu's Redis transports, or another transport as it is."""
    if transport.__module__ != "kombu.transport.redis":
        return transport
    from qbridge.backends.redis.transport import derive  # imports redis-py, an optional driver

    return derive(transport)


class BridgeConnection(Connection):
    """A kombu connection that honours the call's deadline and lets go of its socket in a forked child.

    It works on kombu's transports as they are, but that an AMQP read ends with the deadline.
    """

    #: Most bytes that a body that came compressed may have; None: any number. The app sets it.
    max_payload_bytes: int | None = None

    _confirms: ConfirmChannel | None = None
    connect_timeout: Any  # seconds: fractions too, whatever kombu's default looks like

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        begin_anew_after_fork(self)

    def _init_params(self, **params: Any) -> None:  # type: ignore[override]  # kombu calls it by keywords only
        if params["transport"] in (None, "amqp"):
            params["transport"] = _AMQP
        super()._init_params(**params)

    def clone(self, **kwargs: Any) -> Any:
        """Copy the settings."""
        copy: Any = super().clone(**kwargs)
        copy.max_payload_bytes = self.max_payload_bytes
        return copy

    def get_transport_cls(self) -> Any:
        """Return the transport class for the URL's scheme, ours where there is one."""
        transport: Any = super().get_transport_cls()
        return _BOUNDED.get(f"{transport.__module__}:{transport.__name__}", transport)

    def _ensure_connection(
        self, errback: Any = None, max_retries: int | None = None, interval_start: float = 2, interval_step: float = 2,
        interval_max: float = 30, callback: Any = None, reraise_as_library_errors: bool = True,
        timeout: float | None = None,
    ) -> Any:  # fmt: skip
        # kombu's own signature: it passes some of these by position and some by name
        left = remaining()
        if left is not None:
            # one round over all hosts; whether there is time for another is decided by the sender
            max_retries, interval_start, timeout = max(0, len(self.alt) - 1), 0.1, left
        ensure: Any = super()._ensure_connection  # kombu says int where it takes any number of seconds
        return ensure(
            errback,
            max_retries,
            interval_start,
            interval_step,
            interval_max,
            callback,
            reraise_as_library_errors,
            timeout,
        )

    @property
    def default_channel(self) -> Any:
        """The channel that is used where none is named; kombu works out how it would connect each time it is asked."""
        channel = self._default_channel
        return channel if channel is not None and self.connected else super().default_channel

    def _establish_connection(self) -> Any:
        configured: Any = self.connect_timeout
        left = remaining()
        # of several servers the first may be frozen: the others get their share of the time
        share = None if left is None else left / 2 if len(self.alt) > 1 else left
        self.connect_timeout = bounded(configured if share is None else min(configured or share, share))
        try:
            return super()._establish_connection()
        finally:
            self.connect_timeout = configured

    def switch(self, conn_str: str) -> None:
        """Go on to another server; the connection to the one that failed is not closed politely."""
        if self._connection is not None:
            self.collect()
        super().switch(conn_str)

    def collect(self, socket_timeout: float | None = None) -> None:
        """Drop the connection without a word to the server.

        kombu's own sets the process-wide default timeout of sockets meanwhile: two threads that close connections at
        once may leave it set for ever, on every socket of the application.
        """
        transport = self._transport
        drop = getattr(transport, "_collect", None)
        if drop is not None:
            drop(self._connection)
        else:
            self._do_close_self()
        self._do_close_transport()
        self._forget_declared()
        self._connection = self._default_channel = self._confirms = None

    def _forget_declared(self) -> None:
        if self.declared_entities is not None:
            self.declared_entities.clear()

    def say_goodbye(self) -> None:
        """Close with a handshake: it makes sure that a server has read all that was sent. A silent one is left.

        How long that may take is up to the caller's deadline.
        """
        connection, transport = self._connection, self._transport
        with suppress(Exception):  # whatever it is, the connection is dropped below
            self._close()
        drop = getattr(transport, "_collect", None)
        if connection is not None and drop is not None:
            with suppress(Exception):
                drop(connection)
        self._confirms = None

    def after_fork(self) -> None:
        """In a forked child: close this process's copy of the socket, and do not speak on it: it is the parent's.

        py-amqp's own closing shuts the connection down for the parent too. On Redis each channel sees to its sockets;
        what waits for them (epoll) is shared as well: a child that added its own would wake the parent for them.
        """
        transport: Any = self._transport
        poller = getattr(getattr(transport, "cycle", None), "poller", None)
        if poller is not None:
            poller.close()
            self._transport = self._connection = self._default_channel = None
            self._forget_declared()
            return
        transport = getattr(self._connection, "_transport", None)
        sock = getattr(transport, "sock", None)
        if transport is None or sock is None:
            return
        sock.close()
        transport.sock, transport.connected = None, False
        self._confirms = None

    def confirms(self) -> ConfirmChannel:
        """Return the channel for confirmed messages, opened at first use and again after a reconnect."""
        if not self.connected:
            options: Any = self._extract_failover_opts()
            self._ensure_connection(**options)
        amqp = self.connection
        if self._confirms is None or self._confirms.amqp is not amqp or not self._confirms.usable:
            self._confirms = ConfirmChannel(amqp)
        return self._confirms


class SafeConnection(BridgeConnection):
    """The same under ``defaults="safe"``: Redis priorities in our order, and soon back at a broker that is back."""

    def _ensure_connection(
        self, errback: Any = None, max_retries: int | None = None, interval_start: float = 1, interval_step: float = 1,
        interval_max: float = _LONGEST_WAIT, callback: Any = None, reraise_as_library_errors: bool = True,
        timeout: float | None = None,
    ) -> Any:  # fmt: skip
        # kombu waits 2, 4, 6 and so on up to 30 s: after a minute without a broker half a minute more
        return super()._ensure_connection(
            errback,
            max_retries,
            interval_start,
            interval_step,
            interval_max,
            callback,
            reraise_as_library_errors,
            timeout,
        )

    def get_transport_cls(self) -> Any:
        """Return the transport class for the URL's scheme, ours where there is one."""
        return _in_our_order(super().get_transport_cls())


class _Pooled(PooledConnection):
    """What the pool adds: ``PooledConnection`` leaves a broken connection."""

    def clone(self, **kwargs: Any) -> Any:
        """Copy the settings; the copy belongs to no pool (kombu's own cannot be made without one)."""
        return self._pool.connection.clone(**kwargs)


class _PooledBridgeConnection(_Pooled, BridgeConnection):
    pass


class _PooledSafeConnection(_Pooled, SafeConnection):
    pass


class BridgeConnectionPool(ConnectionPool):
    """Connections of one app.

    What is closed in order is closed with a handshake and within a bound; what is broken is dropped.
    """

    def new(self) -> Any:
        """Make a connection; it connects at first use."""
        kind = _PooledSafeConnection if isinstance(self.connection, SafeConnection) else _PooledBridgeConnection
        made = kind(self, **dict(self.connection._info(resolve=False)))
        made.max_payload_bytes = self.connection.max_payload_bytes
        return made

    def close_resource(self, resource: Any) -> None:
        """Close a connection that is well."""
        with deadline(_GOODBYE):
            resource.say_goodbye()

    def collect_resource(self, resource: Any, socket_timeout: float | None = None) -> None:
        """Drop a connection."""
        if not isinstance(resource, lazy):
            resource.collect()

    def replace(self, resource: Any) -> None:
        """Drop a connection on which something failed; it connects again at its next use."""
        self._dirty.discard(resource)
        resource.collect()

    def release(self, resource: Any) -> None:
        """Take a connection back; one that comes back after the end is closed."""
        if self._closed:
            self._dirty.discard(resource)
            self.close_resource(resource)
        else:
            super().release(resource)

    def retire(self) -> None:
        """Close what is idle; what is in use is closed when it comes back."""
        self._closed = True
        with deadline(_GOODBYE):
            while True:
                with self._resource.mutex:  # who has just seen something in it must find it
                    if not self._resource.queue:
                        break
                    resource = self._resource.queue.pop()
                if not isinstance(resource, lazy):
                    resource.say_goodbye()
        turn_away(self)


class BridgeAMQP(AMQP):
    """Celery's ``app.amqp`` with our connections, pools and publishing."""

    _producer_pool: BridgeProducerPool | None

    @property
    def Connection(self) -> type[BridgeConnection]:  # noqa: N802 - Celery's name
        """The connection class."""
        return SafeConnection if self.app.safe else BridgeConnection

    BrokerConnection = Connection

    @property
    def confirm_timeout(self) -> float | None:
        """Seconds to wait for the confirmation of a message; None: messages are not confirmed."""
        timeout: float | None = self.app.confirm_timeout
        return timeout

    @property
    def Producer(self) -> type[Producer]:  # noqa: N802 - Celery's name
        """The producer class, with what this app demands of messages."""
        cached: type[Producer] | None = self.__dict__.get("_made_producer")
        if cached is None:
            demands = {
                "max_payload_bytes": self.app.max_payload_bytes,
                "bounding": self.app.safe,
                "confirming": self.app.safe,
                "lock": self.app.lock,
            }
            cached = self.__dict__["_made_producer"] = type("Producer", (BridgeProducer,), demands)
        return cached

    @property
    def producer_pool(self) -> Any:
        """The app's producers."""
        pool = self._producer_pool
        if pool is None:
            with self.app.pools_lock:  # else one of two threads may keep producers of a pool that was closed
                pool = self._producer_pool
                if pool is None:
                    connections = self.app.pool
                    pool = self._producer_pool = BridgeProducerPool(connections, connections.limit, self.Producer)
        return pool

    publisher_pool = producer_pool

    def Queues(self, queues: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N802 - Celery's name
        """Return the queues of the settings and those of typed tasks; without either, Celery's default queue."""
        make = self.app.make_queues
        if make is None:
            return super().Queues(queues, *args, **kwargs)
        default = self.app.conf.task_default_queue
        known, left_to_others = make(default)
        if queues or not self.app.safe:
            # what the settings say comes first, and the default queue is theirs to say
            made = super().Queues(queues, *args, **kwargs)
            for queue in known:
                if queue.name not in made and queue.name != default:
                    made.select_add(queue)
        else:
            made = super().Queues(list(known), *args, **kwargs)
        made.deselect(list(left_to_others))
        return made

    def _create_task_sender(self) -> Callable[..., Any]:
        send: Callable[..., Any] = super()._create_task_sender()
        if not self.app.safe:
            return send
        confirm_timeout = self.app.confirm_timeout

        def send_task_message(producer: Any, name: str, message: Any, **options: Any) -> Any:
            # an expired message reaches a worker, which says so; the broker would drop it without a word
            options.pop("expiration", None)
            for described in _IN_THE_HEADERS:
                # Celery has written them there, and would write them among the message's properties once more
                options.pop(described, None)
            if options.get("confirm_timeout") is None:
                options["confirm_timeout"] = confirm_timeout
            return send(producer, name, message, **options)

        return send_task_message

    def forget_derived(self, *names: str) -> None:
        """Drop what was computed from settings, so that it is computed again from the present ones."""
        for name in names:
            self.__dict__.pop(name, None)
