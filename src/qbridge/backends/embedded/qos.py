"""What has a channel in its hands, and has it room for more?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kombu.transport import virtual

if TYPE_CHECKING:
    from qbridge.backends.embedded.channel import Channel
    from qbridge.backends.embedded.staying import Staying
    from qbridge.backends.embedded.transport import Transport

__all__ = ["QoS"]


class QoS(virtual.QoS):
    """The messages that this channel has claimed and not settled, against its prefetch count."""

    def __init__(self, channel: Channel, prefetch_count: int = 0) -> None:
        # Not the base's: its dictionaries, and its restoring at exit, are for transports that lose what they hand out.
        self.channel = channel
        self.prefetch_count: int = prefetch_count or 0
        self._claims: dict[str, tuple[int, int]] = {}
        self._messages: dict[str, Any] = {}
        self._kept: set[str] = set()
        #: Who settles what is kept when the channel is closed: the connection, then what stays of it; None: nothing is.
        self.staying: Staying | Transport | None = None

    def can_consume(self) -> bool:
        return not self.prefetch_count or len(self._claims) < self.prefetch_count

    def can_consume_max_estimate(self) -> int | None:
        return max(self.prefetch_count - len(self._claims), 0) if self.prefetch_count else None

    def append(self, message: Any, delivery_tag: str) -> None:
        id_, deliveries = delivery_tag.split(".")
        self._messages[delivery_tag] = message
        self._claims[delivery_tag] = int(id_), int(deliveries)

    def get(self, delivery_tag: str) -> Any:
        return self._messages[delivery_tag]

    def ack(self, delivery_tag: str) -> None:
        self._settle([delivery_tag], requeue=False)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        self._settle([delivery_tag], requeue=requeue)

    def ack_up_to(self, delivery_tag: str) -> None:
        tags = list(self._claims)
        if delivery_tag in self._claims:
            self._settle(tags[: tags.index(delivery_tag) + 1], requeue=False)

    def restore_unacked(self) -> list[Any]:
        self._settle([tag for tag in self._claims if tag not in self._kept], requeue=True)
        return []

    def keep(self, delivery_tags: Iterable[str]) -> None:
        """Let messages stay claimed when the channel is closed.

        Args:
            delivery_tags: of messages whose tasks run on.
        """
        self._kept = {tag for tag in delivery_tags if tag in self._claims}

    def kept(self) -> list[tuple[int, int]]:
        """What is to outlive the channel, by id and deliveries."""
        return [self._claims[tag] for tag in self._kept if tag in self._claims]

    def restore_unacked_once(self, stderr: Any = None) -> None:
        self.restore_unacked()

    def forget(self) -> None:
        """Drop the list without settling anything: in a forked child, where the claims are the parent's."""
        self._claims.clear()
        self._messages.clear()
        self._kept.clear()

    def _settle(self, tags: list[str], *, requeue: bool) -> None:
        claims = []
        for tag in tags:
            self._messages.pop(tag, None)
            claim = self._claims.pop(tag, None)
            if claim is not None:  # None: from a consumer that does not acknowledge, or settled already
                claims.append(claim)
        if claims and self.channel.connection is not None:  # None: closed, and given back with everything
            self.channel.connection.settle(claims, requeue=requeue)
        elif claims and self.staying is not None:  # but for what is kept
            self.staying.settle(claims, requeue=requeue)
