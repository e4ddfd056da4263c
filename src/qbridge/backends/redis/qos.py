"""What has a consumer of Redis in its hands, and whose is it still? Claims with their owners, and settling them.

Acknowledgements wait for company, at most 20 ms or 64 of them: they go with the next claim, or by the keeper's thread.
Each names the claim that it is for; one whose message was taken over meanwhile changes nothing, and is logged.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable
from typing import Any

from kombu.transport import redis as kombu_redis
from kombu.transport import virtual

from qbridge.backends.redis.messages import FAULTS
from qbridge.backends.redis.places import NoList

__all__ = ["QoS"]

logger: logging.Logger = logging.getLogger(__name__)

MOST = 64
"""Acknowledgements that are sent at once."""

_NO_PLACE = (
    "Messages of plain Celery workers cannot be given back: the Redis key %r is of another type than kombu's. Somebody "
    "else has written it. Delete it; until then they stay unacknowledged."
)

Claim = tuple[str, str]


class QoS(kombu_redis.QoS):
    """kombu's, for what was not claimed by our script; ours for what was."""

    _delivered: Any  # an ordered mapping; None in the class

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lock = threading.Lock()
        self._claims: dict[str, Claim] = {}
        self._settled: list[Claim] = []
        self._kept: set[str] = set()
        self._said: set[str] = set()
        self._since = 0.0
        self._process = os.getpid()

    def claimed(self, delivery_tag: str, tag: str, owner: str) -> None:
        """Remember a claim that is being delivered.

        Args:
            delivery_tag: as this consumer knows the delivery.
            tag: as Redis knows the message.
            owner: of the claim.
        """
        with self._lock:
            self._claims[delivery_tag] = (tag, owner)

    def holds(self, delivery_tag: str) -> bool:
        """Return whether a claim is still in this consumer's hands; closing the connection gives all back."""
        return delivery_tag in self._claims

    def forget(self, delivery_tags: Iterable[str]) -> list[Claim]:
        """Let go of claims that were not delivered, for somebody to give back.

        Args:
            delivery_tags: as this consumer knows them.
        """
        with self._lock:
            return [self._claims.pop(tag) for tag in delivery_tags if tag in self._claims]

    def tags(self) -> list[str]:
        """What is held, as Redis knows it."""
        with self._lock:
            return [tag for tag, _ in self._claims.values()]

    def keep(self, delivery_tags: Iterable[str]) -> bool:
        """Let claims outlive the channel; return whether there are any to keep."""
        with self._lock:
            self._kept = {tag for tag in delivery_tags if tag in self._claims}
        return bool(self._kept)

    def hold_what_is_kept(self) -> None:
        """Forget the other claims."""
        with self._lock:
            self._claims = {tag: claim for tag, claim in self._claims.items() if tag in self._kept}

    def held(self) -> list[Claim]:
        """What is claimed, and what is to be acknowledged."""
        with self._lock:
            return [*self._claims.values(), *self._settled]

    def move(self, owner: str) -> None:
        """Note that all of it has another owner."""
        with self._lock:
            self._claims = {delivery_tag: (tag, owner) for delivery_tag, (tag, _) in self._claims.items()}
            self._settled = [(tag, owner) for tag, _ in self._settled]

    def append(self, message: Any, delivery_tag: str) -> None:
        if delivery_tag in self._claims:
            virtual.QoS.append(self, message, delivery_tag)  # Redis knows
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        waiting = self._settle(delivery_tag)
        if not waiting:
            if delivery_tag in self._delivered:
                super().ack(delivery_tag)
            return
        virtual.QoS.ack(self, delivery_tag)
        if waiting == 1:
            self.channel.settle_soon()
        elif waiting >= MOST:
            self.channel.settle()

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if delivery_tag not in self._claims:
            if delivery_tag in self._delivered:
                super().reject(delivery_tag, requeue=requeue)
        elif requeue:
            with self._lock:
                claim = self._claims.pop(delivery_tag)
            try:
                self.channel.give_back([claim], "LPUSH")  # at the end, as kombu does: what is refused must not spin
            except BaseException:
                with self._lock:
                    self._claims[delivery_tag] = claim
                raise
            virtual.QoS.ack(self, delivery_tag)
        else:
            self.ack(delivery_tag)

    def let_go(self, delivery_tag: str) -> None:
        """Acknowledge a claim of which no message could be made."""
        if self._settle(delivery_tag):
            self.channel.settle_soon()

    def _settle(self, delivery_tag: str) -> int:
        """Note that a claim is to be acknowledged; return how many are, 0 if there is no such claim."""
        with self._lock:
            claim = self._claims.pop(delivery_tag, None)
            if claim is None:
                return 0
            if not self._settled:
                self._since = time.monotonic()
            self._settled.append(claim)
            return len(self._settled)

    def take_settled(self, waited: float = 0.0) -> list[Claim]:
        """What is to be acknowledged now.

        Args:
            waited: seconds that the oldest must have waited.
        """
        with self._lock:
            if not self._settled or time.monotonic() - self._since < waited * 0.9:
                return []
            settled, self._settled = self._settled, []
            return settled

    def untake(self, settled: list[Claim]) -> None:
        """Put acknowledgements back that could not be sent."""
        with self._lock:
            self._settled = [*settled, *self._settled]

    def restore_by_tag(self, tag: Any, client: Any = None, leftmost: bool = False) -> None:
        """Give back a message of a plain worker; one that is leased is none of those."""
        if self.channel.leased(tag):
            return
        try:
            super().restore_by_tag(tag, client=client, leftmost=leftmost)
        except NoList as error:  # it stays as it is, and is looked at again
            if error.key not in self._said:
                self._said.add(error.key)
                logger.error(_NO_PLACE, error.key)  # noqa: TRY400 - it says all
        except FAULTS as error:  # else those after it would never be looked at
            logger.error("Threw away an unacknowledged entry: no message (%s)", type(error).__name__)  # noqa: TRY400 - its type says it
            with self.channel.conn_or_acquire(client) as found:
                found.hdel(self.unacked_key, tag)
                found.zrem(self.unacked_index_key, tag)

    def restore_unacked(self, client: Any = None) -> Any:
        """Give back what is held and not kept, oldest first again; what was done is acknowledged before."""
        if os.getpid() != self._process:  # a forked child: they are the parent's
            self._claims.clear()
            self._delivered.clear()
            return None
        self._flush()
        self.channel.settle()
        with self._lock:
            claims, self._claims = self._claims, {}
            self._claims = {delivery_tag: claims.pop(delivery_tag) for delivery_tag in self._kept & claims.keys()}
        for delivery_tag in (*claims, *self._kept):
            self._delivered.pop(delivery_tag, None)
        if claims:
            try:
                self.channel.give_back([*claims.values()][::-1], "RPUSH")
            except BaseException:
                with self._lock:  # a task that runs on may still be acknowledged, before its lease ends
                    self._claims.update(claims)
                raise
        return super().restore_unacked(client=client)


def say_late(tags: list[Any]) -> None:
    """Log that claims were not this consumer's any more when it settled them."""
    for tag in tags:
        logger.warning(
            "The message %s had been taken over by another worker when this one settled it: its lease had ended. "
            "The other run's outcome counts.",
            tag.decode() if isinstance(tag, bytes) else tag,
        )
