"""How a call of a task becomes JSON arguments, and JSON arguments a call: bound, validated and encoded once.

Send: ``encode_call`` binds like Python does, validates strictly, turns values into JSON types.
Receive: ``decode_call`` validates again, as JSON. ``encode_result`` and ``decode_result`` do the same for the
return value. Arguments keep the form in which they were given (positional or by name), so that any plain Celery
worker can call its function with them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from qbridge.exceptions import ArgumentsError, ConfigurationError, PayloadError
from qbridge.serialization.kombu_types import has_kombu_types, revive
from qbridge.serialization.schema import Fields, wire_json
from qbridge.serialization.wire_schema import canonical_text

__all__ = ["Signature", "result_decoder"]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_RESULT = "return"


class Signature:
    """The typed face of one function.

    Args:
        function: the task's function, sync or async.
        task: name of the task, for messages.
        context: True if the first parameter is the injected ``TaskContext``, which callers do not pass.
        strict: False lets pydantic coerce what callers pass (``"1"`` for an int).
        returns: False if what it returns does not cross the wire.

    Raises:
        ConfigurationError: if an annotation cannot be resolved or cannot cross the wire.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        task: str,
        *,
        context: bool = False,
        strict: bool = True,
        returns: bool = True,
    ) -> None:
        self.task = task
        self.strict = strict
        hints = _resolved_hints(function, task)
        parameters = list(inspect.signature(function).parameters.values())
        if context:
            parameters = _without_context(parameters, task)
        self._signature = inspect.Signature(parameters)
        self._positional = [p.name for p in parameters if p.kind in _POSITIONAL]
        self._star = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
        self._double_star = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        self._by_name = frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        optional = {p.name for p in parameters if p.default is not p.empty or p.name in (self._star, self._double_star)}
        self._required = frozenset(p.name for p in parameters) - optional
        annotations = {p.name: self._annotation(p, hints, task) for p in parameters}
        self._fields = Fields(f"task {task}", annotations, frozenset(optional))
        self._result = Fields(f"task {task}", {_RESULT: hints.get("return", Any) if returns else Any})

    def _annotation(self, parameter: inspect.Parameter, hints: Mapping[str, Any], task: str) -> Any:
        hint: Any = hints.get(parameter.name, Any)
        if getattr(hint, "__module__", "") == "qbridge.context" and getattr(hint, "__name__", "") == "TaskContext":
            raise ConfigurationError(
                f"task {task}: parameter {parameter.name!r} is annotated TaskContext",
                "Declare the task with context=True; the context is its first parameter and callers do not pass it.",
            )
        if parameter.name == self._star:
            return tuple[hint, ...]
        if parameter.name == self._double_star:
            unpacked: Any = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Unpack else None
            return unpacked if unpacked is not None else dict[str, hint]
        return hint

    # -- caller's side

    def encode_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Bind, validate and encode a call.

        Returns:
            ``(args, kwargs)`` made of JSON types, split as the caller gave them.

        Raises:
            ArgumentsError: if the call does not fit the signature; each fault is named.
            PayloadError: if a value has no JSON form.
        """
        values = self._bind(args, kwargs)
        try:
            checked, dumped = self._fields.encode(values, strict=self.strict)
            wire_json(dumped)  # text that is not Unicode fails here, not in the worker
        except ValidationError as error:
            raise self._arguments_error(self._fields.faults(error)) from None
        except (PydanticSerializationError, ValueError) as error:
            raise PayloadError(
                f"task {self.task}: an argument has no JSON form: {_first_line(error)}",
                "Pass plain data, models or dataclasses; for bytes in a model set ser_json_bytes='base64'.",
            ) from None
        if self._fields.ambiguous:
            self._refuse_changed(checked, dumped)
        return self._split(dumped, len(args))

    def by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call by name, those that were left out too."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        # a call that fits as it stands; inspect takes ten times as long, and knows what is wrong with the others
        if self._star is None and self._double_star is None and len(args) <= len(self._positional):
            values = dict(zip(self._positional, args, strict=False))
            if not kwargs or (self._by_name >= kwargs.keys() and values.keys().isdisjoint(kwargs)):
                values.update(kwargs)
                if self._required <= values.keys():
                    return values
        try:
            return self._signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise self._arguments_error([{"loc": [], "msg": str(error), "type": "call"}]) from None

    def _refuse_changed(self, checked: Mapping[str, Any], dumped: Mapping[str, Any]) -> None:
        """Compare what the worker would get: a union such as ``str | UUID`` may read a UUID back as text."""
        try:
            arrived = self._fields.read(dumped, strict=self.strict)
        except ValidationError as error:
            raise self._arguments_error(self._fields.faults(error)) from None
        for name, value in checked.items():
            other = arrived.get(name)
            if type(other) is not type(value) or (other != value and value == value):
                fault = {
                    "loc": [name],
                    "msg": f"would arrive as {type(other).__name__} instead of {type(value).__name__}: its JSON form "
                    "fits more than one member of the union; use a discriminator or one type",
                    "type": "ambiguous_union",
                }
                raise self._arguments_error([fault])

    def _split(self, dumped: dict[str, Any], given: int) -> tuple[list[Any], dict[str, Any]]:
        names = self._positional[:given]
        args = [dumped.pop(name) for name in names]
        if self._star is not None:
            args.extend(dumped.pop(self._star, ()))
        if self._double_star is not None:
            dumped.update(dumped.pop(self._double_star, {}))
        return args, dumped

    # -- worker's side

    def decode_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Validate arguments that came as JSON and return the call's ``(args, kwargs)`` as Python values.

        kombu's typed values (``{"__type__": "datetime", …}`` of a plain Celery producer) are taken where the plain
        reading does not fit the annotation and the typed value does.

        Raises:
            ArgumentsError: if they do not fit the signature.
        """
        values = self._bind(args, kwargs)
        try:
            decoded = self._fields.read(values, strict=self.strict)
        except ValidationError as error:
            revived = self._revived(values)
            if revived is None:
                raise self._arguments_error(self._fields.faults(error)) from None
            decoded = revived
        except (PydanticSerializationError, ValueError) as error:
            raise PayloadError(f"task {self.task}: arguments are not JSON: {_first_line(error)}") from None
        return self._split(decoded, len(args))

    def _revived(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        if not has_kombu_types(values):
            return None
        try:
            return self._fields.check(revive(dict(values)), strict=False)
        except ValidationError:
            return None

    def encode_result(self, value: Any) -> Any:
        """Validate and encode a return value.

        Raises:
            PayloadError: if the function returned something else than it declares, or something without a JSON form.
        """
        try:
            return self._result.encode({_RESULT: value}, strict=self.strict)[1][_RESULT]
        except ValidationError as error:
            faults = _told(self._result.faults(error))
            raise PayloadError(
                f"task {self.task} returned a {type(value).__name__} that is not what it declares: {faults}",
                "Return what the annotation says, or correct the annotation.",
            ) from None
        except (PydanticSerializationError, ValueError) as error:
            raise PayloadError(f"task {self.task} returned a value without a JSON form: {_first_line(error)}") from None

    def decode_result(self, value: Any) -> Any:
        """Validate a result that came as JSON and return it as Python value.

        Raises:
            PayloadError: if the stored result does not fit the annotation of the return value.
        """
        try:
            return self._result.read({_RESULT: value}, strict=self.strict)[_RESULT]
        except ValidationError as error:
            if has_kombu_types(value):
                try:
                    return self._result.check({_RESULT: revive(value)}, strict=False)[_RESULT]
                except ValidationError:
                    pass
            faults = _told(self._result.faults(error))
            raise PayloadError(
                f"the stored result of task {self.task} is not what the task declares: {faults}",
                "Another version of the task may have written it; fetch it with bridge.result(id) to see it raw.",
            ) from None
        except (PydanticSerializationError, ValueError) as error:
            raise PayloadError(f"the stored result of task {self.task} is not JSON: {_first_line(error)}") from None

    def json_schema(self) -> dict[str, Any]:
        """Return ``{"arguments": …, "result": …}`` as JSON Schema."""
        result = self._result.json_schema()
        answer = dict(result.pop("properties")[_RESULT])
        if "$defs" in result:
            answer["$defs"] = result["$defs"]
        return {"arguments": self._fields.json_schema(), "result": answer}

    def wire_schema(self) -> dict[str, Any]:
        """Return what decides whether a call fits, and whether its result can be read, as JSON.

        Returns:
            ``parameters`` (pairs of name and kind, in their order), ``strict``, ``arguments`` and ``result`` (schemas).
        """
        result = self._result.wire_schema()
        answer = dict(result.pop("properties")[_RESULT])
        if "$defs" in result:
            answer["$defs"] = result["$defs"]
        return {
            "parameters": self._parameters(),
            "strict": self.strict,
            "arguments": self._fields.wire_schema(),
            "result": answer,
        }

    def fingerprint(self) -> str:
        """Return 12 hexadecimal digits that are the same wherever the same calls fit."""
        parts = (self._parameters(), self.strict, canonical_text(self._fields.wire_schema()))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    def _parameters(self) -> list[list[str]]:
        return [[p.name, p.kind.name.lower()] for p in self._signature.parameters.values()]

    def __str__(self) -> str:
        return str(self._signature)

    def _arguments_error(self, faults: list[dict[str, Any]]) -> ArgumentsError:
        return ArgumentsError(f"task {self.task} cannot be called like this: {_told(faults)}", "", self.task, faults)


def _told(faults: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for fault in faults:
        place = ".".join(str(part) for part in fault["loc"] if part != _RESULT)
        parts.append(f"{place}: {fault['msg']}" if place else str(fault["msg"]))
    return "; ".join(parts)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _resolved_hints(function: Callable[..., Any], task: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except NameError as error:
        raise ConfigurationError(
            f"task {task}: the annotation {error.name!r} cannot be resolved",
            "Define or import that name before the task, outside of TYPE_CHECKING.",
        ) from None
    except TypeError as error:
        raise ConfigurationError(f"task {task}: an annotation cannot be read: {error}") from None


def _without_context(parameters: list[inspect.Parameter], task: str) -> list[inspect.Parameter]:
    if not parameters or parameters[0].kind not in _POSITIONAL:
        raise ConfigurationError(
            f"task {task} is declared with context=True but has no first parameter for the context",
            "Write def task(ctx: TaskContext, ...).",
        )
    return parameters[1:]


def result_decoder(annotation: Any) -> Callable[[Any], Any]:
    """Return a function that reads stored results as ``annotation``, for ids whose task is not at hand.

    Raises:
        ConfigurationError: if the annotation cannot cross the wire.
        PayloadError: from the returned function, if a stored result does not fit.
    """
    fields = Fields("result()", {_RESULT: annotation})

    def decode(value: Any) -> Any:
        try:
            return fields.read({_RESULT: value}, strict=True)[_RESULT]
        except ValidationError as error:
            raise PayloadError(
                f"the stored result does not fit {annotation!r}: {_told(fields.faults(error))}"
            ) from None

    return decode
