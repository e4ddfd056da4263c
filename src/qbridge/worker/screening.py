"""Which messages could no Celery producer have sent? Half-way through a worker they would break it.

Celery takes the headers of a message as they come. A number where it unpacks a pair fails after the pool's slot is
taken and before anything gives it back; a mapping where it expects an id fails in the tables of the worker's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from math import inf
from typing import Any

__all__ = ["fault_of"]


_LONGEST = 1e10
"""Seconds of a time limit, three centuries: a number without end has no place in the pool's clock."""


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _moment(value: Any) -> bool:
    return isinstance(value, str | datetime)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _limits(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(
            one is None
            or (isinstance(one, int | float) and not isinstance(one, bool) and (0 <= one <= _LONGEST or one == inf))
            for one in value
        )
    )


def _names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


def _mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


_SHAPES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "task": (_name, "a name"),
    "id": (_name, "a text that is not empty"),
    "root_id": (_text, "a text"),
    "parent_id": (_text, "a text"),
    "group": (_text, "a text"),
    "shadow": (_text, "a text"),
    "compression": (_text, "a text"),
    "eta": (_moment, "a time as text"),
    "expires": (_moment, "a time as text"),
    "retries": (_count, "a number from 0"),
    "group_index": (_count, "a number from 0"),
    "replaced_task_nesting": (_count, "a number from 0"),
    "timelimit": (_limits, "a pair of seconds"),
    "stamped_headers": (_names, "a list of names"),
    "stamps": (_mapping, "a mapping"),
}


def fault_of(headers: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the headers of a task message, or None.

    Args:
        headers: of protocol 2; of protocol 1, where the body is one mapping, the body.
    """
    for name, (fits, shape) in _SHAPES.items():
        value = headers.get(name)
        if value is None and fits is not _name:
            continue  # most are, and all others may be
        if not fits(value):
            return f"its {name} is not {shape}" if name in headers else f"it has no {name}"
    return None
