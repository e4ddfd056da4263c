"""How is one message published: declared once, confirmed, signed, and refused if it is too large."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kombu.compression import compress
from kombu.connection import is_connection
from kombu.exceptions import OperationalError
from kombu.messaging import Producer
from kombu.pools import ProducerPool
from kombu.utils.functional import ChannelPromise, lazy

from qbridge.backends.deadline import bounded
from qbridge.backends.rabbitmq.publisher import NotConfirmed
from qbridge.exceptions import PayloadError
from qbridge.serialization.header_limits import SENT_HEADER_OCTETS, SENT_HEADERS, header_fault
from qbridge.serialization.limits import body_fault
from qbridge.serialization.lock import Lock
from qbridge.serialization.locked_messages import Kind, Letter, lock_letter

__all__ = ["BridgeProducer", "BridgeProducerPool", "PoolClosed", "turn_away"]


class BridgeProducer(Producer):
    """A producer that can confirm a message, signs it, and refuses one that is too large."""

    #: Largest body of a message in bytes; None: nothing of a message is bounded.
    max_payload_bytes: int | None = None

    #: Whether workers refuse tasks beyond the limits of headers and levels: then they are not sent.
    bounding = False

    #: The keys with which tasks and commands to workers are signed; None: they are not.
    lock: Lock | None = None

    #: False while a message is passed on as it came, such as a dead letter: a signature would vouch for it.
    signing = True

    #: Whether ``confirm_timeout`` means our confirms; False: what it means to kombu.
    confirming = False

    #: Unconfirmed messages that a bulk submission may have under way, which is always confirmed; 0: none is under way.
    window = 0

    #: Where the writes of a bulk submission are kept until all its messages are made; None: each is written at once.
    held: list[Callable[[], int]] | None = None

    def revive(self, channel: Any) -> None:
        """Take a connection or a channel.

        kombu copies the exchange for each use of a pooled producer; the default one needs no channel of its own.
        """
        unbound: Any = self  # kombu's types know no connection here
        if not is_connection(channel) or unbound.exchange.name:
            super().revive(channel)
            return
        unbound.__connection__ = channel
        unbound._channel = ChannelPromise(lambda: channel.default_channel)

    def maybe_declare(self, entity: Any, retry: bool = False, **retry_policy: Any) -> Any:
        """Declare a queue or exchange unless this connection has done so.

        To find out, kombu copies the queue, its exchange and its bindings at every send: a twelfth of its time.
        """
        declared = getattr(self.connection, "declared_entities", None)
        if declared and entity and entity.can_cache_declaration and hash(entity) in declared:
            return False
        return super().maybe_declare(entity, retry, **retry_policy)

    def _prepare(
        self, body: Any, serializer: Any = None, content_type: Any = None, content_encoding: Any = None,
        compression: Any = None, headers: Any = None,
    ) -> Any:  # fmt: skip
        prepared = super()._prepare(body, serializer, content_type, content_encoding, None, headers)
        # before it is compressed: the limit of the receiver is for what comes out again
        size, limit = len(prepared[0]), self.max_payload_bytes
        if limit is not None and size > limit:
            raise PayloadError(
                f"the message has {size:,} bytes, the limit is {limit:,}",
                "Send a reference to the data instead, or raise serialization.max_payload_bytes.",
            )
        if compression:
            body, content_type, content_encoding = prepared
            body, headers["compression"] = compress(body, compression)
        if limit is not None and self.bounding and headers and "task" in headers:
            self._refuse_excess(prepared[0], prepared[1], headers)
        return (body, content_type, content_encoding) if compression else prepared

    def _refuse_excess(self, body: Any, content_type: str | None, headers: Any) -> None:
        # another attempt has what workers have added since it was sent
        limits = () if headers.get("retries") else (SENT_HEADERS, SENT_HEADER_OCTETS)
        fault = header_fault(headers, *limits)
        if fault is not None:
            raise PayloadError(f"the message is not sent: {fault}", "Send a reference to the data, or an argument.")
        fault = body_fault(body, content_type)
        if fault is not None:
            raise PayloadError(f"the message is not sent: {fault}", "Send it flatter, or as a text.")

    def _locked(
        self, lock: Lock, body: Any, content_type: Any, content_encoding: Any, headers: Any, properties: Any,
        exchange: Any,
    ) -> Letter | None:  # fmt: skip
        """Return the message with its signature; None if it is one that nobody acts on."""
        kind: Kind
        if "task" in headers:
            kind = "task"
        elif str(exchange).endswith(".pidbox") and not str(exchange).startswith("reply."):
            kind = "control"
        else:
            return None  # events, answers; results carry their own
        reply_to = properties.get("reply_to")
        raw = body.encode("utf-8") if isinstance(body, str) else bytes(body)
        return lock_letter(
            lock,
            kind,
            Letter(
                raw, content_type, content_encoding, headers, properties.get("correlation_id"),
                getattr(reply_to, "name", reply_to),
            ),
        )  # fmt: skip

    def _publish(
        self, body: Any, priority: Any, content_type: Any, content_encoding: Any, headers: Any, properties: Any,
        routing_key: Any, mandatory: Any, immediate: Any, exchange: Any, declare: Any, timeout: Any = None,
        confirm_timeout: Any = None, retry: bool = False, retry_policy: Any = None,
    ) -> Any:  # fmt: skip
        if self.lock is not None and self.signing:
            letter = self._locked(self.lock, body, content_type, content_encoding, headers, properties, exchange)
            if letter is not None:
                body, content_type, content_encoding, headers = letter[:4]
        connection: Any = self.connection  # one of ours, or somebody else's
        if (
            not (self.window or (self.confirming and confirm_timeout is not None))
            or not hasattr(connection, "confirms")  # somebody else's connection
            # elsewhere a publish is one command whose answer is awaited: nothing more to confirm
            or connection.transport.driver_type != "amqp"
        ):
            return super()._publish(
                body, priority, content_type, content_encoding, headers, properties, routing_key, mandatory,
                immediate, exchange, declare, timeout, None if self.confirming else confirm_timeout, retry,
                retry_policy,
            )  # fmt: skip

        def once() -> int:
            for entity in declare or ():
                self.maybe_declare(entity, retry=retry, **(retry_policy or {}))
            confirms = connection.confirms()
            message = confirms.channel.prepare_message(
                body, priority, content_type, content_encoding, headers, properties
            )
            tag: int = confirms.publish(message, exchange=exchange, routing_key=routing_key)
            confirms.settle(at_most=self.window, timeout=confirm_timeout)
            return tag

        def write() -> int:
            try:
                return once()
            except NotConfirmed as error:
                # what was declared may be gone from the server
                connection._forget_declared()
                if error.may_have_arrived or self.window or not declare:
                    raise
                return once()

        if self.held is not None:
            self.held.append(write)
            return None
        return write()


class PoolClosed(RuntimeError, OperationalError):
    """The pool was closed by another thread; kombu raises a ``RuntimeError``, which no sender knows."""


def turn_away(pool: Any) -> None:
    """Tell each thread that waits in a pool that has been closed; kombu looks at that before it waits only.

    Args:
        pool: of kombu. What makes its next resource raises, and stays for the next who waits.
    """

    def closed() -> None:
        raise PoolClosed("Acquire on closed pool")

    pool._resource.put_nowait(lazy(closed))


class BridgeProducerPool(ProducerPool):
    """Producers of one app over its own connections."""

    def __init__(self, connections: Any, limit: int | None, producer: type[Producer]) -> None:
        super().__init__(connections, limit=limit, Producer=producer)

    def _acquire_connection(self) -> Any:
        return self.connections.acquire(block=True, timeout=bounded(None))
