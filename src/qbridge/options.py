"""Which options a task takes when it is declared and when it is sent; their types and the check of their names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypedDict

from qbridge.exceptions import ConfigurationError
from qbridge.retry import Retry

__all__ = ["Delivery", "Priority", "SendOptions", "TaskOptions", "check_names", "checked_send_options"]

Priority = Literal["low", "normal", "high"]
Delivery = Literal["at_least_once", "at_most_once"]
When = float | timedelta | datetime


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
    time_limit: float
    """Seconds after which the run is killed (process pool)."""
    soft_time_limit: float
    """Seconds after which ``SoftTimeLimitExceeded`` is raised in the run (process pool)."""
    rate_limit: str
    """Celery's: ``"10/s"``, ``"100/m"``, ``"1000/h"``, per worker."""
    results: bool
    """False: neither outcome nor state is stored."""
    expires: float | timedelta
    """Seconds or timedelta after sending; not run after that."""
    serialization: Literal["json", "msgpack"]
    strict: bool
    """False: callers' arguments are coerced by pydantic (``"1"`` for an int)."""


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
    headers: Mapping[str, Any]
    """JSON values; ``TaskContext.headers`` shows them."""


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
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(f"{name}={value!r} is not a time", "Give seconds as a number, or a timedelta.")
    return float(value)


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
    if "task_id" in checked and (not isinstance(checked["task_id"], str) or not checked["task_id"]):
        raise ConfigurationError(f"task_id={checked['task_id']!r} is not an id", "Give a text that is not empty.")
    if checked.get("priority") not in (None, "low", "normal", "high"):
        raise ConfigurationError(
            f"priority={checked['priority']!r} is not a priority",
            "Give 'low', 'normal' or 'high'; brokers count differently.",
        )
    return checked
