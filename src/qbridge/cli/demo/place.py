"""Where does the demo take place? A folder of its own, an environment of its own, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from qbridge.backends.database import DatabaseResults
from qbridge.backends.embedded import EmbeddedBroker
from qbridge.config.rooms import BROKERS, RESULTS

__all__ = ["Place", "prepared"]

_FOREIGN = ("QBRIDGE_", "CELERY_")


@dataclass
class Place:
    """What one run of the demo has to itself.

    Args:
        folder: holds the worker's log, and the embedded broker and results where no others were named.
        queue: name of its queue, unlike any other.
        broker: URL of the broker, or None: embedded.
        results: URL of the results, or None: SQLite.
        keep: True leaves the folder for its log to be read.
    """

    folder: Path
    queue: str
    broker: str | None
    results: str | None
    keep: bool = False

    @property
    def log(self) -> Path:
        """The worker's log."""
        return self.folder / "worker.log"

    def environment(self) -> dict[str, str]:
        """Return the variables that configure both sides."""
        return {
            "QBRIDGE_BROKER": self.broker or EmbeddedBroker(path=self.folder / "bridge.db").celery_url(),
            "QBRIDGE_RESULTS": self.results or f"sqlite:///{self.folder / 'results.db'}",
            "QBRIDGE_DEFAULT_QUEUE": self.queue,
            "QBRIDGE_NAME": "qbridge-demo",
        }


@contextmanager
def prepared(broker: str | None, results: str | None) -> Iterator[Place]:
    """Enter the place: this process works in its folder, and no configuration around has a say.

    Args:
        broker: URL, or None.
        results: URL, or None.

    Raises:
        ConfigurationError: if a URL means nothing.
    """
    broker, results = _absolute(broker, results)
    name = f"qbridge-demo-{uuid4().hex[:8]}"
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    place = Place(folder, name, broker, results)
    here, before = Path.cwd(), dict(os.environ)
    for variable in list(os.environ):
        if variable.startswith(_FOREIGN) and not variable.startswith("QBRIDGE_TEST_"):
            del os.environ[variable]
    os.environ.update(place.environment())
    # A marked project folder: no qbridge.toml or .env above it counts.
    (folder / "qbridge.toml").touch()
    os.chdir(folder)
    try:
        yield place
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(before)
        if not place.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _absolute(broker: str | None, results: str | None) -> tuple[str | None, str | None]:
    """Make relative paths absolute before the folder changes; other URLs stay as they were written."""
    if broker is not None:
        room = BROKERS.from_url(broker)
        if isinstance(room, EmbeddedBroker):
            broker = room.celery_url()
    if results is not None:
        kept = RESULTS.from_url(results)
        if isinstance(kept, DatabaseResults) and "sqlite" in results:
            results = kept.celery_url()  # absolute, as of the working directory now
    return broker, results
