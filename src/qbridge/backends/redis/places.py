"""Where do the transport's keys lie in Redis, and through which client are they reached?"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import redis

from qbridge.backends.base import REDIS_KEYS

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["NoList", "NoQueue", "Places", "is_wrong_type"]


class NoQueue(ValueError):
    """A message was sent to what is no queue but a key with a meaning of its own; nothing was written.

    Who runs a task sends its result to the address in the message, and could be made to break that key.
    """

    unroutable = True


class NoList(Exception):
    """A key that a message is to be given back to, or that says where to, is of another type now.

    Args:
        key: its name, with the prefix.
    """

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def is_wrong_type(error: Exception) -> bool:
    """Tell whether Redis has refused a command because of a key's type; before 7 it says first in which script."""
    return isinstance(error, redis.ResponseError) and "WRONGTYPE" in str(error)


class Places:
    """Part of our channel: keys with their prefix, and clients that are kept."""

    _kept: Any = None

    def _keys(self: Any, *names: str) -> list[str]:
        return [self.global_keyprefix + name for name in names]

    def _refuse_key(self: Any, queue: str) -> None:
        """Refuse to push a message into a key that is no queue's.

        Raises:
            NoQueue: if it is one.
        """
        own = (self.unacked_key, self.unacked_index_key, self.unacked_mutex_key)
        if queue.startswith(REDIS_KEYS) or queue in own:
            raise NoQueue(f"{queue!r} is no queue: its key has another meaning in Redis. Give a queue another name.")

    def _wake_key(self: Any, queue: str) -> str:
        return f"{self.global_keyprefix}qbridge.wake.{queue}"

    @property
    def _claim_keys(self: Any) -> list[str]:
        return self._keys("qbridge.claims", self.unacked_key, self.unacked_index_key, "qbridge.again")  # type: ignore[no-any-return]

    @property
    def _ours(self: Any) -> Any:
        """A client that puts nothing before keys, kept: kombu makes one for each command.

        A closed channel keeps the one that it had: a run may come to its end after the connection did.
        """
        if self.stays:
            return self._client_of_its_own
        if self._kept is None or not (self.closed or self._kept.connection_pool is self.pool):
            self._kept = redis.Redis(connection_pool=self.pool)
        return self._kept

    @contextmanager
    def conn_or_acquire(self: Any, client: Any = None) -> Iterator[Any]:
        """kombu's clients, one per pool instead of one per command."""
        if client is None:
            pool = self.pool
            client = self.__dict__.get("_theirs")
            if client is None or client.connection_pool is not pool:
                client = self.__dict__["_theirs"] = self._create_client()
        yield client
