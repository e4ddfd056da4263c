"""``qbridge worker --reload``: which files belong to the application, and how is the worker started anew?

For development: the worker is a child process, this one looks at the times of the files twice a second.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import FrameType
from typing import Any

from rich.text import Text

from qbridge.cli.screen import error_screen

__all__ = ["FileTimes", "roots_of", "run_and_reload"]

INTERVAL = 0.5
"""Seconds between two looks."""
WARM = 10.0
"""Seconds that running tasks get before the worker is ended."""
_JUNK = frozenset({"__pycache__", "node_modules", "site-packages"})


def roots_of(app: str) -> list[Path]:
    """Return the folders to watch: the working directory, and the package of the application if it lies elsewhere.

    Args:
        app: ``"proj.tasks:bridge"``; nothing of it is imported.
    """
    here = Path.cwd()
    spec = PathFinder.find_spec(app.partition(":")[0].partition(".")[0], [str(here), *sys.path])
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return [here, *(path for place in places if not (path := Path(place).resolve()).is_relative_to(here))]


class FileTimes:
    """Times of all .py files under some folders.

    Args:
        roots: folders; hidden ones, virtual environments and caches below them are left out.
    """

    def __init__(self, roots: Iterable[Path]) -> None:
        self._roots = list(roots)
        self._seen = self._look()

    def changed(self) -> Path | None:
        """Return a file that is new, gone or newer than at the last look, or None."""
        before, self._seen = self._seen, self._look()
        for path in before.keys() | self._seen.keys():
            if before.get(path) != self._seen.get(path):
                return Path(path)
        return None

    def _look(self) -> dict[str, int]:
        return {entry.path: entry.stat().st_mtime_ns for root in self._roots for entry in _sources(root)}


def _sources(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return  # went away, or is not ours to read
    if any(entry.name == "pyvenv.cfg" for entry in entries):
        return
    for entry in entries:
        try:
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in _JUNK and not entry.name.startswith("."):
                    yield from _sources(entry.path)
            elif entry.name.endswith(".py"):
                entry.stat()
                yield entry
        except FileNotFoundError:
            continue  # an editor's temporary file


def run_and_reload(app: str, arguments: list[str]) -> int:
    """Run the same command without ``--reload`` as a child, again after each change of a file.

    Args:
        app: where the bridge is.
        arguments: ``sys.argv`` of this process.

    Returns:
        The exit code of the last child once this process was told to stop.
    """
    return _Supervisor(
        [argument for argument in arguments[1:] if argument != "--reload"], FileTimes(roots_of(app))
    ).run()


class _Supervisor:
    def __init__(self, arguments: list[str], files: FileTimes) -> None:
        self.command = [sys.executable, "-m", "qbridge", *arguments]
        self.files = files
        self.child: subprocess.Popen[bytes] | None = None
        self.told: int | None = None
        self.wake = threading.Event()

    def run(self) -> int:
        """Watch until told to stop."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, self._pass_on)
        self._start()
        while self.told is None:
            self.wake.wait(INTERVAL)
            path = self.files.changed()
            if path is not None and self.told is None:
                _say(f"{_short(path)} changed: starting the worker again")
                self._end()
                self._start()
            elif self.child is not None and self.child.poll() is not None:
                _say(f"the worker has ended with exit code {self.child.returncode}: waiting for a change")
                self.child = None
        if self.child is None:
            return 0
        return self._wait_for_end()

    def _start(self) -> None:
        # a session of its own: Ctrl-C in the terminal reaches this process, which passes it on once
        self.child = subprocess.Popen(self.command, start_new_session=True)  # noqa: S603 - our own command line

    def _pass_on(self, number: int, _: FrameType | None) -> Any:
        self.told = number
        self.wake.set()
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)

    def _wait_for_end(self) -> int:
        child = self.child
        assert child is not None
        while child.poll() is None:  # each further Ctrl-C is passed on too: the worker decides what it means
            time.sleep(0.05)
        return max(0, child.returncode)

    def _end(self) -> None:
        child = self.child
        if child is None:
            return
        for number, patience in ((signal.SIGTERM, WARM), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)):
            if child.poll() is not None:
                return
            child.send_signal(number)
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                continue
            return


def _say(text: str) -> None:
    error_screen().print(Text(f"qbridge: {text}", style="cyan"), soft_wrap=True)


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
