"""How much may the headers of a message be? Counted as RabbitMQ's clients write them, for one frame has to hold them.

A sender may use less than a worker takes: on the way brokers add headers (RabbitMQ one entry for each queue in which a
message has waited), and so do workers, for the next attempt. So what a sender may send no worker refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

__all__ = [
    "MAX_DEPTH", "MAX_HEADERS", "MAX_HEADER_OCTETS", "SENT_HEADERS", "SENT_HEADER_OCTETS", "field_octets",
    "header_fault", "is_deeper", "text_octets",
]  # fmt: skip

MAX_DEPTH = 200
"""Lists and mappings within one another in a JSON body, and in headers."""

MAX_HEADERS = 200
"""Headers of one message, at a worker."""

MAX_HEADER_OCTETS = 60_000
"""Octets of all headers, at a worker: a frame of RabbitMQ has 131,072, and a dead letter needs room for its record."""

SENT_HEADERS = 180
"""Headers of one message, at its sender."""

SENT_HEADER_OCTETS = 45_000
"""Octets of all headers, at their sender: a delay adds up to 28 entries of about 200 octets, with the queue's name."""

_VALUE = 9
"""Octets of a number with its type; of ``None``, a switch and what stands before a text or a list there are fewer."""
_FIELD = 1 + _VALUE
"""The same with what stands before the name of a header."""
_WIDEST = 4
"""Octets of a character, at most."""
_CONTAINERS = (dict, list, tuple)
_PLAIN: frozenset[Any] = frozenset({int, bool, float, type(None)})


def header_fault(headers: Mapping[str, Any], most: int = MAX_HEADERS, octets: int = MAX_HEADER_OCTETS) -> str | None:
    """Return what is too much in the headers of a message; None: nothing is.

    Args:
        headers: all of them.
        most: how many there may be.
        octets: how many all of them may have.
    """
    if len(headers) > most:
        return f"it has {len(headers):,} headers, the limit is {most}"
    # counted in characters at first: nearly all headers are small
    try:
        whole = _FIELD * len(headers) + len("".join(headers))
    except TypeError:  # names that are no text: somebody else's message
        whole = _FIELD * len(headers) + sum(map(len, map(str, headers)))
    for value in headers.values():
        kind = value.__class__
        if kind is str or kind is bytes:
            whole += len(value)
        elif kind is list and _PLAIN.issuperset(map(type, value)):  # ``timelimit``, in every task
            whole += _VALUE * len(value)
        elif kind not in _PLAIN and value:
            weight = _weight(value)
            if weight is None:
                return f"a header has more than {MAX_DEPTH} levels"
            whole += weight
    if whole * _WIDEST > octets:
        whole = sum(field_octets(name, value) or 0 for name, value in headers.items())
        if whole > octets:
            return f"its headers have {whole:,} octets, the limit is {octets:,}"
    return None


def field_octets(name: Any, value: Any) -> int | None:
    """Return how many octets a header has at most, with its name.

    Args:
        name: text; octets where a client could not read it as text.
        value: of the header.

    Returns:
        None if it has more levels than it may have.
    """
    weight = _weight(value)
    return None if weight is None else _FIELD + text_octets(str(name)) + weight


def text_octets(text: str) -> int:
    """Return how many octets a text has on the wire."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def is_deeper(value: Any, levels: int) -> bool:
    """Tell whether there are more lists and mappings within one another than these."""
    return next(islice(_levels(value), levels, None), None) is not None


def _weight(value: Any) -> int | None:
    """Return the octets beyond those of a number; None: it has too many levels."""
    if isinstance(value, str):
        return text_octets(value)
    if isinstance(value, bytes):
        return len(value)
    octets = 0
    for number, level in enumerate(_levels(value)):
        if number == MAX_DEPTH:
            return None
        for one in level:
            octets += _VALUE * len(one)
            parts = one
            if isinstance(one, dict):
                octets += len(one) + sum(map(text_octets, map(str, one)))
                parts = one.values()
            for part in parts:
                if isinstance(part, str):
                    octets += text_octets(part)
                elif isinstance(part, bytes):
                    octets += len(part)
    return octets


def _levels(value: Any) -> Iterator[list[Any]]:
    """Yield the lists and mappings of each level, without recursion."""
    level = [value] if isinstance(value, _CONTAINERS) else []
    while level:
        yield level
        level = [
            part
            for one in level
            for part in (one.values() if isinstance(one, dict) else one)
            if isinstance(part, _CONTAINERS)
        ]
