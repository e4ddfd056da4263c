"""How is a run of a task written down so that no crash can take the line back? One write to a file of the process.

A line is ``MARK NUMBER ATTEMPT RUN TIME``: ``B`` a run began, ``E`` it ended well, ``R`` it failed as it should and is
to be tried again, ``X`` it ended otherwise (its task was told to end, for example). The time is the machine's monotonic
clock, which all processes share. What a process has written stays when it is killed; nothing here is buffered.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

__all__ = ["Again", "Line", "Mark", "Recorder", "RunLog", "pid_of", "read_lines"]

Mark = Literal["B", "E", "R", "X"]


class Again(Exception):
    """The task fails as its call says, and wants to be tried again."""


@dataclass(frozen=True)
class Line:
    """One line of a process.

    Args:
        mark: what happened.
        number: of the call.
        attempt: the first is 1.
        run: number of the run in its process.
        at: monotonic seconds.
    """

    mark: Mark
    number: int
    attempt: int
    run: int
    at: float


class Recorder:
    """Writes the lines of this process, and of those forked from it into files of their own.

    Args:
        folder: where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs = itertools.count()
        self._opened: tuple[int, int] = (0, -1)  # pid, descriptor
        self._lock = threading.Lock()

    @contextmanager
    def run(self, number: int, attempt: int) -> Iterator[None]:
        """Write down that a run begins, and how it ends.

        Args:
            number: of the call.
            attempt: the first is 1.
        """
        run = next(self._runs)
        self._write("B", number, attempt, run)
        mark: Mark = "X"
        try:
            yield
            mark = "E"
        except Again:
            mark = "R"
            raise
        finally:
            self._write(mark, number, attempt, run)

    def _write(self, mark: Mark, number: int, attempt: int, run: int) -> None:
        line = f"{mark} {number} {attempt} {run} {time.monotonic():.6f}\n"
        os.write(self._descriptor(), line.encode())

    def _descriptor(self) -> int:
        pid, descriptor = self._opened
        if pid != os.getpid():
            with self._lock:
                pid, descriptor = self._opened
                if pid != os.getpid():
                    path = self._folder / f"{os.getpid()}-{time.time_ns()}.log"
                    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
                    self._opened = (os.getpid(), descriptor)
        return descriptor


def pid_of(path: Path) -> int:
    """The process that wrote a file."""
    return int(path.name.partition("-")[0])


def read_lines(text: str) -> list[Line]:
    """Read whole lines."""
    lines = []
    for row in text.splitlines():
        mark, number, attempt, run, at = row.split()
        lines.append(Line(cast(Mark, mark), int(number), int(attempt), int(run), float(at)))
    return lines


class RunLog:
    """What has been written so far, read as it grows.

    Args:
        folder: of the ``Recorder``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self.lines: dict[Path, list[Line]] = {}
        self.done: set[int] = set()
        """Numbers of the calls that have ended well."""

    def look(self) -> None:
        """Read what is new."""
        for path in self._folder.glob("*.log"):
            begin = self._read.get(path, 0)
            with path.open("rb") as file:
                file.seek(begin)
                text, _, _ = file.read().rpartition(b"\n")
            if not text:
                self.lines.setdefault(path, [])
                continue
            self._read[path] = begin + len(text) + 1
            new = read_lines(text.decode())
            self.lines.setdefault(path, []).extend(new)
            self.done.update(line.number for line in new if line.mark == "E")

    def busy(self) -> set[int]:
        """Processes in which a run has begun and not ended, dead ones among them."""
        found = set()
        for path, lines in self.lines.items():
            begun = {line.run for line in lines[-40:] if line.mark == "B"}
            if begun - {line.run for line in lines[-40:] if line.mark != "B"}:
                found.add(pid_of(path))
        return found

    @property
    def total(self) -> int:
        """How many lines there are."""
        return sum(map(len, self.lines.values()))
