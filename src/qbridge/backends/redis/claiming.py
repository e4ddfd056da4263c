"""How does a consumer get messages? By claims, several messages at once, and between them by waiting for a sender.

Where kombu begins a BRPOP, this sends the claiming script, or, when there was nothing, a wait for an entry of the
queues' streams. Nothing is popped by waiting, so an answer that nobody reads loses nothing.
"""

from __future__ import annotations

import logging
import uuid
from collections import deque
from contextlib import suppress
from math import inf
from queue import Empty
from time import monotonic
from typing import Any

from kombu.utils.json import loads
from redis.exceptions import ConnectionError, NoPermissionError, NoScriptError, ResponseError  # noqa: A004 - redis-py's

from qbridge.backends.redis import scripts
from qbridge.backends.redis.keeper import Keeper
from qbridge.backends.redis.messages import FAULTS, NO_LIST, earlier, envelope, marked, thrown_away
from qbridge.backends.redis.qos import say_late
from qbridge.backends.redis.sending import SOON, eta_of
from qbridge.serialization.locked_messages import Due

__all__ = ["Claiming"]

LOOK = 100
"""Milliseconds after which an idle consumer looks for messages of senders that wake nobody."""

AT_ONCE = 64
"""Most messages of one claim."""

_DEAF = 1.0
"""Seconds without a look at the queues' streams after one of them was none."""

logger: logging.Logger = logging.getLogger(__name__)


