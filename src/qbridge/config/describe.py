"""What can be configured, as rows for the reference: place, type, default, environment variable, meaning."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from qbridge.config.bridge_config import BridgeConfig
from qbridge.config.models import QueueConfig
from qbridge.config.sources import environment_name
from qbridge.config.tree import Node, alternatives, node_of_model

__all__ = ["FieldRow", "describe"]


@dataclass(frozen=True)
class FieldRow:
    """One field of the configuration.

    Args:
        path: dotted: ``"worker.pool"``; fields of the items of a list follow ``[]``: ``"queues[].name"``.
        model: name of the model that has the field; a broker's or result backend's fields have one row per kind.
        type: as it is written in Python.
        default: likewise; empty if the field is required.
        environment: name of the variable; empty where the environment cannot reach.
        description: one or more sentences.
    """

    path: str
    model: str
    type: str
    default: str
    environment: str
    description: str


def describe() -> Iterator[FieldRow]:
    """List every field that can be configured.

    Yields:
        One row per field, parents before their parts.
    """
    yield from _rows(BridgeConfig, (), node_of_model(BridgeConfig))


def _rows(
    model: type[BaseModel], parents: tuple[str, ...], node: Node, *, reachable: bool = True
) -> Iterator[FieldRow]:
    for name, info in model.model_fields.items():
        path = (*parents, name)
        below = node.children.get(name, Node())
        yield FieldRow(
            path=".".join(path),
            model=model.__name__,
            type=_type(info.annotation),
            default=_default(info),
            environment=environment_name(path) if reachable else "",
            description=_description(model, name, info),
        )
        if below.kinds:
            for room in below.kinds.values():
                yield from _rows(room, path, below, reachable=reachable)
        elif below.many:
            if name == "queues":
                yield from _rows(QueueConfig, (*parents, f"{name}[]"), below, reachable=False)
        else:
            for part in _models(info.annotation):
                yield from _rows(part, path, below, reachable=reachable)
            for each in _dataclasses(info.annotation):
                yield from _parts_of_dataclass(each, path)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    for part in alternatives(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            yield part


def _dataclasses(annotation: Any) -> Iterator[type]:
    for part in alternatives(annotation):
        if isinstance(part, type) and is_dataclass(part):
            yield part


def _parts_of_dataclass(model: type, parents: tuple[str, ...]) -> Iterator[FieldRow]:
    docs = _argument_docs(model)
    for item in fields(model):
        path = (*parents, item.name)
        yield FieldRow(
            path=".".join(path),
            model=model.__name__,
            type=str(item.type),
            default="" if item.default is MISSING else repr(item.default),
            environment=environment_name(path),
            description=" ".join(docs.get(item.name, "").split()),
        )


def _type(annotation: Any) -> str:
    """A type as one would write it, without constraints."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Union, types.UnionType):
        return " | ".join(_type(part) for part in arguments)
    if origin is Literal:
        return " | ".join(repr(part) for part in arguments)
    if annotation is type(None):
        return "None"
    if annotation is Ellipsis:
        return "..."
    name = getattr(origin or annotation, "__name__", str(annotation))
    return f"{name}[{', '.join(_type(part) for part in arguments)}]" if arguments else name


def _default(info: FieldInfo) -> str:
    if info.default_factory is not None:
        return "see description"
    default = info.default
    if default is PydanticUndefined:
        return ""
    if isinstance(default, BaseModel):
        return f"{type(default).__name__}()"
    if isinstance(default, SecretStr):
        return "'**'"
    return repr(str(default)) if isinstance(default, PurePath) else repr(default)


def _description(model: type[BaseModel], name: str, info: FieldInfo) -> str:
    text = info.description or _argument_docs(model).get(name) or _SHARED.get(name, "")
    return " ".join(text.split())


#: What every room has and none describes for itself.
_SHARED = {
    "kind": "Which service is meant.",
    "timeout": "Seconds that ``get()`` waits where the caller names none.",
    "look_timeout": "Seconds that one look may take: ``state``, ``ready()``, ``progress()``, ``forget()``.",
}


@cache
def _argument_docs(model: type) -> dict[str, str]:
    """What the docstrings of a model and of its bases say about each argument."""
    found: dict[str, str] = {}
    for each in reversed(model.__mro__):
        doc = inspect.cleandoc(each.__dict__.get("__doc__") or "")
        _, _, arguments = doc.partition("\nArgs:\n")
        name = ""
        for line in arguments.splitlines():
            if line and not line.startswith(" "):
                break
            start = re.match(r" {4}(\w+): (.*)", line)
            if start:
                name = start[1]
                found[name] = start[2]
            elif name and line.strip():
                found[name] += " " + line.strip()
        described = each.__dict__.get("__pydantic_fields__", {})
        found |= {key: info.description for key, info in described.items() if info.description}
    return {key: text[:1].upper() + text[1:] for key, text in found.items()}
