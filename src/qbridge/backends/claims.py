"""How is it agreed, across processes, who may do something: what a result backend that keeps claims offers.

A *claim* says that a holder has a key, for a while, by the clock of the server. Its *token* grows with each new holder,
so that whoever writes under an old token can be refused. A backend that can keep claims has ``claim_store()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

__all__ = ["ANYBODY", "REVOKED_FOR", "Claim", "ClaimStore", "Kind", "Wanted", "claim_store"]

Kind = Literal["run", "once"]
"""What is claimed: the run of a task (key: its id), or the one send of a key."""

ANYBODY = "*"
"""In ``Wanted.over``: whoever holds it."""

REVOKED_FOR = 30 * 86400.0
"""Seconds for which a revocation is remembered at least: a delayed task may lie for long."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What somebody wants to claim.

    Args:
        key: what is claimed.
        holder: who wants it; a holder that has it already only extends it.
        lease: seconds until it ends if it is not extended.
        note: what the claim is to say to others; empty: what it says already.
        running: seconds for which the holder has acted as if it had the key: who took it within them is the later one,
            and keeps it even if that claim has ended.
        over: a holder from whom it is taken although its claim has not ended, unless that one is the later;
            ``ANYBODY``, or empty for nobody.
    """

    key: str
    holder: str
    lease: float
    note: str = ""
    running: float = 0.0
    over: str = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim as it is now.

    Args:
        holder: who has it, or had it last.
        token: a number that grows with each new holder of the key.
        age: seconds since the holder took it.
        left: seconds until it ends; not above 0 if it has ended.
        note: what the holder wrote.
    """

    holder: str
    token: int
    age: float
    left: float
    note: str = ""


class ClaimStore(Protocol):
    """Keeps claims, and which tasks are revoked. Each call is one atomic step by the server's clock.

    Errors are the driver's: callers know what they mean to them.
    """

    def take(self, kind: Kind, wanted: Sequence[Wanted]) -> list[Claim]:
        """Claim what is free, and extend what the holder has; return each as it is afterwards.

        Args:
            kind: what is claimed.
            wanted: any number; each key stands for itself.
        """
        ...

    def look(self, kind: Kind, key: str) -> Claim | None:
        """Return a claim, ended or not; None: nobody had it for as long as results are kept."""
        ...

    def release(self, kind: Kind, key: str, holder: str) -> None:
        """End a claim, if the holder has it."""
        ...

    def revoke(self, task_id: str) -> None:
        """Note that a task is revoked."""
        ...

    def is_revoked(self, task_id: str) -> bool:
        """Whether a task is revoked."""
        ...

    def revoked_since(self, moment: int) -> tuple[list[str], int]:
        """Return the ids of the tasks that were revoked since a moment, and the moment to ask from next time.

        Args:
            moment: as answered before; 0: all.
        """
        ...


def claim_store(backend: Any) -> ClaimStore | None:
    """Return what keeps claims beside the results of a Celery backend; None: it cannot.

    Args:
        backend: Celery's, ours or another.
    """
    make = getattr(backend, "claim_store", None)
    if make is None:
        return None
    store: ClaimStore = make()
    return store
