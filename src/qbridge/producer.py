"""How is one message published: declared once, confirmed, and refused if it is too large."""

from __future__ import annotations

from typing import Any

from kombu.messaging import Producer
from kombu.pools import ProducerPool

from qbridge.backends.deadline import bounded
from qbridge.backends.rabbitmq.publisher import NotConfirmed
from qbridge.exceptions import PayloadError

__all__ = ["BridgeProducer", "BridgeProducerPool"]


class BridgeProducer(Producer):
    """A producer that can confirm a message, and refuses one that is too large."""

    #: Largest body of a message in bytes; None: no limit.
    max_payload_bytes: int | None = None

    #: Whether ``confirm_timeout`` means our confirms; False: what it means to kombu.
    confirming = False

    #: Unconfirmed messages that a bulk submission may have under way, which is always confirmed; 0: none is under way.
    window = 0

    def maybe_declare(self, entity: Any, retry: bool = False, **retry_policy: Any) -> Any:
        """Declare a queue or exchange unless this connection has done so.

        To find out, kombu copies the queue, its exchange and its bindings at every send: a twelfth of its time.
        """
        declared = getattr(self.connection, "declared_entities", None)
        if declared and entity and entity.can_cache_declaration and hash(entity) in declared:
            return False
        return super().maybe_declare(entity, retry, **retry_policy)

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

        try:
            return once()
        except NotConfirmed as error:
            # what was declared may be gone from the server
            connection._forget_declared()
            if error.may_have_arrived or self.window or not declare:
                raise
            return once()


class BridgeProducerPool(ProducerPool):
    """Producers of one app over its own connections."""

    def __init__(self, connections: Any, limit: int | None, producer: type[Producer]) -> None:
        super().__init__(connections, limit=limit, Producer=producer)

    def _acquire_connection(self) -> Any:
        return self.connections.acquire(block=True, timeout=bounded(None))
