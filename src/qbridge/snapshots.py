"""What can no longer be called, or read, as it could when the snapshot was made?

A snapshot is a file in the repository: for each task its version and what decides whether a call fits. It stands for
the code that runs now, and for the messages that wait. Compared with it is the code that is to be deployed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pydantic

from qbridge.exceptions import ConfigurationError
from qbridge.serialization.compatibility import Difference, differences
from qbridge.task import Task

__all__ = ["Change", "Snapshot", "call_differences", "changes_since", "read_snapshot", "snapshot_of", "snapshot_text"]

_FORM = 1
_POSITIONAL = ("positional_only", "positional_or_keyword")
_BY_NAME = ("positional_or_keyword", "keyword_only")
_KINDS = {"version": int, "fingerprint": str, "parameters": list, "strict": bool, "arguments": dict, "result": dict}
"""What the entry of a task holds."""

Snapshot = Mapping[str, Any]
"""The contents of the file."""


@dataclass(frozen=True)
class Change:
    """What differs in one task.

    Args:
        task: its name.
        place: what of it: a parameter, a field in it, the result.
        what: how it differs.
        verdict: ``"cannot tell"`` counts as ``"breaking"``.
        todo: the way out; empty if there is nothing to do.
    """

    task: str
    place: str
    what: str
    verdict: Literal["breaking", "cannot tell", "compatible"]
    todo: str = ""

    @property
    def breaks(self) -> bool:
        """True if a check fails by it."""
        return self.verdict != "compatible"


def snapshot_of(tasks: Iterable[Task[Any, Any]]) -> Snapshot:
    """Return the snapshot of the tasks that live in this code base: remote ones are somebody else's."""
    return {
        "form": _FORM,
        "pydantic": _pydantic(),
        "tasks": {task.name: _entry(task) for task in tasks if not task.definition.remote},
    }


def _entry(task: Task[Any, Any]) -> dict[str, Any]:
    return {"version": task.version, "fingerprint": task.fingerprint, **task.definition.signature.wire_schema()}


