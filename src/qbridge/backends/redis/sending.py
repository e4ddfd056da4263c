"""How does a message get to its list, now or when it is due?

A task's message with an ``eta`` to come lies in a schedule, which the claims of any consumer of ours look at.
Whether a message may have arrived although the sending failed, the error says.
"""

from __future__ import annotations

from datetime import UTC, datetime
from time import time
from typing import Any

from kombu.utils.json import dumps
from redis.exceptions import ResponseError

from qbridge.backends.base import HEADER_NOT_BEFORE, is_time
from qbridge.backends.redis import scripts
from qbridge.backends.redis.places import is_wrong_type

__all__ = ["SOON", "Sending", "eta_of"]

SOON = 0.005
"""Seconds of delay that are not worth a place in the schedule."""

_LEFT = 3600.0
"""Seconds without one of our workers after which nobody is expected to look at the schedule any more."""

# redis-py's; an answer, even a refusal, is another class
_NO_ANSWER = ("ConnectionError", "TimeoutError")


class Sending:
    """Part of our channel: what comes before a message waits in its list."""

    priority_steps: tuple[int, ...]
    _looked_after = False
    _look_after_at = 0.0

    def priority(self, number: int) -> int:
        """Return the step of a priority number: the largest that is not above it (kombu bisects its own order)."""
        return max((step for step in self.priority_steps if step <= number), default=0)

    def _get_message_priority(self: Any, message: Any, reverse: bool = False) -> Any:
        """Return kombu's number; Infinity is none, like all that is no number, where kombu lets the error through."""
        try:
            return super()._get_message_priority(message, reverse=reverse)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # kombu's
        except ArithmeticError:
            return super()._get_message_priority({"properties": {}}, reverse=reverse)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # kombu's

    def _put(self: Any, queue: str, message: Any, **options: Any) -> None:
        """Push one message, or schedule it; an error of a command that was written says that it may have arrived.

        A frozen Redis reads it from its socket once it goes on, long after the sender has given up. That of a key which
        is no list says that there is no such queue.
        """
        self._refuse_key(queue)
        batch = options.get("_publish_batch")
        due = eta_of(message)
        try:
            if due is not None and due - time() > SOON and self._is_looked_after():
                self._schedule(queue, message, due, batch)
            elif batch is not None:
                super()._put(queue, message, **options)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # kombu's
            else:
                self._push(queue, message)
        except Exception as error:
            if type(error).__name__ in _NO_ANSWER and "connecting to" not in str(error):
                error.__dict__["may_have_arrived"] = True  # read by those who send
            elif is_wrong_type(error):
                error.__dict__["unroutable"] = True  # nobody receives there: an outcome is not offered again
            raise

    def _push(self: Any, queue: str, message: Any) -> None:
        number = self._get_message_priority(message, reverse=False)
        keys = [*self._keys(self._q_for_pri(queue, number)), self._wake_key(queue)]
        args = [dumps(message)]
        expires = self._expires.get(queue)
        if expires:
            keys += self._keys(*(self._q_for_pri(queue, step) for step in self.priority_steps))
            args.append(expires)
        try:
            scripts.PUT.run(self._ours, keys, args)
        except ResponseError as error:
            if not scripts.is_forbidden(error):
                raise
            # an account for sending alone: nothing was done, and the consumer finds the message when it looks
            super()._put(queue, message)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # kombu's

    def _is_looked_after(self: Any) -> bool:
        """Whether a worker of ours has consumed here: plain workers do not look at the schedule, but keep tasks."""
        if time() >= self._look_after_at:
            try:
                swept = self._ours.get(*self._keys("qbridge.swept"))  # milliseconds since 1970
                found = swept is not None and abs(time() - float(swept) / 1000) < _LEFT
            except (ResponseError, ValueError):  # somebody else wrote there: the next sweep writes over it
                found = False
            self._looked_after, self._look_after_at = found, time() + (60 if found else 1)
        return bool(self._looked_after)

    def _schedule(self: Any, queue: str, message: Any, due: float, batch: Any) -> None:
        number = self._get_message_priority(message, reverse=False)
        (key,) = self._keys(self._q_for_pri(queue, number))
        name = f"{key}\0{message['properties']['delivery_tag']}"
        entry = f"{key}\0{self._wake_key(queue)}\0{dumps(message)}"
        milliseconds = int(due * 1000)
        if batch is None:
            keys = self._keys("qbridge.schedule", "qbridge.scheduled")
            scripts.SCHEDULE.run(self._ours, keys, [name, milliseconds, entry])
        else:  # kombu's pipeline puts the prefix before the keys
            batch.add("hset", "qbridge.scheduled", name, entry)
            batch.add("zadd", "qbridge.schedule", {name: milliseconds})

    def _purge(self: Any, queue: str) -> int:
        return int(scripts.PURGE.run(self._ours, self._queue_keys(queue), []))

    def _delete(self: Any, queue: str, *args: Any, **kwargs: Any) -> None:
        super()._delete(queue, *args, **kwargs)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # kombu's
        scripts.PURGE.run(self._ours, self._queue_keys(queue), [])
        self._ours.delete(self._wake_key(queue))

    def _queue_keys(self: Any, queue: str) -> list[str]:
        lists = (self._q_for_pri(queue, step) for step in self.priority_steps)
        return self._keys("qbridge.schedule", "qbridge.scheduled", *lists)  # type: ignore[no-any-return]


def eta_of(message: Any) -> float | None:
    """When a task's message is to be run, in seconds since 1970; None: at any time."""
    headers = message.get("headers")
    until = headers.get(HEADER_NOT_BEFORE) if isinstance(headers, dict) else None
    # of a message that a worker has put off, a task or not
    until = float(until) if is_time(until) else None
    eta = headers.get("eta") if isinstance(headers, dict) and "task" in headers else None
    if not isinstance(eta, str):
        return until
    try:
        moment = datetime.fromisoformat(eta)
    except ValueError:  # the worker says what it thinks of it
        return until
    return max((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp(), until or 0.0)
