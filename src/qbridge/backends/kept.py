"""What lies in a queue of dead letters, and what can be done with one of them while the others stay as they are?

Each broker's room has its own ``KeptQueue``: looking must neither change the order nor count as a delivery.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["InUse", "Kept", "KeptQueue"]


class InUse(Exception):
    """Somebody else looks at the queue, and has not finished in time."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One message as it lies there.

    Args:
        place: by which its queue finds it again; every room has its own.
        body: as it was sent.
        headers: of the message.
        properties: the rest, by kombu's names: ``content_type``, ``content_encoding``, ``correlation_id`` …
    """

    place: Any
    body: bytes
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]


class KeptQueue(Protocol):
    """One queue of kept messages, open for a while."""

    def look(self) -> Iterator[Kept]:
        """Yield what is there now, oldest first; what arrives meanwhile may be left out."""
        ...

    def discard(self, kept: Kept) -> bool:
        """Delete a message; False if it is not there any more."""
        ...

    def send(self, kept: Kept, queue: str, headers: Mapping[str, Any], properties: Mapping[str, Any]) -> bool:
        """Move a message to the end of another queue; it leaves this one once the broker has it there.

        Args:
            kept: what to move; its body is not touched.
            queue: where it goes.
            headers: of the message there.
            properties: likewise; ``priority`` is an AMQP number or None.

        Returns:
            False if it is not there any more; then nothing was sent.
        """
        ...
