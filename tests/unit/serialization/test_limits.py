"""What is larger than meant costs no more than what is not."""

from __future__ import annotations

import bz2
import json
import lzma
import time
import tracemalloc
import zlib
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.transport.virtual import Message

from qbridge.serialization.header_limits import MAX_DEPTH, MAX_HEADER_OCTETS, MAX_HEADERS
from qbridge.serialization.limits import BoundedMessage, decompressed, refuse_excess
from qbridge.serialization.refused import MessageRefused

METHODS = [(zlib.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "application/x-lzma")]


def message(body: Any = b"[[], {}, {}]", headers: Any = None, content_type: str = "application/json") -> Any:
    """As much of a message as is looked at."""
    return SimpleNamespace(body=body, headers=headers or {}, content_type=content_type)


def nested(levels: int) -> Any:
    """Lists within lists."""
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


@pytest.mark.parametrize(("compress", "name"), METHODS)
def test_what_fits_is_decompressed(compress: Any, name: str) -> None:
    """To the last byte of the limit."""
    assert decompressed(compress(b"x" * 1000), name, 1000) == b"x" * 1000
    assert decompressed(compress(b"x" * 1000), name, None) == b"x" * 1000


@pytest.mark.parametrize(("compress", "name"), METHODS)
def test_what_claims_more_is_not_made(compress: Any, name: str) -> None:
    """Twenty megabytes of zeros from some kilobytes: no more memory than the limit, and the library's own."""
    small = compress(bytes(20_000_000))
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(MessageRefused, match="more than 100,000 bytes"):
        decompressed(small, name, 100_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12_000_000  # of which eight are the dictionary of lzma
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(("compress", "name"), METHODS)
def test_what_is_cut_off_is_an_error(compress: Any, name: str) -> None:
    """Not half a message."""
    with pytest.raises((zlib.error, EOFError, lzma.LZMAError, ValueError)):
        decompressed(compress(bytes(range(256)))[:-6], name, 1000)


def test_a_method_that_nobody_knows_is_an_error() -> None:
    """As in kombu."""
    with pytest.raises(KeyError):
        decompressed(b"x", "application/x-unheard-of", 1000)


def test_a_message_keeps_what_came_beside_what_was_made_of_it() -> None:
    """For its signature, and for its dead letter; one that is too large has an error instead."""

    class Mine(Message, BoundedMessage):
        pass

    client = SimpleNamespace(max_payload_bytes=100)
    channel = SimpleNamespace(decode_body=lambda body, _: body, connection=SimpleNamespace(client=client))
    for size, failed in ((100, False), (101, True)):
        payload = {
            "body": zlib.compress(b"x" * size),
            "headers": {"compression": "gzip", "task": "a"},
            "properties": {"delivery_tag": "1"},
        }
        made: Any = Mine(payload, channel=channel)
        assert bool(made.errors) is failed
        assert made.compressed_body == payload["body"]
        assert made.headers == payload["headers"]
        assert failed or made.body == b"x" * 100


@pytest.mark.parametrize(
    ("given_message", "said"),
    [
        (message(b"x" * 1001), "1,001 bytes"),
        (message(headers={str(number): 1 for number in range(MAX_HEADERS + 1)}), "headers"),
        (message(headers={"a": nested(MAX_DEPTH + 1)}), "a header has"),
        (message(headers={"a": {"b": [nested(MAX_DEPTH)]}}), "a header has"),
        (message(headers={"a": "x" * 30_000, "b": ["é" * 15_000]}), "octets"),
        (message(headers={"a": [1] * 10_000}), "octets"),
        (message(headers={"a": b"x" * MAX_HEADER_OCTETS}), "octets"),
        (message(json.dumps(nested(MAX_DEPTH + 1)).encode()), "levels"),
        (message(b"[" * 500), "levels"),
        (message("[" * 500), "levels"),
        (message(memoryview(b'{"a":' * 150)), None),
    ],
)
def test_what_is_too_large_is_refused(given_message: Any, said: str | None) -> None:
    """Bytes, headers, levels; what is no JSON is not for this to say."""
    if said is None:
        refuse_excess(given_message, 1000)
        return
    with pytest.raises(MessageRefused, match=said) as caught:
        refuse_excess(given_message, 1000)
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize(
    "given_message",
    [
        message(json.dumps(nested(MAX_DEPTH)).encode()),
        message(json.dumps(["[" * 1000, '"[\\"[' * 300]).encode()),
        message(json.dumps([{"a": [number]} for number in range(1000)]).encode()),
        message(headers={"a": nested(MAX_DEPTH), "b": [{}] * 1000}),
        message(b"[" * 500, content_type="application/x-msgpack"),
        message(None),
        message(headers=[1, 2]),
    ],
)
def test_what_is_meant_is_not_refused(given_message: Any) -> None:
    """Many brackets are not deep, nor are those in texts."""
    refuse_excess(given_message, None)


@given(
    st.recursive(
        st.text(st.sampled_from('[]{}"\\a'), max_size=9),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(st.sampled_from('[]{}"\\'), max_size=3), inner)
        ),
        max_leaves=40,
    )
)
def test_levels_are_counted_as_json_has_them(value: Any) -> None:
    """Whatever stands in the texts."""

    def levels(part: Any) -> int:
        if isinstance(part, dict | list):
            return 1 + max(map(levels, part.values() if isinstance(part, dict) else part), default=0)
        return 0

    from qbridge.serialization.limits import _depth_exceeds

    text, depth = json.dumps(value).encode(), levels(value)
    assert not _depth_exceeds(text, depth)
    assert depth == 0 or _depth_exceeds(text, depth - 1)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("end", [b"", b"\\", b'"'])
def test_a_text_without_an_end_is_looked_at_once(end: bytes) -> None:
    """Tried again at each of its quotation marks, one of these takes hours; a worker does nothing else meanwhile."""
    body = b"[" * (MAX_DEPTH + 1) + b'"' + b'\\"' * 400_000 + end
    with pytest.raises(MessageRefused, match="levels"):
        refuse_excess(message(body), None)


def test_brackets_in_texts_are_no_levels() -> None:
    """Whatever is escaped in them."""
    refuse_excess(message(json.dumps(['"[[' + "[" * 500 + '\\"', "\\", "[" * 300]).encode()), None)


@pytest.mark.parametrize("end", [b"", b"[" * 201 + b"]" * 201])
def test_a_million_brackets_are_looked_at_once(end: bytes) -> None:
    """A worker does nothing else meanwhile; one look for each of the levels took half a second."""
    body = (b"[" * 190 + b"]" * 190) * 2_700 + end
    began = time.process_time()
    with pytest.raises(MessageRefused, match="levels") if end else nullcontext():
        refuse_excess(message(body), None)
    assert time.process_time() - began < 0.2


@pytest.mark.parametrize("body", [b"]" * 300 + b"[" * 201, b"[" * 150 + b"}" * 300 + b"[" * 150])
def test_what_closes_before_it_opens_is_for_the_decoder(body: bytes) -> None:
    """It is no JSON, and gets nobody any deeper."""
    refuse_excess(message(body), None)
