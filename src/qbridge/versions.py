"""By which signature was a message sent, and how does a worker with another one read it?

A message says the version of its task and the fingerprint of its arguments' schema. The version decides: what is older
goes through the upcaster for it, what is newer is left to workers that have it. The fingerprint decides nothing; it
tells people whether sender and worker meant the same, when arguments do not fit.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from qbridge.calls import Call, Item
from qbridge.exceptions import ArgumentsError, ConfigurationError
from qbridge.serialization.signature import Signature

if TYPE_CHECKING:
    from qbridge.task import TaskDefinition

__all__ = ["HEADER_SCHEMA", "Stamp", "Upcaster", "decode_received", "is_of_another_version", "newer", "version_in"]

HEADER_SCHEMA = "qbridge_schema"
"""Message header: the task's version and, after a colon, the fingerprint of its arguments' schema."""

_FORM = re.compile(r"([1-9][0-9]{0,8}):([0-9a-f]{12})")


class Stamp(NamedTuple):
    """What a message says about the signature that it was sent by.

    Args:
        version: of the task.
        fingerprint: of the schema of its arguments.
    """

    version: int
    fingerprint: str

    @classmethod
    def of(cls, headers: Any) -> Stamp | None:
        """Read it from a message's headers; None where they say nothing, or something else under that name."""
        said = headers.get(HEADER_SCHEMA) if isinstance(headers, Mapping) else None
        form = _FORM.fullmatch(said) if isinstance(said, str) else None
        return None if form is None else cls(int(form[1]), form[2])

    def __str__(self) -> str:
        return f"{self.version}:{self.fingerprint}"


def version_in(headers: Any) -> int:
    """Return the version that a message was sent by; 0 if it says none, as plain producers do."""
    stamp = Stamp.of(headers)
    return 0 if stamp is None else stamp.version


class Upcaster:
    """Turns calls of an old version into calls of the current one.

    Args:
        definition: of the task.
        version: whose calls it takes.
        function: has the signature of then, and returns ``task.item(...)``.

    Raises:
        ConfigurationError: if it cannot work; says why.
    """

    def __init__(self, definition: TaskDefinition, version: int, function: Callable[..., Any]) -> None:
        self.version = version
        self.name = f"{function.__module__}.{getattr(function, '__qualname__', repr(function))}"
        what = f"the upcaster {self.name} of task {definition.name}"
        if definition.remote:
            raise ConfigurationError(f"{what} would never be called", "Write it where the task's body is.")
        if type(version) is not int or not 0 < version < definition.version:
            raise ConfigurationError(
                f"{what} is for version {version!r}, and the current one is {definition.version}",
                "Raise version= where the task is declared; an upcaster takes calls of a version below that.",
            )
        if version in definition.upcasters:
            raise ConfigurationError(
                f"{what} is the second one for version {version}, after {definition.upcasters[version].name}",
                "Keep one of them.",
            )
        if inspect.iscoroutinefunction(inspect.unwrap(function)):
            raise ConfigurationError(f"{what} is async", "Write it with def: it only rewrites arguments.")
        self._definition = definition
        self._function = function
        self._signature = Signature(
            function, f"{definition.name} (version {version})", strict=definition.signature.strict, returns=False
        )

    def wire_schema(self) -> dict[str, Any]:
        """Return which calls it takes, as of a signature."""
        return self._signature.wire_schema()

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Return the arguments of an old call, both as JSON, as those of a current one.

        Raises:
            ArgumentsError: if they do not fit the signature of then, or what comes of them does not fit today's.
        """
        given, named = self._signature.decode_call(args, kwargs)
        item = self._function(*given, **named)
        if not isinstance(item, Item) or item[0] is not self._definition:
            what = f"a call of task {item[0].name}" if isinstance(item, Item) else f"a {type(item).__name__}"
            task = self._definition
            raise ArgumentsError(
                f"the upcaster {self.name} returned {what}, not a call of task {task.name}",
                f"Return {task.function.__name__}.item(...).",
                task.name,
            )
        return item[1]


def decode_received(
    definition: TaskDefinition, headers: Mapping[str, Any] | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Return the Python arguments of a call that was received.

    Args:
        definition: of the task, as this worker has it.
        headers: of the message.
        args: as it came.
        kwargs: as it came.

    Raises:
        ArgumentsError: if they do not fit; says so if they were sent by another signature.
        PayloadError: if they are not JSON.
        Exception: whatever an upcaster raises.
    """
    upcaster = definition.upcasters.get(version_in(headers)) if definition.upcasters else None
    try:
        if upcaster is not None:
            args, kwargs = upcaster(args, kwargs)
        return definition.signature.decode_call(args, kwargs)
    except ArgumentsError as error:
        raise _explained(error, definition, Stamp.of(headers), upcaster) from None


def is_of_another_version(definition: TaskDefinition, headers: Any) -> bool:
    """Return whether arguments were made by another version of a task: only its workers can check them."""
    return version_in(headers) not in (0, definition.version)


def newer(definition: TaskDefinition, headers: Any) -> ArgumentsError:
    """Return the error of a message whose version is above this worker's."""
    error = ArgumentsError(f"this worker cannot run task {definition.name}", "", definition.name)
    return _explained(error, definition, Stamp.of(headers), None)


def _explained(
    error: ArgumentsError, definition: TaskDefinition, sent: Stamp | None, upcaster: Upcaster | None
) -> ArgumentsError:
    if sent is None or sent == definition.stamp:
        return error
    ours, function = definition.stamp, definition.function.__name__
    what = f"{error.what}; it was sent as version {sent.version} with schema {sent.fingerprint}"
    if ours is not None:
        what += f", this worker has version {ours.version} with schema {ours.fingerprint}"
    if error.todo:
        todo = error.todo
    elif upcaster is not None:
        todo = f"Correct the upcaster {upcaster.name}, and replay the dead letter."
    elif sent.version < definition.version:
        todo = f"Write @{function}.upcast({sent.version}) with the arguments of then, and replay the dead letter."
    elif sent.version > definition.version:
        todo = f"Start workers that have version {sent.version}, and replay the dead letter."
    else:
        todo = (
            f"Its arguments have changed and its version has not: raise version=, write @{function}.upcast"
            f"({sent.version}), and replay the dead letter."
        )
    return ArgumentsError(what, todo, error.task, error.errors)
