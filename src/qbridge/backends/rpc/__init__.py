"""How do results come back over the broker? The model of rpc results, and the Celery settings it means."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from qbridge.backends.base import Finding, ResultBackend, ResultCapabilities, Seconds
from qbridge.backends.urls import refuse_query, split_url
from qbridge.exceptions import ConfigurationError

__all__ = ["RpcResults"]


class RpcResults(ResultBackend, frozen=True):
    """Results sent back over the broker to the process that sent the task, and to no other.

    Args:
        expires: seconds after which an unread result, and the reply queue of a process that died, are dropped.
        timeout: seconds that ``get()`` waits where the caller names none.
        look_timeout: seconds that one look may take: ``state``, ``ready()``, ``progress()``, ``forget()``.
        persistent: whether results survive a restart of the broker. Celery's default is False: they do not.
    """

    schemes: ClassVar[tuple[str, ...]] = ("rpc",)

    kind: Literal["rpc"] = "rpc"
    # An hour, not Celery's day: a result is only good for its sender, and each dead sender leaves a queue behind.
    expires: Seconds = 3600.0
    persistent: bool = True

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            kind: Literal["rpc"] = "rpc",
            expires: float | timedelta = 3600.0,
            timeout: float | timedelta = 60.0,
            look_timeout: float | timedelta = 5.0,
            persistent: bool = True,
        ) -> None: ...

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Read ``rpc://``; results always travel over the broker, so a host is refused."""
        parts = split_url(url)
        refuse_query("rpc", parts.query, sorted(cls.model_fields))
        if parts.scheme != "rpc" or parts.host or parts.path:
            raise ConfigurationError(
                "rpc results travel over the broker and take no host or path of their own", "Write rpc://."
            )
        return cls()

    def celery_url(self) -> str:
        return "rpc://"

    def celery_settings(self) -> dict[str, Any]:
        return {
            "result_backend": self.celery_url(),
            "result_expires": self.expires,
            "result_persistent": self.persistent,
            # True gives all threads one backend object whose replies only the thread that made it consumes.
            "result_backend_thread_safe": False,
        }

    def minimal_celery_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"result_backend": self.celery_url()}
        if "expires" in self.model_fields_set:
            settings["result_expires"] = self.expires
        if "persistent" in self.model_fields_set:
            settings["result_persistent"] = self.persistent
        return settings

    @property
    def capabilities(self) -> ResultCapabilities:
        return ResultCapabilities(
            readable_elsewhere=False,
            chords=False,
            progress=False,
            notes=("only the process that sent the task can read its result, once",),
        )

    def check(self) -> Iterable[Finding]:
        return (
            Finding(
                "info",
                "results.rpc",
                "results travel over the broker: only the process that sent a task can read its result, once",
            ),
        )
