"""What every broker and result backend offers: its configuration model, capabilities, Celery settings and checks.

A *room* is one package (or module) under ``qbridge.backends``. Its model is what the operator writes; the methods
say what that means to Celery. Adding a service means adding a room and one line in the union in ``qbridge.config``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeGuard

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from qbridge.backends.kept import KeptQueue
from qbridge.backends.urls import mask_url
from qbridge.exceptions import ConfigurationError

__all__ = [
    "HEADER_NOT_BEFORE",
    "HEADER_UNREADABLE",
    "LATEST",
    "REDIS_KEYS",
    "TAKEN_FROM",
    "Broker",
    "BrokerCapabilities",
    "Finding",
    "Priority",
    "QueueDepth",
    "ResultBackend",
    "ResultCapabilities",
    "Room",
    "Seconds",
    "is_time",
    "need_driver",
]

HEADER_NOT_BEFORE = "qbridge_not_before"
"""Message header with the time until when a broker of ours keeps a message, in seconds since 1970."""
HEADER_UNREADABLE = "qbridge_unreadable"
"""Header of a message of which something cannot be read: what that was, in base64.

On RabbitMQ the first 40,000 octets of its properties, in an embedded file as many of its envelope: it has no other
header then. On Redis, where it keeps all others, a JSON list with the names of those that are too deep, or no times.
"""
LATEST = 253_402_387_199.0
"""Seconds since 1970 after which no time is one: the end of the year 9999, in the zone where it is latest."""
REDIS_KEYS = ("qbridge.", "_kombu.binding.", "celery-task-meta-", "celery-taskset-meta-", "chord-unlock-")
"""What the names of keys in Redis begin with that are no queues: the transport's own, and results."""
TAKEN_FROM = "qbridge_queue"
"""In the ``delivery_info`` of a received message: the queue it was in, which a routing key does not tell."""

Level = Literal["ok", "info", "warning", "error"]
Priority = Literal["low", "normal", "high"]


def is_time(value: Any) -> TypeGuard[float]:
    """Tell whether a value can be seconds since 1970: Infinity, NaN and numbers of any length come in JSON too."""
    return isinstance(value, int | float) and -LATEST <= value <= LATEST


def _seconds(value: Any) -> Any:
    return value.total_seconds() if isinstance(value, timedelta) else value


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)]
"""A duration above zero: seconds or a ``timedelta`` going in, seconds held."""


def need_driver(module: str, extra: str, what: str) -> None:
    """Say at configuration time that an optional driver is missing, without importing it.

    Args:
        module: top-level name of the driver, such as ``"psycopg"``.
        extra: qbridge's extra that brings it.
        what: what needs it, for the message.

    Raises:
        ConfigurationError: if it is not installed, naming the exact extra.
    """
    if find_spec(module) is None:
        raise ConfigurationError(f"{what} needs {module}, which is not installed", f'pip install "qbridge[{extra}]"')


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
class QueueDepth:
    """What is in one queue now; None where the broker does not tell.

    Args:
        name: of the queue.
        waiting: messages that no worker has taken; None if the queue does not exist.
        running: messages that workers hold: running tasks, and tasks fetched ahead.
        consumers: how many consume it.
    """

    name: str
    waiting: int | None
    running: int | None = None
    consumers: int | None = None


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
    claims: bool = False
    """Who may run, what was sent and what is revoked can be agreed here, across processes and restarts."""
    notes: tuple[str, ...] = ()


class Room(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True):
    """Base of all brokers and result backends: frozen, no unknown names, no input in errors.

    Raises:
        ConfigurationError: if a field is unknown (with a did-you-mean), wrong, or contradicts another.
    """

    schemes: ClassVar[tuple[str, ...]] = ()
    """The URL schemes that mean this service."""

    kind: str

    if not TYPE_CHECKING:  # type checkers see the fields, or the __init__ that a room spells out

        def __init__(self, /, **fields: Any) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise _as_configuration_error(type(self), error) from None

        # pydantic's own mark for "validate nested models without calling __init__": a room inside another model then
        # reports its faults with their path, as if this method were not here.
        __init__.__pydantic_base_init__ = True

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read a URL as kombu, Celery or SQLAlchemy would read it.

        Raises:
            ConfigurationError: if it cannot be read or says what nothing reads; the message never shows a password.
        """
        raise NotImplementedError  # every room says its own

    def celery_url(self) -> str:
        """The URL for Celery's ``broker_url`` or ``result_backend``: may hold the password, never print it."""
        raise NotImplementedError  # every room says its own

    def safe_url(self) -> str:
        """The URL with the password replaced by ``**``: for messages, logs and tables."""
        return mask_url(self.celery_url())

    def celery_settings(self) -> dict[str, Any]:
        """The Celery settings that this choice means under ``defaults="safe"``: name to value, secrets included."""
        raise NotImplementedError  # every room says its own

    def minimal_celery_settings(self) -> dict[str, Any]:
        """The Celery settings that the user's own fields mean, and no others: for ``defaults="celery"``."""
        raise NotImplementedError  # every room says its own


