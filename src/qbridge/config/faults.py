"""How are the faults of a configuration said: one line each, with its source, and never a secret?

pydantic's own errors carry the rejected input, which may be a password, and tracebacks print what is chained to an
exception. So pydantic's errors are translated here and ours are raised outside of the ``except`` block: nothing is
chained, not even as context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from qbridge.config.suggest import did_you_mean
from qbridge.config.tree import Node, node_of_model
from qbridge.exceptions import ConfigurationError

__all__ = ["ConfigModel", "Fault", "as_error", "attribute", "build", "faults_of", "read_faults"]

Path = tuple[str | int, ...]

_FAULTS = "_faults"


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong in a configuration.

    Args:
        path: where in the model: ``("worker", "pool")``; empty for the configuration as a whole.
        what: what is wrong; never the value that was given.
        todo: what to write instead; may be empty.
        source: who said it: an environment variable, a file, an argument; may be empty.
    """

    path: Path
    what: str
    todo: str = ""
    source: str = ""

    def __str__(self) -> str:
        path = ".".join(map(str, self.path))
        where = f"{path} ({self.source})" if path and self.source else path or self.source
        return ": ".join(part for part in (where, "; ".join(part for part in (self.what, self.todo) if part)) if part)


def as_error(faults: Sequence[Fault], subject: str = "the configuration") -> ConfigurationError:
    """Make one error of all faults.

    Args:
        faults: at least one.
        subject: what they are faults of.

    Returns:
        The error to raise, outside of any ``except`` block.
    """
    unique = list(dict.fromkeys(faults))
    if len(unique) == 1:
        what = f"{subject} cannot work: {unique[0]}"
    else:
        what = f"{subject} has {len(unique)} faults:" + "".join(f"\n  {fault}" for fault in unique)
    error = ConfigurationError(what)
    # Beside the message, so that an outer model can say where in it the faults are.
    error.__dict__[_FAULTS] = tuple(unique)
    return error


def faults_of(error: BaseException, path: Path = ()) -> list[Fault]:
    """Take an error of ours apart again.

    Args:
        error: what a room, a model or a parser raised.
        path: where in the configuration it was raised.

    Returns:
        Its faults, at least one, each placed under ``path``.
    """
    single: tuple[Fault, ...] = error.__dict__.get(_FAULTS, ())
    if single:
        return [replace(fault, path=path + fault.path) for fault in single]
    if isinstance(error, ConfigurationError):
        return [Fault(path, error.what, error.todo)]
    return [Fault(path, str(error))]


def read_faults(error: ValidationError, model: type[BaseModel]) -> list[Fault]:
    """Translate what pydantic found.

    Args:
        error: raised by ``model``'s validation.
        model: the model that was validated.

    Returns:
        One fault per error, without the rejected values.
    """
    root = node_of_model(model)
    found: list[Fault] = []
    # The input is asked for only to suggest one of the allowed words; no fault shows it.
    for line in error.errors(include_url=False):
        path, siblings = _clean(line["loc"], root)
        if line["type"] == "default_factory_not_called":
            continue  # follows from another fault
        context: Mapping[str, Any] = line.get("ctx") or {}
        raised = context.get("error")
        if isinstance(raised, BaseException):
            found += faults_of(raised, path)
        elif line["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            name = str(path[-1])
            todo = did_you_mean(name, siblings) or (f"known here: {', '.join(siblings)}" if siblings else "")
            elsewhere = _kinds_with(name, path, root)
            found.append(
                Fault(path, f"no such field here, only on {elsewhere}" if elsewhere else "no such field", todo)
            )
        elif line["type"] == "literal_error":
            words = [part.strip(" '") for part in str(context.get("expected", "")).replace(" or ", ",").split(",")]
            todo = did_you_mean(line["input"], words) if isinstance(line["input"], str) else ""
            found.append(Fault(path, _lower(line["msg"]), todo))
        else:
            found.append(Fault(path, _lower(line["msg"])))
    return found


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _kinds_with(name: str, path: Path, root: Node) -> str:
    """The kinds of the union around a field that do have it."""
    node = root.children.get(str(path[0]), Node()) if len(path) == 2 else Node()
    return " and ".join(model.__name__ for model in node.kinds.values() if name in model.model_fields)


def _clean(loc: tuple[str | int, ...], root: Node) -> tuple[Path, list[str]]:
    """Drop what pydantic adds to a path for unions; also return the names that could stand at its end."""
    node: Node | None = root
    path: list[str | int] = []
    siblings = list(root.children)
    for step in loc:
        if node is not None and step in node.kinds:  # the tag of a tagged union
            siblings = list(node.kinds[str(step)].model_fields)
            continue
        path.append(step)
        if isinstance(step, int):
            continue
        if len(path) > 1 and not (node is not None and node.kinds):
            siblings = list(node.children) if node is not None else []
        node = node.children.get(step) if node is not None else None
    return tuple(path), siblings


class ConfigModel(BaseModel):
    """Base of the small models: frozen, nothing unknown, faults as ``ConfigurationError``."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, validate_default=True, use_attribute_docstrings=True
    )

    if not TYPE_CHECKING:  # type checkers see the fields, or the __init__ that a model spells out

        def __init__(self, /, **values: Any) -> None:
            build(type(self), lambda: super(ConfigModel, self).__init__(**values))

        # pydantic's own mark for "validate nested models without calling __init__": inside another model the faults
        # keep their path.
        __init__.__pydantic_base_init__ = True


def build(model: type[BaseModel], construct: Callable[[], None], origin: Callable[[Path], str] | None = None) -> None:
    """Run a model's construction and raise what goes wrong as ``ConfigurationError``, chained to nothing.

    Args:
        model: which model is built.
        construct: builds it.
        origin: says who gave the value at a path.

    Raises:
        ConfigurationError: if the values do not fit; one line per fault.
    """
    faults: list[Fault] = []
    try:
        construct()
    except ValidationError as error:
        faults = read_faults(error, model)
    if faults:
        raise as_error(attribute(faults, origin), _subject(model))


def attribute(faults: Iterable[Fault], origin: Callable[[Path], str] | None) -> list[Fault]:
    """Name the source of each fault that does not name one yet."""
    return [replace(f, source=origin(f.path)) if origin is not None and not f.source else f for f in faults]


def _subject(model: type[BaseModel]) -> str:
    return "the configuration" if model.__name__ == "BridgeConfig" else model.__name__
