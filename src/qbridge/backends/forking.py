"""What must begin anew in a forked child: objects whose threads and connections belong to the parent."""

from __future__ import annotations

import logging
import os
import sys
import threading
from functools import cached_property
from typing import Protocol
from weakref import WeakSet

__all__ = ["BeginsAnew", "begin_anew_after_fork"]

logger: logging.Logger = logging.getLogger(__name__)


class BeginsAnew(Protocol):
    """An object that knows how to let go of its parent's threads, locks and connections."""

    def after_fork(self) -> None:
        """In a forked child, where no other thread runs yet: begin anew, without closing what is the parent's."""


_registered: WeakSet[BeginsAnew] = WeakSet()


def begin_anew_after_fork(thing: BeginsAnew) -> None:
    """Have ``thing.after_fork()`` called in each forked child, for as long as the object lives.

    This holds for ``os.fork``, multiprocessing and billiard; their own hooks know only of forks of their own.
    """
    _registered.add(thing)


def _renew_locks() -> None:
    """Give every cached property of the libraries below us a new lock.

    kombu's take one at each reading, and one lock serves all objects of a class (functools' did so before Python
    3.12): a thread that read ``channel.client`` at the moment of the fork would stop the child's first send for ever.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in {"celery", "kombu", "amqp", "qbridge"}:
            continue
        for kind in list(vars(module).values()):
            # by type(): isinstance would ask Celery's proxies what they stand for, and so make it
            if issubclass(type(kind), type) and kind.__module__ == name:
                for value in list(vars(kind).values()):
                    if issubclass(type(value), cached_property) and hasattr(value, "lock"):
                        value.lock = threading.RLock()


def _begin_anew() -> None:
    _renew_locks()
    for thing in list(_registered):
        try:
            thing.after_fork()
        except Exception:
            # Python ignores what a hook raises: the others would never hear of the fork.
            logger.exception("After a fork: %s could not let go of what is its parent's", type(thing).__name__)


os.register_at_fork(after_in_child=_begin_anew)
