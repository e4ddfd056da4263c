"""Messages as py-amqp would not write them: properties that RabbitMQ passes on and py-amqp cannot read."""

from __future__ import annotations

from struct import pack

import amqp

__all__ = ["TASK", "TEXT", "UNREADABLE", "Raw", "nested", "short", "table"]


class Raw(amqp.Message):
    """A message whose properties are written as they are given."""

    raw = b"\x00\x00"

    def _serialize_properties(self) -> bytes:
        return self.raw


def short(octets: bytes) -> bytes:
    """A short string."""
    return bytes([len(octets)]) + octets


def table(*fields: bytes) -> bytes:
    """A table of fields with their names."""
    return pack(">I", sum(map(len, fields))) + b"".join(fields)


def nested(levels: int) -> bytes:
    """Arrays in arrays."""
    value = b""
    for _ in range(levels):
        value = b"A" + pack(">I", len(value)) + value
    return value


TASK = short(b"task") + b"S" + pack(">I", 4) + b"echo"
TEXT = b"\xff\xfe"
UNREADABLE = {
    "a content type that is no text": b"\x80\x00" + short(TEXT),
    "an encoding that is no text": b"\x40\x00" + short(TEXT),
    "a correlation id that is no text": b"\x04\x00" + short(TEXT),
    "an address of replies that is no text": b"\x02\x00" + short(TEXT),
    "an application that is no text": b"\x00\x08" + short(TEXT),
    "a time in milliseconds": b"\x20\x00" + table(TASK, short(b"at") + b"T" + pack(">Q", 1_764_288_000_000)),
    "a time at the end of time": b"\x20\x00" + table(TASK, short(b"at") + b"T" + b"\xff" * 8),
    "ten thousand levels": b"\x20\x00" + table(TASK, short(b"deep") + nested(10_000)),
}
