"""How much may a message make a worker do before it is known to be one? Bounds that cost nothing to keep.

A compressed body may claim to be a gigabyte, a nested one may take the interpreter's stack. What is refused here goes
to the dead letters as it came.
"""

from __future__ import annotations

import bz2
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from kombu.compression import get_decoder, get_encoder
from kombu.message import Message

from qbridge.serialization.refused import MessageRefused

__all__ = [
    "MAX_DEPTH", "MAX_HEADERS", "MAX_HEADER_OCTETS", "BoundedMessage", "decompressed", "header_octets", "refuse_excess",
]  # fmt: skip

MAX_DEPTH = 200
"""Lists and mappings within one another in a JSON body, and in headers."""

MAX_HEADERS = 200
"""Headers of one message."""

MAX_HEADER_OCTETS = 60_000
"""Octets of all headers: RabbitMQ's frame takes 131,072, and a dead letter needs room for its record."""

_OCTETS = 9
"""Octets of a number with its type, or of what stands before a text or a list; some are smaller."""
_WIDEST = 4
"""Octets of a character, at most."""
_CONTAINERS: frozenset[Any] = frozenset({dict, list, tuple})  # exact types: what comes from JSON and AMQP has no others
# One that does not end goes to the end of the body: what is tried again at each quotation mark takes hours.
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ALIKE = bytes.maketrans(b"{}", b"[]")


def refuse_excess(message: Any, max_bytes: int | None) -> None:
    """Refuse a message that is larger, or deeper, than any that is meant.

    Args:
        message: kombu's, decompressed and not decoded.
        max_bytes: for its body; None: nobody has set a limit.

    Raises:
        MessageRefused: naming the limit.
    """
    body, headers = message.body, message.headers
    if max_bytes is not None and body is not None and len(body) > max_bytes:
        raise MessageRefused(
            "too_large", f"its body has {len(body):,} bytes, serialization.max_payload_bytes is {max_bytes:,}"
        )
    if headers.__class__ is dict:
        if len(headers) > MAX_HEADERS:
            raise MessageRefused("too_large", f"it has {len(headers):,} headers, the limit is {MAX_HEADERS}")
        octets = sum(map(len, headers))
        for value in headers.values():
            kind = value.__class__
            if kind is str or kind is bytes:
                octets += len(value)
            elif kind in _CONTAINERS and value:
                weight = _octets_within(value)
                if weight is None:
                    raise MessageRefused("too_large", f"a header has more than {MAX_DEPTH} levels")
                octets += weight
        if octets * _WIDEST > MAX_HEADER_OCTETS:  # counted in characters up to here: nearly all headers are small
            octets = sum(len(name) + (header_octets(value) or 0) for name, value in headers.items())
            if octets > MAX_HEADER_OCTETS:
                raise MessageRefused(
                    "too_large", f"its headers have {octets:,} octets, the limit is {MAX_HEADER_OCTETS:,}"
                )
    if message.content_type == "application/json" and body and _depth_exceeds(body, MAX_DEPTH):
        raise MessageRefused("too_large", f"its body has more than {MAX_DEPTH} levels")


def header_octets(value: Any) -> int | None:
    """Return about how many octets a header has.

    Args:
        value: of the header.

    Returns:
        None if it has more levels than it may have.
    """
    kind = value.__class__
    if kind is str:
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if kind in _CONTAINERS:
        return _octets_within(value)
    return len(value) if kind is bytes else 0


def _octets_within(value: Any) -> int | None:
    """Count level by level, without recursion."""
    level, octets = [value], 0
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for one in level:
            if one.__class__ is dict:
                octets += sum(map(len, map(str, one)))
                one = one.values()
            octets += _OCTETS * len(one)
            for part in one:
                kind = part.__class__
                if kind in _CONTAINERS:
                    below.append(part)
                elif kind is str or kind is bytes:
                    octets += header_octets(part) or 0
        if not below:
            return octets
        level = below
    return None


