"""What does the operator write to use the embedded broker: one SQLite file, no server?

Importing this room loads neither kombu nor SQLite; the transport is named by string in ``register``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from qbridge.backends.base import Broker, BrokerCapabilities, Finding, Priority
from qbridge.backends.embedded.address import DEFAULT_PATH, path_of, url_of
from qbridge.backends.kept import KeptQueue
from qbridge.exceptions import ConfigurationError

__all__ = ["EmbeddedBroker"]

# Nothing sent means 5 to the transport, so that plain Celery producers, which send none, rank as "normal".
_PRIORITIES: dict[Priority, int | None] = {"low": 1, "normal": None, "high": 9}


class EmbeddedBroker(Broker, frozen=True):
    """A broker in one file, for any number of processes on one machine; nothing to install, nothing to start.

    What was sent survives ``kill -9`` of every process and a power cut. What a worker holds comes back about a second
    after the worker died. Not for several machines: SQLite's locks do not work on network filesystems.

    Args:
        path: the file; a relative path is taken from the working directory. Beside it appear SQLite's ``-wal`` and
            ``-shm`` files and a folder ``-parties`` with one lock and one pipe for each consuming process.
        publish_timeout: seconds that a send may wait while other processes hold the file.
    """

    schemes: ClassVar[tuple[str, ...]] = ("embedded",)

    kind: Literal["embedded"] = "embedded"
    path: Path = DEFAULT_PATH

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            kind: Literal["embedded"] = "embedded",
            path: str | Path = DEFAULT_PATH,
            publish_timeout: float | timedelta = 10.0,
        ) -> None: ...

    @classmethod
    def from_url(cls, url: str) -> Self:
        """The broker that ``url`` names.

        Args:
            url: ``embedded:///absolute/path.db``, ``embedded://./relative/path.db``, or ``embedded://`` for the
                default file.

        Raises:
            ConfigurationError: if it is not such a URL.
        """
        try:
            return cls(path=path_of(url))
        except ValueError as error:
            raise ConfigurationError(str(error), "Correct the broker's URL") from None

    def celery_url(self) -> str:
        """The URL for ``broker_url``: with the absolute path, as of the working directory now."""
        return url_of(self.path)

    def celery_settings(self) -> dict[str, Any]:
        _register()
        return {
            "broker_url": self.celery_url(),
            "broker_transport_options": {"publish_timeout": self.publish_timeout},
            "broker_heartbeat": 0,  # the kernel knows who is alive
        }

    def minimal_celery_settings(self) -> dict[str, Any]:
        _register()
        settings: dict[str, Any] = {"broker_url": self.celery_url()}
        if "publish_timeout" in self.model_fields_set:
            settings["broker_transport_options"] = {"publish_timeout": self.publish_timeout}
        return settings

    @property
    def capabilities(self) -> BrokerCapabilities:
        return BrokerCapabilities(
            priorities="three levels",
            native_delays=True,
            publisher_confirms=True,
            rpc_results=True,
            notes=("one machine only", "needs a POSIX system"),
        )

    def celery_priority(
        self,
        level: Priority,
        *,
        queue_type: str | None = None,
        max_priority: int | None = None,
        server_version: tuple[int, ...] | None = None,
    ) -> int | None:
        return _PRIORITIES[level]

    def kept_queue(self, connection: Any, name: str) -> AbstractContextManager[KeptQueue]:
        from qbridge.backends.embedded.dead_letters import open_queue  # loads SQLite: not needed to configure

        return open_queue(connection, name)

    def check(self, queues: Sequence[Any] = ()) -> Iterable[Finding]:
        from qbridge.backends.embedded.check import findings  # loads kombu and SQLite: not with the configuration

        return findings(self.path.absolute(), self.publish_timeout, [queue.name for queue in queues])


def _register() -> None:
    """Teach kombu the scheme: whoever gets the URL must be able to use it."""
    import_module("qbridge.backends.embedded.register")
