"""Which options a task takes when it is declared and when it is sent; their types and the check of their names."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypedDict, cast, get_args

from qbridge.exceptions import ConfigurationError
from qbridge.retry import Retry
from qbridge.serialization.locked_messages import BROKERS, NOT_SIGNED

__all__ = [
    "CELERY_HEADERS",
    "Delivery",
    "Priority",
    "SendOptions",
    "TaskOptions",
    "check_names",
    "checked_send_options",
    "checked_task_options",
]

Priority = Literal["low", "normal", "high"]
Delivery = Literal["at_least_once", "at_most_once"]
Serialization = Literal["json", "msgpack"]
When = float | timedelta | datetime
Unique = Callable[[Mapping[str, Any]], str]


class TaskOptions(TypedDict, total=False):
    """What ``@bridge.task(...)`` accepts beside ``context``."""

    name: str
    """Name on the wire; default: module and function, such as ``shop.tasks.add``."""
    queue: str
    """Queue it is sent to; naming it declares it. Default: the configuration's ``default_queue``."""
    priority: Priority
    retry: Retry | None
    """Default: the configuration's ``retry``."""
    delivery: Delivery
    """Default: the configuration's ``delivery``."""
    time_limit: float | timedelta
    """Seconds or timedelta after which the run is killed (process pool)."""
    soft_time_limit: float | timedelta
    """Seconds or timedelta after which ``SoftTimeLimitExceeded`` is raised in the run (process pool)."""
    rate_limit: str | float
    """Celery's: ``"10/s"``, ``"100/m"``, ``"1000/h"``, per worker."""
    results: bool
    """False: neither outcome nor state is stored."""
    expires: float | timedelta
    """Seconds or timedelta after sending; not run after that."""
    serialization: Serialization
    strict: bool
    """False: callers' arguments are coerced by pydantic (``"1"`` for an int)."""
    version: int
    """Of its arguments, from 1, which is the default: raise it when they change, and write ``@task.upcast(...)`` for
    calls of versions before. Workers leave calls of a version that they do not have yet to others."""
    unique: bool | Unique
    """True: while a call is queued or runs, another with the same arguments is not sent; its caller gets the handle of
    the first. A function of the arguments by name (JSON values) returns the text that must be the same instead."""


class SendOptions(TypedDict, total=False):
    """What ``task.using(...)`` and ``bridge.send(...)`` accept."""

    queue: str
    """A declared queue."""
    countdown: float | timedelta
    """Seconds or timedelta from now."""
    eta: datetime
    """When to run, at the earliest; with a time zone, or in the configuration's."""
    expires: When
    """Seconds, timedelta or datetime; not run after that."""
    priority: Priority
    task_id: str
    """1 to 155 characters, no control characters; default: a new UUID."""
    headers: Mapping[str, Any]
    """JSON values; ``TaskContext.headers`` shows them. Refused are names of Celery's protocol, those that begin with
    ``qbridge_``, and those that brokers write themselves (``x-death``, ``x-opt-...``, ``redelivered``); and more than
    180 headers or 45,000 octets of them."""
    idempotency_key: str
    """The second send of a task with the same key sends nothing, and returns the handle of the first."""
    deadline: datetime | timedelta
    """By when it has to be over, or how long from now; not begun after that, and inherited by what the task sends."""


CELERY_HEADERS = frozenset({
    "lang", "task", "id", "shadow", "eta", "expires", "group", "group_index", "retries", "timelimit", "root_id",
    "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers",
    "stamps", "compression",
})  # fmt: skip
"""Message headers that are the protocol's own."""

_OUR_HEADERS = "qbridge_"
_VERSIONS = 10**9
_ID = re.compile(r"(?!\s)[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,155}(?<!\s)")
"""What every result backend keeps: databases have 155 characters, and some see no blanks at an end."""
_SHOWN = 60
_LONGEST = 100 * 366 * 86400.0
"""Seconds: more than anybody waits, and less than what clocks and servers can count."""
_RATE = re.compile(r"\d+(\.\d+)?(/[smh])?")
_CHOICES = {"priority": get_args(Priority), "delivery": get_args(Delivery), "serialization": get_args(Serialization)}


