"""Messages that nobody means: one that a producer makes, and then something is done to it, from a seed."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Generated", "generate"]

USUAL = ("application/json", "utf-8")
TYPES = [
    "application/json", "application/x-msgpack", "application/x-python-serialize", "application/data", "text/plain",
    "application/x-yaml", "application/x-qbridge-encrypted", "", "é", "application/json; charset=latin-1",
]  # fmt: skip
ENCODINGS = ["utf-8", "binary", "latin-1", "utf-16", "rot13", "", "no-such-thing", "utf-8\x00"]
TEXTS = ["", "\x00", "é" * 50, "a" * 3000, "None", "[]", "__type__", "../..", "\u202e", "1e999", "x:" * 40]
NUMBERS = [0, -1, 1, 2**31, -(2**63), 2**62, 0.5, -0.0, 1e300]


@dataclass(frozen=True)
class Generated:
    """One message as it is published."""

    headers: dict[str, Any]
    body: bytes
    content_type: str
    content_encoding: str
    untouched: bool


def junk(rng: random.Random, depth: int = 3) -> Any:
    """A value that AMQP and JSON can carry."""
    kind = rng.randrange(8 if depth else 5)
    if kind < 2:
        return rng.choice(TEXTS)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind == 4:
        return rng.choice([None, True, False])
    if kind < 7:
        return [junk(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {f"k{number}": junk(rng, depth - 1) for number in range(rng.randrange(4))}


def _nested(levels: int) -> Any:
    value: Any = "x"
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def _headers(rng: random.Random, headers: dict[str, Any]) -> None:
    way = rng.randrange(6)
    name = rng.choice(list(headers))
    if way == 0:
        del headers[name]
    elif way == 1 and name not in ("eta", "expires"):  # a moment to come would only be waited for
        headers[name] = junk(rng)
    elif way == 2:
        added = ["x-delivery-count", "compression", "qbridge_signature", "qbridge_deadline", "new", "é"]
        headers[rng.choice(added)] = junk(rng)
    elif way == 3 and name != "x-delivery-count":  # the broker's word, which is no part of what counts as touched
        headers[name] = _nested(rng.choice([5, 100, 199, 200, 201, 250]))
    elif way == 4:
        headers.update({f"h{number}": number for number in range(rng.choice([10, 190, 300]))})
    elif isinstance(headers[name], str):
        headers[name] = headers[name][: rng.randrange(len(headers[name]) + 1)]


def _body(rng: random.Random, body: bytes, headers: dict[str, Any]) -> bytes:
    way = rng.randrange(8)
    if way == 0:
        return body[: rng.randrange(len(body))]
    if way == 1:
        changed = bytearray(body)
        for _ in range(rng.randrange(1, 5)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if way == 2:
        return rng.randbytes(rng.randrange(200))
    if way == 3:
        return json.dumps(junk(rng)).encode()
    if way == 4:
        levels = rng.choice([50, 201, 3000, 20_000])
        return rng.choice([b"[" * levels, b"[" * levels + b"]" * levels, b'{"a":' * levels])
    if way == 5:
        headers["compression"] = rng.choice(["gzip", "bzip2", "application/x-lzma", "application/x-brotli", "none"])
        return rng.choice([zlib.compress(body), zlib.compress(bytes(3_000_000)), zlib.compress(body)[:-4], body])
    if way == 6:
        return json.dumps([[junk(rng)], {"word": junk(rng)}, junk(rng)]).encode()
    return json.dumps([["ok"], {}, {rng.choice(["callbacks", "errbacks", "chain", "chord"]): junk(rng)}]).encode()


def _told(headers: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in headers.items() if name != "x-delivery-count"}, sort_keys=True)


def generate(seed: int, headers: dict[str, Any], body: bytes) -> Iterator[Generated]:
    """Yield messages without end, the same for a seed.

    Args:
        seed: of all that happens by chance.
        headers: of a message that a producer has made.
        body: of the same.
    """
    rng = random.Random(seed)
    number = 0
    while True:
        number += 1
        changed, new = dict(headers), body
        content_type, encoding = USUAL
        changes = rng.choice([0, 1, 1, 1, 2, 4])
        if "id" in changed and changed.get("qbridge_signature") is None:
            changed["id"] = f"fuzz-{seed}-{number}"
        usual = _told(changed)
        for _ in range(changes):
            what = rng.randrange(8)
            if what < 4 and changed:
                _headers(rng, changed)
            elif what < 6 and new:
                new = _body(rng, new, changed)
            elif what == 6:
                content_type = rng.choice(TYPES)
            else:
                encoding = rng.choice(ENCODINGS)
        same = _told(changed) == usual and (new, content_type, encoding) == (body, *USUAL)
        yield Generated(changed, new, content_type, encoding, same)
