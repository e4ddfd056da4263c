"""What becomes of the stored outcome of a task that is sent again? It is forgotten, so that who asks waits for the new.

It goes before the message: a worker may end the new run at once, and its outcome must not be taken for the old one. So
it is put back where the message was not sent after all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any, Protocol

from qbridge.dead_letters.letter import DeadLetter
from qbridge.exceptions import QBridgeError, ResultsUnavailable

__all__ = ["Outcomes", "StoredOutcomes"]

Meta = Mapping[str, Any]


class StoredOutcomes(Protocol):
    """The result backend; the bridge provides it. Each call is bounded by ``look_timeout``."""

    def look(self, task_id: str) -> Meta:
        """Return what is stored now."""
        ...

    def clear(self, task_id: str) -> None:
        """Delete what is stored; who asks for it again waits."""
        ...

    def restore(self, task_id: str, meta: Meta) -> None:
        """Store what was deleted, if nothing is stored now."""
        ...


class Outcomes:
    """The stored outcomes of the letters of one replay.

    Args:
        stored: the result backend; None: other processes' results cannot be read there.
    """

    def __init__(self, stored: StoredOutcomes | None) -> None:
        self._stored = stored

    @contextmanager
    def forgotten(self, letter: DeadLetter) -> Iterator[Sent]:
        """Forget the outcome that the letter stands for, while it is sent; put it back if that fails.

        Without results a task can be replayed all the same: a backend that does not answer is not asked again.

        Args:
            letter: the letter.

        Yields:
            What to tell whether it was sent.
        """
        sent = Sent()
        meta = self._forget(letter)
        try:
            yield sent
        except BaseException:
            self._put_back(letter, meta)
            raise
        # somebody else has sent it: what was there may have been the outcome of that run
        if not sent.confirmed and meta is not None and _is_after(meta, letter):
            self._put_back(letter, meta)

    def _forget(self, letter: DeadLetter) -> Meta | None:
        stored, task_id = self._stored, letter.task_id
        if stored is None or task_id is None:
            return None
        try:
            meta = stored.look(task_id)
            if meta.get("status") not in ("FAILURE", "REVOKED" if letter.reason == "expired" else "FAILURE"):
                return None
            stored.clear(task_id)
        except ResultsUnavailable:
            self._stored = None
            return None
        except QBridgeError:  # forgotten before, or not to be read
            return None
        return meta

    def _put_back(self, letter: DeadLetter, meta: Meta | None) -> None:
        if self._stored is not None and letter.task_id is not None and meta is not None:
            with suppress(QBridgeError):  # what has hindered the replay is to be told
                self._stored.restore(letter.task_id, meta)


class Sent:
    """Whether a letter was sent; not known to be, at first."""

    confirmed = False


def _is_after(meta: Meta, letter: DeadLetter) -> bool:
    """Return whether an outcome is newer than the letter, or may be."""
    try:
        done = datetime.fromisoformat(str(meta.get("date_done")))
    except ValueError:
        return True
    return (done if done.tzinfo is not None else done.replace(tzinfo=UTC)) > letter.at
