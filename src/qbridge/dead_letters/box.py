"""What can users do with dead letters? List them, look at one, send them again, throw them away.

Looking changes nothing: neither the order of a queue, nor what is counted as a delivery, nor who consumes it.
"""

from __future__ import annotations

import builtins
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

from qbridge.backends.base import HEADER_UNREADABLE, Broker
from qbridge.backends.deadline import deadline
from qbridge.backends.kept import InUse, Kept, KeptQueue
from qbridge.dead_letters.letter import REASONS, DeadLetter, Reason, fresh_headers, name_of, read
from qbridge.dead_letters.outcomes import Outcomes, StoredOutcomes
from qbridge.exceptions import (
    BrokerUnavailable,
    ConfigurationError,
    DeadLetterUnknown,
    PayloadError,
    QBridgeError,
    UnsupportedFeature,
)
from qbridge.serialization.lock import Lock
from qbridge.serialization.locked_messages import Letter, relock_letter
from qbridge.serialization.refused import MessageRefused

__all__ = ["DeadLetters", "Place"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Many = builtins.list[DeadLetter]


class Place(Protocol):
    """Where the dead letters of a bridge are; the bridge provides it."""

    @property
    def broker(self) -> Broker:
        """The configured broker."""
        ...

    @property
    def lock(self) -> Lock | None:
        """The keys; None: nothing is signed."""
        ...

    @property
    def keeps_dead_letters(self) -> bool:
        """False under ``defaults="celery"``."""
        ...

    def queue_names(self) -> Iterable[str]:
        """Return the names of all queues."""
        ...

    def check_queue(self, name: str) -> None:
        """Refuse a queue that nobody declared."""
        ...

    def outcomes(self) -> StoredOutcomes | None:
        """Return what outcomes are read from and forgotten in; None: there is nothing that others could read."""
        ...

    def connect(self) -> Any:
        """Return a new kombu connection; it connects at its first use."""
        ...

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in a thread."""
        ...


class DeadLetters:
    """The dead letters of a bridge's queues; ``bridge.dead_letters``.

    Every call opens a connection of its own and closes it. Each step on the broker is bounded by ``publish_timeout``.

    Args:
        place: where they are.
    """

    def __init__(self, place: Place) -> None:
        self._place = place

    def list(
        self,
        queue: str | None = None,
        *,
        limit: int | None = 100,
        reason: Reason | None = None,
        task: str | None = None,
    ) -> Many:
        """Return dead letters, oldest first, queue by queue.

        Args:
            queue: name of the queue that they came from; None: all queues.
            limit: the most that are returned; None: all.
            reason: only those given up for this reason.
            task: only those of the task of this name.

        Raises:
            BrokerUnavailable: if the broker cannot be read.
            UnknownQueueError: if nobody declared ``queue``.
        """
        found: Many = []
        with self._open(queue, None, reason, task) as opened:
            for _, _, letter in opened:
                if limit is not None and len(found) >= limit:
                    break
                found.append(letter)
        return found

    def get(self, id: str) -> DeadLetter:  # noqa: A002 - the field's name
        """Return one dead letter.

        Raises:
            DeadLetterUnknown: if there is none with this id.
            BrokerUnavailable: if the broker cannot be read.
        """
        with self._open(None, {id}, None, None) as opened:
            for _, _, letter in opened:
                return letter
        raise DeadLetterUnknown(
            f"there is no dead letter {id}", "It may have been replayed or discarded: look at the list.", id
        )

    def replay(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        queue: str | None = None,
        reason: Reason | None = None,
        task: str | None = None,
        limit: int | None = None,
        rate: float | None = None,
        skipped: Callable[[DeadLetter, PayloadError], object] | None = None,
    ) -> Many:
        """Send dead letters to the queues that they came from: same id, body and headers, attempts counted anew.

        A stored failure is forgotten, so ``bridge.result(letter.task_id)`` waits for the new outcome; so is REVOKED,
        where the task had expired. It is put back where the letter could not be sent.
        A time at which the task was to expire, and a deadline, are left out if they are over; else they stay.
        On Redis and the embedded broker the move is one step. On RabbitMQ the new message is confirmed first, and then
        the dead letter goes: whoever is killed between the two leaves both, and the task may run twice with one id.
        One that cannot be sent again (there are keys and no holder of one has sent it, or its headers could not be read
        and it names no task) stays a dead letter; chosen by a filter it keeps no others from being sent.

        Args:
            ids: one or several; those that are not there (any more) are left out.
            queue: only those that came from this queue.
            reason: only those given up for this reason.
            task: only those of the task of this name.
            limit: the most that are sent; None: all.
            rate: the most per second; None: as fast as the broker takes them.
            skipped: called with each that a filter chose and that cannot be sent again, and why; None: a warning in the
                log says how many there were.

        Returns:
            Those that were sent.

        Raises:
            ConfigurationError: if neither ``ids`` nor a filter says which.
            PayloadError: if one of ``ids`` cannot be sent again; those before it were sent.
            BrokerUnavailable: if the broker does not take one; it stays a dead letter, and those before it were sent.
        """
        if rate is not None and not rate > 0:
            raise ConfigurationError(f"replay(rate={rate!r}) would never send one", "rate is a number per second.")

        outcomes = Outcomes(self._place.outcomes())
        left: builtins.list[PayloadError] = []

        def send(opened: KeptQueue, kept: Kept, letter: DeadLetter) -> bool:
            properties = {
                **letter.properties, "content_type": letter.content_type, "content_encoding": letter.content_encoding,
            }  # fmt: skip
            try:
                headers = self._headers(letter)
            except PayloadError as error:
                if ids is not None:
                    raise
                if skipped is None:
                    left.append(error)
                else:
                    skipped(letter, error)
                return False
            with outcomes.forgotten(letter) as sent, self._bounded():
                sent.confirmed = opened.send(kept, letter.queue, headers, properties)
            return sent.confirmed

        try:
            return self._each(send, ids, queue, reason, task, limit, None if rate is None else 1 / rate)
        finally:
            if left:
                logger.warning("%d dead letters cannot be sent again, and stay; the first: %s", len(left), left[0])

    def _headers(self, letter: DeadLetter) -> Mapping[str, Any]:
        """Return the headers of a dead letter that is sent again, signed anew if a holder of the keys has sent it."""
        if HEADER_UNREADABLE in letter.headers and "task" not in letter.headers:
            raise PayloadError(
                f"the dead letter {letter.id} cannot be sent again: its headers could not be read, so it names no task",
                "There is nothing in it that a worker could run. Send its task anew, and discard it.",
            )
        lock = self._place.lock
        if lock is None:
            return fresh_headers(letter)
        # a transport has marked it; what was taken out with that is missed below, if it was signed
        headers = {name: value for name, value in letter.headers.items() if name != HEADER_UNREADABLE}
        sent = Letter(
            letter.body, letter.content_type, letter.content_encoding, headers,
            letter.properties.get("correlation_id"), letter.properties.get("reply_to"),
        )  # fmt: skip
        try:
            return relock_letter(lock, sent, lambda _: fresh_headers(letter)).headers
        except MessageRefused as refused:
            raise PayloadError(
                f"the dead letter {letter.id} cannot be sent again: {refused}",
                "A worker would refuse it. If it is to be run, send its task anew.",
            ) from None

    def discard(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        queue: str | None = None,
        reason: Reason | None = None,
        task: str | None = None,
        limit: int | None = None,
    ) -> Many:
        """Delete dead letters.

        Args:
            ids: one or several; those that are not there (any more) are left out.
            queue: only those that came from this queue.
            reason: only those given up for this reason.
            task: only those of the task of this name.
            limit: the most that are deleted; None: all.

        Returns:
            Those that were deleted.

        Raises:
            ConfigurationError: if neither ``ids`` nor a filter says which.
            BrokerUnavailable: if the broker cannot be read.
        """

        def delete(opened: KeptQueue, kept: Kept, letter: DeadLetter) -> bool:
            with self._bounded():
                return opened.discard(kept)

        return self._each(delete, ids, queue, reason, task, limit, None)

    async def alist(
        self,
        queue: str | None = None,
        *,
        limit: int | None = 100,
        reason: Reason | None = None,
        task: str | None = None,
    ) -> Many:
        """Do what :meth:`list` does without blocking the event loop."""
        return await self._place.in_thread(partial(self.list, queue, limit=limit, reason=reason, task=task))

    async def aget(self, id: str) -> DeadLetter:  # noqa: A002 - the field's name
        """Do what :meth:`get` does without blocking the event loop."""
        return await self._place.in_thread(self.get, id)

    async def areplay(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        queue: str | None = None,
        reason: Reason | None = None,
        task: str | None = None,
        limit: int | None = None,
        rate: float | None = None,
        skipped: Callable[[DeadLetter, PayloadError], object] | None = None,
    ) -> Many:
        """Do what :meth:`replay` does without blocking the event loop; ``skipped`` is called in a thread."""
        replay = partial(
            self.replay, ids, queue=queue, reason=reason, task=task, limit=limit, rate=rate, skipped=skipped
        )
        return await self._place.in_thread(replay)

    async def adiscard(
        self,
        ids: str | Iterable[str] | None = None,
        *,
        queue: str | None = None,
        reason: Reason | None = None,
        task: str | None = None,
        limit: int | None = None,
    ) -> Many:
        """Do what :meth:`discard` does without blocking the event loop."""
        discard = partial(self.discard, ids, queue=queue, reason=reason, task=task, limit=limit)
        return await self._place.in_thread(discard)

    def _each(
        self,
        act: Callable[[KeptQueue, Kept, DeadLetter], bool],
        ids: str | Iterable[str] | None,
        queue: str | None,
        reason: Reason | None,
        task: str | None,
        limit: int | None,
        pause: float | None,
    ) -> Many:
        if ids is None and queue is None and reason is None and task is None:
            raise ConfigurationError(
                "which dead letters are meant is not said", "Give ids, or queue=, reason= or task=."
            )
        wanted = None if ids is None else {ids} if isinstance(ids, str) else set(ids)
        done: Many = []
        rested = True  # whoever finds nothing to send has no need of a rest
        with self._open(queue, wanted, reason, task) as opened:
            for kept_queue, kept, letter in opened:
                if limit is not None and len(done) >= limit:
                    break
                if not rested and pause is not None:
                    time.sleep(pause)
                rested = not act(kept_queue, kept, letter)
                if not rested:
                    done.append(letter)
        return done

    @contextmanager
    def _open(
        self, queue: str | None, ids: set[str] | None, reason: Reason | None, task: str | None
    ) -> Iterator[Iterator[tuple[KeptQueue, Kept, DeadLetter]]]:
        """Open a connection, and yield what is wanted."""
        if not self._place.keeps_dead_letters:
            raise UnsupportedFeature(
                "a bridge with defaults='celery' keeps no dead letters", "Celery drops such messages; use 'safe'."
            )
        if reason is not None and reason not in REASONS:
            raise ConfigurationError(f"there is no reason {reason!r}", f"Reasons are {', '.join(REASONS)}.")
        if queue is not None:
            self._place.check_queue(queue)
        names = sorted(self._place.queue_names()) if queue is None else [queue]
        connection = self._place.connect()
        try:
            with closing(self._wanted(connection, names, ids, reason, task)) as wanted:
                yield wanted
        finally:
            with self._bounded():
                connection.release()

    def _wanted(
        self, connection: Any, names: Iterable[str], ids: set[str] | None, reason: Reason | None, task: str | None
    ) -> Generator[tuple[KeptQueue, Kept, DeadLetter]]:
        left = None if ids is None else set(ids)
        for name in names:
            if left is not None and not left:
                return
            opening = self._place.broker.kept_queue(connection, name_of(name))
            with self._bounded():
                opened = opening.__enter__()
            try:
                looking = opened.look()
                while (left is None or left) and (kept := self._next(looking)) is not None:
                    letter = read(kept, name)
                    if (
                        (left is not None and letter.id not in left)
                        or (reason is not None and letter.reason != reason)
                        or (task is not None and letter.task != task)
                    ):
                        continue
                    if left is not None:
                        left.discard(letter.id)
                    yield opened, kept, letter
            finally:
                with self._bounded():
                    opening.__exit__(None, None, None)

    def _next(self, looking: Iterator[Kept]) -> Kept | None:
        with self._bounded():
            return next(looking, None)

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        broker = self._place.broker
        try:
            with deadline(broker.publish_timeout):
                yield
        except QBridgeError:
            raise
        except Exception as error:
            todo = "Wait for the other reader." if isinstance(error, InUse) else "Look at `qbridge check`."
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BrokerUnavailable(
                f"the dead letters on {broker.safe_url()} cannot be reached: {reason}", todo
            ) from error
