"""What does an existing Celery configuration say, and what of it can a bridge not take over?

Celery reads a setting under today's name, under its name of Celery 3, and with a namespace in front
(``celery/utils/collections.py``, ``ConfigurationView``); everything else it ignores in silence. Here each key that is
not taken over as it was meant becomes a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

from qbridge.backends.base import Finding
from qbridge.config.celery_names import (
    check_setting,
    closest_old_name,
    closest_setting,
    known_settings,
    new_name,
    old_names,
)
from qbridge.config.celery_rooms import take_broker, take_results
from qbridge.config.faults import Fault, as_error, faults_of
from qbridge.config.owned import lift
from qbridge.config.suggest import closest
from qbridge.config.tree import Path
from qbridge.exceptions import ConfigurationError

__all__ = ["Conversion"]

C = TypeVar("C")

#: What shows that an object holds Django's settings, most of which are not about Celery.
_DJANGO = frozenset({"DATABASES", "INSTALLED_APPS", "MIDDLEWARE", "ROOT_URLCONF", "SECRET_KEY"})
#: How names of Celery 3 begin.
_OLD_STYLE = ("CELERY", "BROKER_")
_PICKLE = frozenset({"pickle", "application/x-python-serialize"})
#: Fields that say all of what the setting says; the others keep the raw setting beside them.
_EXACT = frozenset(
    {
        "imports",
        "include",
        "task_default_queue",
        "timezone",
        "worker_concurrency",
        "worker_max_memory_per_child",
        "worker_max_tasks_per_child",
        "worker_pool",
        "worker_prefetch_multiplier",
    }
)


class Conversion:
    """One reading of a Celery configuration.

    Args:
        source: a mapping, a module, a dotted name, or an object with attributes.
        namespace: prefix of the settings; None: none, unless the names show one.

    Raises:
        ConfigurationError: if a dotted name leads to nothing.
    """

    def __init__(self, source: object, namespace: str | None) -> None:
        self.findings: list[Finding] = []
        self._lifted: dict[Path, str] = {}
        names = _read(source)
        self._raw = self._resolve(names, namespace)
        for name in list(self._raw):
            self._judge(name)

    def build(self, construct: Callable[..., C]) -> C:
        """Make the configuration; raw settings that turn out not to fit are left out, with a finding.

        Args:
            construct: takes the fields by name.
        """
        fields = self._fields()
        faults: list[Fault] = []
        try:
            return construct(**fields)
        except ConfigurationError as error:
            faults = faults_of(error)
        left = [fault for fault in faults if not self._drop(fields, fault)]
        if left:
            raise as_error(left, "the configuration made of Celery's")
        return construct(**fields)

    def _drop(self, fields: dict[str, Any], fault: Fault) -> bool:
        """Leave out the setting behind a fault; False if there is none."""
        raw = fields["celery"]
        path = tuple(str(step) for step in fault.path)
        if len(path) > 1 and path[0] == "celery" and path[1] in raw:
            setting, option = path[1], path[2] if len(path) > 2 else None
        else:
            owner = next((field for field in self._lifted if path[: len(field)] == field), None)
            if owner is None:
                return False
            setting, option = self._lifted[owner], None
            place = fields
            for step in owner[:-1]:
                place = place[step]
            place.pop(owner[-1], None)
        if option is not None and isinstance(raw[setting], Mapping):
            raw[setting] = {key: value for key, value in raw[setting].items() if str(key) != option}
        else:
            raw.pop(setting, None)
        named = setting if option is None else f"{setting}[{option!r}]"
        self._report("error", "celery.invalid", f"{named}: {fault.what}", fault.todo)
        return True

    def _fields(self) -> dict[str, Any]:
        raw = dict(self._raw)
        fields: dict[str, Any] = {"defaults": "celery"}
        fields |= take_broker(raw, self._report)
        fields |= take_results(raw, self._report)
        for said in lift(raw):
            *parents, name = said.field
            place = fields
            for step in parents:
                place = place.setdefault(step, {})
            place.setdefault(name, said.value)
            self._lifted[said.field] = said.setting
            for setting in ("imports", "include") if said.field == ("modules",) else (said.setting,):
                if setting in _EXACT:
                    raw.pop(setting, None)
        fields["celery"] = raw
        return fields

    def _resolve(self, names: Mapping[str, Any], namespace: str | None) -> dict[str, Any]:
        """Today's names; what is said twice is taken in the order in which Celery looks."""
        prefix = f"{namespace.rstrip('_')}_" if namespace else _shown_prefix(names)
        django = bool(_DJANGO & set(names))
        found: dict[str, tuple[int, str, Any]] = {}
        styles: set[str] = set()
        for key, value in names.items():
            meaning = _meaning(key, prefix)
            if meaning is None:
                if _concerns_celery(key, value, prefix, django=django):
                    self._ignored(key, prefix)
                continue
            rank, setting = meaning
            styles.add(("prefixed", "new", "old")[rank])
            if setting in found and found[setting][2] != value:
                first = min((rank, key), found[setting][:2])
                text = f"{key} and {found[setting][1]} mean the same setting and say different things"
                self._report("warning", "celery.twice", text, f"keep one of them; {first[1]} was taken")
            if setting not in found or rank < found[setting][0]:
                found[setting] = (rank, key, value)
        if {"new", "old"} <= styles and not prefix:
            text = "names of Celery 3 and of today are mixed, with which Celery itself refuses to start"
            self._report("warning", "celery.mixed", text, "write all of them in lower case: `celery upgrade settings`")
        return {setting: value for setting, (_, _, value) in found.items()}

    def _ignored(self, key: str, prefix: str) -> None:
        suggestion = _suggestion(key, prefix)
        todo = (
            f"did you mean {suggestion!r}?"
            if suggestion
            else ("remove it; if a plugin of Celery reads it, assign it to bridge.celery.conf")
        )
        self._report("warning", "celery.ignored", f"{key}: Celery 5.7 reads no such setting and ignores it", todo)

    def _judge(self, name: str) -> None:
        value = self._raw.pop(name)
        if name.endswith("accept_content") and isinstance(value, (list, tuple, set, frozenset)):
            kept = [kind for kind in value if not _is_pickle(kind)]
            if len(kept) < len(value):
                self._pickle(name)
                if not kept:
                    return
                value = kept
        if value is None and check_setting(name, None) is not None:
            return  # Celery takes it for "not set"
        fault = check_setting(name, value)
        if fault is None:
            self._raw[name] = value
        elif "pickle" in fault.what:
            self._pickle(name)
        else:
            self._report("error", "celery.invalid", f"{name} {fault.what}", fault.todo)

    def _pickle(self, name: str) -> None:
        self._report(
            "error",
            "celery.pickle",
            f"{name} allows pickle, which runs the code of whoever can write to the broker; it was not taken over",
            "drain the queues of pickled messages with the old workers, then send JSON: qbridge encodes models, "
            "dataclasses and standard types",
        )

    def _report(self, level: Any, code: str, what: str, todo: str) -> None:
        self.findings.append(Finding(level, code, what, todo))


