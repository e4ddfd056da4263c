"""kombu's typed JSON values: ``{"__type__": "datetime", "__value__": …}``, as plain Celery producers write them.

kombu's own ``loads`` turns every such mapping into an object, a user's own data included, and fails on unknown
types; here they are only looked at where somebody asks. Format: kombu 5.7, ``kombu/utils/json.py``.
"""

from __future__ import annotations

from typing import Any

from kombu.utils import json as kombu_json

__all__ = ["has_kombu_types", "revive"]


def has_kombu_types(value: Any) -> bool:
    """Return True if a typed value occurs anywhere in ``value``."""
    if isinstance(value, dict):
        return _is_typed(value) or any(has_kombu_types(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(has_kombu_types(item) for item in value)
    return False


def revive(value: Any) -> Any:
    """Return a copy in which typed values have become the objects that plain Celery would make of them.

    What cannot be revived stays the mapping that it is.
    """
    if isinstance(value, dict):
        plain = {key: revive(item) for key, item in value.items()}
        if not _is_typed(plain):
            return plain
        try:
            return kombu_json.object_hook(plain)
        except Exception:  # noqa: BLE001 - any failure of a foreign decoder means: it was just a mapping
            return plain
    if isinstance(value, list | tuple):
        return [revive(item) for item in value]
    return value


def _is_typed(value: dict[Any, Any]) -> bool:
    return value.keys() == {"__type__", "__value__"}
