"""Which names can be written where: the configuration's models as a tree of names."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

__all__ = ["Node", "Path", "alternatives", "node_of_model"]

Path = tuple[str, ...]


@dataclass(frozen=True)
class Node:
    """One place in the configuration.

    Args:
        children: names that can be written below; empty for a plain value.
        kinds: for a tagged union, the model behind each ``kind``.
        many: a list of values is meant.
        free: a mapping is meant whose names are checked elsewhere.
    """

    children: Mapping[str, Node] = field(default_factory=dict)
    kinds: Mapping[str, type[BaseModel]] = field(default_factory=dict)
    many: bool = False
    free: bool = False

    def paths(self, prefix: Path = ()) -> Iterator[Path]:
        """All places below this one, each before what is below it."""
        for name, child in self.children.items():
            yield (*prefix, name)
            yield from child.paths((*prefix, name))


@cache
def node_of_model(model: type[BaseModel]) -> Node:
    """The tree of one model."""
    return Node({name: _node(info.annotation) for name, info in model.model_fields.items()})


def _node(annotation: Any) -> Node:
    parts = list(alternatives(annotation))
    models = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
    many = [part for part in parts if get_origin(part) in (tuple, list, set, frozenset)]
    kinds = {tag: model for model in models if (tag := _tag(model)) is not None}
    children: dict[str, Node] = {}
    for model in models:
        for name, child in node_of_model(model).children.items():
            children.setdefault(name, child)
    for part in parts:
        if isinstance(part, type) and is_dataclass(part):
            children |= {item.name: Node() for item in fields(part)}
    if kinds:
        children.setdefault("url", Node())  # a room can be written as a URL with other fields beside it
    if many and not models:
        # The fields of a list's items: for messages only, the environment cannot reach below a list.
        for item in get_args(many[0]):
            for name, child in _node(item).children.items():
                children.setdefault(name, child)
    free = any(get_origin(part) in (dict, Mapping) or part in (dict, Mapping) or _is_mapping(part) for part in parts)
    return Node(children, kinds, bool(many), free)


def _is_mapping(part: Any) -> bool:
    return isinstance(part, type) and issubclass(part, Mapping)


def _tag(model: type[BaseModel]) -> str | None:
    info = model.model_fields.get("kind")
    if info is None or get_origin(info.annotation) is not Literal:
        return None
    return str(get_args(info.annotation)[0])


def alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union, without ``Annotated`` and None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from alternatives(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from alternatives(part)
    elif annotation is not type(None):
        yield annotation
