"""The demo's worker: a real process, started as a user would, and ended by its id in every case."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from qbridge.exceptions import QBridgeError

__all__ = ["COMMAND", "WorkerDied", "WorkerProcess"]

COMMAND = ("worker", "-A", "qbridge.cli.demo.tasks:bridge", "--concurrency", "2")
_READY = " ready."
_WARM = 5.0
"""Seconds to end by itself before it is killed."""


class WorkerDied(QBridgeError):
    """The worker ended, or did not begin to consume in time."""


class WorkerProcess:
    """A worker as a context: started on entering, gone on leaving.

    Args:
        log: file for all that it prints.
        extra: further arguments of ``qbridge worker``.
    """

    def __init__(self, log: Path, *extra: str) -> None:
        self.log = log
        self._command = [sys.executable, "-m", "qbridge", *COMMAND, *extra]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        with self.log.open("wb") as output:
            # A session of its own: Ctrl-C in the terminal ends the demo, which then ends the worker.
            self._process = subprocess.Popen(  # noqa: S603 - our own command line
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        return self

    def wait_until_ready(self, timeout: float) -> None:
        """Wait until it consumes.

        Args:
            timeout: seconds.

        Raises:
            WorkerDied: if it ends, or takes longer.
        """
        until = time.monotonic() + timeout
        while _READY not in self.text():
            self.refuse_dead()
            if time.monotonic() > until:
                raise WorkerDied(f"the worker did not consume within {timeout:.0f} s")
            time.sleep(0.05)

    def refuse_dead(self) -> None:
        """Raise WorkerDied if the process has ended."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise WorkerDied(f"the worker ended with exit code {self._process.returncode}")

    def text(self) -> str:
        """Return what it has printed until now."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tail(self, lines: int) -> str:
        """Return the last lines of its log."""
        return "\n".join(self.text().rstrip().splitlines()[-lines:])

    def stop(self) -> int:
        """Ask it to end, and end it if it does not; return its exit code."""
        process = self._process
        assert process is not None
        for number, patience in ((signal.SIGTERM, _WARM), (signal.SIGKILL, 5.0)):
            if process.poll() is None:
                process.send_signal(number)
                try:
                    process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue
        return process.returncode

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except KeyboardInterrupt:  # an impatient second Ctrl-C
            assert self._process is not None
            self._process.kill()
            self._process.wait(5)
            raise
