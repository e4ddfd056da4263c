"""What stays of the parent's connections to Redis in a forked child? Nothing.

redis-py makes new connections in a child, and forgets the parent's without closing the child's copies of their sockets
while anything else knows them. A server sees the end of a connection when the last copy is closed: one whose process
was killed would live as long as the last of its children.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from qbridge.backends.forking import begin_anew_after_fork

__all__ = ["not_for_children"]


class _Pools:
    """The connection pools of this process."""

    def __init__(self) -> None:
        self.known: WeakSet[Any] = WeakSet()
        begin_anew_after_fork(self)

    def after_fork(self) -> None:
        """In a forked child: close this process's copies of the sockets, and say nothing on them."""
        for pool in list(self.known):
            manager = getattr(pool, "sentinel_manager", None)
            asked = [sentinel.connection_pool for sentinel in getattr(manager, "sentinels", ())]
            for each in (pool, *asked):
                _close_copies(each)


_pools = _Pools()


def not_for_children(pool: Any) -> Any:
    """Have a pool's sockets closed in each forked child, before anything else uses them.

    Args:
        pool: redis-py's ``ConnectionPool``, or a Sentinel's.

    Returns:
        The pool.
    """
    _pools.known.add(pool)
    return pool


def _close_copies(pool: Any) -> None:
    # redis-py's names; the last one is that of pools that wait for a free connection
    for name in ("_available_connections", "_in_use_connections", "_connections"):
        for connection in list(getattr(pool, name, ())):
            sock = getattr(connection, "_sock", None)
            if sock is not None:
                # Not disconnect(): kombu's goes on to take the socket from the poller, which the parent shares.
                sock.close()
                connection._sock = None
