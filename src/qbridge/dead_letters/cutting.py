"""Which headers of a message can be kept with its dead letter? Those that no writer of it chokes on.

A client reads a table of a thousand levels and cannot write it; RabbitMQ closes the connection over which a table comes
that is larger than its frame. A message whose copy cannot be written would keep its place in a worker for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qbridge.dead_letters.letter import HEADER_DEAD_LETTER
from qbridge.options import CELERY_HEADERS
from qbridge.serialization.header_limits import field_octets

__all__ = ["HEADER_CUT", "KEPT_OCTETS", "with_record"]

HEADER_CUT = "qbridge_cut"
"""Header of a dead letter: names of the headers that it had and that could not be kept, with commas between them."""

KEPT_OCTETS = 80_000
"""Octets of the headers that are kept: more than any worker takes, with a signature.

A frame has 131,072. Of these 45,000 are the record's, 4,000 those of the names that were cut, and 2,000 are for all
else that stands in it: seven properties of up to 256 octets, and numbers.
"""

_LONGEST_NAMES = 1_000  # characters, of up to four octets


def with_record(headers: Mapping[str, Any], record: str) -> dict[str, Any]:
    """Return the headers of a dead letter: those that the message had, but for what is too large or too deep.

    What was cut is named. One that lay in the place of the record is replaced.

    Args:
        headers: of a message that is given up.
        record: why it is given up.
    """
    kept = {name: value for name, value in headers.items() if name != HEADER_DEAD_LETTER}
    return {**_keepable(kept), HEADER_DEAD_LETTER: record}


def _keepable(headers: dict[str, Any]) -> dict[str, Any]:
    weights = {name: field_octets(name, value) for name, value in headers.items()}
    if sum(KEPT_OCTETS + 1 if weight is None else weight for weight in weights.values()) <= KEPT_OCTETS:
        return headers
    kept: set[str] = set()
    room = KEPT_OCTETS // 2
    # those first that say what it is
    for name, weight in sorted(weights.items(), key=lambda pair: (pair[0] not in CELERY_HEADERS, pair[1] or 0)):
        if weight is not None and weight <= room:
            room -= weight
            kept.add(name)
    cut = ", ".join(str(name) for name in headers if name not in kept)
    return {**{name: headers[name] for name in headers if name in kept}, HEADER_CUT: cut[:_LONGEST_NAMES]}
