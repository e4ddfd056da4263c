"""What must begin anew in a forked child: objects whose threads and connections belong to the parent."""

from __future__ import annotations

import os
from typing import Protocol
from weakref import WeakSet

__all__ = ["BeginsAnew", "begin_anew_after_fork"]


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


def _begin_anew() -> None:
    for thing in list(_registered):
        thing.after_fork()


os.register_at_fork(after_in_child=_begin_anew)
