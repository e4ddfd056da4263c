"""How a message is published so that the broker is known to have it: confirms, returns, a window for bulk.

py-amqp's own ``confirm_publish`` waits for *any* acknowledgement of the channel, which is the wrong one as soon as an
event or a control message shares the channel, and it has no window: a round trip per message. Here confirmed messages
have a channel of their own, on which every delivery tag is accounted for.
Protocol: RabbitMQ's "Consumer Acknowledgements and Publisher Confirms" (tags count from 1 per channel; ``multiple``
settles all up to the tag; an unroutable ``mandatory`` message is returned before its acknowledgement).
"""

from __future__ import annotations

import time
from typing import Any

from kombu.exceptions import OperationalError

from qbridge.backends.deadline import bounded

__all__ = ["ConfirmChannel", "NotConfirmed"]


class NotConfirmed(OperationalError):
    """The broker refused a message, could not route it, or did not confirm it in time."""

    def __init__(
        self, reason: str, may_have_arrived: bool, tags: frozenset[int] = frozenset(), *, unroutable: bool = False
    ) -> None:
        super().__init__(reason)
        self.may_have_arrived = may_have_arrived
        self.tags = tags
        self.unroutable = unroutable


class ConfirmChannel:
    """A channel in confirm mode and the state of every message sent on it.

    Args:
        connection: an open py-amqp connection.
    """

    def __init__(self, connection: Any) -> None:
        self.amqp = connection
        self.channel: Any = connection.channel()
        self.channel.confirm_select()
        self.channel.events["basic_ack"].add(self._on_ack)
        self.channel.events["basic_nack"].add(self._on_nack)
        self.channel.events["basic_return"].add(self._on_return)
        self.pending: set[int] = set()
        self.refused: set[int] = set()
        #: Tag to reason of messages that no queue took; acknowledged all the same.
        self.returned: dict[int, str] = {}
        self._tags: dict[str, int] = {}
        self.next_tag: int = 1

    @property
    def usable(self) -> bool:
        """False once the channel or its connection is closed."""
        return bool(self.channel.connection is not None and self.channel.is_open and self.amqp.connected)

    def publish(self, message: Any, **where: Any) -> int:
        """Send one message without waiting; return its delivery tag."""
        tag, self.next_tag = self.next_tag, self.next_tag + 1
        self.pending.add(tag)
        self._tags[_identity(message)] = tag
        try:
            # the name without underscore is replaced by py-amqp's own confirming version on some connections
            # a plain connection bounds each write by itself
            timeout = None if getattr(self.amqp, "plain", False) else bounded(None)
            self.channel._basic_publish(message, mandatory=True, timeout=timeout, **where)
        except BaseException:
            # A part of a frame may have been written: whatever follows on this connection would be read as its rest.
            self.amqp.collect()
            raise
        return tag

    def settle(self, at_most: int = 0, timeout: float | None = None) -> None:
        """Wait until no more than ``at_most`` messages are unconfirmed.

        Raises:
            NotConfirmed: if a message was refused or returned, or if time ran out.
        """
        end = None if timeout is None else time.monotonic() + timeout
        # a returned message is acknowledged right behind its return: read on, so that no tag is left for the next call
        while len(self.pending) > at_most:
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                self.amqp.drain_events(timeout=bounded(left))
            except TimeoutError:
                unconfirmed = frozenset(self.pending)
                # answers that come late would be taken for those to the next messages
                self.amqp.collect()
                raise NotConfirmed(f"{len(unconfirmed)} message(s) not confirmed in time", True, unconfirmed) from None
            except Exception as error:
                error.__dict__["may_have_arrived"] = True  # the connection broke, and the answer was lost with it
                raise
        if self.returned:
            returned, self.returned = self.returned, {}
            reason = next(iter(returned.values()))
            text = f"{len(returned)} message(s) could not be routed: {reason}"
            raise NotConfirmed(text, False, frozenset(returned), unroutable=True)
        if self.refused:
            tags, self.refused = frozenset(self.refused), set()
            raise NotConfirmed(f"{len(tags)} message(s) refused by the broker (basic.nack)", False, tags)

    def _on_ack(self, delivery_tag: int, multiple: bool) -> None:
        self._settled(delivery_tag, multiple)

    def _on_nack(self, delivery_tag: int, multiple: bool) -> None:
        self.refused |= self._settled(delivery_tag, multiple)

    def _settled(self, delivery_tag: int, multiple: bool) -> set[int]:
        tags = {tag for tag in self.pending if tag <= delivery_tag} if multiple else {delivery_tag} & self.pending
        self.pending -= tags
        if not self.pending:
            self._tags.clear()
        return tags

    def _on_return(self, error: Exception, exchange: str, routing_key: str, message: Any) -> None:
        # It has no tag of its own, but comes before the acknowledgement that has.
        tag = self._tags.get(_identity(message), 0)
        self.returned[tag] = f"exchange {exchange!r}, routing key {routing_key!r}: {error}"


def _identity(message: Any) -> str:
    return str(message.properties.get("correlation_id") or message.properties.get("message_id"))
