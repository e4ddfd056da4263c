"""How the Redis broker is spoken to under ``defaults="safe"``: kombu's transport with three differences.

Priorities in our order. kombu keeps one list per priority step and reads them lowest number first, so nothing can come
before the list that carries a queue's own name (step 0) and with it all unmarked messages. Read in the order
9, 0, 3, 6, step 9 is *high*, step 0 *normal*, step 3 *low*: unmarked messages stay in the plain list, where ``LLEN``
and autoscalers look for them, and a plain Celery worker still consumes every list.

Anybody can push anything on a list. What is no message at all ends kombu's event loop, and with it the worker; here it
is thrown away with an error in the log.

Whether a message may have arrived although the sending failed, the error says.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

__all__ = ["CONSUME_ORDER", "derive"]

logger: logging.Logger = logging.getLogger(__name__)

CONSUME_ORDER = (9, 0, 3, 6)

# redis-py's; an answer, even a refusal, is another class
_NO_ANSWER = ("ConnectionError", "TimeoutError")

_FAULTS = (LookupError, TypeError, ValueError, AttributeError, RecursionError)


class _OurChannel:
    """Mixin for kombu's Redis channels."""

    priority_steps = CONSUME_ORDER

    #: The item being read has become a message, and what happens from now on is its consumer's business.
    _handed_over = False

    def priority(self, number: int) -> int:
        """Return the step of a priority number: the largest that is not above it (kombu bisects its own order)."""
        return max((step for step in self.priority_steps if step <= number), default=0)

    def _put(self, queue: str, message: Any, **options: Any) -> None:
        """Push one message; an error of a command that was written says that the message may have arrived.

        A frozen Redis reads it from its socket once it goes on, long after the sender has given up.
        """
        try:
            super()._put(queue, message, **options)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # kombu's
        except Exception as error:
            if type(error).__name__ in _NO_ANSWER and "connecting to" not in str(error):
                error.__dict__["may_have_arrived"] = True  # read by those who send
            raise

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, *args: Any, **kwargs: Any) -> Any:
        """Consume a queue; items that are no messages do not reach the callback."""
        channel: Any = self
        consuming = super().basic_consume(queue, no_ack, callback, *args, **kwargs)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # kombu's

        def deliver(item: Any) -> Any:
            try:
                message = channel.Message(_envelope(item, queue), channel=channel)
                if not no_ack:
                    channel.qos.append(message, message.delivery_tag)
            except _FAULTS as error:
                _thrown_away(queue, error)
                return None
            channel._handed_over = True
            return callback(message)

        if queue in channel.connection._callbacks:
            channel.connection._callbacks[queue] = deliver
        return consuming

    def _brpop_read(self, **options: Any) -> Any:
        self._handed_over = False
        try:
            return super()._brpop_read(**options)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # kombu's
        except (ValueError, RecursionError) as error:
            if self._handed_over:
                raise
            _thrown_away("", error)
            return True

    def _get(self, queue: str, *args: Any) -> Any:
        while True:
            try:
                return _envelope(super()._get(queue, *args), queue)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # kombu's
            except _FAULTS as error:
                _thrown_away(queue, error)


def _envelope(item: Any, queue: str) -> dict[str, Any]:
    """Return what kombu put on the list, with what it needs.

    Raises:
        TypeError, KeyError: if nothing of kombu's put it there.
    """
    properties = item["properties"]
    if not isinstance(properties["delivery_tag"], str):
        raise TypeError("its delivery_tag is not a text")
    properties.setdefault("delivery_info", {"exchange": "", "routing_key": queue})
    if not {"exchange", "routing_key"} <= properties["delivery_info"].keys():
        raise KeyError("exchange, routing_key")
    found: dict[str, Any] = item
    return found


def _thrown_away(queue: str, error: Exception) -> None:
    logger.error(
        "Threw away an item of %s that is no message of kombu's (%s). Only Celery and kombu may push on its lists.",
        f"the Redis queue {queue!r}" if queue else "a Redis queue",
        type(error).__name__,
    )


@cache
def derive(transport: type[Any]) -> type[Any]:
    """Return a subclass of one of kombu's Redis transports (plain, TLS, socket, Sentinel) with our channel."""
    channel = type("Channel", (_OurChannel, transport.Channel), {"__doc__": transport.Channel.__doc__})
    return type(transport.__name__, (transport,), {"Channel": channel, "__doc__": transport.__doc__})
