"""The same trouble for plain Celery and for us: an empty broker, and workers of either kind in their own processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from celery import Celery

from qbridge.testing.contracts.kit import Contract, WorkerProcess

__all__ = ["Place", "Plain"]

HERE = Path(__file__).parent


class Plain:
    """An application of plain Celery 5.7: it sends, and has workers of ``plain_app``.

    Args:
        broker: URL of the broker.
        results: URL of the result backend, as Celery takes it; None: none.
        folder: for the output of workers.
        settings: Celery's, where its defaults are not meant.
    """

    _numbers = count()

    def __init__(self, broker: str, results: str | None, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.settings = {"broker_url": broker, "result_backend": results, **settings}
        # Not shared, not current: a bridge in the same process does not see it.
        self.app = Celery("plain", set_as_current=False)
        self.app.conf.update(self.settings)

    def send(self, task: str, *args: Any, **options: Any) -> Any:
        """Send ``plain.TASK``; returns an ``AsyncResult``.

        Args:
            task: name of a task of ``plain_app``.
            args: its arguments; paths become texts.
            options: of ``apply_async``.
        """
        texts = [str(value) if isinstance(value, Path) else value for value in args]
        return self.app.send_task(f"plain.{task}", texts, **options)

    def start(
        self, pool: str = "prefork", concurrency: int = 1, *words: str, broker: str | None = None
    ) -> WorkerProcess:
        """Start a worker without waiting for it; ``worker`` also ends it.

        Args:
            pool: Celery's name of it.
            concurrency: tasks at a time.
            words: further words of its command line.
            broker: another URL of the broker, which leads through a proxy.
        """
        settings = self.settings if broker is None else {**self.settings, "broker_url": broker}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("QBRIDGE_", "CELERY_"))}
        environment = {**kept, "PLAIN_SETTINGS": json.dumps(settings), "PYTHONPATH": str(HERE)}
        command = [sys.executable, "-m", "celery", "-A", "plain_app", "worker", "-l", "INFO",
                   "-P", pool, "-c", str(concurrency), "-n", f"plain-{next(self._numbers)}@%h",
                   "--without-mingle", "--without-gossip", *words]  # fmt: skip
        return WorkerProcess(command, environment, self.folder)

    @contextmanager
    def worker(
        self, pool: str = "prefork", concurrency: int = 1, *words: str, broker: str | None = None
    ) -> Iterator[WorkerProcess]:
        """A worker that consumes when the ``with`` block begins, killed at its end; arguments as of ``start``."""
        worker = self.start(pool, concurrency, *words, broker=broker)
        try:
            _ = worker.name
            yield worker
        finally:
            worker.kill()


class Place:
    """An empty broker, results in a file, and who uses them.

    Args:
        url: of the broker.
        folder: for files.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self._paths = count()
        self._plain: list[Plain] = []
        self._ours: list[Contract] = []

    def path(self, name: str = "runs") -> Path:
        """A path that nothing has used yet."""
        return self.folder / f"{name}-{next(self._paths)}"

    def plain(self, *, results: str | None = None, quorum: bool = False, **settings: Any) -> Plain:
        """A plain application on this broker.

        Args:
            results: None: none.
            quorum: its queue is a quorum queue, as people are told to have them on RabbitMQ.
            settings: Celery's.
        """
        if quorum:
            settings = {"task_default_queue_type": "quorum", "task_default_exchange_type": "topic", **settings}
        made = Plain(self.url, results, self.folder, **settings)
        self._plain.append(made)
        return made

    def ours(self, results: str | None = None) -> Contract:
        """A bridge with the contracts' tasks on this broker, and its workers.

        Args:
            results: URL; None: a file.
        """
        made = Contract(self.url, results or f"sqlite:///{self.folder}/results.db", self.folder)
        self._ours.append(made)
        return made

    def close(self) -> None:
        """Close every connection."""
        for plain in self._plain:
            plain.app.close()
        for ours in self._ours:
            ours.close()