def check_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse unknown option names.

    Raises:
        TypeError: if a name is unknown; suggests the one that was probably meant.
    """
    names = sorted(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(names)}"
            raise TypeError(f"{where} has no option {name!r}; {hint}")


def _number(name: str, value: Any) -> float:
    given = value
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(f"{name}={value!r} is not a time", "Give seconds as a number, or a timedelta.")
    if not math.isfinite(value):
        raise ConfigurationError(f"{name}={value!r} has no end", "Give seconds as a number, or leave it out.")
    if abs(value) > _LONGEST:
        raise ConfigurationError(f"{name}={given!r} is more than a hundred years", "Give fewer seconds.")
    return float(value)


def checked_task_options(task: str, options: TaskOptions) -> TaskOptions:
    """Return the options of a declaration with every time in seconds.

    Args:
        task: name of the task, for messages.
        options: as given to the decorator; their names are known.

    Raises:
        ConfigurationError: if a value makes no sense: Celery takes any, and what it means shows in a worker at night.
    """
    try:
        return _checked_task_options(options)
    except ConfigurationError as error:
        raise ConfigurationError(f"task {task}: {error.what}", error.todo) from None


def _checked_task_options(options: TaskOptions) -> TaskOptions:
    checked: dict[str, Any] = {**options}
    for name in ("time_limit", "soft_time_limit", "expires"):
        if checked.get(name) is not None:
            checked[name] = _number(name, checked[name])
            if checked[name] <= 0:
                raise ConfigurationError(f"{name}={checked[name]!r} is not positive", "Give seconds above 0.")
    soft, hard = checked.get("soft_time_limit"), checked.get("time_limit")
    if soft is not None and hard is not None and soft > hard:
        raise ConfigurationError(
            f"soft_time_limit={soft!r} is longer than time_limit={hard!r}",
            "The soft limit warns before the hard one kills: make it the smaller.",
        )
    for name, words in _CHOICES.items():
        if checked.get(name) is not None and checked[name] not in words:
            near = difflib.get_close_matches(str(checked[name]), words, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Give {' or '.join(map(repr, words))}."
            raise ConfigurationError(f"{name}={checked[name]!r} is not a {name}", hint)
    for name in ("results", "strict"):
        if not isinstance(checked.get(name, True), bool):
            raise ConfigurationError(f"{name}={checked[name]!r} is not a switch", "Give True or False.")
    _check_queue(checked)
    _check_version(checked.get("version", 1))
    _check_unique(checked)
    if not isinstance(checked.get("retry"), Retry | None):
        raise ConfigurationError(f"retry={checked['retry']!r} is not a Retry", "Give Retry(on=..., attempts=...).")
    rate = checked.get("rate_limit")
    if rate is not None and (isinstance(rate, bool) or not _RATE.fullmatch(str(rate))):
        raise ConfigurationError(f"rate_limit={rate!r} is not a rate", "Give runs per time: '10/s', '100/m', '1000/h'.")
    if checked.get("name") is not None and (not isinstance(checked["name"], str) or not checked["name"]):
        raise ConfigurationError(f"name={checked['name']!r} is not a name", "Give a text that is not empty.")
    return cast(TaskOptions, checked)


def _check_version(version: object) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version < _VERSIONS:
        raise ConfigurationError(f"version={version!r} is not a version", "Give a whole number from 1.")


def _check_unique(checked: Mapping[str, Any]) -> None:
    unique = checked.get("unique", False)
    if not isinstance(unique, bool) and not callable(unique):
        raise ConfigurationError(f"unique={unique!r} is no switch and no function", "Give True, or a function.")
    if unique is not False and checked.get("results") is False:
        raise ConfigurationError(
            "unique and results=False do not go together", "Leave results=False out: a stored result tells the end."
        )


def checked_send_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return send options with every time as seconds or an aware datetime.

    Raises:
        TypeError: if a name is unknown.
        ConfigurationError: if a value makes no sense.
    """
    check_names(options, SendOptions.__annotations__, "using()")
    checked = {name: value for name, value in options.items() if value is not None}
    if "countdown" in checked:
        if "eta" in checked:
            raise ConfigurationError("countdown and eta were both given", "Give one of them.")
        checked["countdown"] = _number("countdown", checked["countdown"])
        if checked["countdown"] < 0:
            raise ConfigurationError(f"countdown={options['countdown']!r} lies in the past", "Give 0 or more.")
    if "eta" in checked and not isinstance(checked["eta"], datetime):
        raise ConfigurationError(f"eta={checked['eta']!r} is not a datetime", "Use countdown for a number of seconds.")
    if "expires" in checked and not isinstance(checked["expires"], datetime):
        seconds = _number("expires", checked["expires"])
        checked["expires"] = datetime.now(UTC) + timedelta(seconds=seconds)
    if "task_id" in checked and not (isinstance(checked["task_id"], str) and _ID.fullmatch(checked["task_id"])):
        raise ConfigurationError(
            f"task_id={_excerpt(checked['task_id'])} is not an id",
            "Give a text of 1 to 155 characters without control characters, surrogates and blanks at its ends.",
        )
    _check_queue(checked)
    key = checked.get("idempotency_key", "a")
    if not isinstance(key, str) or not key:
        raise ConfigurationError(f"idempotency_key={key!r} is no key", "Give a text that is not empty.")
    if checked.get("priority") not in (None, "low", "normal", "high"):
        raise ConfigurationError(
            f"priority={checked['priority']!r} is not a priority",
            "Give 'low', 'normal' or 'high'; brokers count differently.",
        )
    deadline = checked.get("deadline")
    if deadline is not None and not isinstance(deadline, datetime | timedelta):
        raise ConfigurationError(f"deadline={deadline!r} is not a time", "Give a datetime, or a timedelta from now.")
    if "headers" in checked:
        checked["headers"] = _own_headers(checked["headers"])
    return checked


