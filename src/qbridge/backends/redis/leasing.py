"""Whose is what was claimed, and until when? Renewing, taking over, settling and giving back."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import Any

from kombu.utils.json import dumps
from redis.exceptions import ResponseError

from qbridge.backends.redis import scripts
from qbridge.backends.redis.keeper import Keeper
from qbridge.backends.redis.places import NoList, is_wrong_type
from qbridge.backends.redis.qos import say_late

__all__ = ["Leasing"]

logger: logging.Logger = logging.getLogger(__name__)


class Leasing:
    """Part of our channel: what happens to claims after they were made."""

    _keeper: Keeper | None

    def settle_soon(self: Any) -> None:
        """Something is to be acknowledged."""
        if self.stays:
            self._settle_now()
        elif self._keeper is not None:
            self._keeper.settle_soon()
        elif self._process == os.getpid():  # the channel was closed while the task ran
            try:
                self.settle()
            finally:
                self._ours.connection_pool.disconnect()

    def settle(self: Any, waited: float = 0.0) -> None:
        """Acknowledge what is done."""
        with self._settling:
            settled = self.qos.take_settled(waited)
            if settled:
                words = [word for claim in settled for word in claim]
                try:
                    late = scripts.SETTLE.run(self._ours, self._claim_keys, words)
                except BaseException:
                    self.qos.untake(settled)
                    raise
                say_late(late)

    def settle_now(self: Any) -> None:
        """Acknowledge what is done without waiting for company; what cannot be said now is said later."""
        if self._keeper is not None and self._process == os.getpid():
            self._settle_now()

    def _settle_now(self: Any) -> None:
        # of a closed channel: nobody closes it once more, so what the end of the worker finds unsent would not be sent
        try:
            self.settle()
        except Exception as error:  # noqa: BLE001 - the keeper tries again
            logger.warning("Cannot acknowledge yet, trying again: %s", type(error).__name__)
            self._keeper.settle_soon()

    def give_back(self: Any, claims: list[tuple[str, str]], side: str) -> None:
        """Put claimed messages back on their lists.

        Args:
            claims: tag and owner of each, in the order of pushing.
            side: RPUSH for those that are to come next, LPUSH for those that are to come last.
        """
        args = [side, *(word for claim in claims for word in claim)]
        say_late(scripts.GIVE_BACK.run(self._ours, self._claim_keys, args))

    def _try_to_give_back(self: Any, claims: list[tuple[str, str]]) -> None:
        try:
            self.give_back(claims, "RPUSH")
        except Exception as error:  # noqa: BLE001 - then they are taken over when the lease ends
            logger.warning("Cannot give messages back (%s): others get them when the lease ends", type(error).__name__)

    def _do_restore_message(
        self: Any, payload: Any, exchange: Any, routing_key: Any, pipe: Any, leftmost: bool = False
    ) -> None:
        """Let kombu's transaction put a message of a plain worker back on its list, which it must be able to do.

        kombu's own takes it out of ``unacked`` whether its list can take it or not.

        Raises:
            NoList: if its list is none now.
            NoQueue: if it would go to a key that is no queue's.
            TypeError: if it would go to what is no name; likewise others, if it is no message.
        """
        with suppress(KeyError):
            payload["headers"]["redelivered"] = True
            payload["properties"]["delivery_info"]["redelivered"] = True
        number = self._get_message_priority(payload, reverse=False)
        (key,) = self._keys(self.keyprefix_queue % (exchange,))
        try:
            for name in self._lookup(exchange, routing_key):
                if not isinstance(name, str):
                    raise TypeError(f"the name of a queue is no {type(name).__name__}")
                self._refuse_key(name)
                (key,) = self._keys(place := self._q_for_pri(name, number))
                self._ours.llen(key)
                (pipe.lpush if leftmost else pipe.rpush)(place, dumps(payload))
        except ResponseError as error:
            if is_wrong_type(error):
                raise NoList(key) from error
            raise

    def leased(self: Any, tag: Any) -> bool:
        """Return whether a message is held by a consumer with a lease."""
        return bool(self._ours.hexists(self._claim_keys[0], tag))

    def renew(self: Any) -> None:
        """Say that this consumer lives."""
        tags = self.qos.tags()
        keys = self._keys("qbridge.holders", self.unacked_index_key)
        known = scripts.RENEW.run(self._ours, keys, [self._holder, int(self.lease * 1000), *tags])
        if not known and tags:
            logger.warning(
                "The lease of this worker had ended when it was renewed: others may have taken over what it runs "
                "(%d messages). Was it stopped, or cut off from Redis, for longer than %g s?", len(tags), self.lease,
            )  # fmt: skip

    def sweep(self: Any) -> None:
        """Take over what dead consumers held."""
        keys = self._keys("qbridge.holders")
        keys += self._claim_keys
        keys += self._keys("qbridge.swept")
        taken = scripts.SWEEP.run(self._ours, keys, [])
        if taken:
            logger.warning("Took over %d messages of workers that are gone", taken)

    def close(self: Any) -> None:
        """Close the channel; what it holds goes back at once, but for what is kept."""
        if self._keeper is not None and not self.stays:
            self._keeper.stop()
        if self._in_poll:
            self._read_the_last()
        if self._keeper is not None and not self.closed and self._process == os.getpid():
            if self.stays:
                self._give_the_rest_back()
                self._keeper.stay()
            else:
                self._keeper = None
                self._say_goodbye()
        super().close()  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]  # kombu's

    def _read_the_last(self: Any) -> None:
        kind, asked = self._asked
        connection, self._in_poll = self._in_poll, None
        try:
            answer = connection.read_response()
        except (*self.connection_errors, ResponseError):
            if kind == "claim":
                self.qos.untake(asked[2])
            return
        if kind == "claim":
            say_late(answer[2])
            self._try_to_give_back([(tag, asked[0]) for _, _, tag, _ in reversed(answer[3])])

    def _give_the_rest_back(self: Any) -> None:
        try:
            self.qos.restore_unacked()
        except Exception as error:  # noqa: BLE001 - then others get it when the keeper has moved what is kept
            logger.warning("Cannot give back what this worker holds (%s), trying again", type(error).__name__)
            self.qos.hold_what_is_kept()

    def _say_goodbye(self: Any) -> None:
        try:
            self.qos.restore_unacked()
            # anything that is still claimed, by whatever failed: the next sweep of any worker takes it over
            self._ours.zadd(self._keys("qbridge.holders")[0], {self._holder: 0}, xx=True)
        except Exception as error:  # noqa: BLE001 - the server is gone: others take over when the lease ends
            logger.warning("Cannot give back what this worker holds (%s): its lease ends in time", type(error).__name__)
