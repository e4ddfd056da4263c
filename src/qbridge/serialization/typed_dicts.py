"""How does a ``typing.TypedDict`` cross the wire on Python 3.11, where pydantic takes that of typing_extensions only?

Annotations are rebuilt with an equal ``typing_extensions.TypedDict`` in its place, wherever it stands in them. One that
is a field of a model or a dataclass is out of reach: pydantic's own error says there what to import.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any

import typing_extensions

__all__ = ["readable"]

_NEEDED = sys.version_info < (3, 12)


def readable(annotation: Any) -> Any:
    """Return an annotation that pydantic reads, equal to the given one.

    Args:
        annotation: with all its names resolved.
    """
    return _rebuilt(annotation, {}) if _NEEDED else annotation


def _rebuilt(annotation: Any, made: dict[Any, Any]) -> Any:
    if typing.is_typeddict(annotation) and type(annotation).__module__ == "typing":
        return _modern(annotation, made)
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if not parts or origin is typing.Literal:
        return annotation
    if origin is Annotated:
        new = _rebuilt(parts[0], made)
        return annotation if new is parts[0] else Annotated[(new, *annotation.__metadata__)]
    rebuilt = tuple(_rebuilt(part, made) for part in parts)
    if all(new is old for new, old in zip(rebuilt, parts, strict=True)):
        return annotation
    if isinstance(annotation, types.UnionType):
        return functools.reduce(operator.or_, rebuilt)
    if isinstance(annotation, types.GenericAlias):
        return origin[rebuilt]
    return annotation.copy_with(rebuilt)


def _modern(old: Any, made: dict[Any, Any]) -> Any:
    if old in made:
        return made[old]
    made[old] = old  # one that refers to itself stays as it is there, and pydantic refuses it
    hints: Mapping[str, Any] = typing.get_type_hints(old, include_extras=True)
    fields: dict[str, Any] = {}
    for name, hint in hints.items():
        new = _rebuilt(hint, made)
        marked = typing.get_origin(hint) in (typing.Required, typing.NotRequired)
        # What a class inherits and what it adds may differ in total=, so each key says it for itself.
        fields[name] = new if marked or name not in old.__optional_keys__ else typing.NotRequired[new]
    namespace = {"__module__": old.__module__, "__qualname__": old.__qualname__, "__doc__": old.__doc__}
    make: Any = typing_extensions.TypedDict  # at run time, which no checker can follow
    modern = make(old.__name__, fields)
    for name, value in namespace.items():
        setattr(modern, name, value)
    if hasattr(old, "__pydantic_config__"):
        modern.__pydantic_config__ = old.__pydantic_config__
    made[old] = modern
    return modern
