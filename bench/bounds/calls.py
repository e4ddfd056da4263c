"""Which calls does a client have, and what is each bounded by?"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from bench.bounds.settings import ANSWER, LOOK, PUBLISH, WAIT
from qbridge import Bridge

__all__ = ["CALLS", "Call", "Subject"]


@dataclass(frozen=True)
class Subject:
    """What a call is made on.

    Args:
        bridge: with one task.
        task: that task.
        result: the handle of a call that nobody has run.
    """

    bridge: Bridge
    task: Any
    result: Any


@dataclass(frozen=True)
class Call:
    """One call.

    Args:
        name: as the documentation shows it.
        make: makes it.
        bound: seconds, with the settings of this measurement.
        promise: the bound in words.
        claims: whether it needs results that keep claims.
        asynchronous: whether it runs on an event loop, which must go on meanwhile.
        elsewhere: whether it asks for the result of a task that another process has sent.
    """

    name: str
    make: Callable[[Subject], Any]
    bound: float
    promise: str
    claims: bool = False
    asynchronous: bool = False
    elsewhere: bool = False


def _same_key(subject: Subject) -> None:
    """Send from four threads: three of them wait for another."""
    keyed = subject.task.using(idempotency_key=uuid.uuid4().hex)
    with ThreadPoolExecutor(4) as threads:
        sends = [threads.submit(keyed.delay, 1, 2) for _ in range(4)]
    errors = [error for error in (send.exception() for send in sends) if error is not None]
    if errors:
        raise errors[0]


def _close(subject: Subject) -> None:
    subject.bridge.close()


CALLS: tuple[Call, ...] = (
    Call("task.delay(...)", lambda s: s.task.delay(1, 2), PUBLISH, "`publish_timeout`"),
    Call("await task.adelay(...)", lambda s: s.task.adelay(1, 2), PUBLISH, "`publish_timeout`", asynchronous=True),
    Call("bridge.send(name, ...)", lambda s: s.bridge.send("bounds.add", (1, 2)), PUBLISH, "`publish_timeout`"),
    Call(
        "task.send_many(100 calls)",
        lambda s: s.task.send_many((n, n) for n in range(100)),
        PUBLISH,
        "`publish_timeout` for each 500 calls",
    ),
    Call(
        "task.using(idempotency_key=...).delay(...)",
        lambda s: s.task.using(idempotency_key=uuid.uuid4().hex).delay(1, 2),
        PUBLISH + 2 * ANSWER,
        "`publish_timeout`, and twice an answer of the results",
        claims=True,
    ),
    Call(
        "task.using(idempotency_key=same).delay(...)",
        _same_key,
        PUBLISH + 2 * ANSWER,
        "`publish_timeout`, and twice an answer of the results",
        claims=True,
    ),
    Call("result.get(timeout)", lambda s: s.result.get(timeout=WAIT), WAIT, "`timeout`"),
    Call("await result.aget(timeout)", lambda s: s.result.aget(timeout=WAIT), WAIT, "`timeout`", asynchronous=True),
    Call("result.state", lambda s: s.result.state, LOOK, "`results.look_timeout`"),
    Call("result.ready()", lambda s: s.result.ready(), LOOK, "`results.look_timeout`"),
    Call("result.progress()", lambda s: s.result.progress(), LOOK, "`results.look_timeout`"),
    Call("result.forget()", lambda s: s.result.forget(), LOOK, "`results.look_timeout`"),
    Call(
        "result.revoke()",
        lambda s: s.result.revoke(),
        PUBLISH + ANSWER,
        "`publish_timeout`, and an answer of the results",
    ),
    Call("bridge.check()", lambda s: s.bridge.check(), PUBLISH + 3 * ANSWER, "`publish_timeout`, and three answers"),
    Call(
        "bridge.dead_letters.list()",
        lambda s: s.bridge.dead_letters.list("default"),
        PUBLISH,
        "`publish_timeout` for each letter, and to connect",
    ),
    Call("bridge.close()", _close, 1.0, "one second"),
)
