"""Does every JSON value that fits one schema fit another? If that cannot be told, the answer is no.

For schemas as ``wire_schema`` makes them, which say all that decides. The comparison goes through both side by side.
It knows what pydantic makes of annotations, and takes no step that it cannot justify: a keyword that it does not know
has to be the same on both sides, and a value is not split over several members of a union.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from qbridge.serialization.wire_schema import FINITE, KEYS, MARKS, canonical_text

__all__ = ["Difference", "differences"]

_UNIONS = ("anyOf", "oneOf")
_BINARY = frozenset({"binary", "base64url", "base64"})
_KNOWN = frozenset({
    "type", "$ref", "$defs", "enum", "const", "discriminator", "format", "minimum", "maximum", "exclusiveMinimum",
    "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "items",
    "prefixItems", "uniqueItems", "properties", "required", "additionalProperties", MARKS, KEYS, *_UNIONS,
})  # fmt: skip
_AT_LEAST = ("minLength", "minItems", "minProperties")
_AT_MOST = ("maxLength", "maxItems", "maxProperties")


class Difference(NamedTuple):
    """Why a value that fits the one may not fit the other.

    Args:
        path: where in the value; empty: the value itself.
        what: what has changed.
        certain: False if it is not known whether any value is concerned.
    """

    path: str
    what: str
    certain: bool = True


def differences(old: Any, new: Any, *, written_out: bool = False) -> list[Difference]:
    """Return why values that fit ``old`` may not fit ``new``; nothing if all of them do.

    Args:
        old: a plain schema with its ``$defs``.
        new: likewise.
        written_out: whether a field that has a default is there all the same, as it is in what a worker returns.
    """
    return _Comparison(old, new, written_out).narrowed(old, new, "")


class _Comparison:
    def __init__(self, old: Any, new: Any, written_out: bool) -> None:
        self._written_out = written_out
        self._old_definitions = _definitions(old)
        self._new_definitions = _definitions(new)
        self._under_way: set[tuple[str, str]] = set()

    def narrowed(self, old: Any, new: Any, path: str) -> list[Difference]:
        """Return the differences at one place; what is being compared already is taken for the same."""
        pair = (json.dumps(old, sort_keys=True), json.dumps(new, sort_keys=True))
        if pair in self._under_way:
            return []
        self._under_way.add(pair)
        try:
            return self._compared(old, new, path)
        finally:
            self._under_way.discard(pair)

    def _compared(self, old: Any, new: Any, path: str) -> list[Difference]:
        if new is True or old is False:
            return []
        if new is False:
            return [Difference(path, "is not taken any more")]
        old = _resolved({} if old is True else old, self._old_definitions)
        new = _resolved(new, self._new_definitions)
        if self._same(old, new):
            return []
        found = _marks(old, new, path)
        bare = {name: part for name, part in new.items() if name not in (MARKS, "$defs")}
        if not bare:
            return found
        if branches := _branches(old):
            for branch in branches:
                found += self.narrowed(_with_marks(self._decided(branch, old), old), bare, path)
            return found
        values = _values(old)
        if values is not None:
            return found + [fault for value in values for fault in self._value(value, bare, path)]
        if _branches(bare):
            return found + self._some(old, bare, path)
        if _values(bare) is not None:
            return [*found, Difference(path, "takes only some values now")]
        return found + self._typed(old, bare, path)

    def _same(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
        one = canonical_text({**old, "$defs": self._old_definitions})
        return one == canonical_text({**new, "$defs": self._new_definitions})

    def _some(self, old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> list[Difference]:
        """One member of the new union must take all that the old takes, and be found by what decides between them."""
        decides = _decides(new)
        undecided = []
        if decides is not None and not self._written_out and decides not in old.get("required", ()):
            what = "decides between the members of a union now, and may have been left out"
            undecided = [Difference(_below(path, decides), what, False)]
        near: list[list[Difference]] = []
        unsure: list[Difference] = []
        for branch in _branches(new):
            found = self.narrowed(old, branch, path)
            if not found:
                return undecided
            if not any(fault.certain for fault in found):
                unsure = unsure or found
            if _resolved(branch, self._new_definitions).get("type") == old.get("type"):
                near.append(found)
        if unsure:
            return unsure
        return near[0] if len(near) == 1 else [Difference(path, f"{_shown(old)} fits no member of the union")]

    def _decided(self, branch: Any, union: Mapping[str, Any]) -> Any:
        """Return a member of the old union; what decided between them was never left out."""
        decides = _decides(union)
        if decides is None or not isinstance(branch, Mapping):
            return branch
        member = _resolved(branch, self._old_definitions)
        if member.get("type") != "object" or decides in member.get("required", ()):
            return branch
        return {**member, "required": [*member.get("required", ()), decides]}

    def _value(self, value: Any, new: Any, path: str) -> list[Difference]:
        """One value that was listed."""
        new = _resolved(new, self._new_definitions) if isinstance(new, Mapping) else {}
        if any(not self._value(value, branch, path) for branch in _branches(new)):
            return []
        values = _values(new)
        if values is not None and not new.get(MARKS):
            if any(_same_value(value, other) for other in values):
                return []
        elif new.keys() <= {"type"} and new.get("type") in _types_of(value):
            return []
        return [Difference(path, f"the value {json.dumps(value)} is not taken any more")]

    def _typed(self, old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> list[Difference]:
        was, kind = old.get("type"), new.get("type")
        if not isinstance(kind, str):
            return [Difference(path, "its schema is of a form that is not known here", False)]
        if was != kind and (was, kind) != ("integer", "number"):
            return [Difference(path, f"was {_shown(old)}, is {_shown(new)}")]
        found = _bounds(old, new, path)
        if kind == "string":
            found += _texts(old, new, path)
        elif kind == "array":
            found += self._arrays(old, new, path)
        elif kind == "object":
            found += self._objects(old, new, path)
        for name in sorted(new.keys() - _KNOWN):
            if old.get(name) != new[name]:
                found.append(Difference(path, f"{name} has changed", False))
        return found

    def _arrays(self, old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> list[Difference]:
        found = []
        if new.get("uniqueItems") and not old.get("uniqueItems"):
            found.append(Difference(path, "members that are there twice become one"))
        was, now = list(old.get("prefixItems", ())), list(new.get("prefixItems", ()))
        closed = len(was) if was and old.get("maxItems") == len(was) else None
        for index in range(max(len(was), len(now))):
            if closed is not None and index >= closed:
                break
            one = was[index] if index < len(was) else old.get("items", True)
            other = now[index] if index < len(now) else new.get("items", True)
            found += self.narrowed(one, other, f"{path}[{index}]")
        if closed is None:
            found += self.narrowed(old.get("items", True), new.get("items", True), f"{path}[]")
        return found

    def _objects(self, old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> list[Difference]:
        was, now = old.get("properties", {}), new.get("properties", {})
        # what a model ignores it does not send either; so without the keyword nothing more is there
        more, taken = old.get("additionalProperties", False), new.get("additionalProperties")
        found = [
            Difference(_below(path, name), "is required now")
            for name in new.get("required", ())
            if name not in old.get("required", ())
        ]
        if KEYS in new and old.get(KEYS) != new[KEYS]:
            found.append(Difference(path, "has keys of another type", KEYS in old))
        for name, part in was.items():
            if name in now:
                found += self.narrowed(part, now[name], _below(path, name))
            elif taken is False:
                found.append(Difference(_below(path, name), "is not taken any more"))
            elif taken is not None:
                found += self.narrowed(part, taken, _below(path, name))
        if more is False:
            return found
        for name, part in now.items():
            if name not in was:
                found += self.narrowed(more, part, _below(path, name))
        if taken is None:
            return [*found, Difference(path, "ignores members that it does not name", False)]
        return found + self.narrowed(more, taken, _below(path, "*"))


def _definitions(schema: Any) -> Mapping[str, Any]:
    return schema.get("$defs", {}) if isinstance(schema, Mapping) else {}


def _resolved(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Follow references; marks beside one are those of what it means."""
    answer, followed = dict(schema), 0
    while isinstance(reference := answer.pop("$ref", None), str) and followed < len(definitions) + 1:
        target = dict(definitions.get(reference.removeprefix("#/$defs/"), {"$unknown": reference}))
        answer = _with_marks({**target, **{name: part for name, part in answer.items() if name != MARKS}}, answer)
        followed += 1
    return answer