def snapshot_text(snapshot: Snapshot) -> str:
    """Return a snapshot as text that changes where tasks change, and nowhere else."""
    return json.dumps(snapshot, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_snapshot(text: str, name: str) -> Snapshot:
    """Return the snapshot that a file holds.

    Args:
        text: of the file.
        name: of the file, for messages.

    Raises:
        ConfigurationError: if it holds something else.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigurationError(f"{name} is not JSON: {error}", "Make it again: qbridge schema snapshot.") from None
    if not isinstance(found, dict) or found.get("form") != _FORM or not isinstance(found.get("tasks"), dict):
        raise ConfigurationError(f"{name} holds no snapshot", "Make one: qbridge schema snapshot.")
    for task, entry in found["tasks"].items():
        wrong = _wrong_in(entry)
        if wrong:
            raise ConfigurationError(f"{name}: the task {task} {wrong}", "Make it again: qbridge schema snapshot.")
    return found


def _wrong_in(entry: Any) -> str:
    """Return what is wrong with the entry of one task, empty if nothing is."""
    if not isinstance(entry, dict):
        return "is no object"
    missing = set(_KINDS) - set(entry)
    if missing:
        return f"has no {', '.join(sorted(missing))}"
    odd = [key for key, kind in _KINDS.items() if type(entry[key]) is not kind]  # exactly: True is an int
    if not odd:
        pairs, properties = entry["parameters"], entry["arguments"].get("properties", {})
        if not all(isinstance(pair, list) and [type(part) for part in pair] == [str, str] for pair in pairs):
            odd = ["parameters"]
        elif not isinstance(properties, dict) or not all(isinstance(properties.get(name), dict) for name, _ in pairs):
            odd = ["arguments"]
    return f"has {', '.join(odd)} of another form" if odd else ""


def changes_since(snapshot: Snapshot, tasks: Iterable[Task[Any, Any]]) -> list[Change]:
    """Return what has changed, task by task.

    Args:
        snapshot: of the code that runs now.
        tasks: of the code that is to be deployed.
    """
    there = {task.name: task for task in tasks if not task.definition.remote}
    old: Mapping[str, Any] = snapshot["tasks"]
    found: list[Change] = []
    for name in sorted({*old, *there}):
        if name not in there:
            what = "is gone: calls that wait for it become dead letters"
            todo = "Keep it until none is sent and none waits; then make the snapshot anew."
            found.append(Change(name, "task", what, "breaking", todo))
        elif name not in old:
            found.append(Change(name, "task", "is new", "compatible"))
        else:
            found += _changes(name, old[name], there[name])
    other = snapshot.get("pydantic")
    if other != _pydantic() and any(change.verdict == "cannot tell" for change in found):
        what = f"the snapshot was made with pydantic {other}, this is {_pydantic()}: what cannot be told may be that"
        found.append(Change("–", "pydantic", what, "compatible"))
    return found


def _changes(name: str, old: Mapping[str, Any], task: Task[Any, Any]) -> list[Change]:
    definition = task.definition
    new = definition.signature.wire_schema()
    was, upcaster = old["version"], definition.upcasters.get(old["version"])
    function = definition.function.__name__
    found = [] if was == task.version else [Change(name, "version", f"{was} → {task.version}", "compatible")]
    if was > task.version:
        what = f"{was} → {task.version}: workers would leave waiting calls to others"
        found = [Change(name, "version", what, "breaking", f"Set version={was} or more.")]
    if upcaster is not None:
        todo = f"Give {upcaster.name} the parameters of version {was}."
        faults = call_differences(old, upcaster.wire_schema())
        found += [_change(name, fault, f"the upcaster for version {was}, ", todo) for fault in faults]
        found.append(Change(name, "arguments", f"calls of version {was} go through {upcaster.name}", "compatible"))
    else:
        raised = task.version if task.version > was else was + 1
        todo = f"Set version={raised}, and write @{function}.upcast({was}) with the arguments of before."
        faults = call_differences(old, new)
        found += [_change(name, fault, "", todo) for fault in faults]
        if not faults and was < task.version:
            # a version is raised because something means something else, which no schema shows
            what = f"{was} → {task.version}, without an upcaster: calls of before are run as they are"
            todo = f"Write @{function}.upcast({was}); if they mean the same, make the snapshot anew."
            found = [Change(name, "version", what, "cannot tell", todo)]
        if not faults and old["fingerprint"] != task.fingerprint:
            found.append(Change(name, "arguments", "have changed, and calls of before fit", "compatible"))
    todo = "Let callers know the new result first; then make the snapshot anew."
    results = differences(new["result"], old["result"], written_out=True)
    found += [_change(name, fault, "result ", todo, backwards=True) for fault in results]
    return found


def _change(task: str, fault: Difference, where: str, todo: str, *, backwards: bool = False) -> Change:
    what = f"old callers cannot read it (for them it {fault.what})" if backwards else fault.what
    verdict: Literal["breaking", "cannot tell"] = "breaking" if fault.certain else "cannot tell"
    return Change(task, f"{where}{fault.path}".strip(" ,"), what, verdict, todo)


def call_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Return why calls of one signature may not fit another, or mean something else there.

    Args:
        old: what ``Signature.wire_schema`` says of the one.
        new: likewise.
    """
    was, now = _Parameters(old), _Parameters(new)
    found = [Difference(name, "is gone, or has another name") for name in was.named if name not in now.named]
    if not found and now.positional[: len(was.positional)] != was.positional:
        found.append(Difference("arguments", "positional parameters are in another order, or have to be named"))
    found += [
        Difference(name, "has to be given by position now")
        for name in was.by_name
        if name in now.named and name not in now.by_name
    ]
    found += [
        Difference(name, "has to be given now" if name in was.named else "is new and has no default")
        for name in now.named
        if name in now.required and name not in was.required
    ]
    if new["strict"] and not old["strict"]:
        found.append(Difference("arguments", "are not coerced any more (strict)", False))
    for name in was.named:
        if name in now.named:
            found += _below(name, was.schema(name), now.schema(name))
    return found + _variable(was, now)


def _variable(was: _Parameters, now: _Parameters) -> list[Difference]:
    """Compare ``*args`` and ``**kwargs``."""
    found = []
    if was.star is not None:
        if now.star is None or now.positional != was.positional:
            found.append(Difference(was.star, "what was given there has no place now, or another one"))
        else:
            found += _below(was.star, was.schema(was.star), now.schema(now.star))
    if was.double_star is not None:
        if now.double_star is None:
            found.append(Difference(was.double_star, "names that are not declared are not taken any more"))
        else:
            found += _below(was.double_star, was.schema(was.double_star), now.schema(now.double_star))
        found += [
            Difference(name, f"may have been one of **{was.double_star} before, of another type", False)
            for name in now.by_name
            if name not in was.by_name
        ]
    return found


def _below(name: str, old: Any, new: Any) -> list[Difference]:
    return [
        fault._replace(path=f"{name}{'' if not fault.path or fault.path[0] == '[' else '.'}{fault.path}")
        for fault in differences(old, new)
    ]


class _Parameters:
    """The parameters of one side.

    Args:
        entry: of a snapshot.
    """

    def __init__(self, entry: Mapping[str, Any]) -> None:
        kinds = entry["parameters"]
        self._arguments: Mapping[str, Any] = entry["arguments"]
        self.required: list[str] = list(self._arguments.get("required", ()))
        self.positional = [name for name, kind in kinds if kind in _POSITIONAL]
        self.by_name = [name for name, kind in kinds if kind in _BY_NAME]
        self.named = [name for name, kind in kinds if kind in _POSITIONAL or kind in _BY_NAME]
        self.star = next((name for name, kind in kinds if kind == "var_positional"), None)
        self.double_star = next((name for name, kind in kinds if kind == "var_keyword"), None)

    def schema(self, name: str) -> Any:
        part = self._arguments["properties"][name]
        return {**part, "$defs": self._arguments.get("$defs", {})}


def _pydantic() -> str:
    return ".".join(pydantic.VERSION.split(".")[:2])
