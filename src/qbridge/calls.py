"""What is one call of a task, before it is sent: its arguments as JSON, and where they belong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qbridge.task import TaskDefinition

__all__ = ["Call", "Item"]


class Call(tuple[list[Any], dict[str, Any]]):
    """Encoded arguments: ``(args, kwargs)`` made of JSON types."""

    __slots__ = ()


class Item(tuple["TaskDefinition", Call, Mapping[str, Any]]):
    """One call of a task, with its arguments checked and encoded; made by ``task.item(...)``.

    For ``bridge.send_many``, and what an upcaster returns.
    """

    __slots__ = ()
