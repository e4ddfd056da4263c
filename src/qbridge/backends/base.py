"""What every broker and result backend offers: its configuration model, capabilities, Celery settings and checks.

A *room* is one package (or module) under ``qbridge.backends``. Its model is what the operator writes; the methods
say what that means to Celery. Adding a service means adding a room and one line in the union in ``qbridge.config``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

__all__ = ["Broker", "BrokerCapabilities", "Finding", "ResultBackend", "ResultCapabilities", "Room"]

Level = Literal["ok", "info", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of ``qbridge check``: what was looked at, what was found, what to do.

    Args:
        level: ``"error"`` makes the check's exit code non-zero.
        code: stable, dotted, for machines: ``"broker.unreachable"``.
        what: what was found, naming the object; never a secret.
        todo: what to do about it; empty for ``"ok"``.
    """

    level: Level
    code: str
    what: str
    todo: str = ""


@dataclass(frozen=True)
class BrokerCapabilities:
    """What a broker can do, said instead of pretended."""

    priorities: Literal["none", "two levels", "three levels"]
    native_delays: bool
    publisher_confirms: bool
    rpc_results: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResultCapabilities:
    """What a result backend can do, said instead of pretended."""

    readable_elsewhere: bool
    """A result can be read by id from another process, more than once."""
    chords: bool
    progress: bool
    notes: tuple[str, ...] = ()


class Room(BaseModel):
    """Base of all brokers and result backends: frozen, no unknown names, no input in errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True)

    kind: str

    def safe_url(self) -> str:
        """The URL with the password replaced by ``**``: for messages, logs and tables."""
        raise NotImplementedError  # every room says its own

    def celery_settings(self) -> dict[str, Any]:
        """The Celery settings that this choice means under ``defaults="safe"``: name to value, secrets included."""
        raise NotImplementedError  # every room says its own

    def minimal_celery_settings(self) -> dict[str, Any]:
        """The Celery settings that the user's own fields mean, and no others: for ``defaults="celery"``."""
        raise NotImplementedError  # every room says its own


class Broker(Room):
    """A message broker."""

    publish_timeout: float = 10.0
    """Seconds that a send may take in all, retries included, before ``BrokerUnavailable``."""

    @property
    def capabilities(self) -> BrokerCapabilities:
        """What this broker, configured like this, can do."""
        raise NotImplementedError  # every room says its own

    def celery_priority(self, level: Literal["low", "normal", "high"]) -> int | None:
        """The AMQP priority number that stands for ``level``, or None to send none.

        Raises:
            UnsupportedFeature: if this broker has no priorities; the message names the way.
        """
        raise NotImplementedError  # every room says its own

    def check(self, queues: Sequence[Any] = ()) -> Iterable[Finding]:
        """Look at the live server and yield findings; bounded by ``publish_timeout``, never raises for a sick server.

        Args:
            queues: the ``QueueConfig`` objects that the bridge knows.
        """
        raise NotImplementedError  # every room says its own


class ResultBackend(Room):
    """A place where results are kept."""

    timeout: float = 60.0
    """Seconds that ``TaskResult.get()`` waits where the caller names no timeout."""

    @property
    def capabilities(self) -> ResultCapabilities:
        """What this result backend, configured like this, can do."""
        raise NotImplementedError  # every room says its own

    def check(self) -> Iterable[Finding]:
        """Look at the live server and yield findings; bounded, never raises for a sick server."""
        raise NotImplementedError  # every room says its own
