"""What does "no results" mean? Tasks run, and nobody can ask how they ended."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self

from qbridge.backends.base import Finding, ResultBackend, ResultCapabilities
from qbridge.exceptions import ConfigurationError

__all__ = ["NoResults"]


class NoResults(ResultBackend, frozen=True):
    """No result is kept: for fire-and-forget work. ``TaskResult.get()`` raises ``ResultsUnavailable``."""

    schemes: ClassVar[tuple[str, ...]] = ("disabled",)

    kind: Literal["none"] = "none"

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read ``disabled://``, Celery's own name for it, or ``none``."""
        if url.strip().removesuffix("://") not in {"disabled", "none"}:
            raise ConfigurationError("this URL does not mean 'no results'", "Write disabled://.")
        return cls()

    def celery_url(self) -> str:
        return "disabled://"

    def celery_settings(self) -> dict[str, Any]:
        # task_ignore_result as well: with the backend alone, workers still encode every result for nobody.
        return {"result_backend": self.celery_url(), "task_ignore_result": True}

    def minimal_celery_settings(self) -> dict[str, Any]:
        return {"result_backend": self.celery_url()}

    @property
    def capabilities(self) -> ResultCapabilities:
        return ResultCapabilities(readable_elsewhere=False, chords=False, progress=False, notes=("nothing is kept",))

    def check(self) -> Iterable[Finding]:
        return (Finding("info", "results.none", "no results are kept (kind='none')"),)
