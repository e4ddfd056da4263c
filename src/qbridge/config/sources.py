"""Where do values come from: arguments, environment, ``.env``, ``qbridge.toml``, ``[tool.qbridge]``.

Strongest first, in that order. The files are looked for in the working directory and then in its parents, up to the
project's folder: the first that has a ``qbridge.toml``, a ``pyproject.toml`` or a ``.git``. Where no parent is a
project's folder, only the working directory counts.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

from dotenv import dotenv_values

from qbridge.config.celery_names import parse_setting
from qbridge.config.faults import Fault
from qbridge.config.merging import Merged, Said
from qbridge.config.suggest import did_you_mean
from qbridge.config.tree import Node, Path

__all__ = ["PREFIX", "environment_name", "gather"]

PREFIX = "QBRIDGE_"
#: Names under the prefix that configure something else: servers for test suites.
_FOREIGN = ("QBRIDGE_TEST_",)
_PROJECT_MARKS = ("qbridge.toml", "pyproject.toml", ".git")


def environment_name(path: Path) -> str:
    """The environment variable of a place in the configuration.

    Args:
        path: such as ``("worker", "pool")``.

    Returns:
        Its name: ``QBRIDGE_WORKER__POOL``.
    """
    return PREFIX + "__".join(path).upper()


def gather(root: Node, arguments: Mapping[str, Any]) -> Merged:
    """Collect what all sources say.

    Args:
        root: the tree of the configuration.
        arguments: what the caller passed.

    Returns:
        The values, who said them, and the faults that were found on the way.
    """
    merged = Merged(root)
    places = _places(FilePath.cwd())
    for read in (_pyproject, _toml, _dotenv):
        for said in read(places, root, merged.faults):
            merged.add(said)
    for said in _variables(os.environ, root, merged.faults, "environment variable {}"):
        merged.add(said)
    for name, value in arguments.items():
        if name not in root.children:
            merged.faults.append(_unknown((name,), root, "argument"))
        else:
            merged.add(Said((name,), value, "argument"))
    return merged


def _unknown(path: Path, root: Node, source: str) -> Fault:
    names = {".".join(known) for known in root.paths()}
    todo = did_you_mean(".".join(path), root.children) or did_you_mean(".".join(path), names)
    return Fault(path, "no such field", todo or f"known here: {', '.join(root.children)}", source)


def _places(start: FilePath) -> list[FilePath]:
    """The folders to look into, nearest first."""
    folders = [start, *start.parents]
    for depth, folder in enumerate(folders):
        if any((folder / mark).exists() for mark in _PROJECT_MARKS):
            return folders[: depth + 1]
    return [start]


def _nearest(places: list[FilePath], name: str) -> FilePath | None:
    return next((path for folder in places if (path := folder / name).is_file()), None)


def _pyproject(places: list[FilePath], root: Node, faults: list[Fault]) -> Iterator[Said]:
    path = _nearest(places, "pyproject.toml")
    if path is None or (read := _read_text(path, faults)) is None or "qbridge" not in read:
        return  # a file that does not mention us is not ours to judge
    data = _parse_toml(read, str(path), faults)
    tool = data.get("tool")
    ours = tool.get("qbridge") if isinstance(tool, dict) else None
    if ours is not None:
        yield from _table(ours, root, f"[tool.qbridge] in {path}", faults)


def _toml(places: list[FilePath], root: Node, faults: list[Fault]) -> Iterator[Said]:
    path = _nearest(places, "qbridge.toml")
    if path is not None and (read := _read_text(path, faults)) is not None:
        yield from _table(_parse_toml(read, str(path), faults), root, str(path), faults)


def _table(data: Any, root: Node, source: str, faults: list[Fault]) -> Iterator[Said]:
    if not isinstance(data, dict):
        faults.append(Fault((), "should be a table of fields", source=source))
        return
    for name, value in data.items():
        if name in root.children:
            yield Said((name,), value, source)
        else:
            faults.append(_unknown((name,), root, source))


def _dotenv(places: list[FilePath], root: Node, faults: list[Fault]) -> Iterator[Said]:
    path = _nearest(places, ".env")
    if path is None or _read_text(path, faults) is None:
        return
    values = dotenv_values(path, encoding="utf-8")
    yield from _variables(values, root, faults, "{} in " + str(path))


def _read_text(path: FilePath, faults: list[Fault]) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        faults.append(Fault((), "is not UTF-8 text", source=str(path)))
    except OSError as error:
        faults.append(Fault((), f"cannot be read ({error.strerror})", source=str(path)))
    return None


def _parse_toml(text: str, source: str, faults: list[Fault]) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        # Its message names line and column, not what stands there.
        faults.append(Fault((), f"is not TOML: {str(error).splitlines()[0]}", source=source))
    return {}


def _variables(variables: Mapping[str, str | None], root: Node, faults: list[Fault], source: str) -> Iterator[Said]:
    """Our names among environment variables; those of others are left alone, except under our prefix."""
    found: dict[Path, tuple[str, Said]] = {}
    for variable, text in variables.items():
        name = variable.upper()
        if not name.startswith(PREFIX) or name.startswith(_FOREIGN):
            continue
        path = tuple(name[len(PREFIX) :].lower().split("__"))
        where = source.format(variable)
        node = _resolve(path, root)
        if node is None:
            todo = did_you_mean(name, [environment_name(known) for known in root.paths()])
            todo = todo or "remove it, or see the configuration reference"
            faults.append(Fault((), "no field has this name", todo, where))
        elif path in found and found[path][1].value != text:
            faults.append(Fault((), f"says something else than {found[path][0]}", "keep one of them", where))
        elif text is None:
            faults.append(Fault(path, "has a name but no value", f"write {name}=value", where))
        else:
            value = _parse(text, path, node, where, faults)
            if value is not None:
                found[path] = (variable, Said(path, value, where))
    # A whole value first, then what says which room is meant, then the parts that refine it.
    for _, said in sorted(
        found.values(), key=lambda item: (len(item[1].path), item[1].path[-1] not in ("kind", "url"))
    ):
        yield said


def _resolve(path: Path, root: Node) -> Node | None:
    node = root
    for depth, step in enumerate(path):
        if node.free and not node.children:
            return Node() if depth == len(path) - 1 and step else None
        if node.many or step not in node.children:
            return None
        node = node.children[step]
    return node


def _parse(text: str, path: Path, node: Node, source: str, faults: list[Fault]) -> Any:
    """Text to value, as far as the place tells; pydantic converts numbers and the like."""
    if path[0] == "celery" and len(path) == 2:
        return parse_setting(path[1], text)
    stripped = text.strip()
    if stripped.startswith("[" if node.many else "{") and (node.many or node.children or node.free):
        try:
            return json.loads(stripped)
        except ValueError:
            pass
        faults.append(Fault(path, "starts like JSON but is not", "write valid JSON", source))
        return None
    if node.many and stripped.startswith("{"):
        faults.append(Fault(path, "is one mapping, and there may be many", "write [ and ] around it", source))
        return None
    if node.many:
        return [part.strip() for part in text.split(",") if part.strip()]
    return text
