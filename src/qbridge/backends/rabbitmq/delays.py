"""How does RabbitMQ keep a task until it is due? Celery's native delayed delivery, declared before the first send.

Topology and names are kombu's (``native_delayed_delivery``), so that plain Celery peers share them: 28 exchanges and
queues, one for each bit of the number of seconds, and a delivery exchange that all queues are bound to. Celery leaves
declaring to a worker's start. Until then a delayed message would be refused, and one for a queue that is not bound
would vanish when its time comes.
"""

from __future__ import annotations

from typing import Any

from kombu.entity import Exchange
from kombu.transport.native_delayed_delivery import (
    MAX_LEVEL,
    MAX_NUMBER_OF_BITS_TO_USE,
    bind_queue_to_native_delayed_delivery_exchange,
    calculate_routing_key,
    declare_native_delayed_delivery_exchanges_and_queues,
    level_name,
)

from qbridge.backends.deadline import bounded
from qbridge.exceptions import UnsupportedFeature

__all__ = ["LONGEST", "NativeDelays"]

LONGEST = 2**MAX_NUMBER_OF_BITS_TO_USE - 1
"""Seconds that native delays can count: eight and a half years."""

_NO_GLOBAL_PREFETCH = 4  # from this version on no consumer's prefetch can grow for the tasks that it holds


class NativeDelays:
    """The native delays of one app, on the servers that its pool connects to.

    Args:
        app: the bridge's app.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self._declared: tuple[Any, set[str]] = (None, set())
        self._stalls: tuple[Any, bool] = (None, False)

    @property
    def in_use(self) -> bool:
        """True if the app has a quorum queue: that is how Celery decides."""
        queues = self._app.amqp.queues.values()
        return any((queue.queue_arguments or {}).get("x-queue-type") == "quorum" for queue in queues)

    def prepare(self, seconds: float) -> bool:
        """Get ready for a message that is due in a while.

        Args:
            seconds: from now.

        Returns:
            True if a worker has to hold it: native delays are whole seconds.

        Raises:
            UnsupportedFeature: if the server cannot keep it, and no worker could without harm.
        """
        if not self.in_use:
            if seconds > 0:
                self._refuse_to_stall()
            return False
        if seconds > LONGEST:
            raise UnsupportedFeature(
                f"RabbitMQ cannot keep a task for {seconds:.0f} seconds: its delays end at {LONGEST}",
                "Send it for an earlier time, and let it send itself again.",
            )
        if seconds < 1:
            return True
        self.declare()
        return False

    def route(self, queue: Any, seconds: float) -> tuple[str, str] | None:
        """Return exchange and routing key by which the server keeps a message for a queue, with all of it declared.

        Args:
            queue: where the message is to arrive.
            seconds: from now; whole ones count, and not more than the server can.

        Returns:
            None if no native delays lead to that queue.
        """
        if not self.in_use or not queue.exchange or queue.exchange.type == "direct":
            return None
        self.declare()
        return level_name(MAX_LEVEL), calculate_routing_key(min(max(int(seconds), 1), LONGEST), queue.routing_key)

    def forget(self) -> None:
        """Declare everything again at the next delay: the server may have lost it."""
        self._declared = (None, set())

    def declare(self) -> None:
        """Declare the delays, and bind the queues that are not bound yet."""
        pool, queues = self._app.pool, dict(self._app.amqp.queues)
        known_on, known = self._declared
        if known_on is not pool:
            known = set()
        missing = [queue for name, queue in queues.items() if name not in known]
        if known_on is pool and not missing:
            return
        with pool.acquire(block=True, timeout=bounded(None)) as connection, connection._reraise_as_library_errors():
            if connection.transport.driver_type != "amqp":
                return
            declare_native_delayed_delivery_exchanges_and_queues(
                connection, self._app.conf.broker_native_delayed_delivery_queue_type
            )
            for queue in missing:
                bound = queue.bind(connection.default_channel)
                exchange: Exchange = bound.exchange
                if exchange.type != "direct":
                    bound.declare()
                    bind_queue_to_native_delayed_delivery_exchange(connection, bound)
        self._declared = (pool, known | set(queues))

    def _refuse_to_stall(self) -> None:
        pool = self._app.pool
        if pool.connection.transport.driver_type != "amqp":
            return
        known_on, stalls = self._stalls
        if known_on is not pool:
            with pool.acquire(block=True, timeout=bounded(None)) as connection, connection._reraise_as_library_errors():
                connection.ensure_connection(max_retries=1, timeout=bounded(None))
                stalls = _major(connection) >= _NO_GLOBAL_PREFETCH
            self._stalls = (pool, stalls)
        if stalls:
            raise UnsupportedFeature(
                "a delayed task on a classic queue of RabbitMQ 4 would keep a worker from taking others",
                "Use quorum queues (queue_type='quorum', the default): the server itself keeps their delays.",
            )


def _major(connection: Any) -> int:
    number = str(connection.connection.server_properties.get("version", "")).partition(".")[0]
    return int(number) if number.isdigit() else 0
