"""``typing.TypedDict`` on Python 3.11: pydantic reads only the one of ``typing_extensions`` there.

Where a task's annotation names one, an equal class of ``typing_extensions`` is made from its fields and its
``__required_keys__``, so that users need not know the difference.
"""

from __future__ import annotations

import sys
import types
import typing
from typing import Any

import typing_extensions

__all__ = ["readable"]


def readable(annotation: Any) -> Any:
    """Return the annotation with every ``typing.TypedDict`` in it replaced, or the annotation itself."""
    if sys.version_info >= (3, 12):
        return annotation
    return _Replacing().of(annotation)


class _Replacing:
    """One pass over one annotation; a class that contains itself is left to pydantic's own message."""

    def __init__(self) -> None:
        self._seen: dict[type, Any] = {}

    def of(self, annotation: Any) -> Any:
        if isinstance(annotation, type) and typing.is_typeddict(annotation) and type(annotation).__module__ == "typing":
            return self._typed_dict(annotation)
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is None or not arguments or origin is typing.Literal:
            return annotation
        if origin is typing.Annotated:
            inner, *extras = arguments
            replaced = self.of(inner)
            return annotation if replaced is inner else typing.Annotated[replaced, *extras]
        new = tuple(self.of(argument) for argument in arguments)
        if all(after is before for after, before in zip(new, arguments, strict=True)):
            return annotation
        if origin in (typing.Union, types.UnionType):
            return typing.Union[new]  # noqa: UP007 - made at run time
        return annotation.copy_with(new) if hasattr(annotation, "copy_with") else origin[new]

    def _typed_dict(self, found: Any) -> Any:
        if found in self._seen:
            return found
        self._seen[found] = None
        fields: dict[str, Any] = {}
        for name, hint in typing.get_type_hints(found, include_extras=True).items():
            inner = hint
            while typing.get_origin(inner) in (typing.Required, typing.NotRequired):
                inner = typing.get_args(inner)[0]
            mark = typing_extensions.Required if name in found.__required_keys__ else typing_extensions.NotRequired
            fields[name] = mark[self.of(inner)]
        made: Any = typing_extensions.TypedDict(found.__name__, fields)  # type: ignore[misc]  # pyright: ignore[reportArgumentType]  # made at run time
        made.__module__, made.__qualname__, made.__doc__ = found.__module__, found.__qualname__, found.__doc__
        return made