def _with_marks(schema: Any, other: Mapping[str, Any]) -> Any:
    marks = {*(schema.get(MARKS, ()) if isinstance(schema, Mapping) else ()), *other.get(MARKS, ())}
    return {**schema, MARKS: sorted(marks)} if marks and isinstance(schema, Mapping) else schema


def _branches(schema: Mapping[str, Any]) -> list[Any]:
    return [branch for word in _UNIONS for branch in schema.get(word, ())]


def _decides(union: Mapping[str, Any]) -> str | None:
    """Return the name of the field that says which member of a union it is, if there is one."""
    found = union.get("discriminator")
    name = found.get("propertyName") if isinstance(found, Mapping) else None
    return name if isinstance(name, str) else None


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _types_of(value: Any) -> tuple[str, ...]:
    if isinstance(value, bool):
        return ("boolean",)
    if isinstance(value, int):
        return ("integer", "number")
    return {str: ("string",), float: ("number",), type(None): ("null",)}.get(type(value), ())


def _same_value(one: Any, other: Any) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _marks(old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> list[Difference]:
    further = set(new.get(MARKS, ())) - set(old.get(MARKS, ()))
    if old.get("type") == "integer":
        further.discard(FINITE)
    return [Difference(path, f"is checked by something else: {', '.join(sorted(further))}", False)] if further else []


def _bounds(old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> list[Difference]:
    found = [
        Difference(path, f"{name} is {new[name]}") for name in _AT_LEAST if name in new and old.get(name, 0) < new[name]
    ]
    found += [
        Difference(path, f"{name} is {new[name]}")
        for name in _AT_MOST
        if name in new and (name not in old or old[name] > new[name])
    ]
    for inclusive, exclusive, sign in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
        limits = [(sign * old[name], name == exclusive) for name in (inclusive, exclusive) if name in old]
        for name in (inclusive, exclusive):
            if name not in new:
                continue
            least = sign * new[name]
            kept = any(limit > least or (limit == least and (strict or name == inclusive)) for limit, strict in limits)
            if not kept:
                found.append(Difference(path, f"{name} is {new[name]}"))
    return found


def _texts(old: Mapping[str, Any], new: Mapping[str, Any], path: str) -> list[Difference]:
    was, now = old.get("format"), new.get("format")
    if was == now or (was not in _BINARY and now is None):
        return []
    if now is None:
        return [Difference(path, f"was {_shown(old)}, whose text would be taken as it is", False)]
    return [Difference(path, f"was {_shown(old)}, is {_shown(new)}")]


def _shown(schema: Mapping[str, Any]) -> str:
    """Return a word or two for a schema."""
    if not schema.keys() - {"$defs", MARKS}:
        return "any value"
    kind, form = schema.get("type"), schema.get("format")
    word = kind if isinstance(kind, str) else "a union" if _branches(schema) else "something else"
    return f"{word} ({form})" if form else word


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