class Claiming:
    """Part of our channel: consuming."""

    _keeper: Keeper | None = None
    _wait: int | None = None

    #: By our clock: until then it waits without a look at the queues' streams.
    _deaf_until = 0.0

    #: The server's clock at the last claim, in seconds since 1970.
    _now = 0.0

    def basic_consume(self: Any, queue: str, no_ack: bool, callback: Any, *args: Any, **kwargs: Any) -> Any:
        """Consume a queue; items that are no messages do not reach the callback."""
        channel: Any = self
        consuming = super().basic_consume(queue, no_ack, callback, *args, **kwargs)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # kombu's

        def deliver(item: Any) -> Any:
            try:
                message = channel.Message(envelope(item, queue), channel=channel)
                if not no_ack:
                    channel.qos.append(message, message.delivery_tag)
            except FAULTS as error:
                thrown_away(queue, error)
                with suppress(*FAULTS):  # what was broadcast may be anything, and is not claimed
                    channel.qos.let_go(item["properties"]["delivery_tag"])
                return None
            return callback(message)

        if queue in channel.connection._callbacks:
            channel.connection._callbacks[queue] = deliver
        (self._no_ack.add if no_ack or not self.ack_emulation else self._no_ack.discard)(queue)
        if queue not in self._no_ack and queue not in self._fanout_queues and self._keeper is None:
            _ = self._ours  # what a closed channel still needs can only be made by an open one
            self._keeper = Keeper(self, self.lease)
        self._wait = None
        return consuming

    def _brpop_start(self: Any, timeout: Any = None) -> None:
        """Ask for messages, or, when there were none, wait for a sender: kombu calls it where it begins a BRPOP."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        if self._forget_claim():
            # kombu has dropped a connection that stood still. What was claimed on it, if anything, is freed by closing.
            raise ConnectionError("the answer to a claim did not come")
        if self._wait is not None and self._wait > 0 and not self._settles_first():
            command = self._waiting(queues)
        else:
            command = self._claiming(queues)
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        try:
            self.client.connection.send_command(*command)
        except BaseException:
            self._forget_claim()
            raise

    def _forget_claim(self: Any) -> bool:
        """Keep what a claim was to acknowledge whose answer will not come; return whether there was such a claim."""
        kind, asked = self._asked
        self._asked = ("", None)
        if kind == "claim":
            self.qos.untake(asked[2])  # settled twice is said, and changes nothing
        return bool(kind == "claim")

    def _settles_first(self: Any) -> bool:
        return bool(self.qos._settled)

    def _waiting(self: Any, queues: list[str]) -> list[Any]:
        self._asked = ("wait", None)
        if monotonic() < self._deaf_until:
            # where streams cannot be read, it waits for what nobody sends, under a name that nobody can know
            return ["BRPOP", self._wake_key(f"\0{uuid.uuid4().hex}"), self._wait / 1000]
        streams = [self._wake_key(queue) for queue in queues]
        ids = [max(self._woken.get(key, "0-0"), f"{self._since}-0", key=_moment) for key in streams]
        return ["XREAD", "BLOCK", self._wait, "STREAMS", *streams, *ids]

    def _claiming(self: Any, queues: list[str]) -> list[Any]:
        room = self.qos.can_consume_max_estimate()
        limit = AT_ONCE if room is None else max(1, min(AT_ONCE, room))
        self._owners += 1
        owner = f"{self._holder}/{self._owners}"
        settled = self.qos.take_settled()
        self._asked = ("claim", (owner, queues, settled))
        keys = self._keys("qbridge.holders")
        keys += self._claim_keys
        keys += self._keys(
            "qbridge.schedule",
            "qbridge.scheduled",
            *(self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues),
        )
        flags = ["0" if queue in self._no_ack else "1" for queue in queues] * len(self.priority_steps)
        args: list[Any] = [self._holder, owner, int(self.lease * 1000), limit, len(queues), len(settled)]
        for claim in settled:
            args.extend(claim)
        return scripts.CLAIM.command(keys, args + flags, whole=self._whole)

    def _brpop_read(self: Any, **options: Any) -> Any:
        """Read the answer, and deliver what came: kombu calls it when the connection is readable."""
        kind, asked = self._asked
        self._asked = ("", None)
        connection = self.client.connection
        try:
            answer = connection.read_response()
        except (NoScriptError, ResponseError) as error:
            self._refused(kind, asked, error)
            raise Empty from error
        except self.connection_errors:
            if kind == "claim":
                self.qos.untake(asked[2])  # settled twice is said, and changes nothing
            connection.disconnect()
            raise
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        if kind == "wait":
            self._wait = None
            for stream, entries in answer.items() if isinstance(answer, dict) else answer or ():
                self._woken[stream.decode()] = entries[-1][0].decode()
            raise Empty
        now, due, late, items, wrong = answer
        self._whole = False
        self._now = int(now) / 1000
        self._since = int(now) - 1
        say_late(late)
        self._say_wrong(wrong, looked_at_all=not items)
        # infinity, too, is a number that anybody may have written there
        self._wait = None if items else LOOK if due == b"" else int(min(LOOK, max(0.0, float(due) - int(now))))
        if not items:
            raise Empty
        owner, queues, _ = asked
        self._deliver_claimed(items, owner, queues)
        return True

    def _refused(self: Any, kind: str, asked: Any, error: Exception) -> None:
        """Go on after an error that Redis answered with; one that does not pass is the consumer's to handle."""
        if kind == "claim":
            self.qos.untake(asked[2])
            if isinstance(error, NoScriptError) and not self._whole:
                self._whole = True  # the next round sends the script itself
                return
        elif isinstance(error, NoPermissionError) and self._deaf_until < inf:
            self._deaf_until = inf
            return
        elif str(error).startswith("WRONGTYPE"):
            # what somebody made of a queue's stream is deleted by the next who sends to that queue
            self._deaf_until = monotonic() + _DEAF
            return
        raise error

    def _say_wrong(self: Any, keys: list[bytes], *, looked_at_all: bool) -> None:
        """Say once of each list that it is none."""
        if keys or self._wrong:
            for key in set(keys) - self._wrong:
                logger.error(NO_LIST, key.decode(errors="replace"))
            self._wrong = set(keys) | (set() if looked_at_all else self._wrong)

    def _deliver_claimed(self: Any, items: list[Any], owner: str, queues: list[str]) -> None:
        """Deliver what one claim gave.

        All of it is known to be held before the first is delivered, which may be a task that runs in this thread: what
        waits behind it is renewed, and goes back as not begun if the process has to end meanwhile.
        """
        unread, left = deque(items), deque()  # type: ignore[var-annotated]  # kombu's items
        try:
            while unread:
                number, raw, tag, before = unread[0]
                queue = queues[int(number) % len(queues)]
                item = self._made_ready(queue, raw, tag, before, owner)
                unread.popleft()
                if item is not None:
                    left.append((queue, item))
            while left:
                queue, item = left.popleft()
                if queue in self._no_ack or self.qos.holds(item["properties"]["delivery_tag"]):
                    self._queue_cycle.rotate(queue)
                    self.connection._deliver(item, queue)
        except BaseException:
            # the worker stops, or its connection is gone: what was not begun is for others
            claims = self.qos.forget(item["properties"]["delivery_tag"] for _, item in left)
            claims += [
                (tag, owner) for number, _, tag, _ in unread if queues[int(number) % len(queues)] not in self._no_ack
            ]
            if claims:
                self._try_to_give_back(claims[::-1])
            raise

    def _made_ready(self: Any, queue: str, raw: bytes, tag: bytes, before: bytes, owner: str) -> Any:
        """Return what is to be delivered, held; None: nothing, because it is no message, or not due yet."""
        try:
            item = _opened(queue, raw, tag, before)
            # What the server does not hold it cannot postpone; the worker, which gets it, can.
            due = None if queue in self._no_ack else eta_of(item)
            number = 0 if due is None else self._get_message_priority(item, reverse=False)
        except FAULTS as error:
            thrown_away(queue, error)
            if queue not in self._no_ack:  # the tag as it came: it may be no text
                scripts.SETTLE.run(self._ours, self._claim_keys, [tag, owner])
            return None
        # By the server's clock, which releases it: by another one it could go to and fro until both agree.
        if due is not None and due - self._now <= SOON:
            due = None
            if "eta" in item["headers"]:
                if isinstance(item["headers"]["eta"], str):
                    item["properties"]["delivery_info"]["due"] = Due(item["headers"]["eta"])
                item["headers"]["eta"] = None
        if due is not None:  # of a plain sender, or of before there was a worker: the server keeps it, not this process
            (key,) = self._keys(self._q_for_pri(queue, number))
            keys = [*self._claim_keys, *self._keys("qbridge.schedule", "qbridge.scheduled")]
            entry = f"{key}\0{self._wake_key(queue)}\0{raw.decode()}"
            scripts.POSTPONE.run(self._ours, keys, [tag, owner, f"{key}\0{tag.decode()}", int(due * 1000), entry])
            return None
        if queue not in self._no_ack:
            self.qos.claimed(item["properties"]["delivery_tag"], tag.decode(), owner)
        return item

    def _get(self: Any, queue: str, *args: Any) -> Any:
        while True:
            try:
                return envelope(super()._get(queue, *args), queue)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # kombu's
            except FAULTS as error:
                thrown_away(queue, error)


def _opened(queue: str, raw: bytes, tag: bytes, before: bytes) -> Any:
    """Return the message that a claim gave, with what the server knows of it.

    Raises:
        FAULTS: if it is none.
    """
    item = marked(envelope(loads(raw.decode()), queue), raw)
    item["properties"]["delivery_tag"] = tag.decode()  # its own, if Redis could read that
    if before:
        deliveries, losses = earlier(before)
        item["properties"]["delivery_tag"] = f"{tag.decode()}.{deliveries}"
        item["properties"]["delivery_info"].update(redelivered=True, loss_count=losses)
        item["headers"] = {**(item.get("headers") or {}), "redelivered": True, "x-delivery-count": deliveries}
    return item


def _moment(entry: str) -> tuple[int, int]:
    milliseconds, _, number = entry.partition("-")
    return int(milliseconds), int(number)
