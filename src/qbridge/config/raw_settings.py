"""Raw Celery settings as they are held: printed without values, laid over what the typed fields mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["RawSettings", "overlay"]

_HIDDEN = re.compile("api|token|key|secret|pass|signature|url|backend|database|broker", re.IGNORECASE)


class RawSettings(Mapping[str, Any]):
    """Raw Celery settings, read-only; prints their names and no values, which may be secrets.

    Args:
        settings: name to value.
    """

    __slots__ = ("_settings",)

    def __init__(self, settings: Mapping[str, Any] = MappingProxyType({})) -> None:
        self._settings = dict(settings)

    def __getitem__(self, name: str) -> Any:
        return self._settings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def __repr__(self) -> str:
        return f"<{len(self)} Celery settings: {', '.join(sorted(self))}>" if self else "{}"

    def __hash__(self) -> int:
        return hash(frozenset(self._settings))  # values may be unhashable; equal settings have equal names

    def masked(self) -> dict[str, Any]:
        """The settings for a printed dump: only numbers and switches are shown, everything else is ``**``."""
        return {name: value if _shows(value) and not _HIDDEN.search(name) else "**" for name, value in self.items()}


#: Settings whose values are mappings that say several things at once.
_OPTIONS = frozenset(
    {
        "broker_transport_options",
        "database_engine_options",
        "result_backend_transport_options",
        "task_publish_retry_policy",
    }
)


def overlay(settings: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Lay raw settings over those that the typed fields mean.

    Args:
        settings: what the fields mean.
        raw: what was written; wins. Options are laid over one another name by name, so that a raw transport option
            does not take away the timeouts beside it.
    """
    merged = {**settings, **raw}
    for name in _OPTIONS & set(raw):
        below, above = settings.get(name), raw[name]
        if isinstance(below, Mapping) and isinstance(above, Mapping):
            merged[name] = {**below, **above}
    return merged


def _shows(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float))