def _crosses(value: Any, levels: int = 100) -> bool:
    """Tell whether a header arrives the same as JSON and as AMQP's table."""
    if isinstance(value, str):
        return not any("\ud800" <= sign <= "\udfff" for sign in value)
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if isinstance(value, list | tuple):
        return levels > 0 and all(_crosses(part, levels - 1) for part in value)
    if isinstance(value, dict):
        return levels > 0 and all(
            isinstance(key, str) and _crosses(key) and _crosses(part, levels - 1) for key, part in value.items()
        )
    return value is None or isinstance(value, float)


def _check_queue(checked: Mapping[str, Any]) -> None:
    queue = checked.get("queue")
    if queue is not None and (not isinstance(queue, str) or not queue):
        raise ConfigurationError(f"queue={_excerpt(queue)} is not a queue's name", "Give the name of a declared queue.")


def _excerpt(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


def _own_headers(headers: Any) -> dict[str, Any]:
    if not isinstance(headers, Mapping) or not all(isinstance(name, str) for name in headers):
        raise ConfigurationError("headers are not a mapping with names", "Give headers={'tenant': 'a'}, for example.")
    for name in headers:
        if name in CELERY_HEADERS:
            raise ConfigurationError(
                f"the header {name!r} belongs to Celery's protocol", "Give yours another name, such as 'x-tenant'."
            )
        if name.startswith(_OUR_HEADERS):
            raise ConfigurationError(
                f"the header {name!r} would be taken for one of qbridge's own",
                "Give yours another name, such as 'x-tenant'; for a deadline there is using(deadline=...).",
            )
        if name in NOT_SIGNED or name.startswith(BROKERS):
            raise ConfigurationError(
                f"the header {name!r} is one that brokers write, and does not reach the task",
                "Give yours another name, such as 'x-tenant'.",
            )
        if not _crosses(headers[name]):
            raise ConfigurationError(
                f"the header {name!r} is a {type(headers[name]).__name__} that does not arrive as it is everywhere",
                "Give text, numbers of 64 bits, and lists and mappings of them.",
            )
    return dict(headers)
