"""How is a default ``Retry`` written in a file or in the environment?

Errors are named there: ``on = ["ConnectionError", "httpx.TransportError"]``.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qbridge.config.suggest import did_you_mean
from qbridge.exceptions import ConfigurationError
from qbridge.retry import Retry

__all__ = ["read_retry", "write_retry"]

_NUMBERS = TypeAdapter(int | float)


def read_retry(value: Any) -> Any:
    """Make a ``Retry`` of a mapping; anything else is left as it is.

    Args:
        value: what a source says.

    Returns:
        A ``Retry``, or the value for pydantic to judge.

    Raises:
        ConfigurationError: if a name or a number is wrong.
    """
    if not isinstance(value, Mapping):
        return value
    known = [field.name for field in fields(Retry)]
    for name in value:
        if name not in known:
            todo = did_you_mean(str(name), known) or f"known: {', '.join(known)}"
            raise ConfigurationError(f"Retry has no {name!r}", todo)
    if "on" not in value:
        raise ConfigurationError("retry does not say which errors are tried again", "write on = ['ConnectionError']")
    return Retry(**{name: _errors(part) if name == "on" else _number(name, part) for name, part in value.items()})


def write_retry(retry: Retry | None) -> dict[str, Any] | None:
    """Write a policy as a file would; functions by their names only."""
    if retry is None:
        return None
    written = {field.name: getattr(retry, field.name) for field in fields(Retry)}
    kinds = retry.on if isinstance(retry.on, tuple) else (retry.on,)
    written["on"] = [f"{kind.__module__}.{getattr(kind, '__qualname__', type(kind).__qualname__)}" for kind in kinds]
    return written


def _number(name: str, value: Any) -> Any:
    if not isinstance(value, str) or name == "where":
        return value
    number: int | float | None = None
    try:
        number = _NUMBERS.validate_python(value)
    except ValidationError:
        pass  # raised below: pydantic's error would travel along as context
    if number is None:
        raise ConfigurationError(f"retry.{name} is not a number", "write seconds (attempts: a whole number)")
    return number


def _errors(value: Any) -> Any:
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    if isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value):
        return tuple(_error(name) for name in value)
    return value


def _error(name: str) -> type[BaseException]:
    module, _, attribute = name.replace(":", ".").rpartition(".")
    found: Any = None
    if not module:
        found = getattr(builtins, attribute, None)
    else:
        try:
            found = getattr(import_module(module), attribute, None)
        except ImportError:
            found = None
    if not (isinstance(found, type) and issubclass(found, BaseException)):
        raise ConfigurationError(
            f"{name!r} in retry.on is not an exception type", "write 'ConnectionError' or 'package.module.ErrorName'"
        )
    return found
