"""Which headers of a message can be kept with its dead letter? Those that no writer of it chokes on.

A client reads a table of a thousand levels and cannot write it; RabbitMQ closes the connection over which a table comes
that is larger than its frame. A message whose copy cannot be written would keep its place in a worker for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qbridge.serialization.header_limits import MAX_HEADER_OCTETS, field_octets

__all__ = ["HEADER_CUT", "keepable"]

HEADER_CUT = "qbridge_cut"
"""Header of a dead letter: names of the headers that it had and that could not be kept, with commas between them."""

_LONGEST_NAMES = 1_000


def keepable(headers: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the headers as they are, or without those that are too large or too deep, and with their names.

    Args:
        headers: of a message that is given up.
    """
    weights = {name: field_octets(name, value) for name, value in headers.items()}
    whole = sum(MAX_HEADER_OCTETS + 1 if weight is None else weight for weight in weights.values())
    if whole <= MAX_HEADER_OCTETS:
        return headers
    kept: dict[str, Any] = {}
    room = MAX_HEADER_OCTETS // 2
    for name, weight in sorted(weights.items(), key=lambda pair: pair[1] or 0):
        if weight is not None and weight <= room:
            room -= weight
            kept[name] = headers[name]
    cut = ", ".join(str(name) for name in headers if name not in kept)
    return {**{name: headers[name] for name in headers if name in kept}, HEADER_CUT: cut[:_LONGEST_NAMES]}
