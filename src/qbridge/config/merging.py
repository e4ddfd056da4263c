"""How do values from several sources become one set of values, and who said which?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from qbridge.config.faults import Fault, faults_of
from qbridge.config.rooms import BROKERS, RESULTS, explicit, url_text
from qbridge.config.tree import Node, Path
from qbridge.exceptions import ConfigurationError

__all__ = ["Merged", "Said"]

_SIDES = {"broker": BROKERS, "results": RESULTS}


@dataclass(frozen=True)
class Said:
    """One value and who said it.

    Args:
        path: where it belongs.
        value: the value; a mapping refines what weaker sources said, anything else replaces it.
        source: for messages.
    """

    path: Path
    value: Any = field(repr=False)
    source: str


class Merged:
    """Values laid over one another, the weakest source first.

    A whole value (a URL, a model, a number) replaces what was there. A part (``broker.password``) refines it, even
    where a weaker source wrote a URL: the URL is read into its fields first.
    """

    def __init__(self, root: Node) -> None:
        self.values: dict[str, Any] = {}
        self.faults: list[Fault] = []
        self._root = root
        self._origins: dict[tuple[str | int, ...], str] = {}

    def origin(self, path: tuple[str | int, ...]) -> str:
        """Say who gave the value at ``path``, or what it is part of."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._origins:
                return self._origins[path[:length]]
        return next((source for known, source in self._origins.items() if path and known[: len(path)] == path), "")

    def has(self, path: tuple[str, ...]) -> bool:
        """True if some source said something about exactly this place."""
        place: Any = self.values
        for depth, step in enumerate(path):
            if isinstance(place, Mapping):
                if step not in place:
                    return False
                place = place[step]
            elif isinstance(place, BaseModel):
                return step in place.model_fields_set if depth == len(path) - 1 else True
            else:
                return True  # a URL or another whole value speaks for all of it
        return True

    def add(self, said: Said) -> None:
        """Lay one value over what is there."""
        *parents, name = said.path
        if len(parents) == 1 and name in ("kind", "url") and self._starts_anew(parents[0], {name: said.value}):
            self._forget((parents[0],))
            self.values.pop(parents[0], None)
        place, node = self.values, self._root
        for depth, step in enumerate(parents, 1):
            node = node.children.get(step, Node())
            place = self._open(place, node, tuple(said.path[:depth]))
        self._lay(place, node.children.get(name, Node()), said)

    def _lay(self, place: dict[str, Any], node: Node, said: Said) -> None:
        name = said.path[-1]
        refines = isinstance(said.value, Mapping) and bool(node.children or node.free) and not node.many
        if not refines or (len(said.path) == 1 and self._starts_anew(name, said.value)):
            self._forget(said.path)
            place.pop(name, None)
        if not refines:
            place[name] = said.value
            self._origins[said.path] = said.source
            return
        inner = self._open(place, node, said.path)
        self._origins.setdefault(said.path, said.source)
        for key, value in said.value.items():
            self._lay(inner, node.children.get(str(key), Node()), Said((*said.path, str(key)), value, said.source))

    def _starts_anew(self, field: str, part: Mapping[Any, Any]) -> bool:
        """True where another room is described than the one that is there."""
        base = self.values.get(field)
        side = _SIDES.get(field)
        if side is None or base is None:
            return False
        if "url" in part:
            return True
        if "kind" not in part:
            return False
        if (text := url_text(base)) is not None:
            try:
                return bool(side.kind_of_url(text) != part["kind"])
            except ConfigurationError:
                return True
        return bool(part["kind"] != (base.get("kind") if isinstance(base, Mapping) else getattr(base, "kind", None)))

    def _open(self, place: dict[str, Any], node: Node, path: Path) -> dict[str, Any]:
        """The mapping at ``path``, made of whatever is there."""
        name = path[-1]
        there = place.get(name)
        if isinstance(there, dict):
            return there
        opened: dict[str, Any] = {}
        if isinstance(there, BaseModel):
            opened = explicit(there)
        elif isinstance(there, Mapping):
            opened = dict(there)
        elif len(path) == 1 and name in _SIDES and (text := url_text(there)) is not None:
            fault: list[Fault] = []
            try:
                room = _SIDES[name].from_url(text)
                opened = {**explicit(room), "kind": room.kind}
            except ConfigurationError as error:
                fault = faults_of(error, path)
            self.faults += [Fault(f.path, f.what, f.todo, f.source or self.origin(path)) for f in fault]
        place[name] = opened
        return opened

    def _forget(self, path: Path) -> None:
        for known in [known for known in self._origins if known[: len(path)] == path]:
            del self._origins[known]
