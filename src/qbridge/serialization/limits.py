"""How much may a message make a worker do before it is known to be one? Bounds that cost nothing to keep.

A compressed body may claim to be a gigabyte, a nested one may take the interpreter's stack. What is refused here goes
to the dead letters as it came.
"""

from __future__ import annotations

import bz2
import lzma
import sys
import zlib
from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import accumulate
from typing import Any

from kombu.compression import get_decoder, get_encoder
from kombu.message import Message

from qbridge.serialization.header_limits import MAX_DEPTH, header_fault
from qbridge.serialization.refused import MessageRefused

__all__ = ["BoundedMessage", "body_fault", "decompressed", "refuse_excess"]

_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
"""One level up, or down: 255 is -1 in octets with a sign."""


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
    fault = header_fault(headers) if headers.__class__ is dict else None
    fault = fault or body_fault(body, message.content_type)
    if fault is not None:
        raise MessageRefused("too_large", fault)


def body_fault(body: Any, content_type: str | None) -> str | None:
    """Return what is too much in a body, but for its size; None: nothing is.

    Args:
        body: decompressed and not decoded.
        content_type: of it.
    """
    if content_type == "application/json" and body and _depth_exceeds(body, MAX_DEPTH):
        return f"its body has more than {MAX_DEPTH} levels"
    return None


def _depth_exceeds(body: Any, limit: int) -> bool:
    text = body.encode("utf-8", "replace") if isinstance(body, str) else bytes(body)
    if text.count(b"[") + text.count(b"{") <= limit:
        return False  # nearly all: two looks at the memory
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")  # what is left of quotation marks are ends of texts
    # A text that does not end goes to the end of the body. No regular expression: it took longer than all of the rest.
    brackets = b"".join(text.split(b'"')[::2]).translate(_STEPS, _NOT_BRACKETS)
    # one pass; where they do not match it is no JSON, and the decoder gets no deeper than that
    return max(accumulate(memoryview(brackets).cast("b")), default=0) > limit


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
