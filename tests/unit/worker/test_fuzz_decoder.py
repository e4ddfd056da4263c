"""What does a worker do with a message before it runs anything? Reads it, or says what is wrong; nothing else, ever.

A few hundred messages; ``nox -s fuzz`` makes it a million.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import InvalidTaskError
from kombu.exceptions import DecodeError
from kombu.transport.virtual import Message
from tests.fuzz.messages import Generated, generate

from qbridge import ArgumentsError, PayloadError
from qbridge.serialization.keys import new_key, read_key
from qbridge.serialization.limits import BoundedMessage
from qbridge.serialization.lock import Lock
from qbridge.serialization.locked_messages import Letter, lock_letter
from qbridge.serialization.refused import MessageRefused
from qbridge.serialization.signature import Signature
from qbridge.worker.screening import fault_of
from qbridge.worker.strategy import _plain_body
from qbridge.worker.unlocking import unlock

COUNT = int(os.environ.get("QBRIDGE_TEST_FUZZ_DECODED", "400"))
REFUSALS = (MessageRefused, InvalidTaskError, DecodeError, ArgumentsError, PayloadError)
LIMIT = 100_000


class _Message(Message, BoundedMessage):
    pass


CHANNEL = SimpleNamespace(
    decode_body=lambda body, _: body, connection=SimpleNamespace(client=SimpleNamespace(max_payload_bytes=LIMIT))
)


def echo(word: str, times: int = 1) -> str:
    """The task that would be called."""
    return word * times


def outcome(generated: Generated, lock: Lock | None, signature: Signature) -> str:
    """Go the way of a message up to the call."""
    made: Any = _Message(
        {
            "body": generated.body,
            "headers": generated.headers,
            "content-type": generated.content_type,
            "content-encoding": generated.content_encoding,
            "properties": {"delivery_tag": "1", "correlation_id": "1"},
        },
        channel=CHANNEL,
    )
    if made.errors:
        return "undecodable"
    try:
        unlock(made, lock, LIMIT)
        fault = fault_of(made.headers)
        if fault is not None:
            raise InvalidTaskError(fault)
        if made.content_type != "application/json":
            return "other type"
        args, kwargs, _ = _plain_body(made)
        signature.decode_call(args, kwargs)
    except REFUSALS as error:
        return getattr(error, "reason", type(error).__name__)
    return "called"


@pytest.mark.parametrize("locked", [False, True], ids=["open", "locked"])
def test_a_message_is_read_or_refused(locked: bool) -> None:
    """No other error, and with keys nothing is called that was touched."""
    headers: dict[str, Any] = {
        "task": "echo", "id": "1", "lang": "py", "retries": 0, "timelimit": [None, None], "eta": None, "expires": None,
        "root_id": "1", "parent_id": None, "group": None, "argsrepr": "()", "kwargsrepr": "{}", "stamps": {},
        "stamped_headers": None, "origin": "here", "ignore_result": False, "replaced_task_nesting": 0, "shadow": None,
    }  # fmt: skip
    embedded = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    body = json.dumps([["ok"], {"times": 2}, embedded]).encode()
    lock = Lock([read_key(new_key("a"))]) if locked else None
    if lock is not None:
        headers = dict(lock_letter(lock, "task", Letter(body, "application/json", "utf-8", headers, "1")).headers)
    signature = Signature(echo, "echo")
    seen: Counter[str] = Counter()
    for generated in itertools.islice(generate(20261125, headers, body), COUNT):
        told = outcome(generated, lock, signature)
        seen[told] += 1
        if generated.untouched:
            assert told == "called"
    print(sorted(seen.items()))
    assert sum(seen.values()) == COUNT
    assert seen["called"] > COUNT / 20