def _is_pickle(kind: object) -> bool:
    return isinstance(kind, str) and kind in _PICKLE


def _meaning(key: str, prefix: str) -> tuple[int, str] | None:
    """How early Celery looks under this key, and which setting it is; None if it never looks there."""
    if prefix and key.startswith(prefix) and (bare := key[len(prefix) :].lower()) in known_settings():
        return 0, bare
    if key in known_settings():
        return 1, key
    modern = new_name(key)
    return (2, modern) if modern is not None else None


def _shown_prefix(names: Mapping[str, Any]) -> str:
    """``CELERY_`` if some name makes sense only with it."""
    for key in names:
        if key.startswith("CELERY_") and new_name(key) is None and key[7:].lower() in known_settings():
            return "CELERY_"
    return ""


def _concerns_celery(key: str, value: Any, prefix: str, *, django: bool) -> bool:
    """True for a name that somebody wrote for Celery; False for what only stands beside."""
    if prefix and key.startswith(prefix):
        return True
    if isinstance(value, ModuleType) or callable(value):
        return False
    if prefix or django:
        # Django's own settings are none of our business, a misspelt old name is.
        return key.startswith(_OLD_STYLE) or (not django and key == key.lower())
    return True


def _suggestion(key: str, prefix: str) -> str | None:
    """The name that was probably meant, in the style in which the key is written."""
    if key == key.lower():
        return closest_setting(key)
    if prefix and key.startswith(prefix):
        meant = closest_setting(key[len(prefix) :].lower())
        return f"{prefix}{meant.upper()}" if meant else closest_old_name(key)
    meant = closest_setting(key.lower().removeprefix("celery_"))
    if meant is None:
        return closest_old_name(key)
    if prefix:
        return f"{prefix}{meant.upper()}"
    return closest(key, old_names(meant), likeness=0) or meant


def _read(source: object) -> dict[str, Any]:
    if isinstance(source, str):
        source = _import(source)
    if isinstance(source, Mapping):
        return {str(key): value for key, value in source.items()}
    return dict(_attributes(source))


def _attributes(source: object) -> Iterator[tuple[str, Any]]:
    for name in dir(source):
        if not name.startswith("_"):
            try:
                yield name, getattr(source, name)
            except Exception:  # noqa: BLE001, S112 - a lazy setting that cannot be computed is nobody's Celery setting
                continue


def _import(path: str) -> object:
    """Import ``package.module``, ``package.module.attribute`` or ``package.module:attribute``, as Celery does."""
    from celery.utils.imports import import_from_cwd  # the working directory counts, as for `celery -A`

    module, _, attribute = path.partition(":")
    candidates = [(module, attribute)]
    if not attribute and "." in path:
        parent, _, last = path.rpartition(".")
        candidates.append((parent, last))
    for name, member in candidates:
        try:
            found: object = import_from_cwd(name, imp=import_module)
        except ModuleNotFoundError as error:
            if error.name is not None and not (name == error.name or name.startswith(f"{error.name}.")):
                raise  # the module exists, something that it imports does not
            continue
        if not member:
            return found
        if hasattr(found, member):
            attribute_found: object = getattr(found, member)
            return attribute_found
    raise ConfigurationError(
        f"there is no Celery configuration at {path!r}", "write a dotted name such as 'proj.celeryconfig'"
    )