def _as_configuration_error(room: type[Room], error: ValidationError) -> ConfigurationError:
    """Turn pydantic's report into one sentence per fault, without the input (it may hold a password)."""
    faults, todo = [], f"Read the documentation of {room.__name__} for what each field takes."
    for fault in error.errors(include_input=False, include_url=False):
        where = ".".join(str(step) for step in fault["loc"])
        cause = fault.get("ctx", {}).get("error")
        if isinstance(cause, ConfigurationError):
            if error.error_count() == 1:
                return cause
            faults.append(str(cause))
        elif fault["type"] == "extra_forbidden":
            near = get_close_matches(str(fault["loc"][-1]), list(room.model_fields), n=1)
            faults.append(f"{where}: no such field" + (f" (did you mean {near[0]}?)" if near else ""))
            todo = f"Its fields are {', '.join(room.model_fields)}."
        else:
            message = fault["msg"].removeprefix("Value error, ")
            faults.append(f"{where}: {message}" if where else message)
    return ConfigurationError(f"{room.__name__}: {'; '.join(faults)}", todo)


class Broker(Room, frozen=True):
    """A message broker."""

    publish_timeout: Seconds = 10.0
    """Seconds that a send may take in all, retries included, before ``BrokerUnavailable``."""

    @property
    def capabilities(self) -> BrokerCapabilities:
        """What this broker, configured like this, can do."""
        raise NotImplementedError  # every room says its own

    def celery_priority(
        self,
        level: Priority,
        *,
        queue_type: str | None = None,
        max_priority: int | None = None,
        server_version: tuple[int, ...] | None = None,
    ) -> int | None:
        """The AMQP priority number that stands for ``level``, or None to send none.

        Args:
            level: ``"low"``, ``"normal"`` or ``"high"``.
            queue_type: the queue's own type, where it differs from the broker's.
            max_priority: ``max_priority`` of a classic queue, if it has one.
            server_version: of the server that will take the message; None while it has not been asked.

        Raises:
            UnsupportedFeature: if there are no priorities here; the message names the way.
        """
        raise NotImplementedError  # every room says its own

    def kept_queue(self, connection: Any, name: str) -> AbstractContextManager[KeptQueue]:
        """Open a queue of dead letters for reading, in a way that does not disturb it.

        Args:
            connection: a kombu connection to this broker that nobody else uses; it may not be connected yet.
            name: of the queue; one that does not exist is empty.
        """
        raise NotImplementedError  # every room says its own

    def _publish_retry_policy(self) -> dict[str, Any]:
        """kombu's own retries of one publish: once, at once; more would add up to more than ``publish_timeout``."""
        return {"max_retries": 1, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.2}

    def check(self, queues: Sequence[Any] = ()) -> Iterable[Finding]:
        """Look at the live server and yield findings; bounded by ``publish_timeout``, never raises for a sick server.

        Args:
            queues: the ``QueueConfig`` objects that the bridge knows.
        """
        raise NotImplementedError  # every room says its own


class ResultBackend(Room, frozen=True):
    """A place where results are kept."""

    timeout: Seconds = 60.0
    """Seconds that ``TaskResult.get()`` waits where the caller names no timeout."""

    look_timeout: Seconds = 5.0
    """Seconds that one look may take: ``state``, ``ready()``, ``progress()``, ``forget()``."""

    @property
    def capabilities(self) -> ResultCapabilities:
        """What this result backend, configured like this, can do."""
        raise NotImplementedError  # every room says its own

    def check(self) -> Iterable[Finding]:
        """Look at the live server and yield findings; bounded, never raises for a sick server."""
        raise NotImplementedError  # every room says its own