def _depth_exceeds(body: Any, limit: int) -> bool:
    text = body.encode("utf-8", "replace") if isinstance(body, str) else bytes(body)
    if text.count(b"[") + text.count(b"{") <= limit:
        return False  # nearly all: two looks at the memory
    brackets = _STRINGS.sub(b"", text).translate(_ALIKE, _NOT_BRACKETS)
    for _ in range(limit):
        # each turn takes away the innermost level of everything
        brackets = brackets.replace(b"[]", b"")
        if not brackets:
            return False
    # what has not gone is too deep; or it is no JSON, which its decoder says unless that would get lost in it
    return b"[]" in brackets or brackets.count(b"[") > limit


# -- what is compressed


def decompressed(body: Any, compression: str, max_bytes: int | None) -> bytes:
    """Return what was compressed, as long as it is not too large.

    Args:
        body: as it came.
        compression: kombu's name of the method.
        max_bytes: after which it ends; None: nobody has set a limit.

    Raises:
        MessageRefused: if it is larger; no more of it is made than the limit.
        Exception: the library's, if it is not what was compressed.
    """
    data = body.encode("latin-1", "replace") if isinstance(body, str) else bytes(body)
    if max_bytes is None:
        return bytes(get_decoder(compression)(data))
    make = _STREAMS.get(get_encoder(compression)[1])
    if make is None:
        raise MessageRefused("too_large", f"it is compressed with {compression[:40]!r}, whose size cannot be bounded")
    found = make(data, max_bytes + 1)
    if len(found) > max_bytes:
        raise MessageRefused(
            "too_large", f"decompressed, its body has more than {max_bytes:,} bytes (serialization.max_payload_bytes)"
        )
    return found


def _zlib(data: bytes, most: int) -> bytes:
    stream = zlib.decompressobj()
    found = stream.decompress(data, most)
    if len(found) < most and not stream.eof:
        raise zlib.error("incomplete or truncated stream")
    return found


def _bz2(data: bytes, most: int) -> bytes:
    return _whole(bz2.BZ2Decompressor(), data, most)


def _lzma(data: bytes, most: int) -> bytes:
    # a dictionary of gigabytes may be claimed too
    return _whole(lzma.LZMADecompressor(memlimit=64 * 1024 * 1024 + 4 * most), data, most)


def _zstd(data: bytes, most: int) -> bytes:
    # where kombu has it from
    zstd = import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    return _whole(zstd.ZstdDecompressor(), data, most)


def _whole(stream: Any, data: bytes, most: int) -> bytes:
    found = bytes(stream.decompress(data, most))
    if len(found) < most and not stream.eof:
        raise EOFError("the compressed data ends too soon")
    return found


_STREAMS: Mapping[str, Callable[[bytes, int], bytes]] = {
    "application/x-gzip": _zlib,
    "application/x-bz2": _bz2,
    "application/x-lzma": _lzma,
    "application/zstd": _zstd,
}
"""kombu's names, and what ends in time; brotli has nothing that does."""


class BoundedMessage(Message):
    """kombu's message, whose body is not decompressed to any size: put it behind a transport's own class.

    The limit is the connection's ``max_payload_bytes``. What came is kept as ``compressed_body``.
    """

    compressed_body: Any = None

    def __init__(self, body: Any = None, *, headers: Any = None, channel: Any = None, **kwargs: Any) -> None:
        compression = headers.get("compression") if isinstance(headers, Mapping) else None
        if not compression:
            super().__init__(body, headers=headers, channel=channel, **kwargs)
            return
        hidden = {name: value for name, value in headers.items() if name != "compression"}
        super().__init__(body, headers=hidden, channel=channel, **kwargs)
        self.headers: Any = headers
        self.compressed_body = self.body
        client = getattr(getattr(channel, "connection", None), "client", None)
        try:
            self.body: Any = decompressed(self.body, compression, getattr(client, "max_payload_bytes", None))
        except Exception:  # noqa: BLE001 - whatever it is, kombu hands it to the consumer's on_decode_error
            self.errors = [*(self.errors or ()), sys.exc_info()]
